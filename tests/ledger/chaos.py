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

PAUSE = 2.0
"""The average number of seconds between two faults."""

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
    """

    def __init__(self, seed: str, acts: dict[tuple[str, str], Act]) -> None:
        super().__init__(daemon=True)
        self._random, self._acts = Random(seed), acts
        self._closing = threading.Event()
        self.faults: list[Fault] = []

    def close(self) -> None:
        """Recover from the current fault, and cause no more."""
        self._closing.set()
        self.join()

    def run(self) -> None:
        while not self._closing.wait(self._random.expovariate(1 / PAUSE)):
            subject, name = key = self._random.choice(list(self._acts))
            begun = time.monotonic()
            self._acts[key](self._random)
            self.faults.append(Fault(begun, time.monotonic(), subject, name))


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
