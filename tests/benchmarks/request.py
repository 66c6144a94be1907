"""How much does tgstream add to a whole request, whose stream has two chunks?"""

from __future__ import annotations

from time import process_time

from .apps import App, Pair, environ, start_response
from .measure import Measure, Result, alternate, compare


def requester(app: App) -> Measure:
    """The CPU microseconds of one request, from its environ until all is freed."""

    def measure() -> float:
        start = process_time()
        environment = environ("/two")
        body = app(environment, start_response)
        for _ in body:
            pass
        body.close()
        del body, environment
        return (process_time() - start) * 1e6

    return measure


def run(with_database: Pair, without: Pair, quick: bool) -> list[Result]:
    """Compare with a database configured that no request touches, and without."""
    rounds, count = (7, 300) if quick else (25, 800)
    results = []
    for what, pair in (
        ("a request of two chunks, database configured", with_database),
        ("a request of two chunks, no database", without),
    ):
        measures = requester(pair.plain), requester(pair.tgstream)
        both = alternate(rounds, count, *measures)
        results.append(compare(what, both, 1.7, "us"))
    return results
