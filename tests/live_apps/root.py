"""The controllers of ``stream_app``. TG imports them at the first request."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import tg
from tg import TGController, abort, expose

from tests.model import User
from tgstream import NDJSON, SSE, Event, current_stream, drain, stream

together = threading.Barrier(4)


class RootController(TGController):
    @expose(content_type="text/plain")
    def page(self) -> str:
        """An ordinary page: the number of the process."""
        return str(os.getpid())

    @expose(content_type="text/plain")
    def drain(self) -> str:
        """Drain the process, which goes on."""
        return str(drain())

    @expose(content_type="text/plain")
    @stream
    def fail(self, tell: str = "") -> Iterator[str]:
        yield "one\n"
        yield "two\n"
        raise LookupError("no third")

    @expose()
    @stream(SSE(failed="failed"))
    def fail_events(self) -> Iterator[str]:
        yield from self.fail()

    @expose()
    @stream(NDJSON(end=True), chunk_size=0)
    def fail_lines(self) -> Iterator[str]:
        yield from self.fail()

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
        """Set a header in the controller, or in the generator if ``late``."""
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
        """Wait for a line in a named pipe, and send it.

        :param more: additional bytes of the first chunk.
        :param direct: anything, to set the header that disables nginx's buffer.
        """
        if direct:
            tg.response.headers["X-Accel-Buffering"] = "no"
        yield "first" + "x" * int(more)
        with open(pipe) as file:
            yield file.readline()

    @expose()
    @stream(SSE(heartbeat=0.1))
    def silent(self, tell: str = "") -> Iterator[Event]:
        """Send only heartbeats, until the server drains."""
        yield Event(comment="open")
        while not current_stream().ending:
            time.sleep(0.05)
        yield Event(comment="close")

    @expose()
    @stream(SSE)
    def mute(self, tell: str) -> Iterator[Event]:
        """Send nothing until the server drains."""
        yield Event(comment="open")
        while not current_stream().ending:
            time.sleep(0.02)

    @expose()
    @stream(SSE)
    def clock(self) -> Iterator[int]:
        """Send ten events a second, forever."""
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
        """Send each user's name, and the request's parameter twice."""
        for user in tg.config["DBSession"].query(User).order_by(User.id):
            if concurrent:
                together.wait(10)
            yield f"{of}={tg.request.params['of']}:{user.name}\n"

    @expose()
    @stream(SSE)
    def events(self, of: str) -> Iterator[Event]:
        """Send the events in the parameter, from the client's last id on."""
        last = int(tg.request.headers.get("Last-Event-ID", 0))
        for fields in json.loads(of)[last:]:
            yield Event(**fields)

    @expose()
    @stream(SSE)
    def ticks(self, pipe: str) -> Iterator[Event]:
        """Send a comment at once, and then a line of a named pipe."""
        yield Event(comment="open")
        with open(pipe) as file:
            yield Event(file.readline().strip(), event="tick")
