"""What a stream is asked to do, what its client will do, and what that must store.

A script has a letter a step, and each step is a line that the client hears after it:
``a`` adds a row by the ORM and ``i`` by Core; ``c`` is ``commit()``, ``r`` is
``rollback()``, ``t`` and ``x`` are ``transaction.commit()`` and its ``abort()``; ``!``
fails. A row is known by the number of its step.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import NamedTuple
from urllib.parse import urlencode

from tests.live_apps.soak_app import USERS

LONG = 600.0
"""Seconds that are no bound: no stream takes as long."""

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
"""How often each is met, to which a few that are ``stuck`` come.

Few stall: gunicorn's threads wait two seconds for such a client to say farewell.
"""

STUCK = 2
"""Streams to a server which fill all buffers: each holds a thread to the very end."""

LEFT = ("leave", "reset", "stall", "stuck")
"""Whose client is not there at the end."""

Rows = frozenset[int]


class Plan(NamedTuple):
    """One stream, known to both sides."""

    stream: str
    user: str
    fate: str
    script: str
    commit: str = "end"
    kind: str = "raw"
    hears: int = 0
    """Lines after which the client leaves, if it does."""
    pace: float = 0.0
    pad: int = 0
    max_seconds: float = LONG

    def path(self) -> str:
        """What is asked of the server."""
        asked = self._asdict()
        del asked["fate"], asked["hears"]
        return f"/soak/run?{urlencode(asked)}"

    def stored(self) -> tuple[list[Rows], Rows]:
        """The rows that are committed before each line is heard, and in the end.

        The first of the former is before any line, and a failing step is after all.
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
    """What the clients do, one after the other; one that interleaves has some streams.

    :param name: of all this: the same name, the same choices.
    :param streams: how many there are in all.
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
    """A stream of this fate."""
    commits = ["end", "end", "each", "manual", "manual", str(random.randint(2, 5))]
    paces = [0.0, 0.0, 0.001, 0.003]
    length = random.randint(1, 12)
    made = Plan(
        stream,
        user,
        fate,
        script(random, length),
        commit=random.choice(commits),
        kind=random.choice(["raw", "raw", "raw", "gathered"]),
        pace=random.choice(paces),
    )
    if fate == "fail":
        return made._replace(script=made.script + "!" + script(random, 2))
    if fate in ("leave", "reset"):
        hears = random.randint(0, length)
        return made._replace(hears=hears, script=made.script + script(random, 8))
    if fate == "slow":
        return made._replace(script=made.script * 3, pad=2**14)
    if fate in ("stall", "expire"):  # which would take a second
        made = made._replace(kind="raw", pace=0.005, max_seconds=0.2)
        return made._replace(script=script(random, 200), hears=random.randint(0, 1))
    if fate == "stuck":
        made = made._replace(kind="raw", pace=0.005, max_seconds=2.0)
        return made._replace(script=script(random, 400), pad=2**18)
    return made


def script(random: Random, length: int) -> str:
    """Rows for the most part, and commits and rollbacks at random points."""
    return "".join(random.choices("aictrx", [40, 20, 14, 4, 5, 2], k=length))
