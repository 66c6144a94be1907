"""Load real servers with streams that end in all ways, and check the stored rows.

    python -m tests.soak --streams 20000 --seconds 120 [--server waitress] [--seed 1]

Each server gets its part of the streams, or as many as fit into its seconds. The exit
code is 1 if a row is lost, extra or of another stream, if a server has grown, or if its
metrics differ from what its hooks have written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import chain

from tests.servers.__main__ import postgresql

from .plans import FATES
from .run import SERVERS, SoakResult, soak

HEAD = (
    "server",
    "streams",
    "rows expected",
    "found",
    "lost",
    "extra",
    "mixed",
    "wrong ends",
    "RSS growth",
    "connections",
    "idle in tx",
    "threads",
    "contexts",
    "alive",
)

NAMES = (*FATES, "stuck")


def fates(result: SoakResult) -> tuple[str, ...]:
    """Return how many streams of a server had each fate."""
    return result.server, *(str(result.account.fates[name]) for name in NAMES)


def cells(result: SoakResult) -> tuple[str, ...]:
    """Return a server's row of the table."""
    account, warm, end = result.account, result.warm, result.end
    counts = (
        account.expected,
        account.found,
        account.lost,
        account.extra,
        account.mixed,
    )
    return (
        result.server,
        str(account.streams),
        *map(str, counts),
        str(len(account.wrong_ends)),
        f"{result.growth:+.1f} of {warm.memory:.0f} MiB",
        str(end.connections),
        str(end.idle),
        f"{warm.threads} -> {end.threads}",
        str(end.contexts),
        str(end.alive),
    )


def totals(result: SoakResult) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a server: its ledger, and its metrics."""
    for name, total in (("ledger", result.ledger), ("metrics", result.counters)):
        ended = ", ".join(f"{count} {reason}" for reason, count in total.ended)
        yield (result.server, name, str(total.started), ended, str(total.bytes))


def table(rows: list[tuple[str, ...]]) -> str:
    """Format the rows, a line each."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def main() -> int:
    """Run the soak test of each server, and print the tables.

    :returns: the exit code.
    """
    parser = argparse.ArgumentParser("tests.soak", description=__doc__)
    parser.add_argument("--streams", type=int, default=20_000, help="of all servers")
    parser.add_argument("--seconds", type=float, default=120, help="of each server")
    parser.add_argument("--server", action="append", choices=SERVERS)
    parser.add_argument("--seed", type=int, default=1, help="of the random choices")
    options = parser.parse_args()
    servers = options.server or SERVERS
    streams = options.streams // len(servers)
    with postgresql() as url:
        results = [
            soak(server, url, options.seed, streams, options.seconds)
            for server in servers
        ]
    print(table([("streams", *NAMES), *map(fates, results)]))
    print()
    print(table([HEAD, *map(cells, results)]))
    print()
    head = ("server", "totals", "started", "ended", "bytes")
    print(table([head, *chain.from_iterable(map(totals, results))]))
    for result in results:
        for wrong in result.wrongs[:20]:
            print(f"WRONG {result.server}: {wrong}")
    return 1 if any(result.wrongs for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
