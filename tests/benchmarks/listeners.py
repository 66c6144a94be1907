"""Clients of a live stream, thousands in one process, which note when they hear."""

from __future__ import annotations

import select
import socket
import time
from contextlib import ExitStack

from .servers import REQUEST

WAVE = 50  # connections that are opened at once: a server's backlog is bounded
PATIENCE = 30.0


class Listeners:
    """Open connections to ``/listen`` of one server."""

    def __init__(self, port: int) -> None:
        self._address = "127.0.0.1", port
        self._epoll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}

    def __len__(self) -> int:
        return len(self._sockets)

    def _ask(self, path: str) -> socket.socket:
        connection = socket.create_connection(self._address, PATIENCE)
        connection.sendall(f"GET {path} {REQUEST}".encode())
        return connection

    def get(self, path: str) -> None:
        """Ask for a page, and wait until it is there."""
        with self._ask(path) as connection:
            answer = connection.recv(4096)
            while more := connection.recv(4096):
                answer += more
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{path} is answered with {answer[:200]!r}")

    def open(self, count: int) -> None:
        """Have so many listeners, each of which has had its first comment."""
        while len(self) < count:
            wave = [self._ask("/listen") for _ in range(min(WAVE, count - len(self)))]
            for connection in wave:
                answer = b""
                while b": open" not in answer:
                    if not (more := connection.recv(4096)):
                        raise RuntimeError(f"/listen ended with {answer[-200:]!r}")
                    answer += more
                connection.setblocking(False)
                self._epoll.register(connection, select.EPOLLIN)
                self._sockets[connection.fileno()] = connection

    def hear(self, events: int) -> list[float]:
        """Have one published each second; the seconds that each delivery took.

        :raises RuntimeError: when not every listener has heard every event in time.
        """
        delays: list[float] = []
        expected, published = events * len(self), 0
        begun = time.monotonic()
        with ExitStack() as stack:
            while len(delays) < expected:
                now = time.monotonic()
                if now > begun + events + PATIENCE:
                    raise RuntimeError(f"heard {len(delays)} events of {expected}")
                due = begun + published - now if published < events else 1.0
                if due <= 0:
                    stack.enter_context(self._ask("/publish"))
                    published += 1
                    continue
                for number, _ in self._epoll.poll(due):
                    heard(self._sockets[number], delays)
        return sorted(delays)

    def close(self) -> None:
        self._epoll.close()
        for connection in self._sockets.values():
            connection.close()


def heard(connection: socket.socket, delays: list[float]) -> None:
    """Note the delay of each event that has come; it says when it was published."""
    if not (received := connection.recv(4096)):
        raise RuntimeError("a listener was cut off")
    now = time.monotonic()
    for piece in received.split(b"data: ")[1:]:
        data, whole, _ = piece.partition(b"\n")
        if not whole:
            raise RuntimeError(f"an event came in parts: {received!r}")
        delays.append(now - float(data))
