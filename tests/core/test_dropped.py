"""Streams that the server drops, with and without the garbage collector."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import tg
from tg import TGController, expose

from tests.conftest import MakeApp, assert_clean
from tests.core.support import (
    NamesController,
    leave_clean,
    pull,
    reasons,
    run_on_another_thread,
)
from tests.model import Model, User
from tests.turbogears.support import WIRINGS
from tests.wsgi import Call
from tgstream import SSE, Report, commit, drain, stream
from tgstream.core.body import Body

ROOT = Path(__file__).parents[2]


# Without the garbage collector.


@pytest.mark.usefixtures("no_garbage_collector")
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("pulls", [0, 1, 2])
def test_dropped_stream_ends_at_once(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
    pulls: int,
) -> None:
    """The server drops the body, before or after its first pull."""
    sqlite_model.seed("ada", "bob", "eve")
    ended: list[str] = []
    app = make_app(NamesController(sqlite_model, ended), sqlite_model, **wiring)
    call = Call(app, "/names", checked=False)
    for _ in range(pulls):
        pull(call)
    # TG's debugger calls the application at the first pull.
    started = pulls > 0 or not wiring["debug"]
    call.drop()
    assert ended == ["/names True"] * started
    assert reasons(reports) == ["disconnected"] * started
    assert_clean(sqlite_model)


@pytest.mark.usefixtures("no_garbage_collector")
def test_stream_dropped_on_another_thread_ends_there(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """The thread that drops the last reference ends the stream, and stays clean."""
    sqlite_model.seed("ada", "bob")
    ended: list[str] = []
    app = make_app(NamesController(sqlite_model, ended), sqlite_model)
    call = Call(app, "/names", checked=False)
    pull(call)
    run_on_another_thread(partial(leave_clean, call.drop))
    assert ended == ["/names True"]
    assert reasons(reports) == ["disconnected"]
    assert_clean(sqlite_model)


@pytest.mark.usefixtures("no_garbage_collector")
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("end", ["completed", "closed", "dropped"])
def test_ended_stream_is_freed_at_once(
    make_app: MakeApp, wiring: dict[str, Any], end: str
) -> None:
    """Its source is freed, although the server keeps the environ."""
    sources: list[weakref.ref[Any]] = []

    class Source:
        def __init__(self) -> None:
            self.remaining = ["three", "two", "one"]

        def __iter__(self) -> Iterator[str]:
            return self

        def __next__(self) -> str:
            if not self.remaining:
                raise StopIteration
            return self.remaining.pop()

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Source:
            source = Source()
            sources.append(weakref.ref(source))
            return source

    call = Call(make_app(Root(), **wiring), "/words", checked=False)
    pull(call)
    assert sources[0]() is not None
    if end == "completed":
        assert b"".join(call) == b"twothree"
    if end != "dropped":
        call.close()
    call.drop()
    assert sources[0]() is None


# With the garbage collector.


class DroppedController(TGController):
    """Streams whose hook notes the threads on which they end."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.threads: list[str] = []
        self.lock = threading.Lock()
        self.reasons: SimpleQueue[str] = SimpleQueue()
        # Not at import: the fixture make_app resets the milestones of TG.
        for name in ("words", "heartbeats"):
            expose(content_type="text/plain")(getattr(DroppedController, name))

    def items(self) -> Iterator[str]:
        yield "one"
        yield "two"

    @stream
    def words(self) -> Iterator[str]:
        return self.items()

    @stream(SSE(heartbeat=20))
    def heartbeats(self) -> Iterator[str]:
        return self.items()

    def finished(self, report: Report) -> None:
        self.threads.append(threading.current_thread().name)
        with self.lock:
            self.model.DBSession.add(User(name="ada"))
            commit()
        self.reasons.put(report.reason)


@pytest.fixture
def dropped(make_app: MakeApp, model: Model) -> Iterator[DroppedController]:
    root = DroppedController(model)
    tg.hooks.register("tgstream.finished", root.finished)
    yield root
    tg.hooks.disconnect("tgstream.finished", root.finished)


def put_in_a_cycle(call: Call) -> None:
    """Make the body garbage, which only the garbage collector frees."""
    cycle: list[Any] = [call.body, call._chunks]
    cycle.append(cycle)
    call.drop()


@pytest.mark.parametrize(
    ("path", "pulls", "generation"),
    [
        ("/words", 1, 2),
        ("/words", 2, 2),
        ("/heartbeats", 1, 2),
        ("/heartbeats", 2, 2),
        ("/words", 1, 0),
    ],
)
def test_stream_in_cyclic_garbage_ends_on_another_thread(
    make_app: MakeApp,
    model: Model,
    dropped: DroppedController,
    path: str,
    pulls: int,
    generation: int,
) -> None:
    """The thread that collects garbage may hold a lock, which the hook waits for."""
    call = Call(make_app(dropped, model), path, checked=False)
    for _ in range(pulls):
        next(call)
    if generation == 0:
        gc.collect()  # the stream gets old, and the cycle that holds it is young
    put_in_a_cycle(call)
    with dropped.lock:
        gc.collect(generation)
    assert dropped.reasons.get(timeout=10) == "disconnected"
    assert dropped.threads[0] in ("tgstream-end", "tgstream-heartbeat")
    assert model.names() == ["ada"]
    assert_clean(model)


def test_drain_waits_for_a_stream_in_cyclic_garbage(
    make_app: MakeApp, model: Model, dropped: DroppedController
) -> None:
    """The stream runs until the monitor's thread has ended it."""
    call = Call(make_app(dropped, model), "/words", checked=False)
    next(call)
    put_in_a_cycle(call)
    with dropped.lock:
        gc.collect()
        assert not drain(timeout=0.1)
    assert drain(timeout=10)
    assert dropped.reasons.get_nowait() in ("disconnected", "drained")
    assert_clean(model)


def test_stream_without_a_cycle_ends_on_the_thread_that_drops_it(
    make_app: MakeApp, model: Model, dropped: DroppedController
) -> None:
    """The stream ends at once, without the garbage collector."""
    call = Call(make_app(dropped, model), "/words", checked=False)
    next(call)
    call.drop()
    assert dropped.reasons.get_nowait() == "disconnected"
    assert dropped.threads == [threading.current_thread().name]
    assert_clean(model)


PUBLISHES = """
import itertools, threading, tg
from tests.conftest import make_application
from tests.wsgi import Call
from tgstream import Channel, Report, stream

channel = Channel("ends")

class Root(tg.TGController):
    @tg.expose(content_type="text/plain")
    @stream
    def words(self, where: str):
        try:
            yield "one"
            yield "two"
        finally:
            if where == "finally":
                channel.publish("closed", now=True)

app = make_application(Root())
tg.hooks.register("tgstream.finished", lambda report: channel.publish(report.reason))
for where in ("hook", "finally"):
    for round in range(60):
        call = Call(app, f"/words?where={where}", checked=False)
        next(call)
        cycle = [call.body, call._chunks]
        cycle.append(cycle)
        call.drop()
        del cycle
        for _ in range(200):
            channel.publish("event", now=True)
print("done", flush=True)
"""


def test_end_of_a_stream_in_garbage_can_publish() -> None:
    """A collection in the middle of ``publish()`` ends a stream that publishes too."""
    command = [sys.executable, "-X", "dev", "-c", PUBLISHES]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (ran.stdout, ran.returncode) == ("done\n", 0), ran.stderr


RETRIED = """
from gevent import monkey
monkey.patch_all()
import tg, transaction
from transaction.interfaces import TransientError
from tests.conftest import make_application
from tests.wsgi import get
from tgstream import stream

runs = []

class Root(tg.TGController):
    @tg.expose(content_type="text/plain")
    @stream(limit=1)
    def words(self):
        runs.append("run")
        yield "one"
        yield f" {len(runs)}"

    def _after(self, *args, **params):
        if len(runs) == 1:
            transaction.abort()
            raise TransientError("again")

app = make_application(Root(), tm__enabled=True, tm__attempts=2)
print(get(app, "/words").text, flush=True)
"""


def test_dropped_stream_of_an_earlier_attempt_gives_its_slot_to_the_next() -> None:
    """Under gevent it runs until the monitor ends it, or the next attempt does."""
    command = [sys.executable, "-c", RETRIED]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (ran.stdout, ran.returncode) == ("one 2\n", 0), ran.stderr


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import gevent, tg
from tests.conftest import make_application
from tests.model import Model, User
from tests.wsgi import Call, get
from tgstream import SSE, stream

class Root(tg.TGController):
    @tg.expose(content_type="text/plain")
    @stream(FORMAT)
    def words(self):
        try:
            yield "one"
            yield "two"
        finally:
            gevent.sleep(0)

app = make_application(Root())
drops = 0

def requests():
    global drops
    while True:
        get(app, "/words")
        call = Call(app, "/words", checked=False)
        for _ in range(PULLS):
            next(call)
        call.drop()
        drops += 1
        gevent.sleep(0)

for round in range(60):
    with gevent.Timeout(5):
        greenlet = gevent.spawn(requests)
        gevent.sleep(0.002)
        greenlet.kill(timeout=4)
        assert greenlet.ready(), round
        assert isinstance(greenlet.value, gevent.GreenletExit), greenlet.exception

def until_timeout():
    with gevent.Timeout(0.002):
        requests()

for round in range(40):
    greenlet = gevent.spawn(until_timeout)
    greenlet.join(timeout=4)
    assert greenlet.ready(), round
    assert isinstance(greenlet.exception, gevent.Timeout), greenlet.exception
assert drops
print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("format", "pulls"),
    [("None", 1), ("SSE(heartbeat=5)", 2)],
    ids=["raw", "heartbeat"],
)
def test_kill_and_timeout_of_gevent_work_while_streams_are_dropped(
    format: str, pulls: int
) -> None:
    """A destructor does not switch to another greenlet, at the end or after it."""
    script = GREENLETS.replace("FORMAT", format).replace("PULLS", str(pulls))
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=90)
    assert (ran.stdout, ran.returncode) == ("done\n", 0), ran.stderr


@pytest.mark.usefixtures("no_garbage_collector")
def test_stream_that_ends_while_its_response_departs_is_freed_at_once(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The monitor may end it before it reports to the error guard."""
    bodies: list[weakref.ref[Body]] = []

    def end_first(body: Body, observer: Any) -> None:
        bodies.append(weakref.ref(body))
        body.close("expired")
        report_to(body, observer)

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            yield "one"
            yield "two"

    report_to = Body.report_to
    monkeypatch.setattr(Body, "report_to", end_first)
    call = Call(make_app(Root()), "/words", checked=False)
    assert next(call) == b"one"  # the first chunk was made in time
    call.close()
    call.drop()
    assert bodies[0]() is None
