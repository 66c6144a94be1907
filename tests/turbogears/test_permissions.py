"""``recheck_seconds``: the permission of a stream is checked again while it runs."""

from __future__ import annotations

import gzip
import io
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
import tg
from repoze.who.plugins.basicauth import BasicAuthPlugin
from tg import RestController, TGController, expose, predicates, require
from tg.appwrappers.base import ApplicationWrapper
from tg.appwrappers.identity import IdentityApplicationWrapper
from webob import Request
from webtest import TestApp

import tgstream
from tests.authentication import REVOKE, add_users, auth_options, cookie_of
from tests.conftest import LiveServer, MakeApp, assert_clean, pool
from tests.model import MakeModel, Model, Note, User
from tests.pages import DOCS, blocks
from tests.turbogears.support import SESSION, UNTRACED, Middleware, install_middleware
from tests.wsgi import Call, get
from tgstream import (
    NDJSON,
    SSE,
    Report,
    Stream,
    StreamError,
    commit,
    current_stream,
    flush,
    listen,
    rollback,
    rows,
    stream,
)
from tgstream.core.heartbeat import HEARTBEAT
from tgstream.live.backends.database_tables import create_tables

EACH = 1e-9
"""Seconds after which each chunk has its own check."""
LONG = 3600.0


@pytest.fixture
def users(model: Model) -> Model:
    """The model with the user ``ada``, who is a member of ``staff``."""
    add_users(model)
    return model


DELETE = ["DELETE FROM notes", "DELETE FROM users WHERE name = 'ada'"]


class IsStaff(predicates.Predicate):
    """A predicate of an application, which reads all that a request has."""

    message = "You are not in the staff"

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.count = 0

    def evaluate(self, environ: Any, credentials: Any) -> None:
        self.count += 1
        state = tg.request.dispatch_state
        assert environ is tg.request.environ
        assert tg.request.path == "/events"
        assert state.action.__name__ == "events"
        assert isinstance(state.controller, TGController)
        if not tg.request.identity:
            self.unmet()
        name = tg.request.identity["repoze.who.userid"]
        found = self.model.DBSession.query(User).filter_by(name=name).one()
        assert found is tg.request.identity["user"]
        if not found.notes:
            self.unmet()


def make_root(
    predicate: Any,
    seconds: float = EACH,
    items: Callable[[], Any] = lambda: iter("abcdef"),
    format: Any = SSE,
    **options: Any,
) -> TGController:
    """A controller with one stream, which the predicate protects."""

    class Root(TGController):
        @expose()
        @require(predicate)
        @stream(format, recheck_seconds=seconds, **options)
        def events(self) -> Any:
            return items()

    return Root()


def open_events(app: Any, path: str = "/events", user: str = "ada") -> Call:
    return Call(app, path, HTTP_COOKIE=cookie_of(user))


def status(app: Any, path: str = "/events") -> int:
    return get(app, path, HTTP_COOKIE=cookie_of("ada")).status_int


def assert_refused(app: Any, users: Model, code: int, path: str = "/events") -> None:
    """The stream runs, ends when the permission is gone, and cannot be opened again."""
    call = open_events(app, path)
    assert call.status == "200 OK"
    assert [next(call), next(call)] == [b"data: a\n\n", b"data: b\n\n"]
    for statement in DELETE if code == 401 else [REVOKE]:
        users.execute(statement)
    assert call.read() == b""
    assert status(app, path) == code
    assert_clean(users)


PREDICATES: dict[str, tuple[Callable[[Model], Any], int]] = {
    "not_anonymous": (lambda _: predicates.not_anonymous(), 401),
    "is_user": (lambda _: predicates.is_user("ada"), 401),
    "in_group": (lambda _: predicates.in_group("staff"), 403),
    "has_permission": (lambda _: predicates.has_permission("staff"), 403),
    "all": (
        lambda _: predicates.All(
            predicates.not_anonymous(), predicates.in_group("staff")
        ),
        403,
    ),
    "any": (lambda _: predicates.in_any_group("owners", "staff"), 403),
    "custom": (IsStaff, 403),
}


@pytest.mark.parametrize("name", PREDICATES)
def test_stream_ends_when_its_predicate_is_not_met_any_more(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report], name: str
) -> None:
    """The event stream ends normally, and the client that reconnects is refused."""
    make, code = PREDICATES[name]
    add_users(sqlite_model)
    root = make_root(make(sqlite_model))
    app = make_app(root, sqlite_model, **auth_options(sqlite_model))
    assert_refused(app, sqlite_model, code)
    assert [(report.reason, report.error) for report in reports] == [("refused", None)]


IN_STAFF = predicates.in_group("staff")


def make_tree(name: str) -> TGController:
    """Controllers of which one has ``allow_only``, or a requirement of its own kind."""

    class Leaf(TGController):
        allow_only = IN_STAFF if name == "leaf" else None

        @expose()
        @stream(SSE, recheck_seconds=EACH)
        def events(self) -> Iterator[str]:
            yield from "abcdef"

        @expose()
        def made(self) -> Stream:
            return Stream(iter("abcdef"), SSE, recheck_seconds=EACH)

    class Rest(RestController):
        @expose()
        @require(IN_STAFF if name == "rest" else predicates.not_anonymous())
        @stream(SSE, recheck_seconds=EACH)
        def get_all(self) -> Iterator[str]:
            yield from "abcdef"

    class Stacked(TGController):
        @require(predicates.not_anonymous())
        @expose()
        @stream(SSE, recheck_seconds=EACH)
        @require(IN_STAFF if name == "stacked" else predicates.not_anonymous())
        def events(self) -> Iterator[str]:
            yield from "abcdef"

    class Base(TGController):
        @expose("json", inherit=True)
        @require(IN_STAFF)
        def events(self) -> None:
            """The method that the next class overrides."""

    class Inherited(Base):
        @expose(inherit=True)
        @stream(SSE, recheck_seconds=EACH)
        def events(self) -> Iterator[str]:
            yield from "abcdef"

    class Checked(TGController):
        leaf = Leaf()

        def _check_security(self) -> None:
            if not IN_STAFF.is_met(tg.request.environ):
                tg.abort(403)

    class Found(TGController):
        @expose()
        def _lookup(self, *remainder: str) -> Any:
            class Of(Leaf):
                allow_only = IN_STAFF

            return Of(), remainder[1:]

    class Middle(TGController):
        allow_only = require(IN_STAFF) if name == "parent" else None
        leaf = Leaf()
        rest = Rest()
        stacked = Stacked()
        inherited = Inherited()
        checked = Checked()
        found = Found()

    class Root(TGController):
        allow_only = predicates.not_anonymous() if name != "checked" else None
        middle = Middle()

    return Root()


PATHS = {
    "leaf": "/middle/leaf/events",
    "parent": "/middle/leaf/made",
    "rest": "/middle/rest",
    "stacked": "/middle/stacked/events",
    "inherited": "/middle/inherited/events",
    "checked": "/middle/checked/leaf/events",
    "lookup": "/middle/found/1/events",
}


@pytest.mark.parametrize("name", PATHS)
def test_all_requirements_of_the_path_are_checked_again(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report], name: str
) -> None:
    """Those of the method and of all controllers above it, however they are written."""
    add_users(sqlite_model)
    app = make_app(make_tree(name), sqlite_model, **auth_options(sqlite_model))
    assert_refused(app, sqlite_model, 403, PATHS[name])
    assert [report.reason for report in reports] == ["refused"]


def test_parent_of_a_parent_is_checked_again(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """``allow_only`` of the root controller ends the stream of a deleted user."""
    add_users(sqlite_model)
    app = make_app(make_tree("none"), sqlite_model, **auth_options(sqlite_model))
    assert_refused(app, sqlite_model, 401, PATHS["leaf"])


def test_stream_without_a_requirement_is_an_error(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """The option would do nothing."""

    class Root(TGController):
        @expose()
        @stream(SSE, recheck_seconds=30)
        def events(self) -> Iterator[str]:
            yield "a"

    with pytest.raises(
        StreamError,
        match=r"^Root.events: recheck_seconds has nothing to check again. Put @require "
        "on the controller, set allow_only on its class, or omit recheck_seconds$",
    ):
        get(make_app(Root(), sqlite_model, **UNTRACED), "/events")
    assert_clean(sqlite_model)


def test_stream_that_cannot_start_is_closed(make_app: MakeApp) -> None:
    """Its callbacks are called, and its file is closed, although the error keeps it."""
    ended: list[str] = []
    file = io.BytesIO(b"abc")

    class Root(TGController):
        @expose()
        def events(self) -> Stream:
            made = Stream(file, recheck_seconds=EACH)
            made.on_end(lambda: ended.append("end"))
            return made

    with pytest.raises(StreamError, match="has nothing to check again"):
        get(make_app(Root(), **UNTRACED), "/events")
    assert ended == ["end"]
    assert file.closed


def test_aborted_response_shows_that_a_download_was_refused(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A format that cannot end anywhere must not look complete."""
    add_users(sqlite_model)
    items = lambda: iter(range(6))  # noqa: E731
    root = make_root(IN_STAFF, items=items, format=NDJSON, chunk_size=0)
    app = make_app(root, sqlite_model, **auth_options(sqlite_model))
    call = open_events(app)
    assert [next(call), next(call)] == [b"0\n", b"1\n"]
    sqlite_model.execute(REVOKE)
    with pytest.raises(StreamError, match=r"Root.events was refused before its end"):
        next(call)
    call.close()
    assert [report.reason for report in reports] == ["refused"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert_clean(sqlite_model)


def test_spooled_stream_is_checked_while_its_file_is_sent(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """It is made in the request, which has evaluated the permission."""
    add_users(sqlite_model)

    def items() -> Iterator[bytes]:
        for _ in range(4):
            yield bytes(2**16)

    root = make_root(IN_STAFF, format=None, items=items, spool=True)
    app = make_app(root, sqlite_model, **auth_options(sqlite_model), **UNTRACED)
    call = open_events(app)
    received = len(next(call))
    assert call.headers["Content-Length"] == str(2**18)
    sqlite_model.execute(REVOKE)
    with pytest.raises(StreamError, match="was refused"):
        call.read()
    assert received < 2**18
    assert [report.reason for report in reports] == ["refused"]
    assert_clean(sqlite_model)


def test_permission_is_checked_at_most_once_an_interval(
    make_app: MakeApp, sqlite_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks in between are sent without a check."""
    add_users(sqlite_model)
    offset = 0.0
    monkeypatch.setattr(
        "tgstream.core.recheck.clock", lambda: time.perf_counter() + offset
    )
    is_staff = IsStaff(sqlite_model)
    root = make_root(is_staff, seconds=30)
    call = open_events(make_app(root, sqlite_model, **auth_options(sqlite_model)))
    counts = [is_staff.count]
    for offset in 0, 25, 35, 60, 70:  # noqa: B007
        next(call)
        counts.append(is_staff.count)
    assert counts == [1, 1, 1, 2, 2, 3]
    call.close()


class Meddling(predicates.Predicate):
    """A predicate that changes all that it can in the checks, and is met."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.count = 0

    def evaluate(self, environ: Any, credentials: Any) -> None:
        self.count += 1
        if self.count == 1:  # in the request
            return
        session = self.model.DBSession()
        for user in session.query(User):
            user.name = "changed"
        session.expire_all()
        environ["meddled"] = tg.request.meddled = tg.tmpl_context.meddled = True
        tg.request.identity["user"] = None
        if hasattr(tg.request, "state"):  # since TurboGears 2.5.1
            tg.request.state["meddled"] = True
        tg.response.status = 500
        tg.response.headers["X-Meddled"] = "yes"


def test_check_changes_nothing_of_the_stream(
    make_app: MakeApp, users: Model, reports: list[Report]
) -> None:
    """Its session, its uncommitted changes, its request and its identity are kept."""

    def items() -> Iterator[str]:
        session = users.DBSession()
        user = session.query(User).filter_by(name="ada").one()
        note = Note(text="pending", user=user)
        session.add(note)
        session.flush()
        yield "a"
        for item in "bc":
            request, identity = tg.request._current_obj(), tg.request.identity
            assert "meddled" not in getattr(request, "state", ())
            environ, found = {**request.environ}, {**identity}
            yield item
            assert users.DBSession() is session
            assert note in session
            assert "text" in note.__dict__  # it was not expired
            assert tg.request._current_obj() is request
            assert request.environ == environ
            assert tg.request.identity is identity
            assert identity == found
            assert not hasattr(request, "meddled")
            assert not hasattr(tg.tmpl_context, "meddled")
            assert tg.response.status_int == 200

    root = make_root(Meddling(users), items=items, commit="end")
    call = open_events(make_app(root, users, **auth_options(users)))
    for _ in range(3):
        next(call)
        assert pool(users).checkedout() == 1  # the connection of the stream
    assert users.texts() == ["staff"]
    assert call.read() == b""
    assert users.texts() == ["staff", "pending"]
    assert users.names() == ["ada", "bob"]
    assert [report.reason for report in reports] == ["completed"]
    assert "X-Meddled" not in call.headers
    assert_clean(users)


def test_check_leaves_no_open_connection(make_app: MakeApp, users: Model) -> None:
    """A stream that waits for its next item holds none, although it was checked."""
    app = make_app(make_root(IN_STAFF), users, **auth_options(users))
    call = open_events(app)
    for _ in range(3):
        next(call)
        assert pool(users).checkedout() == 0
        assert_clean(users)
    call.close()


def test_waiting_stream_ends_at_a_heartbeat(
    make_app: MakeApp, sqlite_model: Model, next_report: Callable[[], Report]
) -> None:
    """Its response ends while the generator still waits for its event."""
    add_users(sqlite_model)
    go = threading.Event()

    def items() -> Iterator[str]:
        yield "a"
        assert go.wait(10)
        yield "secret"

    root = make_root(IN_STAFF, items=items, format=SSE(heartbeat=0.02))
    app = make_app(root, sqlite_model, **auth_options(sqlite_model))
    call = open_events(app)
    assert [next(call), next(call)] == [b"data: a\n\n", HEARTBEAT]
    sqlite_model.execute(REVOKE)
    assert call.read() == b""
    go.set()
    report = next_report()
    assert (report.reason, report.error) == ("refused", None)
    assert_clean(sqlite_model)


def test_event_that_ends_a_wait_is_not_sent(
    make_app: MakeApp, sqlite_model: Model, next_report: Callable[[], Report]
) -> None:
    """The generator of a stream with heartbeats makes it on another thread."""
    add_users(sqlite_model)
    go = threading.Event()

    def items() -> Iterator[str]:
        yield "a"
        assert go.wait(10)
        yield "secret"

    root = make_root(IN_STAFF, items=items, format=SSE(heartbeat=60))
    app = make_app(root, sqlite_model, **auth_options(sqlite_model))
    call = open_events(app)
    assert next(call) == b"data: a\n\n"
    sqlite_model.execute(REVOKE)
    go.set()
    assert call.read() == b""
    assert next_report().reason == "refused"
    assert_clean(sqlite_model)


@pytest.mark.parametrize("format", [SSE, NDJSON], ids=["events", "download"])
def test_first_chunk_that_takes_long_is_checked(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report], format: Any
) -> None:
    """Nothing is sent if the permission was withdrawn while the chunk was made."""
    add_users(sqlite_model)

    def items() -> Iterator[str]:
        sqlite_model.execute(REVOKE)
        yield "secret"
        yield "more"

    root = make_root(IN_STAFF, items=items, format=format, chunk_size=0)
    app = make_app(root, sqlite_model, **auth_options(sqlite_model, **UNTRACED))
    call = open_events(app)
    if format is SSE:
        assert list(call) == [b""]
    else:
        with pytest.raises(StreamError, match=r"Root.events was refused"):
            next(call)
    call.close()
    assert [report.reason for report in reports] == ["refused"]
    assert_clean(sqlite_model)


def test_compressed_stream_that_is_refused_ends_normally(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """Its client can decompress all of it."""
    add_users(sqlite_model)
    root = make_root(IN_STAFF, compress=True)
    app = make_app(root, sqlite_model, **auth_options(sqlite_model))
    cookie = cookie_of("ada")
    call = Call(app, "/events", HTTP_COOKIE=cookie, HTTP_ACCEPT_ENCODING="gzip")
    body = next(call)
    sqlite_model.execute(REVOKE)
    assert gzip.decompress(body + call.read()) == b"data: a\n\n"
    assert [report.reason for report in reports] == ["refused"]
    assert_clean(sqlite_model)


def test_response_that_is_complete_with_its_first_chunk_is_sent(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """It is an ordinary response, whose length is declared."""
    add_users(sqlite_model)

    def items() -> Iterator[str]:
        sqlite_model.execute(REVOKE)
        yield "all"

    root = make_root(IN_STAFF, items=items, format=NDJSON)
    call = open_events(make_app(root, sqlite_model, **auth_options(sqlite_model)))
    assert call.headers["Content-Length"] == "6"
    assert call.read() == b'"all"\n'
    assert [report.reason for report in reports] == ["completed"]
    assert_clean(sqlite_model)


@pytest.mark.parametrize("end", [Call.close, Call.drop])
def test_checked_stream_ends_with_its_client(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    end: Callable[[Call], None],
) -> None:
    """The body is closed or dropped, as without checks."""
    add_users(sqlite_model)
    app = make_app(make_root(IN_STAFF), sqlite_model, **auth_options(sqlite_model))
    call = Call(app, "/events", checked=False, HTTP_COOKIE=cookie_of("ada"))
    next(call)
    end(call)
    assert [report.reason for report in reports] == ["disconnected"]
    assert_clean(sqlite_model)


def test_async_generator_is_refused(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """It is cancelled, and its ``finally`` runs."""
    add_users(sqlite_model)
    ended = []

    async def items() -> AsyncIterator[str]:
        try:
            for item in "abcdef":
                yield item
        finally:
            ended.append(True)

    app = make_app(
        make_root(IN_STAFF, items=items), sqlite_model, **auth_options(sqlite_model)
    )
    assert_refused(app, sqlite_model, 403)
    assert [report.reason for report in reports] == ["refused"]
    assert ended == [True]


@pytest.mark.parametrize("zope", [True, False])
def test_permission_is_checked_without_a_transaction_manager(
    make_app: MakeApp, make_model: MakeModel, tmp_path: Path, zope: bool
) -> None:
    """The check does not need ``tm.enabled`` or zope.sqlalchemy."""
    model = make_model(f"sqlite:///{tmp_path}/test.db", zope=zope)
    add_users(model)
    options = auth_options(model, tm__enabled=False)
    assert_refused(make_app(make_root(IN_STAFF), model, **options), model, 403)


def test_stream_inside_another_one_is_checked(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """The generator of the other one makes the request, and keeps its own session."""
    add_users(sqlite_model)

    class Outer(TGController):
        inner = make_root(IN_STAFF)

        @expose()
        @stream(SSE)
        def index(self) -> Iterator[str]:
            session, path = sqlite_model.DBSession(), tg.request.path
            call = open_events(app, "/inner/events")
            assert next(call) == b"data: a\n\n"
            sqlite_model.execute(REVOKE)
            assert call.read() == b""
            assert (sqlite_model.DBSession(), tg.request.path) == (session, path)
            yield "done"

    app = make_app(Outer(), sqlite_model, **auth_options(sqlite_model))
    assert get(app).text == "data: done\n\n"
    assert [report.reason for report in reports] == ["refused", "completed"]
    assert_clean(sqlite_model)


def test_webtest_reads_a_refused_stream(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """Tests of applications set the user with ``REMOTE_USER``."""
    add_users(sqlite_model)

    def items() -> Iterator[str]:
        yield "a"
        yield "b"
        sqlite_model.execute(REVOKE)
        yield "secret"

    root = make_root(IN_STAFF, items=items)
    options = auth_options(sqlite_model, skip_authentication=True)
    app = TestApp(
        make_app(root, sqlite_model, **options), extra_environ={"REMOTE_USER": "ada"}
    )
    assert app.get("/events").text == "data: a\n\ndata: b\n\n"
    assert [report.reason for report in reports] == ["refused"]
    app.get("/events", status=403)
    assert_clean(sqlite_model)


def test_example_of_the_docs_refuses_a_user(
    make_app: MakeApp, sqlite_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page on operation shows a feed for a group."""
    page = (DOCS / "operating.rst").read_text()
    names: dict[str, Any] = {}
    exec(next(block for block in blocks(page) if "recheck_seconds" in block), names)
    add_users(sqlite_model)
    options = auth_options(sqlite_model)
    options |= {"tgstream__heartbeat_seconds": 0.01}
    app = make_app(names["Staff"](), sqlite_model, **options)
    monkeypatch.setattr("tgstream.core.recheck.clock", lambda: time.perf_counter() + 40)
    call = open_events(app, "/news")
    assert next(call).startswith(b": open")
    sqlite_model.execute(REVOKE)
    monkeypatch.setattr("tgstream.core.recheck.clock", lambda: time.perf_counter() + 80)
    assert call.read() == b""
    assert status(app, "/news") == 403
    assert_clean(sqlite_model)


# Errors.


class Failing(predicates.Predicate):
    """A predicate that raises the errors of the test, one after the other."""

    def __init__(self, *errors: BaseException | None) -> None:
        super().__init__()
        self.errors = [*errors]

    def evaluate(self, environ: Any, credentials: Any) -> None:
        error = self.errors.pop(0)
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [LookupError, SystemExit])
def test_second_failed_check_in_a_row_ends_the_stream(
    make_app: MakeApp,
    reports: list[Report],
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
) -> None:
    """One error is tolerated, because a database may be away for a moment."""
    no = error("no answer")
    predicate = Failing(None, no, None, no, no)
    app = make_app(make_root(predicate))
    call = Call(app, "/events")
    assert [next(call) for _ in range(3)] == [
        b"data: a\n\n",
        b"data: b\n\n",
        b"data: c\n\n",
    ]
    assert call.read() == b""
    assert [report.reason for report in reports] == ["refused"]
    assert [record.levelname for record in caplog.records] == [
        "WARNING",
        "WARNING",
        "ERROR",
    ]
    first, _, last = [record.getMessage() for record in caplog.records]
    assert first.startswith("Root.events: its permission could not be checked again: ")
    assert first.endswith("The stream ends if the next check in 1e-09 s fails, too")
    assert last.startswith("Root.events: its permission could not be checked twice")
    assert caplog.records[-1].exc_info


def test_database_that_fails_once_does_not_end_the_stream(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """The next check succeeds."""
    add_users(sqlite_model)
    app = make_app(make_root(IN_STAFF), sqlite_model, **auth_options(sqlite_model))
    call = open_events(app)
    next(call)
    sqlite_model.execute("ALTER TABLE users RENAME TO gone")
    next(call)
    sqlite_model.execute("ALTER TABLE gone RENAME TO users")
    next(call)
    sqlite_model.execute("ALTER TABLE users RENAME TO gone")
    next(call)
    assert call.read() == b""
    assert [report.reason for report in reports] == ["refused"]
    assert_clean(sqlite_model)


# Identification.


class HasRemoteUser(predicates.Predicate):
    """A predicate that reads what repoze.who sets for other middlewares."""

    message = "Log in"

    def evaluate(self, environ: Any, credentials: Any) -> None:
        if "REMOTE_USER" not in environ:
            self.unmet()


@pytest.mark.parametrize("predicate", [predicates.not_anonymous(), HasRemoteUser()])
def test_login_that_has_timed_out_is_refused(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report], predicate: Any
) -> None:
    """The cookie of the request is read again."""
    add_users(sqlite_model)
    timeouts = {"sa_auth__authtkt__timeout": 60, "sa_auth__authtkt__reissue_time": 30}
    options = auth_options(sqlite_model, **timeouts)
    app = make_app(make_root(predicate), sqlite_model, **options)
    call = open_events(app)
    next(call)
    call.environ["repoze.who.plugins"]["cookie"].timeout = -1
    assert call.read() == b""
    assert [report.reason for report in reports] == ["refused"]
    assert status(app) == 401
    assert_clean(sqlite_model)


def test_password_that_was_changed_is_refused(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """The requests of HTTP basic authentication have the password."""
    add_users(sqlite_model)
    basic = [("basic", BasicAuthPlugin("realm"))]
    options = auth_options(sqlite_model, sa_auth__identifiers=basic)
    app = make_app(make_root(predicates.not_anonymous()), sqlite_model, **options)
    request = Request.blank("/events")
    request.authorization = ("Basic", "YWRhOnN0YWZm")  # ada:staff
    authorization = request.environ["HTTP_AUTHORIZATION"]
    call = Call(app, "/events", HTTP_AUTHORIZATION=authorization)
    assert next(call) == b"data: a\n\n"
    sqlite_model.execute("UPDATE notes SET text = 'changed'")
    assert call.read() == b""
    assert [report.reason for report in reports] == ["refused"]
    assert get(app, "/events", HTTP_AUTHORIZATION=authorization).status_int == 401
    assert_clean(sqlite_model)


def test_identity_of_another_middleware_is_read_again(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """Its groups are. The middleware itself is not called again."""
    add_users(sqlite_model)
    users = []

    def items() -> Iterator[str]:
        for item in "abc":
            users.append(tg.request.identity["user"])
            yield item

    options = auth_options(sqlite_model, sa_auth__enabled=False)
    app = make_app(make_root(IN_STAFF, items=items), sqlite_model, **options)
    environ: dict[str, Any] = {"repoze.who.identity": {"repoze.who.userid": "ada"}}
    call = Call(app, "/events", **environ)
    assert [next(call), next(call)] == [b"data: a\n\n", b"data: b\n\n"]
    assert users[0] is users[1]  # the object of the stream
    sqlite_model.execute(REVOKE)
    assert call.read() == b""
    assert [report.reason for report in reports] == ["refused"]
    assert_clean(sqlite_model)


class ByToken(Middleware):
    """Identifies users beside the logins of repoze.who."""

    def __call__(self, environ: Any, start_response: Any) -> Any:
        if token := environ.get("HTTP_X_TOKEN"):
            environ["repoze.who.identity"] = {"repoze.who.userid": token}
        return self.app(environ, start_response)


class ByKey(ApplicationWrapper):
    """The same, without TurboGears' metadata of the user."""

    def __call__(self, controller: Any, environ: Any, context: Any) -> Any:
        if name := environ.get("HTTP_X_KEY"):
            credentials = {"repoze.what.userid": name, "groups": ["staff"]}
            context.request.identity = credentials
            environ["repoze.what.credentials"] = credentials
        return self.next_handler(controller, environ, context)


@pytest.mark.parametrize("header", ["X_TOKEN", "X_KEY"])
def test_identity_of_the_application_is_kept(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report], header: str
) -> None:
    """repoze.who has not identified the user, and cannot do so in a check."""
    add_users(sqlite_model)

    def plug(base_config: Any) -> None:
        tgstream.plugme(base_config)
        base_config.register_application_wrapper(
            ByKey, after=IdentityApplicationWrapper
        )

    options = auth_options(sqlite_model)
    with install_middleware(ByToken):
        app = make_app(make_root(IN_STAFF), sqlite_model, plug=plug, **options)
    environ: dict[str, Any] = {f"HTTP_{header}": "ada"}
    call = Call(app, "/events", **environ)
    assert [next(call), next(call)] == [b"data: a\n\n", b"data: b\n\n"]
    sqlite_model.execute(REVOKE)
    is_read_again = header == "X_TOKEN"
    assert call.read().count(b"data: ") == (0 if is_read_again else 4)
    assert [report.reason for report in reports] == [
        "refused" if is_read_again else "completed"
    ]
    assert_clean(sqlite_model)


def test_forged_user_of_a_test_is_checked(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """Tests of quickstarted applications identify users by ``REMOTE_USER``."""
    add_users(sqlite_model)
    options = auth_options(sqlite_model, skip_authentication=True)
    app = make_app(make_root(IN_STAFF), sqlite_model, **options)
    call = Call(app, "/events", REMOTE_USER="ada")
    assert [next(call), next(call)] == [b"data: a\n\n", b"data: b\n\n"]
    sqlite_model.execute(REVOKE)
    assert call.read() == b""
    assert [report.reason for report in reports] == ["refused"]
    assert_clean(sqlite_model)


def test_anonymous_user_may_be_required(make_app: MakeApp, sqlite_model: Model) -> None:
    """A request without an identity is checked, too."""
    app = make_app(
        make_root(predicates.is_anonymous()), sqlite_model, **auth_options(sqlite_model)
    )
    assert get(app, "/events").text.count("data: ") == 6
    assert_clean(sqlite_model)


def test_session_that_was_deleted_is_refused(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """A predicate may read ``tg.session``, which is loaded again."""

    class LoggedIn(predicates.Predicate):
        message = "Log in"

        def evaluate(self, environ: Any, credentials: Any) -> None:
            if not tg.session.get("user"):
                self.unmet()

    class Root(TGController):
        @expose()
        def log_in(self) -> str:
            tg.session["user"] = "ada"
            tg.session.save()
            return ""

        @expose()
        def log_out(self) -> str:
            tg.session.delete()
            return ""

        @expose()
        @require(LoggedIn())
        @stream(SSE, recheck_seconds=EACH)
        def events(self) -> Iterator[str]:
            assert tg.session["user"] == "ada"
            yield "a"
            yield "b"
            yield "c"

    app = make_app(Root(), **SESSION)
    [value] = get(app, "/log_in").cookies
    cookie = value.partition(";")[0]
    call = Call(app, "/events", HTTP_COOKIE=cookie)
    assert [next(call), next(call)] == [b"data: a\n\n", b"data: b\n\n"]
    get(app, "/log_out", HTTP_COOKIE=cookie)
    assert call.read() == b""
    assert [report.reason for report in reports] == ["refused"]
    assert get(app, "/events", HTTP_COOKIE=cookie).status_int == 401


def test_denial_handler_decides_as_in_a_request(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """A handler that returns lets the request, and so the stream, go on."""
    add_users(sqlite_model)
    denied: list[str] = []

    class Root(TGController):
        @expose()
        @require(IN_STAFF, denial_handler=denied.append)
        @stream(SSE, recheck_seconds=EACH)
        def events(self) -> Iterator[str]:
            yield from "abc"

    app = make_app(Root(), sqlite_model, **auth_options(sqlite_model))
    call = open_events(app)
    next(call)
    assert denied == []
    sqlite_model.execute(REVOKE)
    assert call.read() == b"data: b\n\ndata: c\n\n"
    assert set(denied) == {'The current user must belong to the group "staff"'}
    assert [report.reason for report in reports] == ["completed"]
    assert_clean(sqlite_model)


def test_changes_of_a_predicate_are_rolled_back(
    make_app: MakeApp, users: Model
) -> None:
    """In a request TurboGears commits them. A check has no request to commit."""

    class Writing(predicates.Predicate):
        def evaluate(self, environ: Any, credentials: Any) -> None:
            users.DBSession.add(Note(text="read"))
            users.DBSession.flush()

    app = make_app(make_root(Writing()), users, **auth_options(users))
    assert get(app, "/events").text.count("data: ") == 6
    assert users.texts() == ["staff", "read"]  # of the request
    assert_clean(users)


def test_predicate_may_call_functions_of_tgstream(
    make_app: MakeApp, users: Model, reports: list[Report]
) -> None:
    """In a check they do the same as in the request, where no stream runs."""
    outside = "no stream is running"

    class Calling(predicates.Predicate):
        def evaluate(self, environ: Any, credentials: Any) -> None:
            found = rows(sa.select(User.name).order_by(User.name))
            assert [row.name for row in found] == ["ada", "bob"]
            for function in current_stream, commit, rollback, flush:
                with pytest.raises(StreamError, match=outside):
                    function()
            assert next(listen("staff")).data is None

    app = make_app(make_root(Calling()), users, **auth_options(users))
    assert get(app, "/events").text.count("data: ") == 6
    assert [report.reason for report in reports] == ["completed"]
    assert_clean(users)


# Real servers.


@pytest.mark.parametrize("server", ["waitress", "gunicorn-gevent"])
def test_server_sends_no_event_after_the_interval(
    sqlite_model: Model, live_server: Callable[..., LiveServer], server: str
) -> None:
    """Events are published all the time. Each has its time as its data."""
    add_users(sqlite_model)
    create_tables(sqlite_model.outside)
    url = sqlite_model.url.render_as_string()
    port = live_server(server, "permission_app", f"url={url}").port
    paths = ["/feed", "/chosen"]
    received: dict[str, list[float]] = {path: [] for path in paths}

    with (
        httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Cookie": cookie_of("ada")},
            timeout=30,
        ) as client,
        ThreadPoolExecutor(2) as threads,
    ):

        def read(path: str) -> None:
            with client.stream("GET", path) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        received[path].append(float(line[6:]))

        feeds = [threads.submit(read, path) for path in paths]
        while not all(received.values()):
            client.get("/publish")
        sqlite_model.execute(REVOKE)
        revoked = time.monotonic()
        while not all(feed.done() for feed in feeds):
            client.get("/publish")
        ended = time.monotonic()
        assert [feed.result() for feed in feeds] == [None, None]
        assert max(max(times) for times in received.values()) < revoked + 0.3
        assert ended < revoked + 5
        assert [client.get(path).status_code for path in paths] == [403, 403]
