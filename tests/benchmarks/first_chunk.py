"""How much does tgstream delay the first chunk of a stream?"""

from __future__ import annotations

import gc
from time import process_time

from .apps import App, Pair, environ, start_response
from .measure import Measure, Result, alternate, compare


def starter(app: App) -> Measure:
    """The CPU microseconds from the call of the application to the first chunk."""

    def measure() -> float:
        environment = environ("/one")
        start = process_time()
        body = app(environment, start_response)
        chunks = iter(body)  # kept: to drop it here would measure the end, too
        next(chunks)
        seconds = process_time() - start
        body.close()
        return seconds * 1e6

    return measure


def run(with_database: Pair, without: Pair, quick: bool) -> list[Result]:
    """Compare with a database configured that is not used, with Python's gc or not."""
    rounds, count = (7, 300) if quick else (25, 800)
    measures = starter(with_database.plain), starter(with_database.tgstream)
    results = []
    for what in ("first chunk, database configured", "the same, Python's gc off"):
        both = alternate(rounds, count, *measures)
        results.append(compare(what, both, 1.6, "us"))
        gc.disable()
    gc.enable()
    gc.collect()
    return results
