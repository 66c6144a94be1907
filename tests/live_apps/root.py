"""The controllers of ``stream_app``, which TG imports at its first request."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import tg
from tg import TGController, abort, expose

from tests.model import User
from tgstream import SSE, Event, current_stream, stream

together = threading.Barrier(4)


class RootController(TGController):
    @expose(content_type="text/plain")
    @stream
    def fail(self, tell: str = "") -> Iterator[str]:
        yield "one\n"
        yield "two\n"
        raise LookupError("no third")

    @expose(content_type="text/plain")
    @stream
    def missing(self) -> Iterator[str]:
        abort(404)
        yield "never"

    @expose(content_type="text/plain")
    @stream
    def words(self) -> Iterator[str]:
        yield "one\n"
        yield "two\n"

    @expose(content_type="text/plain")
    @stream
    def header(self, name: str, value: str, late: str = "") -> Iterator[str]:
        """Sets a header that some server refuses, in the generator or outside of it."""
        given: Any = int(value) if value.isdigit() else value
        if not late:
            tg.response.headers[name] = given
        return self._words(name, given, late)

    def _words(self, name: str, value: Any, late: str) -> Iterator[str]:
        if late:
            tg.response.headers[name] = value
        yield "one\n"
        yield "two\n"

    @expose(content_type="text/plain")
    @stream
    def status(self, status: str, items: str = "0") -> Iterator[str]:
        tg.response.status = status
        for _ in range(int(items)):
            yield "one\n"

    @expose(content_type="text/plain")
    @stream
    def wait(self, pipe: str, more: str = "0", direct: str = "") -> Iterator[str]:
        """Sends the line that the client writes into a named pipe, when it does so.

        :param more: bytes of the first chunk, beside its word.
        :param direct: whether proxies are told not to gather it.
        """
        if direct:
            tg.response.headers["X-Accel-Buffering"] = "no"
        yield "first" + "x" * int(more)
        with open(pipe) as file:
            yield file.readline()

    @expose()
    @stream(SSE(heartbeat=0.1))
    def silent(self, tell: str = "") -> Iterator[Event]:
        """Says nothing until it is to end."""
        yield Event(comment="open")
        while not current_stream().ending:
            time.sleep(0.05)
        yield Event(comment="close")

    @expose()
    @stream(SSE)
    def mute(self, tell: str) -> Iterator[Event]:
        """Says nothing until it is to end, and has no heartbeat."""
        yield Event(comment="open")
        while not current_stream().ending:
            time.sleep(0.02)

    @expose()
    @stream(SSE)
    def clock(self) -> Iterator[int]:
        """An event ten times a second, for ever."""
        while True:
            yield int(time.time())
            time.sleep(0.1)

    @expose(content_type="text/plain")
    @stream
    def endless(self, tell: str) -> Iterator[bytes]:
        while tg.config["DBSession"].query(User).count():
            yield b"x" * 65536

    @expose(content_type="text/plain")
    @stream
    def names(self, of: str, concurrent: str = "") -> Iterator[str]:
        """Each name that is stored, and whose request it is in."""
        for user in tg.config["DBSession"].query(User).order_by(User.id):
            if concurrent:
                together.wait(10)
            yield f"{of}={tg.request.params['of']}:{user.name}\n"

    @expose()
    @stream(SSE)
    def events(self, of: str) -> Iterator[Event]:
        """The events that the client asks for, behind the last one that it had."""
        last = int(tg.request.headers.get("Last-Event-ID", 0))
        for fields in json.loads(of)[last:]:
            yield Event(**fields)

    @expose()
    @stream(SSE)
    def ticks(self, pipe: str) -> Iterator[Event]:
        """Opens at once; then sends a line that is written into a named pipe."""
        yield Event(comment="open")
        with open(pipe) as file:
            yield Event(file.readline().strip(), event="tick")
