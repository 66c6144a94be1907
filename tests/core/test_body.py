"""The life of a body: pulls, ends, the order of cleanup, and what may go wrong."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
import tg
import transaction
from tg import TGController, expose
from tg.decorators import cached

from tests.conftest import MakeApp, assert_clean, assert_thread_clean
from tests.model import MakeModel, Model, User
from tests.turbogears.test_guard import WIRINGS, unplugged
from tests.wsgi import Call, get
from tgstream import (
    Report,
    Stream,
    StreamError,
    commit,
    current_stream,
    drain,
    flush,
    stream,
)
from tgstream.core.body import Body


def pull(call: Call) -> bytes:
    """The next chunk, with a look at what it leaves on the thread."""
    try:
        return next(call)
    finally:
        assert_thread_clean()


def in_thread(function: Callable[[], Any]) -> Any:
    """What ``function`` returns on a thread of its own, which must be left clean."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
            assert_thread_clean()
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Without the cyclic garbage collector: what is dropped must go at once."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def names(model: Model, ended: list[str] | None = None) -> TGController:
    """A controller whose stream reads the database, and says when it is closed."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def names(self, fail: bool = False) -> Iterator[str]:
            try:
                for user in model.DBSession.query(User).order_by(User.id):
                    yield f"{tg.request.params.get('of', '')}{user.name}"
                if fail:
                    raise LookupError("no more")
            finally:
                if ended is not None:
                    ended.append(f"{tg.request.path} {model.DBSession().is_active}")

        @expose()
        def count(self) -> str:
            return str(model.DBSession.query(User).count())

    return Root()


def reasons(reports: list[Report]) -> list[str]:
    return [report.reason for report in reports]


# Between pulls, and after any end, the thread carries nothing.


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("end", ["completed", "failed", "disconnected"])
def test_pull_leaves_nothing_on_the_thread(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
    end: str,
) -> None:
    """Context and database are bound while the generator runs, and only then."""
    sqlite_model.seed("ada", "bob", "eve")
    app = make_app(names(sqlite_model), sqlite_model, **wiring)
    call = Call(app, "/names?fail=1" if end == "failed" else "/names")
    for name in [b"ada", b"bob", b"eve"][: 2 if end == "disconnected" else 3]:
        assert pull(call) == name
        assert not sqlite_model.DBSession.registry.has()
    if end != "disconnected":
        with pytest.raises(StopIteration if end == "completed" else LookupError):
            pull(call)
    call.close()
    assert reasons(reports) == [end]
    assert_clean(sqlite_model)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_stream_on_postgresql_leaves_nothing(
    make_app: MakeApp,
    make_model: MakeModel,
    postgresql: str,
    wiring: dict[str, Any],
) -> None:
    """No end leaves a connection checked out, nor idle in transaction."""
    model = make_model(postgresql)
    model.seed("ada", "bob")
    app = make_app(names(model), model, **wiring)
    assert get(app, "/names").text == "adabob"
    assert_clean(model)
    with pytest.raises(LookupError):
        get(app, "/names?fail=1")
    assert_clean(model)
    call = Call(app, "/names")
    pull(call)
    call.close()
    assert_clean(model)
    call = Call(app, "/names", checked=False)
    pull(call)
    call.drop()
    assert_clean(model)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_pull_may_come_on_any_thread(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
) -> None:
    """Each pull on another thread, and the close on yet another, is as good as any."""
    sqlite_model.seed("ada", "bob", "eve")
    ended: list[str] = []
    app = make_app(names(sqlite_model, ended), sqlite_model, **wiring)
    call = Call(app, "/names")
    assert [in_thread(lambda: next(call)) for _ in range(2)] == [b"ada", b"bob"]
    in_thread(call.close)
    assert ended == ["/names True"]
    assert reasons(reports) == ["disconnected"]
    assert_clean(sqlite_model)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_streams_interleaved_on_a_thread_do_not_mix(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
) -> None:
    """Streams pulled in random order each see their own request and session."""
    sqlite_model.seed("ada", "bob", "eve")
    app = make_app(names(sqlite_model), sqlite_model, **wiring)
    calls = {of: Call(app, f"/names?of={of}") for of in "vwxyz"}
    received: dict[str, bytes] = dict.fromkeys(calls, b"")
    order = [of for of in calls for _ in range(3)]
    random.Random(7).shuffle(order)
    for of in order:
        received[of] += pull(calls[of])
    for of, call in calls.items():
        call.close()
        assert received[of] == f"{of}ada{of}bob{of}eve".encode()
    assert_clean(sqlite_model)


def test_stream_pulled_inside_a_request_leaves_it_be(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """A request that pulls a stream keeps its own context, session, transaction."""
    sqlite_model.seed("ada", "bob")
    calls: list[Call] = []
    root = names(sqlite_model)

    class Outer(TGController):
        inner = root

        @expose()
        def outer(self) -> str:
            mine = sqlite_model.DBSession()
            mine.add(User(name="carl"))
            manager = transaction.manager.manager
            seen = next(calls[0]).decode()
            assert sqlite_model.DBSession() is mine
            assert transaction.manager.manager is manager
            return f"{seen} {tg.request.path}"

    app = make_app(Outer(), sqlite_model)
    calls.append(Call(app, "/inner/names"))
    assert get(app, "/outer").text == "ada /outer"
    assert sqlite_model.names() == ["ada", "bob", "carl"]
    assert calls[0].read() == b"bob"
    assert_clean(sqlite_model)


# The ends.


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize(
    ("end", "level"),
    [("completed", "DEBUG"), ("failed", "ERROR"), ("disconnected", "DEBUG")],
)
def test_end_is_told_once(
    make_app: MakeApp,
    reports: list[Report],
    caplog: pytest.LogCaptureFixture,
    wiring: dict[str, Any],
    end: str,
    level: str,
) -> None:
    """Each end makes one report and one line, with a traceback only if it failed."""
    caplog.set_level(logging.DEBUG, "tgstream")

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self, fail: bool = False) -> Iterator[str]:
            yield "one"
            yield "two"
            if fail:
                raise LookupError("no third")

    call = Call(make_app(Root(), **wiring), "/words" + "?fail=1" * (end == "failed"))
    assert pull(call) == b"one"
    with contextlib.suppress(LookupError):
        b"".join(call) if end != "disconnected" else call.close()
    call.close()
    call.close()
    # A failed one keeps it for those who mail errors; else it would be a cycle.
    assert ("tg.locals" in call.environ) is (end == "failed")
    (report,) = reports
    two = 1 if end == "disconnected" else 2
    assert (report.reason, report.items, report.chunks) == (end, two, two)
    assert (report.bytes, report.commits) == (3 * two, 0)
    assert (report.controller, report.path) == ("Root.words", "/words")
    assert report.first_chunk_seconds is not None
    assert 0 <= report.first_chunk_seconds <= report.seconds
    (line,) = [r for r in caplog.records if r.name == "tgstream"]
    assert line.levelname == level
    assert bool(line.exc_info) == isinstance(report.error, LookupError)
    assert line.getMessage().startswith(f"Root.words at /words {end}: {two} items")


def watched(model: Model, steps: list[str]) -> None:
    """Write down what the connections of ``model`` go through."""
    sa.event.listen(model.engine, "commit", lambda c: steps.append("committed"))
    sa.event.listen(model.engine, "rollback", lambda c: steps.append("aborted"))
    sa.event.listen(model.engine, "checkin", lambda *a: steps.append("released"))


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("completed", ["closed", "committed", "released", "reported"]),
        ("failed", ["closed", "aborted", "released", "reported"]),
        ("disconnected", ["closed", "aborted", "released", "reported"]),
    ],
)
def test_end_runs_its_steps_in_order(
    make_app: MakeApp, sqlite_model: Model, end: str, expected: list[str]
) -> None:
    """The generator closes, then the transaction, then the session; then it is told."""
    steps: list[str] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def write(self) -> Iterator[str]:
            try:
                sqlite_model.DBSession.add(User(name="ada"))
                sqlite_model.DBSession.flush()
                yield "one"
                yield "two"
                if end == "failed":
                    raise LookupError
            finally:
                assert tg.request.path == "/write"
                assert sqlite_model.DBSession.query(User).count() == 1
                steps.append("closed")

    app = make_app(Root(), sqlite_model)
    watched(sqlite_model, steps)
    tg.hooks.register("tgstream.finished", lambda report: steps.append("reported"))
    call = Call(app, "/write")
    pull(call)
    if end == "failed":
        with pytest.raises(LookupError):
            call.read()
    elif end == "completed":
        call.read()
    call.close()
    assert steps == expected
    tg.hooks._hooks.pop("tgstream.finished")
    assert_clean(sqlite_model)


class Refusing:
    """A data manager whose abort fails."""

    transaction_manager = transaction.manager

    def abort(self, transaction: Any) -> None:
        raise ArithmeticError("no abort")

    def sortKey(self) -> str:
        return "refusing"


def test_step_runs_though_the_one_before_failed(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """Of several errors the first is told, and the session is released all the same."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def write(self) -> Iterator[str]:
            transaction.get().join(Refusing())
            sqlite_model.DBSession.add(User(name="ada"))
            flush()
            try:
                yield "one"
                yield "two"
            finally:
                raise LookupError("no end")

    call = Call(make_app(Root(), sqlite_model), "/write")
    pull(call)
    call.close()
    assert [type(report.error) for report in reports] == [LookupError]
    assert sqlite_model.names() == []
    assert_clean(sqlite_model)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_error_while_closing_is_told_and_not_raised(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    caplog: pytest.LogCaptureFixture,
    wiring: dict[str, Any],
) -> None:
    """A generator whose ``finally`` fails leaves neither a session nor a context."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def names(self) -> Iterator[str]:
            try:
                sqlite_model.DBSession.query(User).all()
                yield "one"
                yield "two"
            finally:
                raise LookupError("no end")

    call = Call(make_app(Root(), sqlite_model, **wiring), "/names")
    pull(call)
    call.close()
    (report,) = reports
    assert report.reason == "disconnected"
    assert isinstance(report.error, LookupError)
    (line,) = [r for r in caplog.records if r.name == "tgstream"]
    assert (line.levelname, line.exc_info and line.exc_info[1]) == (
        "ERROR",
        report.error,
    )
    assert_clean(sqlite_model)


def test_generator_that_will_not_close_is_told(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """A generator that swallows GeneratorExit holds nothing up, and is reported."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def names(self) -> Iterator[str]:
            for name in "one", "two":
                sqlite_model.DBSession.query(User).all()
                with contextlib.suppress(BaseException):
                    yield name

    call = Call(make_app(Root(), sqlite_model), "/names")
    pull(call)
    call.close()
    (report,) = reports
    assert report.reason == "disconnected"
    assert "ignored GeneratorExit" in str(report.error)
    assert_clean(sqlite_model)


# Dropped, and closed at odd times.


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("pulls", [0, 1, 2])
def test_dropped_stream_ends_at_once(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
    pulls: int,
) -> None:
    """A body that no server holds any more ends, whether or not it was begun."""
    sqlite_model.seed("ada", "bob", "eve")
    ended: list[str] = []
    app = make_app(names(sqlite_model, ended), sqlite_model, **wiring)
    call = Call(app, "/names", checked=False)
    for _ in range(pulls):
        pull(call)
    begun = pulls > 0 or not wiring["debug"]  # the debugger begins with the first pull
    call.drop()
    assert ended == ["/names True"] * begun
    assert reasons(reports) == ["disconnected"] * begun
    assert_clean(sqlite_model)


@pytest.mark.usefixtures("no_collector")
def test_stream_dropped_on_another_thread_ends_there(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """Wherever the last reference goes, the stream ends, and the thread stays clean."""
    sqlite_model.seed("ada", "bob")
    ended: list[str] = []
    call = Call(
        make_app(names(sqlite_model, ended), sqlite_model), "/names", checked=False
    )
    pull(call)
    in_thread(call.drop)
    assert ended == ["/names True"]
    assert reasons(reports) == ["disconnected"]
    assert_clean(sqlite_model)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("pulls", [0, 1])
@pytest.mark.parametrize("how", ["drop", "close"])
def test_stream_ended_inside_a_request_leaves_it_be(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    pulls: int,
    how: str,
) -> None:
    """In the middle of another request, that request's session and context stay."""
    sqlite_model.seed("ada", "bob")
    calls: list[Call] = []
    root = names(sqlite_model)

    class Outer(TGController):
        inner = root

        @expose()
        def outer(self) -> str:
            mine = sqlite_model.DBSession()
            mine.add(User(name="carl"))
            getattr(calls[0], how)()
            assert reasons(reports) == ["disconnected"]
            assert sqlite_model.DBSession() is mine
            return str(tg.request.path)

    app = make_app(Outer(), sqlite_model)
    calls.append(Call(app, "/inner/names", checked=False))
    for _ in range(pulls):
        pull(calls[0])
    assert get(app, "/outer").text == "/outer"
    assert sqlite_model.names() == ["ada", "bob", "carl"]
    assert_clean(sqlite_model)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("tm", [True, False])
def test_stream_closed_inside_a_request_that_is_done_with_its_session(
    make_app: MakeApp, sqlite_model: Model, tm: bool
) -> None:
    """The request's session is removed at its end, though it is not used again."""
    sqlite_model.seed("ada", "bob")
    streams: list[Stream] = []
    calls: list[Call] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def names(self) -> Iterator[str]:
            streams.append(current_stream())
            yield "one"
            yield "two"

        @expose()
        def stop(self) -> str:
            count = sqlite_model.DBSession.query(User).count()
            streams.pop().close()
            return str(count)

    app = make_app(Root(), sqlite_model, tm__enabled=tm)
    calls.append(Call(app, "/names"))
    pull(calls[0])
    assert get(app, "/stop").text == "2"
    calls[0].close()
    assert_clean(sqlite_model)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_stream_closed_before_its_first_pull_ends(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
) -> None:
    """A client that is gone at once leaves nothing open."""
    sqlite_model.seed("ada", "bob")
    app = make_app(names(sqlite_model), sqlite_model, **wiring)
    call = Call(app, "/names", checked=False)
    call.close()
    call.close()
    assert reasons(reports) == ["disconnected"] * (not wiring["debug"])
    assert_clean(sqlite_model)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_close_during_a_pull_takes_effect_when_it_returns(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any]
) -> None:
    """Closed from another thread, the stream ends on the one that pulls it."""
    entered, go, ended = threading.Event(), threading.Event(), []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def wait(self) -> Iterator[str]:
            try:
                yield "one"
                entered.set()
                assert go.wait(10)
                yield "two"
                yield "three"
            finally:
                ended.append((tg.request.path, threading.get_ident()))

    call = Call(make_app(Root(), **wiring), "/wait", checked=False)
    assert pull(call) == b"one"
    received: list[bytes] = []
    thread = threading.Thread(target=lambda: received.append(next(call)))
    thread.start()
    assert entered.wait(10)
    call.close()
    assert ended == []
    go.set()
    thread.join(10)
    assert received == [b"two"]
    assert ended == [("/wait", thread.ident)]
    assert reasons(reports) == ["disconnected"]
    with contextlib.suppress(StreamError):
        assert list(call) == []
    call.close()
    assert reasons(reports) == ["disconnected"]


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("chunks", [0, 1])
def test_stream_that_closes_itself_is_broken(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any], chunks: int
) -> None:
    """A generator that closes its own stream ends it, and nobody takes it for whole."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            yield from ["one"] * chunks
            current_stream().close()
            yield "two"
            yield "three"

    call = Call(make_app(Root(), **wiring), "/words", checked=False)
    assert reasons(reports) == ["disconnected"] * (not (chunks or wiring["debug"]))
    with pytest.raises(StreamError, match="closed before its end"):
        while True:
            pull(call)
    call.close()
    assert reasons(reports) == ["disconnected"]


def test_close_on_many_threads_ends_it_once(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """However many close it at the same time, there is one end."""
    streams: list[Stream] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            streams.append(current_stream())
            yield "one"
            yield "two"

    app = make_app(Root())
    calls = [Call(app, "/words") for _ in range(50)]
    barrier = threading.Barrier(4)

    def close_all() -> None:
        for each in streams:
            barrier.wait(10)
            each.close()
        assert_thread_clean()

    threads = [threading.Thread(target=close_all) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    sys.setswitchinterval(interval)
    assert reasons(reports) == ["disconnected"] * 50
    for call in calls:
        call.close()


def test_response_while_the_generator_closes_leaves_no_source_open(
    make_app: MakeApp,
) -> None:
    """A ``finally`` that aborts does not keep the object behind its generator open."""
    closed = threading.Event()

    class Source:
        def __iter__(self) -> Iterator[str]:
            try:
                yield "one"
                yield "two"
            finally:
                tg.abort(404)

        def close(self) -> None:
            closed.set()

    class First:
        content_type = "text/plain"

        def encode(self, items: Any) -> Iterator[str]:
            yield next(iter(items))

    class Root(TGController):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            return Stream(Source(), First(), chunk_size=10)

    assert get(make_app(Root())).status == "404 Not Found"
    assert closed.is_set()


@pytest.mark.usefixtures("no_collector")
def test_stream_that_ends_while_its_response_departs_is_freed_at_once(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The monitor may end it before the error guard can be told."""
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
    assert next(call) == b"one"  # it was made in time
    call.close()
    call.drop()
    assert bodies[0]() is None


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("end", ["completed", "closed", "dropped"])
def test_ended_stream_is_freed_at_once(
    make_app: MakeApp, wiring: dict[str, Any], end: str
) -> None:
    """What a stream was made of goes with it, though the server keeps the environ."""
    items: list[weakref.ref[Any]] = []

    class Words:
        def __init__(self) -> None:
            self.left = ["three", "two", "one"]

        def __iter__(self) -> Iterator[str]:
            return self

        def __next__(self) -> str:
            if not self.left:
                raise StopIteration
            return self.left.pop()

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Words:
            words = Words()
            items.append(weakref.ref(words))
            return words

    call = Call(make_app(Root(), **wiring), "/words", checked=False)
    pull(call)
    assert items[0]() is not None
    if end == "completed":
        assert b"".join(call) == b"twothree"
    if end != "dropped":
        call.close()
    call.drop()
    assert items[0]() is None


def test_stream_that_closes_itself_in_its_last_pull_is_whole(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """Nothing is missing then, whether it is one chunk or several."""

    class Root(TGController):
        @expose(content_type="text/plain")
        def words(self, size: str) -> Stream:
            def words() -> Iterator[str]:
                yield "one"
                current_stream().close()

            return Stream(words(), chunk_size=int(size))

    app = make_app(Root())
    assert get(app, "/words/100").text == "one"
    assert get(app, "/words/0").text == "one"
    assert reasons(reports) == ["completed"] * 2


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("how", ["close", "drop"])
def test_generator_may_commit_while_it_closes(
    make_app: MakeApp, sqlite_model: Model, how: str
) -> None:
    """A generator may use the hooks in its ``finally``, whether dropped or closed."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def write(self) -> Iterator[str]:
            try:
                yield "one"
                yield "two"
            finally:
                sqlite_model.DBSession.add(User(name=f"ada{current_stream().items}"))
                commit()

    call = Call(make_app(Root(), sqlite_model), "/write", checked=False)
    pull(call)
    getattr(call, how)()
    assert sqlite_model.names() == ["ada1"]
    assert_clean(sqlite_model)


# One stream, one request, one thread at a time.


def test_stream_given_to_two_requests_is_refused(make_app: MakeApp) -> None:
    """The second request gets an error, not the first one's data."""

    def letters() -> Iterator[str]:
        yield "a"
        yield "b"

    kept = Stream(letters())
    generator = letters()

    class Root(TGController):
        @expose(content_type="text/plain")
        def kept(self) -> Stream:
            return kept

        @expose(content_type="text/plain")
        def generator(self) -> Stream:
            return Stream(generator)

        @expose(content_type="text/plain")
        @stream
        def decorated(self) -> Iterator[str]:
            return generator

    app = make_app(Root(), trace_errors__enable=False)
    first = [Call(app, "/kept"), Call(app, "/generator")]
    for path in "/kept", "/generator", "/decorated":
        with pytest.raises(StreamError, match="serves one request"):
            Call(app, path, checked=False)
    assert [call.read() for call in first] == [b"ab", b"ab"]
    for path in "/kept", "/generator", "/decorated":
        with pytest.raises(StreamError, match="serves one request"):
            Call(app, path, checked=False)


@pytest.mark.parametrize("order", ["cached above", "cached below"])
def test_cached_stream_is_refused(make_app: MakeApp, order: str) -> None:
    """With ``@cached`` on it, a stream's second request is an error that says so."""

    def letters(self: Any) -> Iterator[str]:
        yield f"a{tg.request.headers['X-Of']}"
        yield "b"

    decorators: list[Any] = [stream, cached(type="memory")]
    if order == "cached below":
        decorators.reverse()
    for decorate in [*decorators, expose(content_type="text/plain")]:
        letters = decorate(letters)
    letters.__name__ = order

    class Root(TGController):
        pass

    Root.letters = letters
    app = make_app(
        Root(),
        trace_errors__enable=False,
        cache__enabled=True,
        cache__type="memory",
    )
    assert get(app, "/letters", HTTP_X_OF="1").text == "a1b"
    with pytest.raises(StreamError, match="remove @cached"):
        Call(app, "/letters", checked=False, HTTP_X_OF="2")


def test_pull_by_two_threads_disturbs_nobody(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The second to pull gets an error; the first one's chunk is as it should be."""
    entered, go = threading.Event(), threading.Event()

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def wait(self) -> Iterator[str]:
            yield "one"
            entered.set()
            assert go.wait(10)
            yield "two"

    bare = unplugged(
        make_app(Root(), registry_streaming=False, trace_errors__enable=False)
    )
    call = Call(bare, "/wait", checked=False)
    assert pull(call) == b"one"
    received: list[bytes] = []
    thread = threading.Thread(target=lambda: received.append(next(call)))
    thread.start()
    assert entered.wait(10)
    with pytest.raises(ValueError, match="already executing"):
        next(call)
    with pytest.raises(StreamError, match="iterated"):
        next(iter(call.body))
    assert_thread_clean()
    go.set()
    thread.join(10)
    assert received == [b"two"]
    assert call.read() == b""
    assert reasons(reports) == ["completed"]


# Those who are told.


@pytest.mark.parametrize("wiring", WIRINGS)
def test_report_hook_that_fails_changes_nothing(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
) -> None:
    """A hook that raises is logged by TG, and the next hook is called all the same."""
    sqlite_model.seed("ada", "bob")

    def fail(report: Report) -> None:
        raise LookupError("no report")

    app = make_app(names(sqlite_model), sqlite_model, **wiring)
    tg.hooks.register("tgstream.finished", fail)
    tg.hooks._hooks["tgstream.finished"].reverse()
    try:
        assert get(app, "/names").text == "adabob"
    finally:
        tg.hooks.disconnect("tgstream.finished", fail)
    assert reasons(reports) == ["completed"]
    assert_clean(sqlite_model)


@pytest.mark.parametrize("end", ["completed", "failed", "closed", "dropped"])
def test_report_hook_may_use_the_database(
    make_app: MakeApp, model: Model, end: str
) -> None:
    """What a hook reads or writes leaves no session, no connection, no transaction."""
    model.seed("ada", "bob")
    counts = []

    def count(report: Report) -> None:
        model.DBSession.add(User(name="eve"))
        counts.append(model.DBSession.query(User).count())

    app = make_app(names(model), model)
    tg.hooks.register("tgstream.finished", count)
    try:
        call = Call(app, f"/names{'?fail=1' * (end == 'failed')}", checked=False)
        pull(call)
        if end == "failed":
            with pytest.raises(LookupError):
                call.read()
        elif end == "completed":
            call.read()
        call.close() if end == "closed" else call.drop()
    finally:
        tg.hooks.disconnect("tgstream.finished", count)
    assert counts == [3]
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


# Short streams.


@pytest.mark.parametrize(
    ("path", "length"),
    [
        ("/words/0?size=100", "0"),
        ("/words/2?size=100", "6"),
        ("/words/2?size=3", None),
        ("/words/0?size=0", "0"),
        ("/words/1?size=0", None),
    ],
)
def test_short_stream_has_a_length(
    make_app: MakeApp, reports: list[Report], path: str, length: str | None
) -> None:
    """A stream that ends in its first pull tells how long it is; one that sends each
    item at once waits for no second, so that only its empty one does."""

    class Root(TGController):
        @expose(content_type="text/plain")
        def words(self, count: str, size: str) -> Stream:
            return Stream(iter(["one"] * int(count)), chunk_size=int(size))

    call = Call(make_app(Root()), path)
    assert call.headers.get("Content-Length") == length
    assert len(call.read()) == 3 * int(path[7])
    assert reasons(reports) == ["completed"]


# Strays: what is no Exception.


STRAYS = [SystemExit, GeneratorExit]


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("stray", [*STRAYS, KeyboardInterrupt])
def test_stray_in_a_pull_is_a_failure(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
    stray: type[BaseException],
) -> None:
    """What would end a server's thread, and so hang its client, breaks the stream."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            sqlite_model.DBSession.add(User(name="ada"))
            flush()
            yield "one"
            raise stray

    call = Call(make_app(Root(), sqlite_model, **wiring), "/words")
    assert pull(call) == b"one"
    with (
        ThreadPoolExecutor(1) as thread,
        pytest.raises(StreamError, match=f"words raised {stray.__name__}") as raised,
    ):
        thread.submit(pull, call).result()
    call.close()
    assert type(raised.value.__cause__) is stray
    assert [(r.reason, r.error) for r in reports] == [("failed", raised.value)]
    assert sqlite_model.names() == []
    assert_clean(sqlite_model)


@pytest.mark.parametrize("stray", STRAYS)
def test_stray_before_the_first_chunk_is_an_ordinary_error(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    stray: type[BaseException],
) -> None:
    """The request fails as for any exception, and nothing is left."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            sqlite_model.DBSession.add(User(name="ada"))
            flush()
            raise stray
            yield

    assert get(make_app(Root(), sqlite_model), "/words").status.startswith("500 ")
    assert [(r.reason, type(r.error)) for r in reports] == [("failed", StreamError)]
    assert sqlite_model.names() == []
    assert_clean(sqlite_model)


def test_keyboard_interrupt_in_the_main_thread_is_for_the_process(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """Ctrl-C ends a server that serves in its main thread, and the stream with it."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            yield "one"
            raise KeyboardInterrupt

    call = Call(make_app(Root(), sqlite_model), "/words")
    assert pull(call) == b"one"
    with pytest.raises(KeyboardInterrupt):
        pull(call)
    call.close()
    assert reasons(reports) == ["failed"]
    assert_clean(sqlite_model)


# One thread pulls while another ends.


@pytest.mark.parametrize("end", ["expired", "drained", "disconnected"])
def test_generator_can_commit_in_its_finally_while_the_server_pulls(
    make_app: MakeApp, model: Model, ended: Callable[[], Report], end: str
) -> None:
    """The thread of the generator is in the stream, whatever another thread does."""
    ending, pulled = threading.Event(), threading.Event()
    streams: list[Stream] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(max_seconds=0.1 if end == "expired" else None)
        def words(self) -> Iterator[str]:
            streams.append(current_stream())
            try:
                yield "one"
                yield "two"
            finally:
                ending.set()
                assert pulled.wait(10)
                assert current_stream().items == 1
                model.DBSession.add(User(name="ada"))
                commit()

    call = Call(make_app(Root(), model), "/words", checked=False)
    assert pull(call) == b"one"
    with ThreadPoolExecutor(1) as other:
        if end == "drained":
            other.submit(drain)
        elif end == "disconnected":
            other.submit(streams[0].close)
        assert ending.wait(10)
        with pytest.raises(StreamError, match="before its end"):
            pull(call)
        pulled.set()
        report = ended()
    assert (report.reason, report.error, report.commits) == (end, None, 1)
    streams.clear()
    call.close()
    assert model.names() == ["ada"]
    assert_clean(model)


def test_stream_of_another_thread_is_not_running_here(
    make_app: MakeApp, model: Model
) -> None:
    """While a generator runs on one thread, the hooks are refused on another."""
    refused: list[BaseException] = []

    def commit_elsewhere() -> None:
        try:
            commit()
        except StreamError as error:
            refused.append(error)

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            model.DBSession.add(User(name="ada"))
            thread = threading.Thread(target=commit_elsewhere)
            thread.start()
            thread.join()
            yield "one"

    assert get(make_app(Root(), model), "/words").text == "one"
    assert "where no stream is running" in str(refused[0])
    assert model.names() == ["ada"]


# Clients that disconnect, and generators that raise because of it.


@pytest.mark.parametrize("wiring", WIRINGS)
def test_error_after_the_client_has_left_is_a_disconnect(
    make_app: MakeApp,
    model: Model,
    reports: list[Report],
    caplog: pytest.LogCaptureFixture,
    wiring: dict[str, Any],
) -> None:
    """Nothing is stored, nothing is logged above DEBUG, and the transfer is aborted."""
    caplog.set_level(logging.DEBUG, "tgstream")
    left = threading.Event()

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def relay(self) -> Iterator[str]:
            model.DBSession.add(User(name="ada"))
            yield "one"
            left.set()
            raise TimeoutError("the upstream was cut")

    app = make_app(Root(), model, **wiring)
    asked: dict[str, Any] = {"waitress.client_disconnected": left.is_set}
    call = Call(app, "/relay", checked=False, **asked)
    with pytest.raises(ConnectionResetError, match="relay has disconnected"):
        call.read()
    assert [(r.reason, r.error) for r in reports] == [("disconnected", None)]
    assert {r.levelname for r in caplog.records if r.name == "tgstream"} == {"DEBUG"}
    assert model.names() == []
    assert_clean(model)


def test_error_before_the_first_chunk_and_after_the_client_has_left(
    make_app: MakeApp, reports: list[Report], caplog: pytest.LogCaptureFixture
) -> None:
    """The application makes its error page, and the stream is reported disconnected."""
    caplog.set_level(logging.DEBUG, "tgstream")

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def upload(self) -> Iterator[str]:
            yield tg.request.body_file.read(100).decode()

    call = Call(
        make_app(Root()),
        "/upload",
        "POST",
        checked=False,
        CONTENT_LENGTH="100",
        CONTENT_TYPE="application/octet-stream",
    )
    call.read()
    assert call.status_int == 500
    assert [(r.reason, r.error) for r in reports] == [("disconnected", None)]
    assert {r.levelname for r in caplog.records if r.name == "tgstream"} == {"DEBUG"}


def test_error_while_the_client_is_there_is_a_failure(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """Also a connection that was reset, if it was not the client's."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def relay(self) -> Iterator[str]:
            yield "one"
            raise ConnectionResetError("the upstream was cut")

    asked: dict[str, Any] = {"waitress.client_disconnected": lambda: False}
    call = Call(make_app(Root()), "/relay", **asked)
    with pytest.raises(ConnectionResetError, match="upstream"):
        call.read()
    assert [report.reason for report in reports] == ["failed"]


# A process that forks.


@pytest.mark.parametrize("comes_out", ["raises", "exits", "returns", "yields"])
@pytest.mark.parametrize("pulls", [0, 1])
def test_forked_process_ends_nothing_of_its_parent(
    make_app: MakeApp,
    make_model: MakeModel,
    postgresql: str,
    reports: list[Report],
    comes_out: str,
    pulls: int,
) -> None:
    """A child that comes out of the generator exits. The parent's stream is whole."""
    model = make_model(postgresql)
    codes: list[int] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            yield from ["one"] * pulls
            model.DBSession.add(User(name="ada"))
            flush()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: of threads
                child = os.fork()
            if child:
                codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            elif comes_out == "raises":
                raise LookupError
            elif comes_out == "exits":
                sys.exit(7)
            elif comes_out == "returns":
                return
            yield "two"

    parent = os.getpid()
    try:
        call = Call(make_app(Root(), model), "/words")
        assert call.read() == b"one" * pulls + b"two"
    finally:
        if os.getpid() != parent:
            os._exit(99)
    assert codes == [7 if comes_out == "exits" else 1]
    assert [(r.reason, r.error) for r in reports] == [("completed", None)]
    assert model.names() == ["ada"]
    assert_clean(model)


def test_forked_process_that_drops_a_stream_ends_nothing_of_its_parent(
    make_app: MakeApp, make_model: MakeModel, postgresql: str, reports: list[Report]
) -> None:
    """Between two pulls, too: the parent's transaction goes on."""
    model = make_model(postgresql)

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            model.DBSession.add(User(name="ada"))
            flush()
            yield "one"
            yield "two"

    call = Call(make_app(Root(), model), "/words", checked=False)
    assert next(call) == b"one"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: of the threads
        child = os.fork()
    if not child:
        try:
            call.close()
            call.drop()
            gc.collect()
            os._exit(len(reports))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert call.read() == b"two"
    assert reasons(reports) == ["completed"]
    assert model.names() == ["ada"]
    assert_clean(model)
