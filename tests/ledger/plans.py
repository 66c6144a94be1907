"""Random transactions that publish events, as plans of a few words.

Each word of a plan is a step:

- ``p0`` adds a row to the ledger, and publishes its event in channel 0.
- ``m0`` adds a row whose ``after_insert`` listener publishes the event.
- ``f`` flushes.
- ``(`` begins a savepoint of SQLAlchemy. ``)`` releases it, and ``<`` rolls it back.
- ``s`` begins a savepoint of ``transaction``. ``k`` keeps it, and ``u`` rolls it back.

The last word ends the transaction:

- ``c`` commits.
- ``d`` dooms the transaction, ``!`` raises an error. In a stream, ``r`` rolls back.
- ``B`` kills the process before the database commits. ``K`` kills it after the commit,
  before events are sent. ``Q3`` kills it at the third statement from here on, if any.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

CHANNELS = ["0", "1", "2"]
LAST = "p0 p1 p2 c"
"""The plan of the last transaction of each process."""
ENDS = {"c": 76, "d": 8, "!": 8, "r": 8}
KILLS = ["B", "K", "K", "Q1", "Q2", "Q3", "Q4"]
KILL = 0.006
"""The share of transactions that kill their process."""


class Plan(NamedTuple):
    """A request, or the work of a thread."""

    kind: str
    """``request``, ``thread`` or ``stream``."""
    commit: str
    """The option ``commit`` of a stream."""
    transactions: list[str]


def plan(random: Random, savepoints: bool) -> Plan:
    """Return a random plan.

    :param savepoints: whether the database has savepoints. Without them it has one
        writer at a time, so a stream must not write while its client reads.
    """
    (kind,) = random.choices(["request", "thread", "stream"], [4, 2, 3])
    if kind != "stream":
        return Plan(kind, "", [transaction(random, savepoints, "c", "d", "!")])
    commit = random.choice(["each", "manual", *(["end"] if savepoints else [])])
    count = random.randint(1, 4)
    ends = "c", "r", "!"
    return Plan(
        kind, commit, [transaction(random, savepoints, *ends) for _ in range(count)]
    )


def transaction(random: Random, savepoints: bool, *ends: str) -> str:
    """Return the plan of a transaction, which has one of these ends."""
    (end,) = random.choices(ends, [ENDS[end] for end in ends])
    if random.random() < KILL:
        end = random.choice(KILLS)
    return " ".join([*_steps(random, savepoints, depth=2), end])


def _steps(random: Random, savepoints: bool, depth: int) -> list[str]:
    """Return random steps, with savepoints in savepoints."""
    steps = []
    for _ in range(random.randint(1, 3)):
        kind = random.choice("ppppmmmf(s" if savepoints and depth else "pppmmf")
        if kind in "pm":
            steps.append(kind + random.choice(CHANNELS))
        elif kind == "f":
            steps.append(kind)
        else:
            ends = [")", "<"] if kind == "(" else ["k", "u"]
            inner = _steps(random, savepoints, depth - 1)
            steps += [kind, *inner, random.choice(ends)]
    return steps
