"""How much does tgstream add to a request that does not stream?

Each application runs in its own processes, ``python -m tests.benchmarks.untouched plain
FOLDER``, so that the plain processes never import tgstream. The limit is the noise: the
difference between two plain processes in 19 of 20 measurements.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles
from time import process_time

from .apps import App, environ, make_app, start_response
from .measure import Both, Result, compare


class Worker:
    """A process that makes requests to an application."""

    def __init__(self, way: str, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.untouched", way, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.times: list[float] = []

    def measure(self, count: int) -> None:
        """Make ``count`` requests, and keep the CPU microseconds per request."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(count, file=self._process.stdin, flush=True)
        self.times.append(float(self._process.stdout.readline()))

    def stop(self) -> list[float]:
        """End the process, and return the times without the first, a warm-up."""
        self._process.communicate()
        return self.times[1:]


def work(app: App) -> None:
    for line in sys.stdin:
        count = int(line)
        start = process_time()
        for _ in range(count):
            body = app(environ("/page"), start_response)
            b"".join(body)
            body.close()
        print((process_time() - start) / count * 1e6, flush=True)


def run(folder: Path, quick: bool) -> list[Result]:
    """Compare the same page in processes with tgstream and without."""
    processes, rounds, count = (2, 11, 300) if quick else (6, 21, 700)
    workers = [
        (Worker("plain", folder), Worker("plain", folder), Worker("tgstream", folder))
        for _ in range(processes)
    ]
    for _ in range(rounds):
        for group in workers:
            for worker in group:
                worker.measure(count)
    rows: list[tuple[float, ...]] = []
    for group in workers:
        rows += zip(*(worker.stop() for worker in group), strict=True)
    noise = quantiles([abs(again / plain - 1) for plain, again, _ in rows], n=20)[-1]
    plain, _, ours = map(median, zip(*rows, strict=True))
    ratio = median(row[2] / row[0] for row in rows)
    what = "a request that does not stream; limit: the noise"
    return [compare(what, Both(plain, ours, ratio), 1 + noise, "us")]


if __name__ == "__main__":
    way, folder = sys.argv[1:]
    work(make_app(way == "tgstream", Path(folder)))
