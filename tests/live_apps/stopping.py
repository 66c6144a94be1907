"""An application with endless streams, which another request ends."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from tg import TGController, expose

from tests.application import make_wsgi_app
from tgstream import SSE, Event, listen, running, stream


class Root(TGController):
    """The streams, the list of those that are open, and their end."""

    @expose(content_type="text/plain")
    @stream
    def endless(self) -> Iterator[bytes]:
        while True:
            yield bytes(1 << 16)

    @expose()
    @stream(SSE)
    def feed(self) -> Iterator[Event]:
        return listen("stopping")

    @expose()
    @stream(SSE(heartbeat=3600))
    def blocked(self) -> Iterator[str]:
        yield "one"
        time.sleep(3)
        yield "two"

    @expose(content_type="text/plain")
    def streams(self) -> str:
        return json.dumps([each._asdict() for each in running()])

    @expose(content_type="text/plain")
    def end(self) -> str:
        return json.dumps([each.end() for each in running()])


class CountedCloses:
    """Adds the number of streams that the server has closed to all other responses."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.count = 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        def start(status: str, headers: Any, exc_info: Any = None) -> Any:
            return start_response(
                status, [*headers, ("Closes", str(self.count))], exc_info
            )

        body = self.app(environ, start)
        return Counted(body, self) if environ["PATH_INFO"] == "/endless" else body


class Counted:
    """A body whose close is counted."""

    def __init__(self, body: Any, counter: CountedCloses) -> None:
        self.body, self.counter = body, counter

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.body)

    def close(self) -> None:
        self.body.close()
        self.counter.count += 1


def make_app(**_: str) -> CountedCloses:
    """Return the application."""
    return CountedCloses(make_wsgi_app({"root_controller": Root()}))
