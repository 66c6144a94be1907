"""How much does it cost to buffer an item into chunks of 32 KiB?"""

from __future__ import annotations

from collections.abc import Iterator
from time import process_time
from typing import Any

from tg import TGController, expose

from .apps import NO_DATABASE, App, configure, environ, start_response
from .measure import Measure, Result, compare, interleave


def lines(count: int) -> Iterator[str]:
    for _ in range(count):
        yield "nineteen characters\n"


def make_app() -> App:
    from tgstream import plugme, stream

    class RootController(TGController):
        @expose(content_type="text/plain")
        @stream(chunk_size=32768)
        def lines(self, count: str) -> Any:
            return lines(int(count))

    return configure(RootController(), NO_DATABASE, plugme)


def bare(count: int) -> Measure:
    """Measure the CPU nanoseconds per item of the generator alone."""

    def measure() -> float:
        start = process_time()
        for _ in lines(count):
            pass
        return (process_time() - start) / count * 1e9

    return measure


def buffered(app: App, count: int) -> Measure:
    """Measure the same of a request, whose stream buffers the generator's items."""

    def measure() -> float:
        start = process_time()
        body = app(environ(f"/lines/{count}"), start_response)
        for _ in body:
            pass
        body.close()
        return (process_time() - start) / count * 1e9

    return measure


def run(quick: bool) -> list[Result]:
    """Compare with the bare generator, whose items are not sent."""
    rounds, count = (7, 200_000) if quick else (15, 1_000_000)
    both = interleave(rounds, bare(count), buffered(make_app(), count))
    return [compare("an item in 32 KiB chunks, bare generator beside", both, 6, "ns")]
