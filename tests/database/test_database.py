"""A stream's database: its own sessions and transaction, and what commits when."""

from __future__ import annotations

import contextlib
import gc
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import tg
import transaction
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import (
    Session,
    make_transient,
    scoped_session,
    selectinload,
    sessionmaker,
)
from tg import TGController, expose
from tg.configuration.sqla.balanced_session import BalancedSession
from transaction.interfaces import TransientError
from zope.sqlalchemy import register

import tgstream
from tests.conftest import MakeApp, assert_clean, pool
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import Call, get
from tgstream import Channel, Report, Stream, StreamError, stream

Generator = Callable[[], Iterator[str]]


class Root(TGController):
    """A stream of ``body``, and beside it what ordinary requests do."""

    def __init__(self, model: Model, body: Generator, **options: Any) -> None:
        self.model, self.body, self.options = model, body, options
        for method in (Root.index, Root.add, Root.names, Writing.index):
            # Not at import: it would wait for the milestones that make_app resets.
            expose(content_type="text/plain")(method)

    def index(self) -> Stream:
        return Stream(self.body(), **self.options)

    def add(self, name: str) -> str:
        self.model.DBSession.add(User(name=name))
        return "added"

    def names(self) -> str:
        query = self.model.DBSession.query(User).order_by(User.id)
        return ",".join(user.name for user in query)


class Writing(Root):
    """A root whose stream's controller body writes, too."""

    runs = 0
    doomed = False

    def index(self) -> Stream:
        self.runs += 1
        self.model.DBSession.add(Note(text="body"))
        if self.doomed:
            transaction.doom()
        return super().index()


def assert_thread_works(app: Any, model: Model) -> None:
    """The next request and the next write on this thread are ordinary ones."""
    before = model.names()
    assert get(app, "/add?name=next").text == "added"
    assert model.names() == [*before, "next"]
    assert get(app, "/names").text == ",".join(model.names())
    assert_clean(model)


@contextlib.contextmanager
def statements(model: Model) -> Iterator[list[str]]:
    """The statements that the application's engine runs meanwhile."""
    seen: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        seen.append(statement)

    engine = model.engine
    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)


def user(model: Model, name: str) -> User:
    return model.DBSession.query(User).filter_by(name=name).one()


# Its own session and transaction.


def test_stream_session_and_transaction_are_its_own(
    make_app: MakeApp, model: Model
) -> None:
    """A session that the request made becomes the stream's, and no other's."""
    seen: list[tuple[Session, Any]] = []

    def note() -> None:
        seen.append((model.DBSession(), transaction.manager.manager))

    def body() -> Iterator[str]:
        for _ in range(3):
            note()
            yield "item"

    class Noting(Root):
        def _before(self, *args: Any, **params: Any) -> None:
            note()

        def _after(self, *args: Any, **params: Any) -> None:
            note()

    app = make_app(Noting(model, body), model)
    first, second = Call(app), Call(app)
    assert first.read() == second.read() == b"itemitemitem"
    sessions = [session for session, _ in seen]
    assert len({id(session) for session in sessions}) == 4
    assert sessions[0] is sessions[1] is sessions[6] is sessions[7]
    assert sessions[3] is sessions[4] is sessions[8] is sessions[9]
    managers = [manager for _, manager in seen]
    assert len({id(manager) for manager in managers}) == 3
    assert all(managers[i] is transaction.manager.manager for i in (0, 2, 3, 5))
    assert_clean(model)


def test_stream_without_database_use_makes_no_session(
    make_app: MakeApp, make_model: MakeModel, url: str
) -> None:
    """A stream that never touches the database creates no session, nor connects."""
    made: list[Session] = []

    class Counted(Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(self)
            super().__init__(*args, **options)

    model = make_model(url, class_=Counted)

    def body() -> Iterator[str]:
        yield "one"
        yield "two"

    for commit in ("end", "each", "manual", 2):
        assert get(make_app(Root(model, body, commit=commit), model)).text == "onetwo"
    assert made == []
    assert pool(model).checkedin() + pool(model).checkedout() == 0
    assert_clean(model)


def test_stream_is_pulled_on_any_thread(make_app: MakeApp, model: Model) -> None:
    """A stream whose chunks are pulled on different threads writes in one session."""

    def body() -> Iterator[str]:
        for name in ("ada", "bob", "cyd"):
            model.DBSession.add(User(name=name))
            model.DBSession.flush()
            yield name

    call = Call(make_app(Root(model, body), model), checked=False)
    chunks: list[bytes] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: chunks.append(next(call)))
        thread.start()
        thread.join()
    assert model.names() == []
    assert list(call) == []
    call.close()
    assert chunks == [b"ada", b"bob", b"cyd"]
    assert model.names() == ["ada", "bob", "cyd"]
    assert_clean(model)


# The objects of the request.


class Metadata:
    """What an application gives TG to know its users by."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def get_user(self, identity: Any, userid: str) -> User:
        return user(self.model, userid)

    def get_groups(self, identity: Any, userid: str) -> list[str]:
        return []

    get_permissions = get_groups


def test_stream_objects_of_the_request_come_with_their_values(
    make_app: MakeApp, model: Model
) -> None:
    """The identity's user, and what ``_before`` and the body loaded, cost no SELECT."""
    model.seed("ada", "bob", "cyd")
    kept: dict[str, User] = {}
    selects: list[str] = []

    class Loading(Root):
        def _before(self, *args: Any, **params: Any) -> None:
            kept["before"] = user(model, "bob")

        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept["body"] = user(model, "cyd")
            return super().index()

    def body() -> Iterator[str]:
        assert model.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        with statements(model) as seen:
            yield tg.request.identity["user"].name
            yield kept["before"].name + kept["body"].name
        selects.extend(seen)
        assert kept["body"] in model.DBSession
        kept["body"].notes.append(Note(text="lazy, and new"))
        yield str(len(tg.request.identity["user"].notes))

    root = Loading(model, body)
    app = make_app(root, model, sa_auth__authmetadata=Metadata(model))
    identity = {"repoze.who.userid": "ada"}
    call = get(app, "/", **{"repoze.who.identity": identity})
    assert call.text == "adabobcyd0"
    assert selects == []
    assert model.texts() == ["lazy, and new"]
    assert_clean(model)


def test_stream_many_objects_of_the_request_cost_no_select(
    make_app: MakeApp, model: Model
) -> None:
    """3,000 objects move into the stream, are read there, and nothing is selected."""
    model.seed(*(f"user{number}" for number in range(3000)))
    users: list[User] = []

    class Loading(Root):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            model.DBSession.add(Note(text="so that the request commits"))
            users.extend(model.DBSession.query(User))
            return super().index()

    def body() -> Iterator[str]:
        for each in users:
            yield each.name + "\n"

    app = make_app(Loading(model, body), model)
    with statements(model) as seen:
        assert len(get(app).text.splitlines()) == 3000
    assert [line for line in seen if line.startswith("SELECT")] == seen[1:]
    assert len(seen) == 2
    assert model.texts() == ["so that the request commits"]
    assert_clean(model)


def test_stream_new_object_of_the_request_moves_after_its_insert(
    make_app: MakeApp, model: Model
) -> None:
    """What the body added is committed, and the stream goes on to change it."""
    added = User(name="ada")

    class Adding(Root):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            model.DBSession.add(added)
            return super().index()

    def body() -> Iterator[str]:
        assert model.names() == ["ada"]
        yield str(added.id)
        added.name = "lovelace"
        yield added.name

    assert get(make_app(Adding(model, body), model)).text == "1lovelace"
    assert model.names() == ["lovelace"]
    assert_clean(model)


@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize("commit", ["end", "each"])
def test_stream_objects_are_expired_after_an_abort(
    make_app: MakeApp, model: Model, touched: bool, commit: str
) -> None:
    """After rollback() the next use of an object of the request reads it again."""
    model.seed("ada")
    kept: list[User] = []

    class Loading(Root):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept.append(user(model, "ada"))
            return super().index()

    def body() -> Iterator[str]:
        yield kept[0].name
        with model.outside.begin() as outside:
            outside.execute(sa.text("UPDATE users SET name = 'countess'"))
        yield kept[0].name
        if touched:
            kept[0].name = "undone"
        tgstream.rollback()
        yield kept[0].name

    app = make_app(Loading(model, body, commit=commit), model)
    assert get(app).text == "adaadacountess"
    assert model.names() == ["countess"]
    assert_clean(model)


@pytest.mark.parametrize("chunks", [0, 1])
def test_stream_objects_go_back_for_after(
    make_app: MakeApp, model: Model, chunks: int
) -> None:
    """When the first pull is also the last, ``_after`` finds them in its session."""
    model.seed("ada")
    kept: list[User] = []

    class Loading(Root):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept.append(user(model, "ada"))
            return super().index()

        def _after(self, *args: Any, **params: Any) -> None:
            assert kept[0] in model.DBSession
            kept[0].name += "!"

    def body() -> Iterator[str]:
        kept[0].notes.append(Note(text="new"))
        yield from ["one"][:chunks]

    root = Loading(model, body, format=Lines, chunk_size=9)
    assert get(make_app(root, model)).text == "one" * chunks
    assert model.names() == ["ada!"]
    assert model.texts() == ["new"]
    assert_clean(model)


class Lines:
    content_type = "text/plain"

    def encode(self, items: Any) -> Iterator[str]:
        yield from items


@pytest.mark.parametrize("read", [False, True])
def test_stream_objects_go_back_for_the_error_page(
    make_app: MakeApp, model: Model, read: bool
) -> None:
    """When the first pull raises, the error page reads them, as without a stream."""
    model.seed("ada")
    kept: list[User] = []

    class Error(TGController):
        @expose(content_type="text/plain")
        def document(self, *args: Any, **params: Any) -> str:
            return "sorry, " + kept[0].name

    class Loading(Root):
        error = Error()

        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept.append(user(model, "ada"))
            return super().index()

        @expose(content_type="text/plain")
        def plain(self) -> None:
            kept.append(user(model, "ada"))
            raise ValueError("no")

    def body() -> Iterator[str]:
        if read:
            model.DBSession.query(Note).all()
        raise ValueError("no")
        yield ""

    app = make_app(
        Loading(model, body),
        model,
        errorpage__enabled=True,
        errorpage__status_codes=[500],
        errorpage__content_types=[],
    )
    for path in ("/plain", "/"):
        kept.clear()
        call = get(app, path)
        assert call.status.startswith("500")
        assert call.text == "sorry, ada"
    assert_thread_works(app, model)


def test_stream_changes_do_not_go_back_with_the_objects(
    make_app: MakeApp, model: Model
) -> None:
    """What a stream changed and did not commit is not in the request's commit."""
    model.seed("ada", "bob")
    kept: list[User] = []

    class Loading(Root):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept.extend(model.DBSession.query(User).order_by(User.id))
            return super().index()

    def body() -> Iterator[str]:
        kept[0].name = "flushed"
        model.DBSession.flush()
        kept[1].name = "pending"
        model.DBSession.add(User(name="new"))
        tg.redirect("/elsewhere")
        yield ""

    app = make_app(Loading(model, body, commit="manual"), model)
    assert get(app).status.startswith("302")
    assert model.names() == ["ada", "bob"]
    assert_thread_works(app, model)


# commit='end'


def test_stream_commits_before_the_ending_of_its_format(
    make_app: MakeApp, model: Model
) -> None:
    """What is written is stored before the last byte says that all is there."""
    seen: list[list[str]] = []

    class Format:
        content_type = "text/plain"

        def encode(self, items: Any) -> Iterator[str]:
            yield from items
            seen.append(model.names())
            yield "."

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        yield "one"
        assert model.names() == []

    app = make_app(Root(model, body, format=Format(), chunk_size=0), model)
    assert get(app).text == "one."
    assert seen == [["ada"]]
    assert_clean(model)


def test_stream_doomed_transaction_is_aborted(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """A stream that dooms its transaction ends well, and stores nothing."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        yield "one"
        transaction.doom()
        yield "two"

    app = make_app(Root(model, body), model)
    assert get(app).text == "onetwo"
    assert model.names() == []
    assert [report.reason for report in reports] == ["completed"]
    assert_thread_works(app, model)


def defer_unique_names(model: Model) -> None:
    """On PostgreSQL let a second user of a name fail at the commit, not the flush."""
    if not model.sqlite:
        with model.outside.begin() as outside:
            for change in (
                "DROP CONSTRAINT users_name_key",
                "ADD CONSTRAINT users_name_key UNIQUE (name)"
                " DEFERRABLE INITIALLY DEFERRED",
            ):
                outside.execute(sa.text(f"ALTER TABLE users {change}"))


def test_stream_final_commit_that_fails_breaks_the_transfer(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """A unique violation in the last flush or commit is raised where chunks are."""
    defer_unique_names(model)
    model.seed("ada")

    def body() -> Iterator[str]:
        yield "one"
        model.DBSession.add(User(name="ada"))
        yield "two"

    app = make_app(Root(model, body), model)
    call = Call(app)
    assert [next(call), next(call)] == [b"one", b"two"]
    with pytest.raises(IntegrityError):
        next(call)
    call.close()
    assert model.names() == ["ada"]
    assert [report.reason for report in reports] == ["failed"]
    assert_thread_works(app, model)


def test_stream_commit_that_fails_in_the_first_pull_is_an_ordinary_error(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """A stream that ends within its first pull and cannot commit is a 500."""
    defer_unique_names(model)
    model.seed("ada")

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        yield from ()

    app = make_app(Root(model, body), model)
    call = get(app)
    assert call.status.startswith("500")
    assert "IntegrityError" in call.errors.getvalue()
    assert model.names() == ["ada"]
    assert [report.reason for report in reports] == ["failed"]
    assert_thread_works(app, model)


def test_stream_that_raises_is_aborted(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """What a failing stream wrote is undone, but what commit() stored stays."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        tgstream.commit()
        model.DBSession.add(User(name="bob"))
        model.DBSession.flush()
        yield "one"
        raise ValueError("no")

    app = make_app(Root(model, body), model)
    with pytest.raises(ValueError, match="no"):
        get(app)
    assert model.names() == ["ada"]
    assert [(report.reason, report.commits) for report in reports] == [("failed", 1)]
    assert_thread_works(app, model)


@pytest.mark.parametrize("leave", [Call.close, Call.drop])
@pytest.mark.parametrize("pulls", [0, 1, 2])
def test_stream_whose_client_leaves_is_aborted(
    make_app: MakeApp,
    model: Model,
    reports: list[Report],
    leave: Callable[[Call], None],
    pulls: int,
) -> None:
    """Closed or dropped, what is not committed is undone, and what is, stays."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        tgstream.commit()
        model.DBSession.add(User(name="bob"))
        model.DBSession.flush()
        yield "one"
        yield "two"
        yield "three"

    app = make_app(Root(model, body), model)
    call = Call(app, checked=False)
    for _ in range(pulls):
        next(call)
    leave(call)
    assert model.names() == ["ada"]
    assert [report.reason for report in reports] == ["disconnected"]
    assert_thread_works(app, model)


# commit='manual'


def test_stream_manual_aborts_what_is_left_and_warns(
    make_app: MakeApp, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """Only commit() stores; the warning counts flushed and pending objects alike."""
    model.seed("ada", "bob", "cyd")

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="stored"))
        tgstream.commit()
        user(model, "ada").name = "flushed"
        model.DBSession.add(User(name="new, flushed"))
        model.DBSession.flush()
        yield "one"
        model.DBSession.add_all([User(name="new"), User(name="newer")])
        with model.DBSession.no_autoflush:
            model.DBSession.delete(user(model, "bob"))

    app = make_app(Root(model, body, commit="manual"), model)
    assert get(app).text == "one"
    assert model.names() == ["ada", "bob", "cyd", "stored"]
    [warning] = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert "3 new User, 1 changed User, 1 deleted User. With" in warning.getMessage()
    assert_thread_works(app, model)


@pytest.mark.parametrize("registered", [True, False])
def test_stream_manual_warning_names_classes_and_counts_events(
    make_app: MakeApp,
    make_model: MakeModel,
    url: str,
    caplog: pytest.LogCaptureFixture,
    registered: bool,
) -> None:
    """Events count that were published in the open transaction, and no others."""
    model = make_model(url, zope=registered)

    def body() -> Iterator[str]:
        users = Channel("users")
        users.publish("sent")
        tgstream.commit()
        users.publish("undone")
        tgstream.rollback()
        model.DBSession.add_all([User(name="ada"), Note(text="one"), Note(text="two")])
        users.publish("lost")
        users.publish("lost, too")
        yield "one"

    app = make_app(Root(model, body, commit="manual"), model)
    assert get(app).text == "one"
    [warning] = [each for each in caplog.records if each.levelno >= logging.WARNING]
    left = "2 new Note, 1 new User, 2 unsent events. With"
    assert left in warning.getMessage()
    assert (model.names(), model.texts()) == ([], [])
    assert_clean(model)


def test_stream_manual_with_an_unsent_event_alone_warns(
    make_app: MakeApp, sqlite_model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """No session was used, and the event is lost all the same."""

    def body() -> Iterator[str]:
        Channel("users").publish("lost")
        yield "one"

    root = Root(sqlite_model, body, commit="manual")
    assert get(make_app(root, sqlite_model)).text == "one"
    [warning] = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert "rolled back: 1 unsent event. With" in warning.getMessage()
    assert_clean(sqlite_model)


@pytest.mark.parametrize("end", [tgstream.commit, tgstream.rollback])
def test_stream_manual_without_left_overs_is_silent(
    make_app: MakeApp,
    model: Model,
    caplog: pytest.LogCaptureFixture,
    end: Callable[[], None],
) -> None:
    """A stream that committed or undid all that it wrote is not warned of."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        model.DBSession.flush()
        yield "one"
        end()
        yield "two"
        model.DBSession.query(User).all()

    app = make_app(Root(model, body, commit="manual"), model)
    assert get(app).text == "onetwo"
    assert model.names() == (["ada"] if end is tgstream.commit else [])
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []
    assert_clean(model)


# commit='each', and a number


def names_after_each_chunk(call: Call, model: Model) -> list[int]:
    """How many users are stored when each chunk has left; nothing is held then."""
    counts = []
    for _ in call:
        counts.append(len(model.names()))
        assert pool(model).checkedout() == 0
        assert model.idle_in_transaction() == 0
    call.close()
    return counts


@pytest.mark.parametrize("format", [None, Lines])
def test_stream_each_stores_an_item_before_its_chunk_leaves(
    make_app: MakeApp, model: Model, format: Any, reports: list[Report]
) -> None:
    """A client never sees an item that is not stored, nor waits one a connection."""

    def body() -> Iterator[str]:
        for name in ("ada", "bob", "cyd"):
            model.DBSession.add(User(name=name))
            yield name

    root = Root(model, body, commit="each", format=format, chunk_size=0)
    assert names_after_each_chunk(Call(make_app(root, model)), model) == [1, 2, 3]
    assert [report.commits for report in reports] == [3]
    assert_clean(model)


def test_stream_each_holds_no_connection_while_it_reads(
    make_app: MakeApp, model: Model
) -> None:
    """A stream that only reads gives its connection back after every item, too."""
    model.seed("ada", "bob", "cyd")

    def body() -> Iterator[str]:
        for name in ("ada", "bob", "cyd"):
            yield user(model, name).name

    call = Call(make_app(Root(model, body, commit="each"), model))
    assert names_after_each_chunk(call, model) == [3, 3, 3]
    assert_clean(model)


def test_stream_number_stores_every_so_many_items(
    make_app: MakeApp, model: Model
) -> None:
    """With commit=2 every second item is stored before its chunk, the rest last."""

    def body() -> Iterator[str]:
        for number in range(5):
            model.DBSession.add(User(name=f"user{number}"))
            yield "item"

    call = Call(make_app(Root(model, body, commit=2), model))
    assert [len(model.names()) for _ in call] == [0, 2, 2, 4, 4]
    call.close()
    assert len(model.names()) == 5
    assert_clean(model)


def test_stream_number_stores_before_a_gathered_chunk_leaves(
    make_app: MakeApp, model: Model
) -> None:
    """However items are gathered, a chunk has stored items alone but for the rest."""

    def body() -> Iterator[str]:
        for number in range(6):
            model.DBSession.add(User(name=f"user{number}"))
            yield "x" * 10

    root = Root(model, body, format=Lines, commit=3, chunk_size=30)
    call = Call(make_app(root, model))
    assert names_after_each_chunk(call, model) == [3, 6]
    assert_clean(model)


def test_stream_each_without_a_write_expires_nothing(
    make_app: MakeApp, model: Model
) -> None:
    """Objects keep their values over the commits of a stream that only reads."""
    model.seed(*(f"user{number}" for number in range(50)))

    def body() -> Iterator[str]:
        users = model.DBSession.query(User).order_by(User.id).all()
        for each in users:
            yield each.name
            for other in users:
                assert other.name

    with_statements = make_app(Root(model, body, commit="each"), model)
    with statements(model) as seen:
        get(with_statements)
    assert len(seen) == 1
    assert_clean(model)


def test_stream_each_commits_nothing_for_a_session_unused(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """To have a session is not to use it: there is nothing to commit."""

    def body() -> Iterator[str]:
        for _ in range(3):
            assert model.DBSession() is not None
            yield "item"

    assert get(make_app(Root(model, body, commit="each"), model)).text == "item" * 3
    assert [report.commits for report in reports] == [0]
    assert_clean(model)


@pytest.mark.parametrize("kind", ["text", "core", "orm"])
def test_stream_each_reads_again_after_a_core_write(
    make_app: MakeApp, model: Model, kind: str
) -> None:
    """A write that the session's objects do not know of expires them."""
    model.seed("ada")
    update: Any = {
        "text": sa.text("UPDATE users SET name = name || '!'"),
        "core": sa.update(USERS).values(name=USERS.c.name + "!"),
        "orm": sa.update(User).values(name=User.name + "!"),
    }[kind]

    def body() -> Iterator[str]:
        ada = user(model, "ada")
        for number in range(3):
            assert ada.name == "ada" + "!" * number
            model.DBSession.execute(
                update, execution_options={"synchronize_session": False}
            )
            yield "item"

    app = make_app(Root(model, body, commit="each"), model)
    assert get(app).text == "item" * 3
    assert model.names() == ["ada!!!"]
    assert_clean(model)


class CountingSession(Session):
    """A session that knows how many objects it was made to expire."""

    expired = 0

    def expire(self, *args: Any, **options: Any) -> None:
        self.expired += 1
        super().expire(*args, **options)


@pytest.mark.parametrize("held", [10, 200])
def test_stream_each_cost_does_not_grow_with_the_objects_held(
    make_app: MakeApp, make_model: MakeModel, url: str, held: int
) -> None:
    """After a write what was used since the last is expired, and read when used."""
    model = make_model(url, class_=CountingSession)
    model.seed(*(f"user{number}" for number in range(held)))
    expired: list[int] = []

    def body() -> Iterator[str]:
        users = model.DBSession.query(User).order_by(User.id).limit(held).all()
        for each in users[:5]:
            model.DBSession.add(Note(text=each.name))
            yield each.name
            expired.append(model.DBSession().expired)  # type: ignore[attr-defined]

    app = make_app(Root(model, body, commit="each"), model)
    with statements(model) as seen:
        get(app)
    selects = [line for line in seen if line.startswith("SELECT")]
    assert len(selects) == 1 + 4
    assert expired[-1] - expired[0] <= 2 * 4
    assert len(model.texts()) == 5
    assert_clean(model)


def test_stream_each_that_is_doomed_aborts_that_item_alone(
    make_app: MakeApp, model: Model
) -> None:
    """A doomed item is not stored; the next begins a transaction of its own."""

    def body() -> Iterator[str]:
        for name in ("ada", "bob", "cyd"):
            model.DBSession.add(User(name=name))
            if name == "bob":
                transaction.doom()
            yield name

    call = Call(make_app(Root(model, body, commit="each"), model))
    assert names_after_each_chunk(call, model) == [1, 1, 2]
    assert model.names() == ["ada", "cyd"]
    assert_clean(model)


def test_stream_each_commit_that_fails_sends_no_item(
    make_app: MakeApp, model: Model
) -> None:
    """An item that cannot be stored is not sent, and breaks the transfer."""
    defer_unique_names(model)

    def body() -> Iterator[str]:
        for name in ("ada", "ada"):
            model.DBSession.add(User(name=name))
            yield name

    app = make_app(Root(model, body, commit="each"), model)
    call = Call(app)
    assert next(call) == b"ada"
    with pytest.raises(IntegrityError):
        next(call)
    call.close()
    assert model.names() == ["ada"]
    assert_thread_works(app, model)


@pytest.mark.parametrize("commit", ["each", "end"])
def test_stream_cursor_that_a_commit_ended_is_explained(
    make_app: MakeApp, postgresql: str, make_model: MakeModel, commit: str
) -> None:
    """A server-side cursor over a commit is a StreamError, from the driver's."""
    model = make_model(postgresql)
    model.seed(*(f"user{number}" for number in range(10)))

    def body() -> Iterator[str]:
        for each in model.DBSession.query(User).yield_per(2):
            yield each.name
            if commit == "end":
                tgstream.commit()

    app = make_app(Root(model, body, commit=commit), model)
    with pytest.raises(StreamError, match="the cursor") as raised:
        get(app)
    assert "Root.index" in str(raised.value)
    assert isinstance(raised.value.__cause__, sa.exc.SQLAlchemyError)
    assert_thread_works(app, model)


# The hooks.


def test_flush_is_what_the_session_has(make_app: MakeApp, model: Model) -> None:
    """flush() gives a new object its key, and stores nothing."""

    def body() -> Iterator[str]:
        ada = User(name="ada")
        model.DBSession.add(ada)
        tgstream.flush()
        yield str(ada.id)
        assert model.names() == []
        tgstream.rollback()

    assert get(make_app(Root(model, body), model)).text == "1"
    assert model.names() == []
    assert_clean(model)


Write = Callable[[Any], Any]
USERS = sa.table("users", sa.column("name"))

CORE_WRITES: dict[str, Write] = {
    "core": lambda session: session.execute(sa.insert(USERS), [{"name": "ada"}]),
    "text": lambda session: session.execute(
        sa.text("INSERT INTO users (name) VALUES ('ada')")
    ),
    "connection": lambda session: session.connection().execute(
        sa.insert(USERS), [{"name": "ada"}]
    ),
    "mappings": lambda session: session.bulk_insert_mappings(User, [{"name": "ada"}]),
    "objects": lambda session: session.bulk_save_objects([User(name="ada")]),
    "orm": lambda session: session.execute(sa.insert(User), [{"name": "ada"}]),
    "add": lambda session: session.add(User(name="ada")),
}


@pytest.mark.parametrize("write", CORE_WRITES.values(), ids=CORE_WRITES)
@pytest.mark.parametrize(
    ("commit", "end"),
    [
        ("manual", tgstream.commit),
        ("manual", transaction.commit),
        ("end", lambda: None),
        ("each", lambda: None),
    ],
    ids=["commit()", "transaction.commit()", "end", "each"],
)
def test_commit_counts_every_kind_of_write(
    make_app: MakeApp, sqlite_model: Model, write: Write, commit: str, end: Any
) -> None:
    """Core writes are stored as any other, whoever commits."""
    model = sqlite_model

    def body() -> Iterator[str]:
        write(model.DBSession())
        end()
        yield "one"

    get(make_app(Root(model, body, commit=commit), model))
    assert model.names() == ["ada"]
    assert_clean(model)


@pytest.mark.parametrize("write", CORE_WRITES.values(), ids=CORE_WRITES)
@pytest.mark.parametrize(
    "undo",
    [tgstream.rollback, transaction.abort, transaction.doom],
    ids=["rollback()", "transaction.abort()", "transaction.doom()"],
)
def test_rollback_undoes_every_kind_of_write(
    make_app: MakeApp, sqlite_model: Model, write: Write, undo: Any
) -> None:
    """What was undone is not in the next commit, whatever it was written with."""
    model = sqlite_model

    def body() -> Iterator[str]:
        write(model.DBSession())
        undo()
        yield "one"
        model.DBSession.add(Note(text="after"))

    get(make_app(Root(model, body, commit="each"), model))
    assert model.names() == []
    assert model.texts() == ["after"]
    assert_clean(model)


@pytest.mark.parametrize("commit", [tgstream.commit, transaction.commit])
def test_commit_keeps_objects_attached_and_refreshes_them(
    make_app: MakeApp, model: Model, commit: Callable[[], None]
) -> None:
    """After a commit an object is read again on its next use, lazy loads included."""

    def body() -> Iterator[str]:
        ada = User(name="ada", notes=[Note(text="one")])
        model.DBSession.add(ada)
        commit()
        assert model.names() == ["ada"]
        assert pool(model).checkedout() == 0
        with model.outside.begin() as outside:
            outside.execute(sa.text("UPDATE users SET name = 'countess'"))
        assert ada in model.DBSession
        yield ada.name + ada.notes[0].text
        ada.name = "lovelace"
        commit()
        yield ada.name

    app = make_app(Root(model, body, commit="manual"), model)
    assert get(app).text == "countessonelovelace"
    assert model.names() == ["lovelace"]
    assert_clean(model)


USES: dict[str, Callable[[Session, User], Any]] = {
    "attribute": lambda session, each: each.name,
    "query": lambda session, each: session.query(User).all(),
    "refresh": lambda session, each: session.refresh(each),
    "lazy load": lambda session, each: each.notes,
    "eager load": lambda session, each: session.scalars(
        sa.select(User).options(selectinload(User.notes))
    ).all(),
    "set": lambda session, each: setattr(each, "name", "set"),
    "bulk": lambda session, each: session.execute(sa.update(User).values(name="bulk")),
    "nothing": lambda session, each: None,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("commit", ["commit()", "each"])
def test_commit_expires_what_was_used_since_the_last(
    make_app: MakeApp, sqlite_model: Model, use: Any, commit: str
) -> None:
    """However an object was used, after the next commit it is read again."""
    model = sqlite_model
    model.seed("ada")

    def body() -> Iterator[str]:
        ada = user(model, "ada")
        for text in ("first", "second", "third"):
            use(model.DBSession(), ada)
            model.DBSession.add(Note(text=text))
            if commit == "commit()":
                tgstream.commit()
            yield text
            with model.outside.begin() as outside:
                outside.execute(sa.text(f"UPDATE users SET name = 'outside {text}'"))
                outside.execute(sa.text("UPDATE notes SET user_id = 1"))
            assert ada.name == f"outside {text}"
            assert ada.notes[-1].text == text

    app = make_app(Root(model, body, commit="each"), model)
    assert get(app).text == "firstsecondthird"
    assert_clean(model)


@pytest.mark.parametrize("bulk", [False, True])
def test_commit_detaches_what_was_deleted(
    make_app: MakeApp, model: Model, bulk: bool
) -> None:
    """A deleted object is no longer of the session, and may be added anew."""
    model.seed("ada", "bob")

    def body() -> Iterator[str]:
        ada, bob = user(model, "ada"), user(model, "bob")
        if bulk:
            model.DBSession.execute(sa.delete(User).where(User.name == "ada"))
        else:
            model.DBSession.delete(ada)
        tgstream.commit()
        assert sa.inspect(ada).detached
        assert bob in model.DBSession
        yield bob.name
        make_transient(ada)
        model.DBSession.add(ada)

    assert get(make_app(Root(model, body), model)).text == "bob"
    assert sorted(model.names()) == ["ada", "bob"]
    assert_clean(model)


@pytest.mark.parametrize("commit", [tgstream.commit, transaction.commit])
@pytest.mark.parametrize("deferred", [False, True])
def test_commit_that_fails_lets_the_stream_go_on(
    make_app: MakeApp, model: Model, commit: Callable[[], None], deferred: bool
) -> None:
    """A failed commit is undone and raised; the next one knows nothing of it."""
    if deferred:
        defer_unique_names(model)
    model.seed("ada")

    def body() -> Iterator[str]:
        kept = user(model, "ada")
        for _ in range(2):
            model.DBSession.add(User(name="lost"))
            model.DBSession.add(User(name="ada"))
            with pytest.raises(IntegrityError):
                commit()
            assert kept in model.DBSession
            yield kept.name
        model.DBSession.add(User(name="bob"))
        commit()
        yield "stored"
        model.DBSession.add(User(name="cyd"))

    app = make_app(Root(model, body), model)
    assert get(app).text == "adaadastored"
    assert model.names() == ["ada", "bob", "cyd"]
    assert_thread_works(app, model)


@pytest.mark.parametrize("abort", [tgstream.rollback, transaction.abort])
def test_rollback_undoes_and_the_stream_goes_on(
    make_app: MakeApp, model: Model, abort: Callable[[], None]
) -> None:
    """What is not committed is undone, flushed or pending; objects stay attached."""
    model.seed("ada")

    def body() -> Iterator[str]:
        ada = user(model, "ada")
        model.DBSession.add(User(name="flushed"))
        model.DBSession.flush()
        model.DBSession.add(User(name="pending"))
        ada.name = "changed"
        abort()
        yield ada.name
        model.DBSession.add(User(name="bob"))

    app = make_app(Root(model, body), model)
    assert get(app).text == "ada"
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


# An HTTP exception before the first chunk.


def no(environ: Any, status: str, headers: Any) -> bool:
    """A ``tm.commit_veto`` that stores nothing of what is not a success."""
    return not status.startswith("200")


@pytest.mark.parametrize("answer", ["404", "302"])
@pytest.mark.parametrize("rule", ["commit", "doomed", "veto", "manual", "no tm"])
def test_http_exception_commits_by_the_rules_of_tg(
    make_app: MakeApp, model: Model, answer: str, rule: str, reports: list[Report]
) -> None:
    """It is a response: what the stream wrote is stored, unless TG would not."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        if rule == "doomed":
            transaction.doom()
        if answer == "404":
            tg.abort(404)
        tg.redirect("/elsewhere")
        yield ""

    options: dict[str, Any] = {"tm.commit_veto": no} if rule == "veto" else {}
    root = Root(model, body, commit="manual" if rule == "manual" else "end")
    app = make_app(root, model, tm__enabled=rule != "no tm", **options)
    assert get(app).status.startswith(answer)
    stored = rule in ("commit", "no tm")
    assert model.names() == (["ada"] if stored else [])
    assert reports == []
    assert_clean(model)


def test_http_exception_whose_commit_fails_is_an_error(
    make_app: MakeApp, model: Model
) -> None:
    """A redirect that says all is well does not leave when its commit failed."""
    model.seed("ada")

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        tg.redirect("/thanks")
        yield ""

    app = make_app(Root(model, body), model)
    assert get(app).status.startswith("500")
    assert model.names() == ["ada"]
    assert_thread_works(app, model)


# The request's transaction.


def test_request_writes_survive_whatever_the_stream_does(
    make_app: MakeApp, model: Model
) -> None:
    """What the controller body wrote is stored before the first item is taken."""

    def body() -> Iterator[str]:
        assert model.texts() == ["body"]
        transaction.abort()
        transaction.doom()
        raise ValueError("no")
        yield ""

    app = make_app(Writing(model, body), model)
    assert get(app).status.startswith("500")
    assert model.texts() == ["body"]
    assert_thread_works(app, model)


@pytest.mark.parametrize("how", ["doomed", "veto"])
def test_request_that_tg_would_abort_is_aborted(
    make_app: MakeApp, model: Model, how: str
) -> None:
    """Doomed or vetoed, the body's writes are gone; the stream's are its own."""

    def body() -> Iterator[str]:
        assert model.texts() == []
        model.DBSession.add(User(name="ada"))
        yield "one"

    root = Writing(model, body)
    root.doomed = how == "doomed"
    options: dict[str, Any] = (
        {"tm.commit_veto": lambda *args: True} if how == "veto" else {}
    )
    app = make_app(root, model, **options)
    assert get(app).text == "one"
    assert model.texts() == []
    assert model.names() == ["ada"]
    assert_clean(model)


def test_request_is_not_run_again_for_an_error_of_the_stream(
    make_app: MakeApp, model: Model
) -> None:
    """With tm.attempts a retryable error of the first pull is raised all the same."""

    def body() -> Iterator[str]:
        raise TransientError("again")
        yield ""

    root = Writing(model, body)
    app = make_app(root, model, tm__attempts=3)
    assert get(app).status.startswith("500")
    assert root.runs == 1
    assert model.texts() == ["body"]
    assert_thread_works(app, model)


@pytest.mark.parametrize("how", ["raise", "commit"])
def test_request_is_not_run_again_for_an_error_after_the_controller(
    make_app: MakeApp, model: Model, how: str
) -> None:
    """Neither ``_after`` nor what it wrote can make TG run the controller again."""

    def fail() -> None:
        raise TransientError("again")

    class After(Writing):
        def _after(self, *args: Any, **params: Any) -> None:
            model.DBSession.add(Note(text="after"))
            if how == "commit":
                transaction.get().addBeforeCommitHook(fail)
            else:
                fail()

    root = After(model, lambda: iter(["one", "two"]))
    app = make_app(root, model, tm__attempts=3)
    assert get(app).status.startswith("500")
    assert root.runs == 1
    assert model.texts() == ["body"]
    assert_clean(model)


def test_request_commits_what_after_wrote(make_app: MakeApp, model: Model) -> None:
    """TG's own commit, a moment later, has what ``_after`` wrote."""

    class After(Writing):
        def _after(self, *args: Any, **params: Any) -> None:
            model.DBSession.add(Note(text="after"))

    app = make_app(After(model, lambda: iter(["one", "two"])), model)
    call = Call(app)
    assert model.texts() == ["body", "after"]
    assert call.read() == b"onetwo"
    assert_clean(model)


class Flaky:
    """A resource of the request's transaction that cannot vote the first times."""

    transaction_manager = None

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def tpc_vote(self, transaction: Any) -> None:
        self.failures -= 1
        if self.failures >= 0:
            raise TransientError("again")

    def sortKey(self) -> str:
        return "~~~"  # after the database's vote, which TG then cannot undo

    def nothing(self, transaction: Any) -> None:
        pass

    abort = commit = tpc_begin = tpc_finish = tpc_abort = nothing


class FlakyFirst(Flaky):
    def sortKey(self) -> str:
        return "0"


@pytest.mark.parametrize("attempts", [1, 3])
def test_request_whose_own_commit_fails_is_run_again(
    make_app: MakeApp, model: Model, attempts: int
) -> None:
    """A retryable commit of the request's own transaction is TG's to retry."""
    model.seed("ada")
    flaky = FlakyFirst(2)

    class Failing(Writing):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            transaction.get().join(flaky)
            self.kept = user(model, "ada")
            return super().index()

    root = Failing(model, lambda: iter(["one", root.kept.name]))
    app = make_app(root, model, tm__attempts=attempts)
    call = get(app)
    assert root.runs == attempts
    if attempts == 3:
        assert call.text == "oneada"
        assert model.texts() == ["body"]
    else:
        assert call.status.startswith("500")
        assert "TransientError: again" in call.errors.getvalue()
        assert model.texts() == []
    assert_thread_works(app, model)


def test_request_whose_own_flush_fails_is_an_ordinary_error(
    make_app: MakeApp, model: Model
) -> None:
    """What the controller body cannot store is a 500, and the stream never runs."""
    defer_unique_names(model)
    model.seed("ada")
    ran: list[bool] = []

    class Failing(Root):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            user(model, "ada")
            model.DBSession.add(User(name="ada"))
            return super().index()

    def body() -> Iterator[str]:
        ran.append(True)
        yield ""

    app = make_app(Failing(model, body), model)
    call = get(app)
    assert call.status.startswith("500")
    assert "IntegrityError" in call.errors.getvalue()
    assert ran == []
    assert_thread_works(app, model)


# tm.enabled off


@pytest.mark.parametrize("zope", [True, False])
@pytest.mark.parametrize("commit", ["end", "each", "manual"])
def test_stream_commits_with_tm_off(
    make_app: MakeApp, make_model: MakeModel, url: str, zope: bool, commit: str
) -> None:
    """Without TG's transactions a stream has its own; the body's left-overs go."""
    model = make_model(url, zope=zope)
    model.seed("ada")
    kept: list[User] = []

    class Loading(Root):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept.append(user(model, "ada"))
            kept[0].name = "gone"
            model.DBSession.add(User(name="gone, too"))
            model.DBSession.flush()
            return super().index()

    def body() -> Iterator[str]:
        assert model.names() == ["ada"]
        yield kept[0].name
        model.DBSession.add(User(name="undone"))
        model.DBSession.flush()
        tgstream.rollback()
        model.DBSession.add(User(name="bob"))
        if commit == "manual":
            tgstream.commit()
        yield "two"

    app = make_app(Loading(model, body, commit=commit), model, tm__enabled=False)
    assert get(app).text == "adatwo"
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


@pytest.mark.parametrize("zope", [True, False])
def test_stream_with_tm_off_leaves_the_thread_well(
    make_app: MakeApp, make_model: MakeModel, url: str, zope: bool
) -> None:
    """Failed and abandoned streams neither wedge their thread nor reach a commit."""
    model = make_model(url, zope=zope)

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="lost"))
        model.DBSession.flush()
        yield "one"
        raise ValueError("no")

    def writing() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        yield "one"

    app = make_app(Root(model, body), model, tm__enabled=False)
    with pytest.raises(ValueError, match="no"):
        get(app)
    call = Call(app, checked=False)
    next(call)
    call.drop()
    app = make_app(Root(model, writing), model, tm__enabled=False)
    assert get(app).text == "one"
    assert model.names() == ["ada"]
    assert_clean(model)


def test_stream_of_an_unregistered_session_commits_with_tm_on(
    make_app: MakeApp, make_model: MakeModel, url: str
) -> None:
    """A session that zope.sqlalchemy does not know is committed all the same."""
    model = make_model(url, zope=False)
    model.seed("ada")
    kept: list[User] = []

    class Loading(Root):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept.append(user(model, "ada"))
            kept[0].name = "gone"
            return super().index()

    def body() -> Iterator[str]:
        assert pool(model).checkedout() == 0
        yield kept[0].name
        model.DBSession.add(User(name="bob"))

    assert get(make_app(Loading(model, body), model)).text == "ada"
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


# Which sessions.

second_session: scoped_session[Session] = scoped_session(sessionmaker())
register(second_session)


@pytest.fixture
def other(model: Model, tmp_path: Path) -> Iterator[sa.Engine]:
    """A second database, of ``second_session``."""
    engine = sa.create_engine(f"sqlite:///{tmp_path}/other.db")
    Note.__table__.create(engine)  # type: ignore[attr-defined]
    second_session.configure(bind=engine)
    yield engine
    second_session.remove()
    engine.dispose()


def other_texts(engine: sa.Engine) -> list[str]:
    with engine.connect() as outside:
        return list(outside.scalars(sa.text("SELECT text FROM notes ORDER BY id")))


@pytest.mark.parametrize(
    "named",
    [
        lambda: [second_session],
        lambda: ["tests.database.test_database.second_session"],
        lambda: "tests.database.test_database.second_session",
    ],
    ids=["object", "dotted", "ini"],
)
@pytest.mark.parametrize("end", ["commit", "abort", "leave", "fail"])
def test_stream_second_session_ends_as_the_first(
    make_app: MakeApp, model: Model, other: sa.Engine, named: Any, end: str
) -> None:
    """Both are committed, aborted and released together."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        second_session.add(Note(text="other"))
        second_session.flush()
        yield "one"
        if end == "abort":
            tgstream.rollback()
        if end == "fail":
            second_session.add(Note(id=1, text="again"))
        yield "two"

    app = make_app(Root(model, body), model, tgstream__sessions=named())
    call = Call(app)
    next(call)
    assert other_texts(other) == []
    if end == "leave":
        call.close()
    elif end == "fail":
        with pytest.raises(IntegrityError):
            call.read()
    else:
        call.read()
    stored = end == "commit"
    assert model.names() == (["ada"] if stored else [])
    assert other_texts(other) == (["other"] if stored else [])
    assert not second_session.registry.has()
    assert other.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert_thread_works(app, model)


def test_stream_second_session_of_the_request_is_released(
    make_app: MakeApp, model: Model, other: sa.Engine
) -> None:
    """What the controller body did with the second session ends there as well."""
    kept: list[Note] = []

    class Loading(Root):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept.append(Note(text="body"))
            second_session.add(kept[0])
            return super().index()

    def body() -> Iterator[str]:
        assert other_texts(other) == ["body"]
        assert kept[0] in second_session
        yield kept[0].text
        kept[0].text = "stream"

    app = make_app(Loading(model, body), model, tgstream__sessions=[second_session])
    call = Call(app)
    assert not second_session.registry.has()
    assert call.read() == b"body"
    assert other_texts(other) == ["stream"]
    assert not second_session.registry.has()
    assert other.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert_clean(model)


def test_stream_names_a_session_that_is_not_there(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """A dotted name that leads nowhere is an error that names the option."""
    app = make_app(
        Root(sqlite_model, lambda: iter(["one"])),
        sqlite_model,
        tgstream__sessions=["tests.model.NoSession"],
    )
    call = get(app)
    assert call.status.startswith("500")
    assert "tgstream.sessions names tests.model.NoSession" in call.errors.getvalue()
    assert_clean(sqlite_model)


def test_stream_of_a_balanced_session_reads_slaves_and_writes_the_master(
    make_app: MakeApp, make_model: MakeModel, tmp_path: Path
) -> None:
    """TG's master and slaves work in a stream as they do in a request."""
    slave = make_model(f"sqlite:///{tmp_path}/slave.db")
    slave.seed("of the slave")
    url = f"sqlite:///{tmp_path}/master.db"
    model = make_model(url, class_=BalancedSession)
    kept: list[User] = []

    class Loading(Root):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept.extend(model.DBSession.query(User))
            return super().index()

    def body() -> Iterator[str]:
        yield kept[0].name
        model.DBSession.add(User(id=2, name="of the master"))
        tgstream.commit()
        yield "".join(each.name for each in model.DBSession.query(User.name))
        with model.DBSession().using_engine("master"):  # type: ignore[attr-defined]
            yield "".join(each.name for each in model.DBSession.query(User.name))

    app = make_app(
        Loading(model, body),
        model,
        **{
            "sqlalchemy.master.url": url,
            "sqlalchemy.slaves.first.url": f"sqlite:///{tmp_path}/slave.db",
        },
    )
    assert get(app).text == "of the slave" * 2 + "of the master"
    assert model.names() == ["of the master"]
    assert slave.names() == ["of the slave"]
    for engine in tg.config["balanced_engines"]["all"].values():
        assert engine.pool.checkedout() == 0
        engine.dispose()
    assert_clean(model)


def test_stream_session_is_made_with_the_arguments_it_is_called_with(
    make_app: MakeApp, model: Model
) -> None:
    """``DBSession(info=...)`` in a generator makes the stream's session so."""

    def body() -> Iterator[str]:
        assert not model.DBSession.registry.has()
        session = model.DBSession(info={"stream": 1})
        assert model.DBSession() is session
        with pytest.raises(sa.exc.InvalidRequestError, match="already present"):
            model.DBSession(info={"stream": 2})
        session.add(User(name="ada"))
        yield "one"
        assert model.DBSession.info == {"stream": 1}
        session.add(User(name="bob"))

    call = Call(make_app(Root(model, body), model))
    next(call)
    assert not model.DBSession.registry.has()
    call.read()
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


def by_thread() -> Any:
    return threading.get_ident()


def by_request() -> Any:
    try:
        return id(tg.request.environ)
    except TypeError:  # outside of a request, where TG configures the session
        return None


@pytest.mark.parametrize("scopefunc", [by_thread, by_request])
def test_stream_of_sessions_with_a_scope_of_their_own(
    make_app: MakeApp, make_model: MakeModel, url: str, scopefunc: Any
) -> None:
    """A ``scoped_session(scopefunc=...)`` gives a stream a session of its own, too."""
    model = make_model(url)
    model.DBSession = scoped_session(model.maker, scopefunc=scopefunc)
    register(model.DBSession)
    model.seed("ada")

    class Loading(Root):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            self.kept = user(model, "ada")
            return super().index()

    def body() -> Iterator[str]:
        yield root.kept.name
        model.DBSession.add(User(name="bob"))
        yield "two"

    root = Loading(model, body)
    app = make_app(root, model)
    assert get(app).text == "adatwo"
    assert get(app, "/names").text == "ada,bob"
    assert model.DBSession.registry.registry == {}
    assert_clean(model)


def test_stream_may_remove_its_session(make_app: MakeApp, model: Model) -> None:
    """``DBSession.remove()`` in a generator undoes, and the next use begins anew."""
    sessions: list[Session] = []

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="undone"))
        model.DBSession.flush()
        sessions.append(model.DBSession())
        model.DBSession.remove()
        assert pool(model).checkedout() == 0
        yield "one"
        model.DBSession.add(User(name="ada"))
        sessions.append(model.DBSession())
        yield "two"

    app = make_app(Root(model, body), model)
    assert get(app).text == "onetwo"
    assert sessions[0] is not sessions[1]
    assert model.names() == ["ada"]
    assert_thread_works(app, model)


@pytest.mark.parametrize("end", ["end", "each", "manual", "leave"])
def test_stream_session_that_was_replaced_ends_with_the_stream(
    make_app: MakeApp, model: Model, end: str
) -> None:
    """``registry.set()`` twice: both are committed, or neither, and both are closed."""
    sessions: list[Session] = []

    def body() -> Iterator[str]:
        sessions.extend([model.maker(), model.maker()])
        model.DBSession.registry.set(sessions[0])
        model.DBSession.add(User(name="ada"))
        model.DBSession.flush()
        model.DBSession.registry.set(sessions[1])
        model.DBSession.query(User).count()
        yield "one"
        yield "two"

    commit = "end" if end == "leave" else end
    call = Call(make_app(Root(model, body, commit=commit), model))
    next(call)
    if end == "leave":
        call.close()
    else:
        call.read()
    assert model.names() == (["ada"] if end in ("end", "each") else [])
    assert [session.in_transaction() for session in sessions] == [False, False]
    assert_clean(model)


def test_stream_session_that_is_set_again_is_the_same_part(
    make_app: MakeApp, make_model: MakeModel, postgresql: str
) -> None:
    """Another session for a while, then the first again."""
    model = make_model(postgresql)

    def body() -> Iterator[str]:
        first = model.DBSession()
        first.add(User(name="first"))
        model.DBSession.registry.set(model.maker())
        model.DBSession.add(User(name="second"))
        model.DBSession.registry.set(first)
        model.DBSession.add(User(name="third"))
        yield "one"

    assert get(make_app(Root(model, body), model)).text == "one"
    assert sorted(model.names()) == ["first", "second", "third"]
    assert_clean(model)


def test_stream_session_in_two_registries_is_removed_from_one(
    make_app: MakeApp, model: Model
) -> None:
    """``remove()`` of the one closes it; the other goes on with it."""
    other = scoped_session(model.maker)

    def body() -> Iterator[str]:
        other.registry.set(model.DBSession())
        other.add(User(name="ada"))
        yield "one"
        other.remove()
        model.DBSession.add(User(name="bob"))
        yield "two"

    root = Root(model, body, commit="each")
    assert get(make_app(root, model, tgstream__sessions=[other])).text == "onetwo"
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("how", ["close", "remove", "remove and use"])
@pytest.mark.parametrize("options", [{}, {"close_resets_only": False}], ids=str)
def test_stream_may_close_its_session(
    make_app: MakeApp,
    make_model: MakeModel,
    url: str,
    options: dict[str, Any],
    how: str,
    begun: bool,
) -> None:
    """Also for good, and in a transaction that the session takes part in."""
    model = make_model(url, **options)

    def body() -> Iterator[str]:
        if begun:
            transaction.get()
        model.DBSession.add(User(name="undone"))
        model.DBSession.flush()
        if how == "close":
            model.DBSession.close()
        else:
            model.DBSession.remove()
        if how == "remove and use":
            model.DBSession.add(User(name="ada"))
        yield "one"

    assert get(make_app(Root(model, body), model)).text == "one"
    assert model.names() == (["ada"] if how == "remove and use" else [])
    assert_clean(model)


def test_stream_session_that_was_removed_can_still_read(
    make_app: MakeApp, model: Model
) -> None:
    """``remove()`` closes a session, which SQLAlchemy lets begin again."""

    def body() -> Iterator[str]:
        session = model.DBSession()
        model.DBSession.remove()
        yield f"{session.scalars(sa.select(User.name)).all()}"
        session.close()

    assert get(make_app(Root(model, body), model)).text == "[]"
    assert_clean(model)


def test_stream_session_of_the_application_serves_several_streams(
    make_app: MakeApp, model: Model
) -> None:
    """A session that the application keeps works in each stream that it is set in."""

    def body() -> Iterator[str]:
        model.DBSession.registry.set(kept)
        yield f"{model.DBSession.scalars(sa.select(User.name)).all()}"

    app = make_app(Root(model, body), model)
    kept = model.maker()
    assert [get(app).text, get(app).text] == ["[]", "[]"]
    assert_clean(model)


def test_stream_session_without_autobegin_may_be_idle(
    make_app: MakeApp, make_model: MakeModel, url: str
) -> None:
    """``Session(autobegin=False)`` that has begun nothing has nothing to commit."""
    model = make_model(url, zope=False, autobegin=False)

    def body() -> Iterator[str]:
        session = model.DBSession()
        transaction.get()
        yield "one"
        with session.begin():
            session.add(User(name="ada"))
        yield "two"

    assert get(make_app(Root(model, body, commit="each"), model)).text == "onetwo"
    assert model.names() == ["ada"]
    assert_clean(model)


def test_stream_in_memory_warns_once_an_engine(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """In-memory SQLite is one connection for all: each engine is warned of once."""

    url = "sqlite://?timeout=7"  # some drivers take a password there
    engines = [sa.create_engine(url) for _ in range(3)]
    by_function: Any = lambda: Session(engines[1])  # noqa: E731
    sessions: list[scoped_session[Session]] = [
        scoped_session(sessionmaker(engines[0])),
        scoped_session(by_function),
        scoped_session(sessionmaker(binds={User: engines[2]})),
    ]

    def body() -> Iterator[str]:
        for session in sessions:
            bound = {"mapper": User} if session is sessions[2] else {}
            session.execute(sa.text("SELECT 1"), bind_arguments=bound)
        yield "one"

    class Streams(TGController):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            return Stream(body())

    app = make_app(Streams(), tgstream__sessions=sessions)
    for _ in range(3):
        assert get(app).text == "one"
    warnings = [
        each.getMessage()
        for each in caplog.records
        if each.levelno == logging.WARNING and "one connection" in each.getMessage()
    ]
    assert len(warnings) == 3
    assert "sqlalchemy.url = sqlite:///%(here)s/test.db" in warnings[0]
    assert "timeout" not in warnings[0]
    for engine in engines:
        engine.dispose()


NO_DATABASE = """
import sys
sys.modules['sqlalchemy'] = None  # as if not installed: TG imports it where it is
from tg import MinimalApplicationConfigurator, TGController, expose
import tgstream

class Root(TGController):
    @expose(content_type='text/plain')
    @tgstream.stream
    def index(self, fail=None):
        yield 'one'
        if fail:
            raise ValueError('no')
        yield 'two'

configurator = MinimalApplicationConfigurator()
configurator.update_blueprint({'root_controller': Root()})
tgstream.plugme(configurator)
app = configurator.make_wsgi_app({}, {})

from tests.wsgi import get
assert get(app).text == 'onetwo'
try:
    get(app, '/?fail=1')
except ValueError:
    print('raised')
for name in ('zope.sqlalchemy', 'transaction', 'tgstream.database.database'):
    print(name, name in sys.modules)
"""


def test_stream_without_sqlalchemy_imports_none_of_it() -> None:
    """An application without a database streams without SQLAlchemy or transaction."""
    done = subprocess.run(
        [sys.executable, "-c", NO_DATABASE], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "raised",
        "zope.sqlalchemy False",
        "transaction False",
        "tgstream.database.database False",
    ]


NO_SQLALCHEMY = """
import sys
sys.modules['sqlalchemy'] = None  # as if it was not installed
import transaction
from tg import FullStackApplicationConfigurator, TGController, expose
import tgstream

class Root(TGController):
    @expose(content_type='text/plain')
    @tgstream.stream(commit='each')
    def index(self):
        yield 'one'
        transaction.get()
        yield 'two'
        raise ValueError('no')

class AppGlobals:
    pass

configurator = FullStackApplicationConfigurator()
configurator.update_blueprint({
    'root_controller': Root(), 'renderers': ['json'], 'default_renderer': 'json',
    'errorpage.enabled': False, 'helpers': object, 'app_globals': AppGlobals,
})
tgstream.plugme(configurator)
app = configurator.make_wsgi_app({}, {})

from tests.wsgi import get
try:
    get(app)
except ValueError:
    print('raised')
"""


def test_stream_with_transactions_needs_no_sqlalchemy() -> None:
    """TG's transaction manager alone (for mails, say) streams without SQLAlchemy."""
    done = subprocess.run(
        [sys.executable, "-c", NO_SQLALCHEMY], capture_output=True, text=True
    )
    assert "raised" in done.stdout, done.stderr


# Streams beside each other, and what is left of them.


def test_streams_interleaved_keep_their_writes_apart(
    make_app: MakeApp, model: Model
) -> None:
    """Nothing uncommitted reaches another stream's or request's commit."""
    count = iter(range(100))

    def body() -> Iterator[str]:
        me = next(count)
        for number in range(3):
            model.DBSession.add(User(name=f"stream{me}.{number}"))
            if not model.sqlite:  # which has one writer at a time
                model.DBSession.flush()
            yield "item"

    app = make_app(Root(model, body), model)
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


@pytest.mark.parametrize("cyclic", [False, True])
def test_stream_dropped_in_another_request_leaves_its_session_alone(
    make_app: MakeApp, model: Model, cyclic: bool
) -> None:
    """TG removes the session of the thread that closes a body; not a busy one."""
    calls: list[Call] = []

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="lost"))
        yield "one"
        yield "two"

    class Dropping(Root):
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
    """Let go of the last call; in a cycle it waits for the garbage collector."""
    call = calls.pop()
    if cyclic:
        cycle: list[Any] = [call]
        cycle.append(cycle)
        del call, cycle
        gc.collect()
    else:
        call.drop()


@pytest.mark.parametrize("cyclic", [False, True])
def test_stream_dropped_in_another_stream_leaves_its_session_alone(
    make_app: MakeApp, model: Model, cyclic: bool
) -> None:
    """Nor does it remove the session of a stream that is being pulled there."""
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

    app = make_app(Root(model, body), model)
    calls.append(Call(app, checked=False))
    next(calls[0])
    assert get(app).text == "onetwo"
    assert model.names() == ["ada", "bob"]
    assert_thread_works(app, model)


def test_stream_closed_by_hand_does_not_keep_the_next_session(
    make_app: MakeApp, model: Model
) -> None:
    """A close() that no removal of TG follows shields no session for ever."""
    streams: list[Stream] = []

    def body() -> Iterator[str]:
        yield "one"

    class Closing(Root):
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


@pytest.mark.parametrize("raises", [False, True])
def test_stream_whose_cleanup_fails_leaves_nothing(
    make_app: MakeApp, model: Model, reports: list[Report], raises: bool
) -> None:
    """A ``finally`` that raises or writes when the client leaves holds nothing up."""

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

    app = make_app(Root(model, body), model)
    call = Call(app)
    next(call)
    call.close()
    assert model.names() == []
    assert [(each.reason, each.error is not None) for each in reports] == [
        ("disconnected", raises)
    ]
    assert_thread_works(app, model)


def test_stream_whose_connection_dies_leaves_nothing(
    make_app: MakeApp, postgresql: str, make_model: MakeModel
) -> None:
    """When the server ends a stream's connection the stream fails, and that is all."""
    model = make_model(postgresql)

    def body() -> Iterator[str]:
        yield str(model.DBSession.scalar(sa.text("SELECT pg_backend_pid()")))
        model.DBSession.add(User(name="lost"))

    app = make_app(Root(model, body), model)
    call = Call(app)
    model.look(f"SELECT pg_terminate_backend({int(next(call))})")
    with pytest.raises(sa.exc.OperationalError):
        next(call)
    call.close()
    assert model.names() == []
    assert_thread_works(app, model)


def test_stream_decorated_is_the_same(make_app: MakeApp, model: Model) -> None:
    """``@stream`` takes the same options, and writes as a returned Stream does."""

    class Decorated(TGController):
        @expose(content_type="text/plain")
        @stream(commit="each")
        def index(self) -> Iterator[str]:
            for name in ("ada", "bob"):
                model.DBSession.add(User(name=name))
                yield name

    call = Call(make_app(Decorated(), model))
    assert names_after_each_chunk(call, model) == [1, 2]
    assert_clean(model)


@pytest.mark.parametrize("commit", ["end", "each", 3])
def test_format_that_stops_early_is_stored(
    make_app: MakeApp, model: Model, commit: Any
) -> None:
    """A format may end a body before its items do; what was taken is committed."""

    class First(Lines):
        def encode(self, items: Iterable[Any]) -> Iterator[str]:
            for number, item in enumerate(items, 1):
                yield f"{item}\n"
                if number == 2:
                    return

    def body() -> Iterator[str]:
        try:
            for name in ("ada", "bob", "carl"):
                model.DBSession.add(User(name=name))
                yield name
        finally:
            model.DBSession.add(User(name="finally"))

    app = make_app(Root(model, body, format=First, commit=commit), model)
    assert get(app).text == "ada\nbob\n"
    assert model.names() == ["ada", "bob", "finally"]
    assert_clean(model)
