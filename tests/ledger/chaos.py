"""Random faults of the stores and of the processes, each followed by a recovery."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from random import Random
from typing import NamedTuple

from tests.ledger.servers import Process
from tests.ledger.stores import Store

PAUSE = 1.5
"""The average number of seconds between two faults."""
PROGRESS = 5
"""Transactions between two faults. A busy machine needs more time for them."""
PROGRESS_SECONDS = 10.0

Act = Callable[[Random], object]


class Fault(NamedTuple):
    """A fault that happened, in seconds of ``time.monotonic()``."""

    begun: float
    ended: float
    subject: str
    """A store or a process."""
    name: str


class Chaos(threading.Thread):
    """Causes one fault after the other, until it is closed.

    :param seed: of the random choices.
    :param acts: the faults by subject and name. Each returns after its recovery.
    :param count_done: returns the number of transactions that were committed.
    """

    def __init__(
        self,
        seed: str,
        acts: dict[tuple[str, str], Act],
        count_done: Callable[[], int],
    ) -> None:
        super().__init__(daemon=True)
        self._random, self._acts, self._count_done = Random(seed), acts, count_done
        self._closing = threading.Event()
        self.faults: list[Fault] = []

    def close(self) -> None:
        """Recover from the current fault, and cause no more."""
        self._closing.set()
        self.join()

    def run(self) -> None:
        while not self._closing.wait(self._random.expovariate(1 / PAUSE)):
            self._wait_for_progress()
            if self._closing.is_set():
                return
            subject, name = key = self._random.choice(list(self._acts))
            begun = time.monotonic()
            self._acts[key](self._random)
            self.faults.append(Fault(begun, time.monotonic(), subject, name))

    def _wait_for_progress(self) -> None:
        enough = self._count_done() + PROGRESS
        until = time.monotonic() + PROGRESS_SECONDS
        while self._count_done() < enough and time.monotonic() < until:
            if self._closing.wait(0.05):
                return


def store_acts(name: str, store: Store) -> dict[tuple[str, str], Act]:
    """Return the faults of a store."""
    return {
        (name, "killed"): lambda random: store.kill(random.uniform(0, 2)),
        (name, "paused"): lambda random: store.pause(random.uniform(0.1, 3)),
        (name, "cut"): lambda _: store.cut(),
    }


def process_acts(processes: list[Process]) -> dict[tuple[str, str], Act]:
    """Return the faults of the processes."""
    acts: dict[str, Callable[[Process, Random], object]] = {
        "killed": lambda process, _: process.kill(),
        "its worker killed": lambda process, _: process.kill(worker=True),
        "terminated": lambda process, _: process.terminate(),
        "paused": lambda process, random: process.pause(random.uniform(0.1, 4)),
    }

    def cause(name: str, process: Process, random: Random) -> None:
        process.wait()
        acts[name](process, random)
        process.wait()

    return {
        (process.name, name): partial(cause, name, process)
        for process in processes
        for name in acts
    }
