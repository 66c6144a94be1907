"""An application that exports its metrics, as ``docs/operating.rst`` shows.

The ``gunicorn`` command finds it as ``tests.live_apps.metrics_app:make_app()``.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from tg import TGController, abort, expose

from tests.application import make_wsgi_app
from tests.pages import DOCS, blocks
from tgstream import NDJSON, SSE, Channel, Stream, listen, plugme, stream

GENERATED = 120
FILE_SIZE = 2**21
"""So large that waitress reads the file itself."""
BLOCKS = blocks((DOCS / "operating.rst").read_text())


def find_block(word: str) -> str:
    """Return the code block of the page that contains a word."""
    [found] = [block for block in BLOCKS if word in block]
    return found


def run_block(word: str, **names: Any) -> dict[str, Any]:
    """Run the code block of the page that contains a word, and return its names."""
    exec(find_block(word), names)
    return names


def make_app(**options: str) -> Any:
    """Return the application.

    :param options: its configuration, with ``__`` instead of a dot.
    """
    run_block("metrics.register()")
    dotted = {name.replace("__", "."): value for name, value in options.items()}
    return make_wsgi_app({"root_controller": make_root(), **dotted}, plugme)


class Root(TGController):
    """Streams that end in all ways."""

    @expose(content_type="text/plain")
    @stream
    def words(self) -> Iterator[str]:
        yield "one"
        yield "two"

    @expose()
    @stream(NDJSON)
    def whole(self) -> list[int]:
        return [1, 2]

    @expose(content_type="text/plain")
    @stream
    def fails(self, first: str = "yes") -> Iterator[str]:
        if first == "yes":
            yield "one"
        raise LookupError("failed")

    @expose(content_type="text/plain")
    @stream
    def aborts(self) -> Iterator[str]:
        abort(404)
        yield ""

    @expose(content_type="text/plain")
    @stream(max_seconds=0.1)
    def expires(self) -> Iterator[str]:
        while True:
            yield "word"
            time.sleep(0.01)

    @expose()
    @stream(SSE(heartbeat=20), limit=1)
    def limited(self) -> Iterator[Any]:
        yield "one"
        yield from listen("limited")

    @expose()
    @stream(SSE)
    def events(self) -> Iterator[Any]:
        yield str(os.getpid())
        yield from listen("events")

    @expose(content_type="text/plain")
    @stream(spool=True)
    def spooled(self) -> Iterator[str]:
        yield "one"
        yield "two"

    @expose(content_type="application/octet-stream")
    @stream
    def file(self) -> Any:
        made = tempfile.TemporaryFile()  # noqa: SIM115 - the stream closes it
        made.truncate(FILE_SIZE)
        return made

    @expose(content_type="text/plain")
    def publish(self, data: str, channel: str = "events") -> str:
        Channel(channel).publish(data)
        return "published"


def make_generated(count: int) -> TGController:
    """Return a controller with many methods, each with a name of its own."""

    def make(number: int) -> Any:
        def generated(self: Any) -> Stream:
            return Stream([str(number)])

        generated.__qualname__ = f"Generated.number{number}"
        return expose(content_type="text/plain")(generated)

    methods = {f"number{number}": make(number) for number in range(count)}
    controller: TGController = type("Generated", (TGController,), methods)()
    return controller


def make_root() -> TGController:
    """Return the controller, with the one of the page, which exports the metrics."""
    shown = run_block("generate_latest(registry)", BaseController=Root)
    root: TGController = shown["RootController"]()
    root.generated = make_generated(GENERATED)
    return root
