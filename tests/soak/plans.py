"""The plans of the streams and their clients, and the rows that a plan must store.

Each letter of a plan's script is a step, after which the stream sends a line:

- ``a`` adds a row with the ORM, and ``i`` with Core
- ``c`` calls ``commit()``, and ``r`` calls ``rollback()``
- ``t`` calls ``transaction.commit()``, and ``x`` calls ``transaction.abort()``
- ``!`` raises an error

The number of a row is the number of its step.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import NamedTuple
from urllib.parse import urlencode

from tests.live_apps.soak_app import USERS

LONG = 600.0
"""A ``max_seconds`` that no stream reaches."""

FATES = {
    "complete": 34,
    "fail": 16,
    "leave": 14,
    "reset": 14,
    "stall": 1,
    "slow": 3,
    "interleaved": 10,
    "expire": 2,
}
"""The fates with their weights. A few streams are ``stuck`` in addition.

Few streams stall, because gunicorn's threads wait two seconds for such a client.
"""

STUCK = 2
"""Streams of each server that fill all buffers and occupy a thread until the end."""

LEAVING = ("leave", "reset", "stall", "stuck")
"""The fates whose client does not read to the end."""

Rows = frozenset[int]


class Plan(NamedTuple):
    """A stream, as its client and its server plan it."""

    stream: str
    user: str
    fate: str
    script: str
    commit: str = "end"
    kind: str = "raw"
    reads: int = 0
    """The lines after which the client disconnects, or reads no more."""
    pace: float = 0.0
    pad: int = 0
    max_seconds: float = LONG

    def path(self) -> str:
        """Return the path of the request, with the server's part of the plan."""
        params = self._asdict()
        del params["fate"], params["reads"]
        return f"/soak/run?{urlencode(params)}"

    def stored(self) -> tuple[list[Rows], Rows]:
        """Return the rows that are committed before each line, and at the end.

        The first set is that before any line. Steps after a failing step do not count.
        """
        committed, pending = Rows(), Rows()
        every = {"end": 0, "manual": 0, "each": 1}.get(self.commit)
        every = int(self.commit) if every is None else every
        states = [committed]
        for number, letter in enumerate(self.script.partition("!")[0], 1):
            if letter in "ai":
                pending |= {number}
            elif letter in "rx":
                pending = Rows()
            if letter in "ct" or (every and number % every == 0):
                committed, pending = committed | pending, Rows()
            states.append(committed)
        return states, committed if self.commit == "manual" else committed | pending


def visits(name: str, streams: int) -> Iterator[list[Plan]]:
    """Yield the plans of each client. A client that interleaves has several streams.

    :param name: the seed. The same name yields the same plans.
    :param streams: the total number of streams.
    """
    number = 0
    while number < streams:
        random = Random(f"{name} {number}")
        if number < STUCK:
            fate = "stuck"
        else:
            (fate,) = random.choices(list(FATES), list(FATES.values()))
        together = min(3, streams - number) if fate == "interleaved" else 1
        user = random.choice(USERS)
        yield [plan(random, f"s{number + i}", user, fate) for i in range(together)]
        number += together


def plan(random: Random, stream: str, user: str, fate: str) -> Plan:
    """Return a random plan with this fate."""
    commits = ["end", "end", "each", "manual", "manual", str(random.randint(2, 5))]
    paces = [0.0, 0.0, 0.001, 0.003]
    length = random.randint(1, 12)
    made = Plan(
        stream,
        user,
        fate,
        script(random, length),
        commit=random.choice(commits),
        kind=random.choice(["raw", "raw", "raw", "buffered"]),
        pace=random.choice(paces),
    )
    if fate == "fail":
        return made._replace(script=made.script + "!" + script(random, 2))
    if fate in ("leave", "reset"):
        reads = random.randint(0, length)
        return made._replace(reads=reads, script=made.script + script(random, 8))
    if fate == "slow":
        return made._replace(script=made.script * 3, pad=2**14)
    if fate in ("stall", "expire"):  # otherwise it would take a second
        made = made._replace(kind="raw", pace=0.005, max_seconds=0.2)
        return made._replace(script=script(random, 200), reads=random.randint(0, 1))
    if fate == "stuck":
        made = made._replace(kind="raw", pace=0.005, max_seconds=1.0)
        return made._replace(script=script(random, 400), pad=2**18)
    return made


def script(random: Random, length: int) -> str:
    """Return random steps: mostly rows, some commits and some rollbacks."""
    return "".join(random.choices("aictrx", [40, 20, 14, 4, 5, 2], k=length))
