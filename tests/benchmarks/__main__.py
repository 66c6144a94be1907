"""Measure what tgstream costs over plain TurboGears2: ``python -m tests.benchmarks``.

The exit code is 1 if a limit is exceeded.
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
    archives,
    arrow,
    channels,
    chart,
    compression,
    driver,
    exports,
    files,
    first_chunk,
    gather,
    live,
    pull,
    request,
    servers,
    untouched,
    xlsx,
)
from .apps import make_pairs
from .measure import Result, table
from .people import databases

Question = Callable[[], list[Result]]


def questions(
    folder: Path, stack: ExitStack, quick: bool, most: int
) -> dict[str, Question]:
    """Return the questions by name. The names are those of the modules.

    :param most: the maximum number of channels.
    """
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
        "compression": lambda: compression.run(quick),
        "driver": lambda: driver.run(urls(), quick),
        "live": lambda: live.run(quick),
        "channels": lambda: channels.run(folder, quick, most),
        "files": lambda: files.run(folder, quick),
        "archives": lambda: archives.run(urls()["PostgreSQL"], rows, quick),
        "arrow": lambda: arrow.run(urls(), rows, quick),
        "exports": lambda: exports.run(urls(), rows, quick),
        "xlsx": lambda: xlsx.run(folder, quick),
    }


def main() -> int:
    parser = argparse.ArgumentParser("tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="run shorter and noisier")
    parser.add_argument("question", nargs="*", help="a module's name. Default: all")
    picture = "draw one export, made in four ways. Runs only the questions you name"
    parser.add_argument("--chart", metavar="FILE.svg", type=Path, help=picture)
    most = "the maximum number of channels"
    parser.add_argument("--channels", type=int, default=10_000, help=most)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    results: list[Result] = []
    with TemporaryDirectory() as name, ExitStack() as stack:
        available = questions(Path(name), stack, options.quick, options.channels)
        if unknown := set(options.question) - available.keys():
            parser.error(
                f"unknown question: {', '.join(unknown)}. "
                f"Choose from {', '.join(available)}"
            )
        chosen = options.question or ([] if options.chart else [*available])
        if options.chart:
            results += chart.run(Path(name), options.chart, options.quick)
        # Keep this order: the first questions must run before tgstream is imported.
        for question, measure in available.items():
            if question in chosen:
                results += measure()
    print(table(results))
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
