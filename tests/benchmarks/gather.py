"""What does it cost an item to be gathered into chunks of 32 KiB?"""

from __future__ import annotations

from collections.abc import Iterator
from time import process_time
from typing import Any

from tg import FullStackApplicationConfigurator, TGController, expose

from .apps import App, configure, environ, start_response
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

    configurator = FullStackApplicationConfigurator()
    plugme(configurator)
    return configure(RootController(), {"tm.enabled": False}, configurator)


def bare(count: int) -> Measure:
    """The CPU nanoseconds of an item of the generator alone."""

    def measure() -> float:
        start = process_time()
        for _ in lines(count):
            pass
        return (process_time() - start) / count * 1e9

    return measure


def gathered(app: App, count: int) -> Measure:
    """The same of the generator, of all of TurboGears2, and of what gathers."""

    def measure() -> float:
        start = process_time()
        body = app(environ(f"/lines/{count}"), start_response)
        for _ in body:
            pass
        body.close()
        return (process_time() - start) / count * 1e9

    return measure


def run(quick: bool) -> list[Result]:
    """Beside the bare generator, which goes nowhere."""
    rounds, count = (7, 200_000) if quick else (15, 1_000_000)
    both = interleave(rounds, bare(count), gathered(make_app(), count))
    return [compare("an item in 32 KiB chunks, bare generator beside", both, 6, "ns")]
