"""What a server's process is made of, seen from outside and told by itself."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]

from tests.conftest import LiveServer

MIB = 2**20
SECONDS = 20.0
"""After so many without a stream, what is left is left for good."""


class Vitals(NamedTuple):
    """Of one moment in which nobody asks the server for anything."""

    memory: float
    """MiB, with all processes below."""
    threads: int
    connections: int
    """Checked out of the pool."""
    idle: int
    """Connections that are idle in transaction."""
    contexts: int
    """On TG's stacks, of any thread."""
    alive: int
    """Streams that are kept in memory."""

    def at_rest(self, threads: int | None, staying: int = 0) -> bool:
        """True if no stream has left anything behind.

        :param threads: how many there may be.
        :param staying: clients that never read: what is alive may be theirs.
        """
        left = self.connections + self.idle + self.contexts
        alive = max(0, self.alive - staying)
        return not (left or alive) and (threads is None or self.threads <= threads)


def ask(live: LiveServer, what: str) -> Any:
    """What the application tells of itself."""
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=SECONDS)
    connection.request("GET", f"/soak/{what}", headers={"Connection": "close"})
    try:
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def look(live: LiveServer) -> Vitals:
    """As it is now."""
    state, alive = ask(live, "state"), ask(live, "alive")
    parent = psutil.Process(live.process.pid)
    processes = [parent, *parent.children(recursive=True)]
    return Vitals(
        memory=sum(each.memory_info().rss for each in processes) / MIB,
        threads=sum(each.num_threads() for each in processes),
        connections=state["connections"],
        idle=state["idle in transaction"],
        contexts=state["contexts"],
        alive=alive,
    )


def settle(live: LiveServer, threads: int | None = None, staying: int = 0) -> Vitals:
    """As it is once it has come to rest; and if it does not, as it is then."""
    deadline = time.monotonic() + SECONDS
    while True:
        vitals = look(live)
        if vitals.at_rest(threads, staying) or time.monotonic() > deadline:
            return vitals
