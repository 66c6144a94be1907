"""The hook ``tgstream.started``: when it is called, and that it harms no stream."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import tg
import transaction
from tg import TGController, abort, expose, redirect

from tests.conftest import MakeApp, assert_clean
from tests.core.support import reasons, run_on_another_thread
from tests.model import Model, User
from tests.wsgi import Call, get
from tgstream import (
    NDJSON,
    SSE,
    Channel,
    Report,
    Stream,
    StreamError,
    current_stream,
    drain,
    listen,
    stream,
)

ROOT = Path(__file__).parents[2]
ERRORS = [LookupError, SystemExit, GeneratorExit, KeyboardInterrupt]
user: ContextVar[str] = ContextVar("user", default="none")

Register = Callable[[Callable[[Stream], object]], None]


class Words(TGController):
    """Streams that start and end in different ways."""

    def __init__(self) -> None:
        for method in vars(Words).values():
            if hasattr(method, "__code__") and method.__name__ != "__init__":
                expose(content_type="text/plain")(method)  # fixtures reset TG

    @stream
    def two(self) -> Iterator[str]:
        yield "one"
        yield "two"

    @stream
    def empty(self) -> Iterator[str]:
        return
        yield

    @stream(NDJSON)
    def whole(self) -> list[int]:
        return [1, 2]

    @stream
    def fails_at_once(self) -> Iterator[str]:
        raise LookupError("no first")
        yield

    @stream
    def aborts(self) -> Iterator[str]:
        abort(404)
        yield ""

    @stream
    def redirects(self) -> Iterator[str]:
        redirect("/two")
        yield ""

    @stream(spool=True)
    def spooled(self) -> Iterator[str]:
        yield "one"
        yield "two"

    @stream(SSE(heartbeat=0.1))
    def events(self) -> Iterator[Any]:
        yield from listen("started", comments=False)

    @stream
    def names_user(self) -> Iterator[str]:
        yield user.get()
        yield user.get()


@pytest.fixture
def register(make_app: MakeApp) -> Iterator[Register]:
    """A function that registers a hook of ``tgstream.started`` for the test."""
    hooks: list[Any] = []

    def add(hook: Callable[[Stream], object]) -> None:
        hooks.append(hook)
        tg.hooks.register("tgstream.started", hook)

    yield add
    for hook in hooks:
        tg.hooks.disconnect("tgstream.started", hook)


@pytest.fixture
def steps(register: Register, reports: list[Report]) -> Iterator[list[str]]:
    """The calls of both hooks, in order."""
    steps: list[str] = []

    def note_end(report: Report) -> None:
        steps.append(report.reason)

    register(lambda stream: steps.append(f"started {stream.controller}"))
    tg.hooks.register("tgstream.finished", note_end)
    yield steps
    tg.hooks.disconnect("tgstream.finished", note_end)


def test_started_is_called_once_when_the_response_can_be_sent(
    make_app: MakeApp, register: Register, steps: list[str]
) -> None:
    """It gets the stream, whose request is bound, before the server gets a chunk."""
    seen: list[Any] = []

    def note(stream: Stream) -> None:
        assert current_stream() is stream
        assert stream.seconds > 0.0
        seen.append((tg.request.path, stream.items, stream.chunks, stream.bytes))

    register(note)
    call = Call(make_app(Words()), "/two")
    assert (steps, seen) == (["started Words.two"], [("/two", 1, 1, 3)])
    assert call.read() == b"onetwo"
    assert steps == ["started Words.two", "completed"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("empty", "completed"),
        ("whole", "completed"),
        ("fails_at_once", "failed"),
        ("spooled", "completed"),
    ],
)
def test_started_is_called_before_the_report_of_a_short_stream(
    make_app: MakeApp, steps: list[str], path: str, reason: str
) -> None:
    """A stream may end with its first pull."""
    get(make_app(Words()), f"/{path}")
    assert steps == [f"started Words.{path}", reason]


def test_started_is_called_before_the_report_of_a_response_that_cannot_be_sent(
    make_app: MakeApp, steps: list[str]
) -> None:
    """The status and the headers are checked before the hook is called otherwise."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def index(self) -> Iterator[str]:
            tg.response.status = 204
            yield "one"
            yield "two"

    with pytest.raises(StreamError, match="has no body"):
        get(make_app(Root(), trace_errors__enable=False))
    assert steps == ["started Root.index", "failed"]


@pytest.mark.parametrize(
    ("path", "method"),
    [("aborts", "GET"), ("redirects", "GET"), ("two", "HEAD"), ("two", "OPTIONS")],
)
def test_ordinary_response_has_neither_hook(
    make_app: MakeApp, steps: list[str], path: str, method: str
) -> None:
    """It may be for ``abort()`` or ``redirect()`` before the first chunk."""
    get(make_app(Words()), f"/{path}", method=method)
    assert steps == []


def test_started_is_called_while_the_generator_waits_for_its_first_event(
    make_app: MakeApp, steps: list[str], next_report: Callable[[], Report]
) -> None:
    """The response has begun, although the generator has not yielded."""
    call = Call(make_app(Words()), "/events")
    assert steps == ["started Words.events"]
    assert next(call).startswith(b": open\n")
    Channel("started").publish("first")
    assert b"data: first\n" in next(call)
    assert run_on_another_thread(drain)
    assert next_report().reason == "drained"
    call.close()
    assert steps == ["started Words.events", "drained"]


@pytest.mark.parametrize("path", ["two", "empty", "events"])
@pytest.mark.parametrize("error", ERRORS)
def test_error_in_started_does_not_change_the_stream(
    make_app: MakeApp,
    register: Register,
    next_report: Callable[[], Report],
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
    path: str,
) -> None:
    """The error is logged, and the other hooks are called."""
    called: list[Stream] = []

    def fail(stream: Stream) -> None:
        raise error("no start")

    for hook in called.append, fail, called.append:
        register(hook)
    call = Call(make_app(Words()), f"/{path}")
    if path == "events":
        assert next(call).startswith(b": open\n")
        assert run_on_another_thread(drain)
        call.close()
    else:
        assert call.read() == (b"onetwo" if path == "two" else b"")
    assert next_report().reason == ("drained" if path == "events" else "completed")
    assert [each.controller for each in called] == [f"Words.{path}"] * 2
    [record] = [each for each in caplog.records if each.levelname == "ERROR"]
    assert record.getMessage() == f"Words.{path}: a hook of tgstream.started failed"
    assert record.exc_info is not None
    assert record.exc_info[0] is error


@pytest.mark.parametrize("query", ["", "?empty=1", "?fail=1", "?wait=1"])
def test_started_hook_may_use_the_database(
    make_app: MakeApp, model: Model, register: Register, query: str
) -> None:
    """Its changes are not committed, and it does not touch those of the stream."""
    model.seed("ada")
    counts: list[int] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(SSE(heartbeat=20), commit="end")
        def index(self, **options: str) -> Iterator[Any]:
            model.DBSession.add(User(name="bob"))
            if "wait" in options:
                for _ in listen("waits", comments=False):
                    break
            if "empty" in options:
                return
            yield "one"
            yield str(model.DBSession.query(User).count())
            if "fail" in options:
                raise LookupError("no more")

    def use(stream: Stream) -> None:
        counts.append(model.DBSession.query(User).count())
        model.DBSession.add(User(name="eve"))
        try:
            model.DBSession.execute(sa.text("SELECT broken"))
        finally:
            counts.append(len(model.DBSession.new))

    register(use)
    call = Call(make_app(Root(), model), f"/{query}", checked=False)
    first = next(call)
    Channel("waits").publish("go", now=True)
    if "fail" in query:
        with pytest.raises(LookupError):
            call.read()
    else:
        last = b"" if "empty" in query else b"data: 2\n\n"
        assert (first + call.read()).endswith(last)
    call.close()
    assert counts[0] == (2 if "empty" in query else 1)
    assert model.names() == (["ada"] if "fail" in query else ["ada", "bob"])
    assert_clean(model)


def test_event_of_a_started_hook_is_sent_at_once(
    make_app: MakeApp, model: Model, register: Register
) -> None:
    """It does not wait for the commit of the stream."""
    channel = Channel("starts")
    app = make_app(Words(), model)
    events = channel.listen()
    next(events)
    register(lambda stream: channel.publish(stream.controller))
    call = Call(app, "/two")
    assert next(events).data == "Words.two"
    call.close()
    assert_clean(model)


def test_context_variable_of_a_started_hook_belongs_to_the_stream(
    make_app: MakeApp, register: Register, reports: list[Report]
) -> None:
    """The generator and the hook of its end see it. The server's thread does not."""
    ends: list[str] = []

    def note_end(report: Report) -> None:
        ends.append(user.get())

    register(lambda stream: user.set(stream.controller) and None)
    app = make_app(Words())
    tg.hooks.register("tgstream.finished", note_end)
    assert get(app, "/names_user").text == "noneWords.names_user"
    tg.hooks.disconnect("tgstream.finished", note_end)
    assert (ends, user.get()) == (["Words.names_user"], "none")


def test_stream_that_its_started_hook_closes_ends_after_the_hook(
    make_app: MakeApp, register: Register, reports: list[Report]
) -> None:
    """The report does not come while a hook of the start runs."""
    counts: list[int] = []

    def end(stream: Stream) -> None:
        stream.close()
        counts.append(len(reports))

    register(end)
    call = Call(make_app(Words()), "/two")
    with pytest.raises(StreamError, match="was closed before its end"):
        call.read()
    assert (counts, reasons(reports)) == ([0], ["disconnected"])


@pytest.mark.parametrize("path", ["two", "events"])
def test_report_waits_for_the_started_hook(
    make_app: MakeApp,
    register: Register,
    steps: list[str],
    next_report: Callable[[], Report],
    path: str,
) -> None:
    """A stream that another thread ends meanwhile ends when the hook has returned."""

    def wait(stream: Stream) -> None:
        assert not run_on_another_thread(lambda: drain(0.05))
        steps.append("hook returns")

    register(wait)
    call = Call(make_app(Words()), f"/{path}")
    assert next_report().reason == "drained"
    call.close()
    assert sorted(steps[:2]) == ["hook returns", f"started Words.{path}"]
    assert steps[2:] == ["drained"]


KILLED = """
from gevent import monkey
monkey.patch_all()
import gevent, tg
from tests.conftest import make_application
from tests.wsgi import Call
from tgstream import stream

class Root(tg.TGController):
    @tg.expose(content_type="text/plain")
    @stream
    def words(self):
        yield "one"
        yield "two"

def wait(stream):
    if not waiting.ready():
        waiting.set("waits")
        gevent.sleep(60)

def serve():
    call = Call(app, "/words")
    return call.read()

app = make_application(Root())
tg.hooks.register("tgstream.started", wait)
tg.hooks.register("tgstream.finished", lambda report: print(report.reason))
for end in (gevent.GreenletExit, gevent.Timeout(1)):
    waiting = gevent.event.AsyncResult()
    greenlet = gevent.spawn(serve)
    waiting.get()
    greenlet.kill(end)
    print(greenlet.get(), flush=True)
"""


def test_kill_of_the_greenlet_in_a_started_hook_does_not_change_the_stream() -> None:
    """The hook gets the kill or the timeout, which is logged as its error."""
    command = [sys.executable, "-X", "dev", "-c", KILLED]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ran.stdout == "completed\nb'onetwo'\n" * 2, ran.stderr
    assert ran.stderr.count("a hook of tgstream.started failed") == 2


def test_streams_of_other_threads_start_while_a_hook_runs(
    make_app: MakeApp, register: Register
) -> None:
    """A hook holds no lock of tgstream."""
    begun = threading.Event()
    app = make_app(Words())

    def start_another(stream: Stream) -> None:
        if not begun.is_set():
            begun.set()
            assert run_on_another_thread(lambda: get(app, "/two").text) == "onetwo"

    register(start_another)
    assert get(app, "/two").text == "onetwo"


@pytest.mark.parametrize("name", ["tgstream.started", "tgstream.finished"])
def test_hook_may_commit_its_own_changes(
    make_app: MakeApp, model: Model, name: str
) -> None:
    """``transaction.commit()`` commits no change of the stream, which then fails."""
    model.seed("ada")

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def index(self) -> Iterator[str]:
            model.DBSession.add(User(name="bob"))
            yield "one"
            raise LookupError("no more")

    def store(_: object) -> None:
        model.DBSession.add(User(name="eve"))
        transaction.commit()

    app = make_app(Root(), model)
    tg.hooks.register(name, store)
    try:
        with pytest.raises(LookupError):
            get(app)
    finally:
        tg.hooks.disconnect(name, store)
    assert model.names() == ["ada", "eve"]
    assert_clean(model)
