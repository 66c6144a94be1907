"""How much does tgstream add to a pull, when each item is a chunk?"""

from __future__ import annotations

from time import process_time

from .apps import App, Pair, environ, start_response
from .measure import Measure, Result, compare, interleave


def puller(app: App, count: int) -> Measure:
    """Measure the CPU nanoseconds of a pull within one long stream."""

    def measure() -> float:
        body = app(environ("/endless"), start_response)
        pull = iter(body).__next__
        pull()
        start = process_time()
        for _ in range(count):
            pull()
        seconds = process_time() - start
        body.close()
        return seconds / count * 1e9

    return measure


def run(with_database: Pair, without: Pair, quick: bool) -> list[Result]:
    """Compare with a database configured, and without a database."""
    rounds, count = (5, 50_000) if quick else (15, 300_000)
    results = []
    for what, pair, limit in (
        ("a pull, database configured", with_database, 13),
        ("a pull, no database", without, 9),
    ):
        both = interleave(
            rounds, puller(pair.plain, count), puller(pair.tgstream, count)
        )
        results.append(compare(what, both, limit, "ns"))
    return results
