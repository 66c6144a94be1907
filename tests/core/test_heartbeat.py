"""``SSE(heartbeat=...)``: comments are sent while the generator waits."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tg
from tg import TGController, expose

import tgstream
from tests.conftest import LiveServer, MakeApp, assert_clean
from tests.forks import run_python
from tests.model import Model, Note
from tests.test_servers import Client, assert_settles
from tests.wsgi import Call, get
from tgstream import SSE, Event, Report, StreamError, current_stream, drain, stream
from tgstream.core.heartbeat import HEARTBEAT

SHORT = 0.02


class Waiting(TGController):
    """Event streams. The generator waits before each event, until the test goes on."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.go = threading.Semaphore(0)
        self.waits = threading.Event()
        self.seen: list[Any] = []
        expose()(Waiting.events)  # each test resets TG, which forgets it

    @stream(SSE(heartbeat=SHORT))
    def events(self, fail: str = "") -> Iterator[Event]:
        try:
            yield Event(comment="open")
            for number in range(3):
                self.waits.set()
                assert self.go.acquire(timeout=10)
                self.model.DBSession.add(Note(text=f"note {number}"))
                self.seen.append((threading.current_thread().name, tg.request.path))
                assert current_stream().items == number + 1
                if fail:
                    raise LookupError("no event")
                yield Event(str(number))
        finally:
            self.seen.append("closed")


@pytest.fixture
def waiting(model: Model) -> Waiting:
    return Waiting(model)


def test_heartbeat_is_sent_while_the_generator_waits(
    make_app: MakeApp, model: Model, waiting: Waiting, reports: list[Report]
) -> None:
    """The events follow at once, bound and committed on the generator's thread."""
    call = Call(make_app(waiting, model), "/events")
    assert [next(call) for _ in range(3)] == [b": open\n\n", HEARTBEAT, HEARTBEAT]
    for number in range(3):
        waiting.go.release()
        chunk = next(call)
        while chunk == HEARTBEAT:
            chunk = next(call)
        assert chunk == b"data: %d\n\n" % number
        assert model.texts()[number] == f"note {number}"
    assert call.read().replace(HEARTBEAT, b"") == b""
    assert waiting.seen == [("tgstream-heartbeat", "/events")] * 3 + ["closed"]
    assert [(r.reason, r.items, r.commits) for r in reports] == [("completed", 4, 3)]
    assert_clean(model)


def test_heartbeat_stream_raises_the_error_of_its_generator(
    make_app: MakeApp, model: Model, waiting: Waiting, reports: list[Report]
) -> None:
    """The pull that waits for the event raises it."""
    call = Call(make_app(waiting, model), "/events?fail=1")
    assert [next(call), next(call)] == [b": open\n\n", HEARTBEAT]
    waiting.go.release()
    with pytest.raises(LookupError, match="no event"):
        while next(call) == HEARTBEAT:
            pass
    call.close()
    assert [report.reason for report in reports] == ["failed"]
    assert model.texts() == []
    assert_clean(model)


@pytest.mark.parametrize("end", [Call.close, Call.drop])
@pytest.mark.parametrize("pulls", [0, 1, 2])
def test_heartbeat_stream_without_its_client_ends_at_the_next_yield(
    make_app: MakeApp,
    model: Model,
    waiting: Waiting,
    next_report: Callable[[], Report],
    end: Callable[[Call], None],
    pulls: int,
) -> None:
    """The body is closed or dropped. A generator that does not wait ends at once."""
    call = Call(make_app(waiting, model), "/events", checked=False)
    for _ in range(pulls):
        next(call)
    assert pulls < 2 or waiting.waits.wait(10)
    end(call)
    del call
    gc.collect()
    waiting.go.release()
    report = next_report()
    assert (report.reason, waiting.seen[-1]) == ("disconnected", "closed")
    for thread in threading.enumerate():
        if thread.name == "tgstream-heartbeat":
            thread.join(10)
    assert model.texts() == ([] if pulls < 2 else ["note 0"])
    assert_clean(model)


def test_heartbeat_stream_of_one_item_is_sent_as_it_is(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """A body that is complete with its first chunk is sent as it is."""

    class Root(TGController):
        @expose()
        @stream(SSE(heartbeat=SHORT, retry=3000))
        def events(self, count: str = "1") -> Iterator[str]:
            for number in range(int(count)):
                yield str(number)

    app = make_app(Root(), sqlite_model)
    assert get(app, "/events").text == "retry: 3000\n\ndata: 0\n\n"
    assert get(app, "/events?count=0").text == ""


def test_heartbeat_stream_sends_the_last_event_of_an_expired_stream(
    make_app: MakeApp, model: Model, next_report: Callable[[], Report]
) -> None:
    """The generator ends at its next yield, and the next pull ends the response."""
    go = threading.Event()

    class Root(TGController):
        @expose()
        @stream(SSE(heartbeat=1), max_seconds=0.1)
        def events(self) -> Iterator[Event]:
            yield Event(comment="open")
            while not current_stream().ending:
                assert not go.wait(0.01)
            model.DBSession.add(Note(text="last"))
            yield Event("last")
            yield Event("never")

    call = Call(make_app(Root(), model), "/events")
    body = call.read().replace(HEARTBEAT, b"")
    assert body == b": open\n\ndata: last\n\n"
    assert next_report().reason == "expired"
    assert model.texts() == ["last"]
    assert_clean(model)


@pytest.mark.parametrize("reason", ["expired", "drained"])
def test_heartbeat_ends_the_response_while_the_generator_waits(
    make_app: MakeApp,
    sqlite_model: Model,
    next_report: Callable[[], Report],
    reason: str,
) -> None:
    """The client can reconnect at once. The generator ends at its next yield.

    It keeps its request. uWSGI clears the environ when the response has ended.
    """
    go, paths = threading.Event(), []

    class Root(TGController):
        @expose()
        @stream(SSE(heartbeat=SHORT), max_seconds=0.5 if reason == "expired" else None)
        def events(self) -> Iterator[Event]:
            yield Event(comment="open")
            assert go.wait(10)
            paths.append(tg.request.path)
            yield Event("never")

    call = Call(make_app(Root(), sqlite_model), "/events")
    assert [next(call), next(call)] == [b": open\n\n", HEARTBEAT]
    if reason == "drained":
        assert not drain(timeout=0)
    assert call.read().replace(HEARTBEAT, b"") == b""
    call.environ.clear()
    go.set()
    report = next_report()
    assert (report.reason, report.error) == (reason, None)
    assert [*paths, report.path] == ["/events"] * 2
    assert_clean(sqlite_model)


@pytest.mark.parametrize("server", ["waitress", "gunicorn-gthread", "gunicorn-gevent"])
def test_heartbeat_detects_a_disconnect(
    live_server: Callable[..., LiveServer], postgresql: str, server: str
) -> None:
    """The server cannot write the comment, and the stream releases all it holds."""
    live = live_server(server, "stream_app", f"postgresql={postgresql}")
    client = Client(live, "/postgresql/silent")
    assert client.response.read1(100) == b": open\n\n"
    assert client.response.read1(100) == HEARTBEAT
    client.leave()
    assert_settles(live, "postgresql")


@pytest.mark.parametrize("heartbeat", [0, -1, "9", float("inf"), float("nan")])
def test_heartbeat_that_is_not_a_positive_number_is_rejected(heartbeat: Any) -> None:
    """The error is raised when the format is made. So is that of ``retry``."""
    with pytest.raises(ValueError, match="SSE: heartbeat must be None or a number"):
        SSE(heartbeat=heartbeat)
    with pytest.raises(ValueError, match=r"SSE: retry must be .* got -1"):
        SSE(retry=-1)


def test_commit_and_rollback_work_on_the_thread_of_the_generator(
    make_app: MakeApp, model: Model
) -> None:
    """They belong to the stream there, and raise on any other thread."""

    class Root(TGController):
        @expose()
        @stream(SSE(heartbeat=10), commit="manual")
        def events(self) -> Iterator[Event]:
            yield Event(comment="open")
            for number in range(2):
                model.DBSession.add(Note(text=f"note {number}"))
                (tgstream.commit, tgstream.rollback)[number]()
                yield Event(str(number))

    assert get(make_app(Root(), model), "/events").text.endswith("data: 1\n\n")
    assert model.texts() == ["note 0"]
    with pytest.raises(StreamError):
        tgstream.commit()
    assert_clean(model)


KILLED = """
from gevent import monkey; monkey.patch_all()
import gevent, tg
from tests.conftest import make_application
from tests.wsgi import get
from tgstream import SSE, stream

class Root(tg.TGController):
    @tg.expose()
    @stream(SSE(heartbeat=5), limit=1)
    def events(self, seconds="0"):
        try:
            gevent.sleep(float(seconds))
            yield "item"
        finally:
            print("closed")

app = make_application(Root())
tg.hooks.register("tgstream.finished", lambda report: print(report.reason))
with gevent.Timeout(0.05, False):
    get(app, "/events?seconds=0.2")
gevent.sleep(0.4)
print(get(app, "/events").text, end="")
"""


def test_killed_request_ends_its_stream_and_frees_its_slot() -> None:
    """The generator ends at its first item, on the thread of its worker."""
    command = [sys.executable, "-W", "ignore", "-c", KILLED]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    expected = "closed\ndisconnected\nclosed\ncompleted\ndata: item\n\n"
    assert ran.stdout == expected, ran.stderr


NO_THREAD = """
import resource, threading
from pathlib import Path
import tg
from tests.conftest import make_application
from tests.wsgi import get
from tgstream import SSE, stream

class Root(tg.TGController):
    @tg.expose()
    @stream(SSE(heartbeat=5))
    def events(self):
        yield from "abc"

app = make_application(Root(), trace_errors__enable=True)
get(app, "/missing")
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (1 << 28)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
threading.stack_size(1 << 30)  # more than the limit leaves
print(get(app, "/events").text, end="")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_events_are_sent_without_a_heartbeat_if_no_thread_can_be_started() -> None:
    """No event is lost. Without this, backlash would hide the error of the thread."""
    ran = run_python("-c", NO_THREAD)
    assert ran.stdout == "data: a\n\ndata: b\n\ndata: c\n\n", ran.stderr
