"""How much does tgstream add to a whole request, whose stream has two chunks?"""

from __future__ import annotations

from time import process_time

from .apps import App, Pair, environ, start_response
from .measure import Measure, Result, compare, interleave


def requester(app: App, count: int) -> Measure:
    """Measure CPU microseconds, from the call of the application to ``close()``."""

    def measure() -> float:
        seconds = 0.0
        for _ in range(count):
            environment = environ("/two")
            start = process_time()
            body = app(environment, start_response)
            for _ in body:
                pass
            body.close()
            seconds += process_time() - start
        return seconds / count * 1e6

    return measure


def run(with_database: Pair, without: Pair, quick: bool) -> list[Result]:
    """Compare with a database configured that no request touches, and without."""
    rounds, count = (7, 300) if quick else (25, 800)
    results = []
    for what, pair in (
        ("a request of two chunks, database configured", with_database),
        ("a request of two chunks, no database", without),
    ):
        both = interleave(
            rounds, requester(pair.plain, count), requester(pair.tgstream, count)
        )
        results.append(compare(what, both, 1.7, "us"))
    return results
