"""HTTP clients that publish and listen, each on its own thread.

A listener behaves like an ``EventSource``: it reconnects, to any server, with the id of
its last complete event.
"""

from __future__ import annotations

import http.client
import itertools
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from random import Random
from typing import Any
from urllib.parse import urlencode

from tests.ledger import plans
from tests.ledger.notes import Last, Note, choose_channels, note_of
from tgstream import Event

REQUEST_SECONDS = 8.0
SILENCE_SECONDS = 3.0
"""Seconds without a heartbeat after which a listener reconnects."""
FAILURES = OSError, http.client.HTTPException

Choose = Callable[[Random], int]
"""Chooses a server, and returns its port."""


class Response:
    """The response to a request.

    :raises HTTPException: if its status is not 200.
    """

    def __init__(self, port: int, path: str, seconds: float, **headers: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
        connection.connect()
        self._socket: socket.socket = connection.sock
        try:
            connection.request("GET", path, headers={"Connection": "close", **headers})
            self._response = connection.getresponse()
            if (status := self._response.status) != 200:
                raise http.client.HTTPException(f"status {status}")
        except BaseException:
            connection.close()
            raise

    def read(self) -> str:
        """Return the whole text."""
        return self._response.read().decode()

    def lines(self) -> Iterator[str]:
        """Yield the lines as they arrive.

        :raises HTTPException: if the response is incomplete.
        """
        rest = b""
        while data := self._response.read1():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield line.decode()

    def reset(self) -> None:
        """Close the connection without a proper end."""
        with suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()

    def close(self) -> None:
        self._response.close()
        self._socket.close()


def get(port: int, path: str, **words: str) -> Response:
    """Request a page.

    :raises HTTPException: if its status is not 200.
    """
    return Response(port, f"{path}?{urlencode(words)}", REQUEST_SECONDS)


class Publisher(threading.Thread):
    """A client whose requests execute plans, one after the other.

    :param savepoints: whether the database has savepoints.
    """

    def __init__(self, seed: str, name: str, choose: Choose, savepoints: bool) -> None:
        super().__init__(name=name, daemon=True)
        self._random = Random(f"{seed} {name}")
        self._choose, self._savepoints = choose, savepoints
        self._closing = threading.Event()
        self.done: set[str] = set()
        """The transactions of which the client knows that they were committed."""
        self.outcomes: Counter[str] = Counter()
        """How its requests ended."""
        self.plans: dict[str, plans.Plan] = {}
        """By the names of their transactions."""

    def close(self) -> None:
        """End after the current request."""
        self._closing.set()

    def run(self) -> None:
        timeouts = 0
        for number in itertools.count():
            if self._closing.wait(self._random.expovariate(30)):
                return
            plan = plans.plan(self._random, self._savepoints)
            work = f"{plan.kind}-{self.name}-{number}"
            self.plans[work] = plan
            try:
                # After a timeout its request may go on, so it becomes another client.
                self._execute(plan, work, f"{self.name}.{timeouts}")
                self.outcomes["done"] += 1
            except TimeoutError:
                timeouts += 1
                self.outcomes["timed out"] += 1
            except FAILURES as error:
                self.outcomes[str(error) or type(error).__name__] += 1

    def _execute(self, plan: plans.Plan, work: str, client: str) -> None:
        words = {"plan": ",".join(plan.transactions), "work": work, "client": client}
        if plan.commit:
            words["commit"] = plan.commit
        with closing(get(self._choose(self._random), f"/{plan.kind}", **words)) as page:
            if plan.kind != "stream":
                if (text := page.read()) != "done":
                    raise http.client.HTTPException(text)
                self.done.add(work)
                return
            done = []
            for line in page.lines():
                done.append(f"{work}.{line}")
                if plan.commit != "end":
                    self.done.update(done)
            self.done.update(done)


class Listener(threading.Thread):
    """A client that listens, is cut off, and reconnects with its last id.

    :param leaves: whether it may leave before the end.
    """

    def __init__(self, seed: str, name: str, choose: Choose, leaves: bool) -> None:
        super().__init__(name=name, daemon=True)
        self._random = Random(f"{seed} {name}")
        self._choose = choose
        self.channels = choose_channels(self._random)
        self._leaves_at = time.monotonic() + self._random.expovariate(0.1)
        if not leaves:
            self._leaves_at = float("inf")
        self._from_page = self._random.random() < 0.3
        self._id = ""
        self.notes: list[Note] = []
        self.stayed = False
        self.outcomes: Counter[str] = Counter()
        """How its connections failed."""
        self._last: Last | None = None
        self._until = float("inf")

    def close(self, last: Last, seconds: float) -> None:
        """End when the last events have arrived, or after so many seconds."""
        self._until = time.monotonic() + seconds
        self.stayed, self._last = not self._is_over(), last

    def run(self) -> None:
        while not self._is_over():
            try:
                if self._from_page and not self._id:
                    self._load_page()
                self._connect()
            except FAILURES as error:
                self.outcomes[f"{type(error).__name__}: {error}"] += 1
            time.sleep(min(self._random.expovariate(4), 3.0))

    def _is_over(self) -> bool:
        if self._last is not None:
            arrived = self._last.arrived(self.channels, self.notes)
            return arrived or time.monotonic() > self._until
        return time.monotonic() > self._leaves_at

    def _load_page(self) -> None:
        """Get the position from a page, and listen after it some time later."""
        port, channels = self._choose(self._random), " ".join(self.channels)
        with closing(get(port, "/position", channels=channels)) as page:
            self._id = page.read()
        self.notes.append(Note(time.monotonic(), "open", ""))
        time.sleep(self._random.expovariate(4))

    def _connect(self) -> None:
        """Listen until the connection is cut."""
        headers = {"Last-Event-ID": self._id} if self._id else {}
        path = f"/feed?{urlencode({'channels': ' '.join(self.channels)})}"
        port = self._choose(self._random)
        response = Response(port, path, SILENCE_SECONDS, **headers)
        try:
            self._read(response, time.monotonic() + self._random.expovariate(0.4))
        finally:
            response.reset() if self._random.random() < 0.7 else response.close()

    def _read(self, response: Response, cut_at: float) -> None:
        """Note the events until the response ends, or until the connection is cut.

        It may be cut between any two lines.
        """
        fields: dict[str, Any] = {}
        for line in response.lines():
            if line:
                name, _, value = line.partition(":")
                fields[name or "comment"] = value.removeprefix(" ")
                if time.monotonic() > cut_at and self._last is None:
                    return
                continue
            fields.pop("retry", None)  # of a process that drains
            self._id = fields.get("id", self._id)
            self.notes.append(note_of(Event(**fields)))
            fields = {}
            if self._is_over():
                return
