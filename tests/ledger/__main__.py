"""Publish and listen while servers are killed, and compare what was received.

    python -m tests.ledger --seconds 60 --seed 1 --backend redis

For each back end of channels it prints how many events were committed, received,
duplicated, lost and reported by ``reset``. The exit code is 1 if one was sent twice,
not in order or without its transaction, or is lost without a ``reset``.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.soak.__main__ import table

from .notes import PLANTS
from .run import BACKENDS, Result, run

HEAD = (
    "back end",
    "published",
    "received",
    "duplicated",
    "disordered",
    "uncommitted",
    "lost untold",
    "reported by reset",
    "resets",
    "unexplained",
    "in doubt",
    "faults",
)
SHOWN = 20
"""How many faults to print."""


def cells(name: str, result: Result) -> tuple[str, ...]:
    """Return a back end's row of the table."""
    account = result.account
    numbers = (
        account.published,
        account.received,
        account.duplicated,
        account.disordered,
        account.uncommitted,
        account.lost,
        account.reported,
        len(account.resets),
        len(result.unexplained),
        account.doubtful,
        len(result.faults),
    )
    return name, *map(str, numbers)


def print_details(name: str, result: Result) -> None:
    """Print the faults of the back end, and those that the run caused."""
    for wrong in result.wrongs[:SHOWN]:
        print(f"WRONG {name}: {wrong}")
        for work, plan in result.plans.items():
            if re.search(rf" {work}[. ]", wrong):
                print(f"      {plan}")
    for fault in result.faults:
        times = f"{fault.begun:7.2f} to {fault.ended:.2f} s"
        print(f"{name} {times}: {fault.subject} {fault.name}")
    for process, time in sorted(result.died.items(), key=lambda item: item[1]):
        print(f"{name} {time:7.2f} s: process {process} ended")
    for who, outcomes in result.outcomes.items():
        for outcome, count in outcomes.most_common():
            print(f"{name} {who}: {count} x {outcome.splitlines()[0]}")


def main() -> int:
    """Run the ledger of each back end, and print the table.

    :returns: the exit code.
    """
    parser = argparse.ArgumentParser("tests.ledger", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="of each back end")
    parser.add_argument("--seed", type=int, help="of the random choices")
    parser.add_argument("--backend", action="append", choices=BACKENDS)
    plants = [*PLANTS, "aborted"]
    planted = "a fault of the application, to see that it is found"
    parser.add_argument("--plant", choices=plants, default="", help=planted)
    parser.add_argument("--verbose", action="store_true", help="print what happened")
    parser.add_argument("--folder", type=Path, help="a new folder for notes and logs")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    results = {}
    for name in options.backend or BACKENDS:
        with TemporaryDirectory() as temporary:
            folder = Path(options.folder or temporary, name)
            folder.mkdir(parents=True)
            result = run(name, seed, options.seconds, folder, options.plant)
        results[name] = result
        if options.verbose or result.wrongs:
            print_details(name, result)
    print(table([HEAD, *(cells(*each) for each in results.items())]))
    return 1 if any(result.wrongs for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
