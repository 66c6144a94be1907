"""The clients, each with its own socket.

A line counts when it has arrived completely. A client keeps only a few numbers, so that
a soak test of any length fits into memory.
"""

from __future__ import annotations

import http.client
import json
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass

from .plans import LEAVING, Plan

SECONDS = 60.0
"""Seconds until a server counts as hanging."""


@dataclass
class Received:
    """The data that a client received of its stream."""

    plan: Plan
    lines: int = 0
    """The number of lines, in the right order."""
    end: str = "open"
    """``open``, ``complete``, ``aborted``, ``left``, ``hangs``, or a status but 200."""
    mixed: int = 0
    """The number of lines that name another stream, user or transaction."""
    wrong_line: str = ""
    """A line in the wrong order."""


class Client:
    """A client, which sends its request at once."""

    def __init__(self, port: int, plan: Plan) -> None:
        """Connect, and send the request."""
        self.received = Received(plan)
        self._rest = b""
        self._response: http.client.HTTPResponse | None = None
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._socket = self._connection.sock = socket.socket()
        self._socket.settimeout(SECONDS)
        if plan.pad:  # unread data must fill the server's buffers, not the client's
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
        self._socket.connect(("127.0.0.1", port))
        self._connection.request("GET", plan.path(), headers={"Connection": "close"})

    def read(self) -> bool:
        """Wait for the next data.

        :returns: whether the response continues.
        """
        try:
            data = self._read()
        except TimeoutError:
            self.received.end = "hangs"
        except (http.client.HTTPException, OSError):
            self.received.end = "aborted"
        else:
            if data:
                self._check_data(data)
                return True
            self.received.end = self._ending()
        return False

    def _read(self) -> bytes:
        """Return the next data, or nothing at the end."""
        if self._response is None:
            self._response = self._connection.getresponse()
        return self._response.read1()

    def _ending(self) -> str:
        """Return how the response ended, as far as the client can see."""
        response = self._response
        assert response is not None
        if response.status != 200:
            return str(response.status)
        return "aborted" if response.length or self._rest else "complete"

    def _check_data(self, data: bytes) -> None:
        """Check the lines that are complete with this data."""
        assert self._response is not None
        if self._response.status != 200:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._check(line)

    def _check(self, line: bytes) -> None:
        """Compare a line with the plan."""
        received, plan = self.received, self.received.plan
        try:
            number, stream, user, mark, _ = json.loads(line)
        except (ValueError, TypeError):
            received.wrong_line = f"invalid line: {line[:200]!r}"
            return
        if (stream, user) != (plan.stream, plan.user) or mark not in ("", stream):
            received.mixed += 1
        elif number != received.lines + 1:
            received.wrong_line = f"line {number} after {received.lines}"
        else:
            received.lines = number

    def leave(self, reset: bool) -> None:
        """Disconnect before the end, normally or with a reset."""
        if self.received.end == "open":
            self.received.end = "left"
            with suppress(OSError):  # the server has already closed it
                if reset:
                    linger = struct.pack("ii", 1, 0)
                    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                else:
                    self._socket.shutdown(socket.SHUT_RDWR)
        self.close()

    def close(self) -> None:
        """Close the socket."""
        if self._response is not None:
            self._response.close()
        self._connection.close()
        self._socket.close()


class Clients:
    """All clients of a server. Some stay connected, and never read."""

    def __init__(self, port: int) -> None:
        """Start without clients."""
        self.port = port
        self.staying: list[Client] = []

    def visit(self, plans: list[Plan]) -> list[Received]:
        """Read these streams concurrently, and end each according to its fate."""
        clients = [Client(self.port, plan) for plan in plans]
        reading = clients
        while reading:
            reading = [
                client for client in reading if _continues(client) and client.read()
            ]
        for client in clients:
            self._end(client)
        return [client.received for client in clients]

    def _end(self, client: Client) -> None:
        """Disconnect, or stay connected, according to the fate."""
        fate = client.received.plan.fate
        if fate in ("stall", "stuck"):
            self.staying.append(client)
        elif fate in ("leave", "reset"):
            client.leave(fate == "reset")
        else:
            client.close()

    def close(self) -> None:
        """Disconnect the clients that stayed."""
        while self.staying:
            self.staying.pop().leave(reset=False)


def _continues(client: Client) -> bool:
    """Return whether the client reads more, after a pause if it is slow."""
    plan = client.received.plan
    if plan.fate == "slow":
        time.sleep(0.002)
    return plan.fate not in LEAVING or client.received.lines < plan.reads
