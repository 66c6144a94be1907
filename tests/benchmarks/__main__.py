"""Prints what tgstream costs over plain TurboGears2: ``python -m tests.benchmarks``.

Exit code 1 tells that a target is missed.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from . import (
    chart,
    driver,
    exports,
    first_chunk,
    gather,
    live,
    pull,
    request,
    servers,
    untouched,
)
from .apps import make_pairs
from .measure import Result, table
from .people import databases

Question = Callable[[], list[Result]]


def questions(folder: Path, stack: ExitStack, quick: bool) -> dict[str, Question]:
    """What can be asked, by the names of the modules."""
    pairs = cache(lambda: make_pairs(folder))
    rows = exports.MILLION // 10 if quick else exports.MILLION
    urls = cache(lambda: stack.enter_context(databases(folder, rows)))
    return {
        "pull": lambda: pull.run(*pairs(), quick),
        "first_chunk": lambda: first_chunk.run(*pairs(), quick),
        "request": lambda: request.run(*pairs(), quick),
        "servers": lambda: servers.run(folder, quick),
        "untouched": lambda: untouched.run(folder, quick),
        "gather": lambda: gather.run(quick),
        "driver": lambda: driver.run(urls(), quick),
        "live": lambda: live.run(quick),
        "exports": lambda: exports.run(urls(), rows, quick),
    }


def main() -> int:
    parser = argparse.ArgumentParser("tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter, and noisier")
    parser.add_argument("question", nargs="*", help="names of modules; default: all")
    picture = (
        "draw one export, done in four ways; nothing else is asked but by its name"
    )
    parser.add_argument("--chart", metavar="FILE.svg", type=Path, help=picture)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    results: list[Result] = []
    with TemporaryDirectory() as name, ExitStack() as stack:
        asked = questions(Path(name), stack, options.quick)
        if unknown := set(options.question) - asked.keys():
            parser.error(f"no question: {', '.join(unknown)}; ask {', '.join(asked)}")
        wanted = options.question or ([] if options.chart else [*asked])
        if options.chart:
            results += chart.run(Path(name), options.chart, options.quick)
        # In this order: who comes first may need tgstream not to be imported.
        for question, answer in asked.items():
            if question in wanted:
                results += answer()
    print(table(results))
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
