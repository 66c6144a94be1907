"""An application whose controllers have one open stream at once, for each user."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import tg
from tg import TGController, expose

import tgstream
from tests.application import make_wsgi_app
from tgstream import SSE, Channel, Event, stream

ended: list[list[str]] = []
"""The path and the reason of each stream that has ended."""

PAGE = """<!doctype html>
<title>limited</title>
<script>
  const kind = location.search.slice(1).split("&")[0], state = {events: [], opened: 0};
  const source = new EventSource(kind + location.search);
  source.onopen = () => { ++state.opened; };
  source.onmessage = (event) => { state.events.push(event.data); };
  source.addEventListener("replaced", () => { state.replaced = true; });
</script>
"""


def user_of(request: Any) -> str:
    """The user whom the request names."""
    return str(request.params.get("user"))


class RootController(TGController):
    requests = 0
    """The number of requests for streams, also of those that are refused."""

    @expose("json")
    def state(self) -> dict[str, Any]:
        """Return what has happened so far."""
        return {"ended": ended, "requests": self.requests}

    @expose(content_type="text/html")
    def index(self, **_: str) -> str:
        """The page of a feed: ``/?replacing&user=ada``."""
        return PAGE

    @expose()
    def publish(self, data: str) -> str:
        Channel("feed").publish(data)
        return ""

    def _before(self, *_: Any, **__: Any) -> None:
        if tg.request.path not in ("/state", "/", "/publish"):
            RootController.requests += 1

    def _events(self) -> Iterator[Event]:
        return Channel("feed").listen()

    @expose()
    @stream(SSE(retry=20), limit=1, limit_by=user_of)
    def refusing(self, **_: str) -> Any:
        return self._events()

    @expose()
    @stream(SSE(retry=20), limit=1, limit_by=user_of, limit_action="replace")
    def replacing(self, **_: str) -> Any:
        return self._events()

    @expose()
    @stream(SSE(retry=20), limit=1, limit_by=user_of, busy="retry")
    def retrying(self, **_: str) -> Any:
        return self._events()

    @expose(content_type="application/octet-stream")
    @stream(limit=1, limit_by=user_of)
    def download(self, pipe: str, **_: str) -> Iterator[bytes]:
        """Send a megabyte, wait for a line in a named pipe, and send another one."""
        yield b"a" * (1 << 20)
        with open(pipe) as file:
            file.readline()
        yield b"z" * (1 << 20)


def make_app(looks: str = "0", **options: str) -> Any:
    """Return the application. Heartbeats and checks of the monitor are rare."""
    logging.basicConfig(stream=sys.stdout, level="WARNING")
    tg.hooks.register(
        "tgstream.finished",
        lambda report: ended.append([report.path, report.reason]),
    )
    return make_wsgi_app(
        {
            "root_controller": RootController(),
            "tgstream.heartbeat_seconds": options.get("heartbeat", "600"),
            "tgstream.disconnect_check_seconds": "600",
        },
        tgstream.plugme,
    )
