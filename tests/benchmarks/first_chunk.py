"""How much does tgstream delay the first chunk of a stream?"""

from __future__ import annotations

import gc
from time import process_time

from .apps import App, Pair, environ, start_response
from .measure import Measure, Result, compare, interleave


def starter(app: App, count: int) -> Measure:
    """Measure CPU microseconds, from the call of the application to the first chunk."""

    def measure() -> float:
        seconds = 0.0
        for _ in range(count):
            environment = environ("/one")
            start = process_time()
            body = app(environment, start_response)
            chunks = iter(body)  # a name keeps it alive: its end must not be measured
            next(chunks)
            seconds += process_time() - start
            body.close()
        return seconds / count * 1e6

    return measure


def run(with_database: Pair, without: Pair, quick: bool) -> list[Result]:
    """Compare with a database that no request touches, with Python's gc and without."""
    rounds, count = (7, 300) if quick else (25, 800)
    measures = (
        starter(with_database.plain, count),
        starter(with_database.tgstream, count),
    )
    results = []
    for what in ("first chunk, database configured", "the same, Python's gc off"):
        both = interleave(rounds, *measures)
        results.append(compare(what, both, 1.6, "us"))
        gc.disable()
    gc.enable()
    gc.collect()
    return results
