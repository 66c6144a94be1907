"""Streams that nobody holds any longer: by reference count, and by the collector."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import tg
from tg import TGController, expose

from tests.conftest import MakeApp, assert_clean
from tests.model import Model, User
from tests.wsgi import Call
from tgstream import SSE, Report, commit, drain, stream

ROOT = Path(__file__).parents[2]


class Dropped(TGController):
    """Streams that note on which thread they end."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.threads: list[str] = []
        self.lock = threading.Lock()
        self.reasons: SimpleQueue[str] = SimpleQueue()
        for name in ("words", "beating"):  # TG forgets it between tests
            expose(content_type="text/plain")(getattr(Dropped, name))

    def items(self) -> Iterator[str]:
        yield "one"
        yield "two"

    @stream
    def words(self) -> Iterator[str]:
        return self.items()

    @stream(SSE(heartbeat=20))
    def beating(self) -> Iterator[str]:
        return self.items()

    def finished(self, report: Report) -> None:
        self.threads.append(threading.current_thread().name)
        with self.lock:
            self.model.DBSession.add(User(name="ada"))
            commit()
        self.reasons.put(report.reason)


@pytest.fixture
def dropped(make_app: MakeApp, model: Model) -> Iterator[Dropped]:
    root = Dropped(model)
    tg.hooks.register("tgstream.finished", root.finished)
    yield root
    tg.hooks.disconnect("tgstream.finished", root.finished)


def put_in_a_cycle(call: Call) -> None:
    """Let the body be garbage that only the collector frees."""
    cycle: list[Any] = [call.body, call._chunks]
    cycle.append(cycle)
    call.drop()


@pytest.mark.parametrize("path", ["/words", "/beating"])
@pytest.mark.parametrize("pulls", [1, 2])
def test_stream_in_cyclic_garbage_ends_on_a_thread_of_its_own(
    make_app: MakeApp,
    model: Model,
    dropped: Dropped,
    path: str,
    pulls: int,
) -> None:
    """The thread that collects may hold any lock: here one that the hook waits for."""
    call = Call(make_app(dropped, model), path, checked=False)
    for _ in range(pulls):
        next(call)
    put_in_a_cycle(call)
    with dropped.lock:
        gc.collect()
    assert dropped.reasons.get(timeout=10) == "disconnected"
    assert dropped.threads[0] in ("tgstream-end", "tgstream-heartbeat")
    assert model.names() == ["ada"]
    assert_clean(model)


def test_stream_that_only_old_garbage_holds_ends_on_a_thread_of_its_own(
    make_app: MakeApp, model: Model, dropped: Dropped
) -> None:
    """Also if the collector frees its holder and not the stream itself."""
    call = Call(make_app(dropped, model), "/words", checked=False)
    next(call)
    gc.collect()  # the stream is old, and what holds it is young
    put_in_a_cycle(call)
    with dropped.lock:
        gc.collect(0)
    assert dropped.reasons.get(timeout=10) == "disconnected"
    assert dropped.threads[0] in ("tgstream-end", "tgstream-heartbeat")
    assert_clean(model)


def test_drain_waits_for_a_stream_in_cyclic_garbage(
    make_app: MakeApp, model: Model, dropped: Dropped
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


def test_stream_that_is_dropped_ends_at_once_on_its_thread(
    make_app: MakeApp, model: Model, dropped: Dropped
) -> None:
    """Without the collector nothing is handed to another thread."""
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
    for round in range(150):
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


def test_end_of_a_stream_in_garbage_can_publish(tmp_path: Path) -> None:
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

for round in range(150):
    with gevent.Timeout(5):
        greenlet = gevent.spawn(requests)
        gevent.sleep(0.002)
        greenlet.kill(timeout=4)
        assert greenlet.ready(), round
        assert isinstance(greenlet.value, gevent.GreenletExit), greenlet.exception

def until_timeout():
    with gevent.Timeout(0.002):
        requests()

for round in range(100):
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
def test_dropped_stream_swallows_no_kill_and_no_timeout_of_gevent(
    format: str, pulls: int
) -> None:
    """No destructor switches to another greenlet, neither of an ended stream nor of one
    that is dropped before its end."""
    script = GREENLETS.replace("FORMAT", format).replace("PULLS", str(pulls))
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=90)
    assert (ran.stdout, ran.returncode) == ("done\n", 0), ran.stderr
