"""Streams and requests on the same thread, and what ended streams leave behind."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import transaction
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from tg import TGController, expose

from tests.conftest import MakeApp, Root, assert_clean
from tests.database.conftest import (
    ModelRoot,
    assert_thread_works,
    find_user,
    seed_note,
    stream_or_plain,
)
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import Call, get
from tgstream import Report, Stream

# Streams beside each other.


def test_streams_that_alternate_keep_their_changes_apart(
    make_app: MakeApp, model: Model
) -> None:
    """An uncommitted change never reaches the commit of another stream or request."""
    count = iter(range(100))

    def body() -> Iterator[str]:
        me = next(count)
        for number in range(3):
            model.DBSession.add(User(name=f"stream{me}.{number}"))
            if not model.sqlite:  # which has one writer at a time
                model.DBSession.flush()
            yield "item"

    app = make_app(ModelRoot(model, body), model)
    calls = [Call(app, checked=False) for _ in range(4)]
    for number in range(2):
        for call in calls:
            next(call)
        assert get(app, f"/add?name=plain{number}").text == "added"
    assert model.names() == ["plain0", "plain1"]
    calls[0].close()
    calls[1].drop()
    assert get(app, "/add?name=plain2").text == "added"
    assert model.names() == ["plain0", "plain1", "plain2"]
    calls[2].read()
    assert get(app, "/add?name=plain3").text == "added"
    calls[3].read()
    assert sorted(model.names()) == [
        *(f"plain{number}" for number in range(4)),
        *(f"stream{me}.{number}" for me in (2, 3) for number in range(3)),
    ]
    assert_clean(model)


# Sessions that TG removes when a body is closed.


@pytest.mark.parametrize("cyclic", [False, True])
def test_stream_dropped_in_a_request_keeps_its_session(
    make_app: MakeApp, model: Model, cyclic: bool
) -> None:
    """TG removes the session of the thread that closes a body, but not while in use."""
    calls: list[Call] = []

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="lost"))
        yield "one"
        yield "two"

    class Dropping(ModelRoot):
        @expose(content_type="text/plain")
        def drop(self) -> str:
            session = model.DBSession()
            session.add(User(name="ada"))
            drop(calls, cyclic)
            assert model.DBSession() is session
            model.DBSession.add(User(name="bob"))
            return "dropped"

    app = make_app(Dropping(model, body), model)
    calls.append(Call(app, checked=False))
    next(calls[0])
    assert get(app, "/drop").text == "dropped"
    assert model.names() == ["ada", "bob"]
    assert_thread_works(app, model)


def drop(calls: list[Call], cyclic: bool) -> None:
    """Drop the last call. In a cycle, the garbage collector drops it."""
    call = calls.pop()
    if cyclic:
        cycle: list[Any] = [call]
        cycle.append(cycle)
        del call, cycle
        gc.collect()
    else:
        call.drop()


@pytest.mark.parametrize("cyclic", [False, True])
def test_stream_dropped_in_a_stream_keeps_its_session(
    make_app: MakeApp, model: Model, cyclic: bool
) -> None:
    """The session of a stream that is being pulled stays, too."""
    calls: list[Call] = []

    def body() -> Iterator[str]:
        dropping = bool(calls)
        model.DBSession.add(User(name="ada" if dropping else "lost"))
        yield "one"
        session = model.DBSession()
        if dropping:
            drop(calls, cyclic)
        assert model.DBSession() is session
        model.DBSession.add(User(name="bob"))
        yield "two"

    app = make_app(ModelRoot(model, body), model)
    calls.append(Call(app, checked=False))
    next(calls[0])
    assert get(app).text == "onetwo"
    assert model.names() == ["ada", "bob"]
    assert_thread_works(app, model)


def test_stream_closed_by_hand_does_not_keep_the_next_session(
    make_app: MakeApp, model: Model
) -> None:
    """If no removal of TG follows ``close()``, the next session is not kept for it."""
    streams: list[Stream] = []

    def body() -> Iterator[str]:
        yield "one"

    class Closing(ModelRoot):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            streams.append(super().index())
            return streams[0]

        @expose(content_type="text/plain")
        def close(self) -> str:
            model.DBSession.add(User(name="ada"))
            streams.pop().close()
            return "closed"

    app = make_app(Closing(model, body), model)
    call = Call(app)
    assert get(app, "/close").text == "closed"
    assert model.names() == ["ada"]
    call.close()
    assert_thread_works(app, model)


def test_removals_are_counted(make_app: MakeApp, sqlite_model: Model) -> None:
    """Two bodies that are dropped at once keep the session over both removals."""
    model = sqlite_model
    calls: list[Call] = []

    class Second:
        """Dropped with the first body, while the first body is being closed."""

        def __del__(self) -> None:
            calls.pop().drop()

    def items() -> Iterator[str]:
        second = Second()
        yield "a"
        yield str(second)

    class Root(TGController):
        @expose(content_type="text/plain")
        def stream(self) -> Stream:
            return Stream(items())

        @expose(content_type="text/plain")
        def plain(self) -> Stream:
            return Stream(iter(["a", "b"]))

        @expose(content_type="text/plain")
        def drop(self) -> str:
            session = model.DBSession()
            session.add(User(name="ada"))
            calls.pop().drop()
            return str(model.DBSession() is session)

    app = make_app(Root(), model)
    for path in ("/plain", "/stream"):
        calls.append(Call(app, path, checked=False))
        next(calls[-1])
    assert get(app, "/drop").text == "True"
    assert model.names() == ["ada"]
    assert_clean(model)


# Failures.


@pytest.mark.parametrize("raises", [False, True])
def test_cleanup_that_fails_leaves_nothing(
    make_app: MakeApp, model: Model, reports: list[Report], raises: bool
) -> None:
    """A ``finally`` may raise or write after the client has disconnected."""

    def body() -> Iterator[str]:
        try:
            model.DBSession.add(User(name="lost"))
            model.DBSession.flush()
            yield "one"
        finally:
            model.DBSession.add(User(name="lost, too"))
            model.DBSession.flush()
            if raises:
                raise ValueError("in finally")

    app = make_app(ModelRoot(model, body), model)
    call = Call(app)
    next(call)
    call.close()
    assert model.names() == []
    assert [(each.reason, each.error is not None) for each in reports] == [
        ("disconnected", raises)
    ]
    assert_thread_works(app, model)


def test_connection_that_dies_fails_only_its_stream(
    make_app: MakeApp, postgresql: str, make_model: MakeModel
) -> None:
    """PostgreSQL terminates the connection of the stream."""
    model = make_model(postgresql)

    def body() -> Iterator[str]:
        yield str(model.DBSession.scalar(sa.text("SELECT pg_backend_pid()")))
        model.DBSession.add(User(name="lost"))

    app = make_app(ModelRoot(model, body), model)
    call = Call(app)
    model.fetch(f"SELECT pg_terminate_backend({int(next(call))})")
    with pytest.raises(sa.exc.OperationalError):
        next(call)
    call.close()
    assert model.names() == []
    assert_thread_works(app, model)


def test_stream_after_a_failed_request_works(make_app: MakeApp, model: Model) -> None:
    """The request has left its transaction in a failed state."""

    class Root(TGController):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            return Stream(body())

        @expose(content_type="text/plain")
        def broken(self) -> str:
            model.DBSession.add(User(name="ada"))
            with contextlib.suppress(IntegrityError):
                transaction.commit()
            return "broken"

    def body() -> Iterator[str]:
        model.DBSession.add(Note(text="stored"))
        yield "one"

    app = make_app(Root(), model)
    model.seed("ada")
    assert get(app, "/broken").status.startswith("500")
    assert get(app).text == "one"
    assert model.texts() == ["stored"]
    assert_clean(model)


# Memory.


def test_sessions_of_ended_streams_are_freed(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """Nothing keeps a stream's session after the stream has ended."""
    model = sqlite_model
    sessions: list[weakref.ref[Session]] = []

    def body() -> Iterator[str]:
        sessions.append(weakref.ref(model.DBSession()))
        model.DBSession.add(User(name=f"user{len(sessions)}"))
        yield "one"
        yield "two"

    app = make_app(Root(body), model)
    for number in range(6):
        call = Call(app, checked=False)
        next(call)
        if number % 2:
            call.read()
        else:
            call.drop()
    del call
    gc.collect()
    assert [reference() for reference in sessions] == [None] * 6
    assert len(model.names()) == 3
    assert_clean(model)


def test_session_is_freed_without_the_collector(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """When the stream ends, its session and the objects in it are freed."""
    model = sqlite_model
    sessions: list[weakref.ref[Session]] = []

    def body() -> None:
        find_user(model, "ada")
        sessions.append(weakref.ref(model.DBSession()))

    seed_note(model)
    app = make_app(stream_or_plain(model, body), model)
    get(app, "/stream")
    gc.collect()
    gc.disable()
    try:
        get(app, "/stream")
        assert [session() for session in sessions] == [None, None]
    finally:
        gc.enable()
