"""Thousands of clients of a live stream in one process, which measure delays."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

from .servers import REQUEST

WAVE = 50
"""Connections that are opened at once, because a server's backlog is limited."""
PATIENCE = 30.0
"""Seconds until a missing answer is an error."""


class Listeners:
    """Connections to ``/listen`` of one server."""

    def __init__(self, port: int) -> None:
        self._address = "127.0.0.1", port
        self._epoll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}

    def __len__(self) -> int:
        return len(self._sockets)

    def _request(self, path: str) -> socket.socket:
        connection = socket.create_connection(self._address, PATIENCE)
        connection.sendall(f"GET {path} {REQUEST}".encode())
        return connection

    def get(self, path: str) -> None:
        """Request a page and read it."""
        with self._request(path) as connection:
            answer = connection.recv(4096)
            while more := connection.recv(4096):
                answer += more
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"unexpected response of {path}: {answer[:200]!r}")

    def open(
        self, count: int, path: Callable[[int], str] = lambda number: "/listen"
    ) -> None:
        """Open ``count`` connections, and wait for the first comment of each.

        :param path: returns the path of each connection by its number.
        """
        while len(self) < count:
            numbers = range(len(self), min(len(self) + WAVE, count))
            wave = [self._request(path(number)) for number in numbers]
            for connection in wave:
                answer = b""
                while b": open" not in answer:
                    if not (more := connection.recv(4096)):
                        raise RuntimeError(f"/listen ended with {answer[-200:]!r}")
                    answer += more
                connection.setblocking(False)
                self._epoll.register(connection, select.EPOLLIN)
                self._sockets[connection.fileno()] = connection

    def receive(self, events: int) -> list[float]:
        """Publish an event each second. Return the sorted delays, in seconds.

        :raises RuntimeError: if not every client receives every event in time.
        """
        delays: list[float] = []
        expected, published = events * len(self), 0
        begun = time.monotonic()
        with ExitStack() as stack:
            while len(delays) < expected:
                now = time.monotonic()
                if now > begun + events + PATIENCE:
                    raise RuntimeError(f"received {len(delays)} of {expected} events")
                due = begun + published - now if published < events else 1.0
                if due <= 0:
                    stack.enter_context(self._request("/publish"))
                    published += 1
                    continue
                for number, _ in self._epoll.poll(due):
                    note_delays(self._sockets[number], delays)
        return sorted(delays)

    def collect(self, expected: int) -> list[float]:
        """Return the sorted delays of so many deliveries that others publish.

        :raises RuntimeError: if no event arrives for a long time.
        """
        delays: list[float] = []
        while len(delays) < expected:
            if not (ready := self._epoll.poll(PATIENCE)):
                raise RuntimeError(f"received {len(delays)} of {expected} events")
            for number, _ in ready:
                note_delays(self._sockets[number], delays)
        return sorted(delays)

    def close(self) -> None:
        self._epoll.close()
        for connection in self._sockets.values():
            connection.close()


def note_delays(connection: socket.socket, delays: list[float]) -> None:
    """Add the delay of each received event, whose data is its publication time."""
    if not (received := connection.recv(4096)):
        raise RuntimeError("the server closed a listener's connection")
    now = time.monotonic()
    for piece in received.split(b"data: ")[1:]:
        data, complete, _ = piece.partition(b"\n")
        if not complete:
            raise RuntimeError(f"an event arrived in parts: {received!r}")
        delays.append(now - float(data))
