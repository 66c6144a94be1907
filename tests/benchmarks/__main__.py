"""Prints what tgstream costs over plain TurboGears2: ``python -m tests.benchmarks``.

Exit code 1 tells that a target is missed.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from . import first_chunk, pull, servers, untouched
from .apps import make_pairs
from .measure import Result, table


def questions(folder: Path, quick: bool) -> dict[str, Callable[[], list[Result]]]:
    """What can be asked, by the names of the modules; a peer would be one more."""
    pairs = make_pairs(folder)
    return {
        "pull": lambda: pull.run(*pairs, quick),
        "first_chunk": lambda: first_chunk.run(*pairs, quick),
        "servers": lambda: servers.run(folder, quick),
        "untouched": lambda: untouched.run(folder, quick),
    }


def main() -> int:
    parser = argparse.ArgumentParser("tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter, and noisier")
    parser.add_argument("question", nargs="*", help="names of modules; default: all")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    results: list[Result] = []
    with TemporaryDirectory() as name:
        asked = questions(Path(name), options.quick)
        for question in options.question or asked:
            results += asked[question]()
    print(table(results))
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
