"""Loads real servers with streams of all fates, and holds the tables to account.

    python -m tests.soak --streams 20000 --seconds 120 [--server waitress] [--seed 1]

Each server gets its part of the streams, or as many as go into its seconds. Exit code 1
tells that a row was lost, is extra or another's, or that a server has grown.
"""

from __future__ import annotations

import argparse
import sys

from tests.servers.__main__ import postgresql

from .plans import FATES
from .run import SERVERS, Soaked, soak

HEAD = (
    *("server", "streams", "rows told", "found", "lost", "extra", "mixed", "astray"),
    *("RSS growth", "connections", "idle in tx", "threads", "contexts", "alive"),
)

NAMES = (*FATES, "stuck")


def fates(soaked: Soaked) -> tuple[str, ...]:
    """How many streams of one server met each fate."""
    return soaked.server, *(str(soaked.account.fates[name]) for name in NAMES)


def cells(soaked: Soaked) -> tuple[str, ...]:
    """One server's row of the table."""
    account, warm, end = soaked.account, soaked.warm, soaked.end
    counts = (account.told, account.found, account.lost, account.extra, account.mixed)
    return (
        soaked.server,
        str(account.streams),
        *map(str, counts),
        str(len(account.astray)),
        f"{soaked.growth:+.1f} of {warm.memory:.0f} MiB",
        str(end.connections),
        str(end.idle),
        f"{warm.threads} -> {end.threads}",
        str(end.contexts),
        str(end.alive),
    )


def table(rows: list[tuple[str, ...]]) -> str:
    """The rows as text, a line each."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def main() -> int:
    """Soak the servers, print the tables, and return the exit code."""
    parser = argparse.ArgumentParser("tests.soak", description=__doc__)
    parser.add_argument("--streams", type=int, default=20_000, help="on all servers")
    parser.add_argument("--seconds", type=float, default=120, help="on each server")
    parser.add_argument("--server", action="append", choices=SERVERS)
    parser.add_argument("--seed", type=int, default=1, help="the choices")
    options = parser.parse_args()
    servers = options.server or SERVERS
    each = options.streams // len(servers)
    with postgresql() as url:
        soaks = [
            soak(server, url, options.seed, each, options.seconds) for server in servers
        ]
    print(table([("streams", *NAMES), *map(fates, soaks)]))
    print()
    print(table([HEAD, *map(cells, soaks)]))
    for soaked in soaks:
        for wrong in soaked.wrongs[:20]:
            print(f"WRONG {soaked.server}: {wrong}")
    return 1 if any(soaked.wrongs for soaked in soaks) else 0


if __name__ == "__main__":
    sys.exit(main())
