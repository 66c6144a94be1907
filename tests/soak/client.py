"""The clients: what each was told, over a socket of its own.

A line counts when all of it has arrived. What a client makes of it is kept in a few
numbers, so that a soak of any length fits into memory.
"""

from __future__ import annotations

import http.client
import json
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass

from .plans import LEFT, Plan

SECONDS = 60.0
"""After so many, a server hangs."""


@dataclass
class Told:
    """What a client heard of its stream."""

    plan: Plan
    heard: int = 0
    """Lines, each of which was the next one."""
    end: str = "open"
    """``open``, ``whole``, ``broken``, ``left``, ``hangs``, or a status but 200."""
    mixed: int = 0
    """Lines that name another stream, user or transaction."""
    astray: str = ""
    """A line that was not the next one."""


class Listener:
    """One client: its request is sent at once, and it hears as much as it is let."""

    def __init__(self, port: int, plan: Plan) -> None:
        """Connect and ask."""
        self.told = Told(plan)
        self._rest = b""
        self._response: http.client.HTTPResponse | None = None
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._socket = self._connection.sock = socket.socket()
        self._socket.settimeout(SECONDS)
        if plan.pad:  # so that what it does not read is the server's to keep
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
        self._socket.connect(("127.0.0.1", port))
        self._connection.request("GET", plan.path(), headers={"Connection": "close"})

    def hear(self) -> bool:
        """Wait for what comes next, if anything does."""
        try:
            data = self._read()
        except TimeoutError:
            self.told.end = "hangs"
        except (http.client.HTTPException, OSError):
            self.told.end = "broken"
        else:
            if data:
                self._take(data)
                return True
            self.told.end = self._ending()
        return False

    def _read(self) -> bytes:
        """What has come, once something has; nothing at the end."""
        if self._response is None:
            self._response = self._connection.getresponse()
        return self._response.read1()

    def _ending(self) -> str:
        """What the client takes the end for."""
        response = self._response
        assert response is not None
        if response.status != 200:
            return str(response.status)
        return "broken" if response.length or self._rest else "whole"

    def _take(self, data: bytes) -> None:
        """Look at the lines that are whole now."""
        assert self._response is not None
        if self._response.status != 200:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._check(line)

    def _check(self, line: bytes) -> None:
        """Hold a line against the plan."""
        told, plan = self.told, self.told.plan
        try:
            number, stream, user, whose, _ = json.loads(line)
        except (ValueError, TypeError):
            told.astray = f"no line: {line[:200]!r}"
            return
        if (stream, user) != (plan.stream, plan.user) or whose not in ("", stream):
            told.mixed += 1
        elif number != told.heard + 1:
            told.astray = f"line {number} after {told.heard}"
        else:
            told.heard = number

    def leave(self, reset: bool) -> None:
        """Go away before the end: with a farewell, or as a client that crashes does."""
        if self.told.end == "open":
            self.told.end = "left"
            with suppress(OSError):  # the server has gone first
                if reset:
                    linger = struct.pack("ii", 1, 0)
                    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                else:
                    self._socket.shutdown(socket.SHUT_RDWR)
        self.close()

    def close(self) -> None:
        """Let go of the socket, whatever is still to come."""
        if self._response is not None:
            self._response.close()
        self._connection.close()
        self._socket.close()


class Clients:
    """All clients of one server, with those that stay and never read."""

    def __init__(self, port: int) -> None:
        """None has come yet."""
        self.port = port
        self.staying: list[Listener] = []

    def visit(self, plans: list[Plan]) -> list[Told]:
        """Have these streams at once, to the end that their fate is."""
        listeners = [Listener(self.port, plan) for plan in plans]
        listening = listeners
        while listening:
            listening = [each for each in listening if _goes_on(each) and each.hear()]
        for listener in listeners:
            self._part(listener)
        return [listener.told for listener in listeners]

    def _part(self, listener: Listener) -> None:
        """Leave in the way that its fate is."""
        fate = listener.told.plan.fate
        if fate in ("stall", "stuck"):
            self.staying.append(listener)
        elif fate in ("leave", "reset"):
            listener.leave(fate == "reset")
        else:
            listener.close()

    def close(self) -> None:
        """The end, also of those that stayed."""
        while self.staying:
            self.staying.pop().leave(reset=False)


def _goes_on(listener: Listener) -> bool:
    """Whether this client still wants to hear more, once it has rested."""
    plan = listener.told.plan
    if plan.fate == "slow":
        time.sleep(0.002)
    return plan.fate not in LEFT or listener.told.heard < plan.hears
