"""How much does tgstream add to a whole request, whose stream has two chunks?"""

from __future__ import annotations

from statistics import median
from time import process_time

from .apps import App, Pair, environ, start_response
from .measure import Both, Result, compare


def request_seconds(app: App) -> float:
    """The CPU seconds of one request, from its environ until all of it is freed."""
    start = process_time()
    environment = environ("/two")
    body = app(environment, start_response)
    for _ in body:
        pass
    body.close()
    del body, environment
    return process_time() - start


def alternate(pair: Pair, rounds: int, count: int) -> Both:
    """Alternate the two applications, request by request.

    The processor's caches then hold as little of one as of the other, as on a server
    that runs other code between two streams.
    """
    rounds_of_both: list[tuple[float, float]] = []
    for _ in range(rounds):
        requests = [
            (request_seconds(pair.plain), request_seconds(pair.tgstream))
            for _ in range(count)
        ]
        plain, tgstream = zip(*requests, strict=True)
        rounds_of_both.append((median(plain) * 1e6, median(tgstream) * 1e6))
    return Both(
        median(plain for plain, _ in rounds_of_both),
        median(tgstream for _, tgstream in rounds_of_both),
        median(tgstream / plain for plain, tgstream in rounds_of_both),
    )


def run(with_database: Pair, without: Pair, quick: bool) -> list[Result]:
    """Compare with a database configured that no request touches, and without."""
    rounds, count = (7, 300) if quick else (25, 800)
    return [
        compare(what, alternate(pair, rounds, count), 1.7, "us")
        for what, pair in (
            ("a request of two chunks, database configured", with_database),
            ("a request of two chunks, no database", without),
        )
    ]
