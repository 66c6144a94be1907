"""The state of a server's process, measured from outside and reported by itself."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]

from tests.conftest import LiveServer

MIB = 2**20
SECONDS = 20.0
"""Seconds after the last stream until remaining state counts as a leak."""


class Vitals(NamedTuple):
    """The state at a moment without requests."""

    memory: float
    """MiB, of the process and its children."""
    threads: int
    connections: int
    """Checked out of the pool."""
    idle: int
    """Connections that are idle in transaction."""
    contexts: int
    """Contexts on TG's stacks, of all threads."""
    alive: int
    """Streams in memory."""

    def at_rest(self, threads: int | None, staying: int = 0) -> bool:
        """Return whether no stream has left anything behind.

        :param threads: the allowed number of threads.
        :param staying: the number of clients that never read, whose streams may live.
        """
        left = self.connections + self.idle + self.contexts
        alive = max(0, self.alive - staying)
        return not (left or alive) and (threads is None or self.threads <= threads)


def ask(live: LiveServer, page: str) -> Any:
    """Return the application's report about its state."""
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=SECONDS)
    connection.request("GET", f"/soak/{page}", headers={"Connection": "close"})
    try:
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def look(live: LiveServer) -> Vitals:
    """Return the current state."""
    state, alive = ask(live, "state"), ask(live, "alive")
    parent = psutil.Process(live.process.pid)
    processes = [parent, *parent.children(recursive=True)]
    return Vitals(
        memory=sum(process.memory_info().rss for process in processes) / MIB,
        threads=sum(process.num_threads() for process in processes),
        connections=state["connections"],
        idle=state["idle in transaction"],
        contexts=state["contexts"],
        alive=alive,
    )


def settle(live: LiveServer, threads: int | None = None, staying: int = 0) -> Vitals:
    """Wait until nothing is left behind, at most ``SECONDS``. Return the state."""
    deadline = time.monotonic() + SECONDS
    while True:
        vitals = look(live)
        if vitals.at_rest(threads, staying) or time.monotonic() > deadline:
            return vitals
