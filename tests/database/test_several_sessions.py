"""Streams that use several sessions, and databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import transaction
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from tg import TGController, expose, redirect
from zope.sqlalchemy import register

import tgstream
from tests.conftest import MakeApp, Root, assert_clean
from tests.database.conftest import (
    ModelRoot,
    Resource,
    assert_thread_works,
    find_user,
    seed_note,
)
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import Call, get
from tgstream import Stream

# The option tgstream.sessions.


second_session: scoped_session[Session] = scoped_session(sessionmaker())


register(second_session)


@pytest.fixture
def second_engine(model: Model, tmp_path: Path) -> Iterator[sa.Engine]:
    """The engine of ``second_session``, of a second database."""
    engine = sa.create_engine(f"sqlite:///{tmp_path}/other.db")
    Note.__table__.create(engine)  # type: ignore[attr-defined]
    second_session.configure(bind=engine)
    yield engine
    second_session.remove()
    engine.dispose()


def second_texts(engine: sa.Engine) -> list[str]:
    """The texts of the committed notes in the second database."""
    with engine.connect() as connection:
        return list(connection.scalars(sa.text("SELECT text FROM notes ORDER BY id")))


@pytest.mark.parametrize(
    "named",
    [
        lambda: [second_session],
        lambda: ["tests.database.test_several_sessions.second_session"],
        lambda: "tests.database.test_several_sessions.second_session",
    ],
    ids=["object", "dotted", "ini"],
)
@pytest.mark.parametrize("end", ["commit", "abort", "leave", "fail"])
def test_second_session_ends_like_the_first(
    make_app: MakeApp, model: Model, second_engine: sa.Engine, named: Any, end: str
) -> None:
    """Both sessions are committed, rolled back and released together."""

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

    app = make_app(ModelRoot(model, body), model, tgstream__sessions=named())
    call = Call(app)
    next(call)
    assert second_texts(second_engine) == []
    if end == "leave":
        call.close()
    elif end == "fail":
        with pytest.raises(IntegrityError):
            call.read()
    else:
        call.read()
    stored = end == "commit"
    assert model.names() == (["ada"] if stored else [])
    assert second_texts(second_engine) == (["other"] if stored else [])
    assert not second_session.registry.has()
    assert second_engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert_thread_works(app, model)


def test_second_session_of_the_request_is_adopted(
    make_app: MakeApp, model: Model, second_engine: sa.Engine
) -> None:
    """The stream adopts it with its objects, and releases it at its end."""
    kept: list[Note] = []

    class Loading(ModelRoot):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept.append(Note(text="body"))
            second_session.add(kept[0])
            return super().index()

    def body() -> Iterator[str]:
        assert second_texts(second_engine) == ["body"]
        assert kept[0] in second_session
        yield kept[0].text
        kept[0].text = "stream"

    app = make_app(Loading(model, body), model, tgstream__sessions=[second_session])
    call = Call(app)
    assert not second_session.registry.has()
    assert call.read() == b"body"
    assert second_texts(second_engine) == ["stream"]
    assert not second_session.registry.has()
    assert second_engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert_clean(model)


@pytest.mark.parametrize("end", ["fail", "redirect", "complete", "go on"])
def test_second_session_is_not_left_on_the_thread(
    make_app: MakeApp, make_model: MakeModel, tmp_path: Any, end: str
) -> None:
    """TG removes one session at the end, tgstream all sessions of the option."""
    model = make_model(f"sqlite:///{tmp_path}/first.db")
    other = make_model(f"sqlite:///{tmp_path}/second.db")
    other.init_model(other.outside)
    seed_note(other)

    def items() -> Iterator[str]:
        if end == "fail":
            raise ValueError("failed")
        if end == "redirect":
            redirect("/")
        yield find_user(other, "ada").name
        if end == "go on":
            yield "b"

    class Root(TGController):
        @expose(content_type="text/plain")
        def stream(self) -> Stream:
            find_user(other, "ada")
            return Stream(items())

        def _after(self, *remainder: Any, **params: Any) -> None:
            find_user(other, "ada")

    app = make_app(Root(), model, tgstream__sessions=[other.DBSession])
    get(app, "/stream")
    assert not other.DBSession.registry.has()
    assert_clean(model)


def test_session_that_cannot_be_imported_is_an_error(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """The error names the option and the dotted name."""
    app = make_app(
        ModelRoot(sqlite_model, lambda: iter(["one"])),
        sqlite_model,
        tgstream__sessions=["tests.model.NoSession"],
    )
    call = get(app)
    assert call.status.startswith("500")
    assert "tgstream.sessions names tests.model.NoSession" in call.errors.getvalue()
    assert_clean(sqlite_model)


# Commits that may be partial.


def two_databases(make_model: MakeModel, tmp_path: Path) -> tuple[Model, Model]:
    """Two SQLite files. The second refuses a note of an unknown user in its commit."""
    first = make_model(f"sqlite:///{tmp_path}/first.db")
    second = make_model(f"sqlite:///{tmp_path}/second.db")
    second.outside.dispose()
    engine = sa.create_engine(second.url)
    sa.event.listen(
        engine, "connect", lambda raw, _: raw.execute("PRAGMA foreign_keys = ON")
    )
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE notes")
        connection.exec_driver_sql(
            "CREATE TABLE notes (id INTEGER PRIMARY KEY, text VARCHAR(200), user_id"
            " INTEGER REFERENCES users DEFERRABLE INITIALLY DEFERRED)"
        )
    second.init_model(engine)
    return first, second


def partial_commit_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings about commits of several sessions."""
    messages = (each.getMessage() for each in caplog.records)
    return [each for each in messages if "one after the other" in each]


@pytest.mark.parametrize("commit", ["end", "each"])
def test_commit_of_two_databases_warns_once(
    make_app: MakeApp,
    make_model: MakeModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    commit: str,
) -> None:
    """One warning an application, before the first commit that may be partial."""
    first, second = two_databases(make_model, tmp_path)
    refused = False

    def body() -> Iterator[str]:
        yield "one"
        first.DBSession.add(Note(text="first"))
        first.DBSession.flush()
        second.DBSession.add(Note(text="second", user_id=7 if refused else None))
        yield "two"

    app = make_app(
        Root(body, commit=commit), first, tgstream__sessions=[second.DBSession]
    )
    for _ in range(2):
        assert get(app).text == "onetwo"
    assert (first.texts(), second.texts()) == (["first"] * 2, ["second"] * 2)
    [warning] = partial_commit_warnings(caplog)
    assert "twophase=True" in warning
    refused = True
    with pytest.raises(IntegrityError):
        get(app)
    assert second.texts() == ["second"] * 2
    assert len(partial_commit_warnings(caplog)) == 1
    assert_clean(first)
    assert_clean(second)


def test_commit_that_the_second_database_refuses_is_partial(
    make_app: MakeApp, make_model: MakeModel, tmp_path: Path
) -> None:
    """Each session commits once. The table in explanation.rst shows the result."""
    first, second = two_databases(make_model, tmp_path)

    def body() -> Iterator[str]:
        second.DBSession.add(Note(text="refused", user_id=7))
        first.DBSession.add(Note(text="stays"))
        second.DBSession.flush()
        yield "one"
        members = transaction.get()._resources
        members.sort(key=lambda member: member.sortKey())
        order.extend(member.session is first.DBSession() for member in members)

    order: list[bool] = []
    app = make_app(Root(body), first, tgstream__sessions=[second.DBSession])
    with pytest.raises(IntegrityError):
        get(app)
    assert second.texts() == []
    assert first.texts() == (["stays"] if order[0] else [])
    assert_clean(first)
    assert_clean(second)


def test_commit_of_a_database_that_is_only_read_does_not_warn(
    make_app: MakeApp,
    make_model: MakeModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A commit without changes cannot be refused."""
    first, second = two_databases(make_model, tmp_path)

    def body() -> Iterator[str]:
        first.DBSession.add(Note(text="first"))
        yield str(second.DBSession.query(User).count())

    app = make_app(Root(body), first, tgstream__sessions=[second.DBSession])
    assert get(app).text == "0"
    assert first.texts() == ["first"]
    assert partial_commit_warnings(caplog) == []
    assert_clean(first)


def test_commit_in_two_phases_does_not_warn(
    make_app: MakeApp, twophase: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """If all sessions but one commit in two phases, a commit is never partial."""
    scoped = scoped_session(sessionmaker())

    def body() -> Iterator[str]:
        scoped.add(User(name="one phase"))
        twophase.DBSession.add(User(name="two phases"))
        yield "one"

    app = make_app(Root(body), twophase, tgstream__sessions=[scoped])
    scoped.configure(bind=twophase.engine)
    assert get(app).text == "one"
    assert sorted(twophase.names()) == ["one phase", "two phases"]
    assert partial_commit_warnings(caplog) == []
    assert_clean(twophase)


# Two phases.


@pytest.fixture
def twophase(make_model: MakeModel, postgresql: str) -> Iterator[Model]:
    """A model whose sessions commit in two phases."""
    model = make_model(postgresql, twophase=True)
    yield model
    assert model.fetch("SELECT * FROM pg_prepared_xacts") == []


def test_twophase_session_is_prepared_in_the_vote(
    make_app: MakeApp, twophase: Model
) -> None:
    """It is committed after all others have voted."""
    model = twophase
    seen: list[int] = []

    class Watching(Resource):
        def tpc_vote(self, transaction: Any) -> None:
            assert model.names() == []
            seen.append(len(model.fetch("SELECT * FROM pg_prepared_xacts")))

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        transaction.get().join(Watching([], key="~"))
        yield "one"
        ada = model.DBSession.query(User).one()
        tgstream.commit()
        yield ada.name
        model.DBSession.execute(sa.text("INSERT INTO users (name) VALUES ('core')"))

    assert get(make_app(Root(body), model)).text == "oneada"
    assert seen == [1]
    assert model.names() == ["ada", "core"]
    assert_clean(model)


@pytest.mark.parametrize("commit", ["each", "end"])
def test_twophase_session_is_undone_when_another_refuses(
    make_app: MakeApp, twophase: Model, commit: str
) -> None:
    """The prepared transaction is rolled back, and the stream can go on."""
    model = twophase

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="lost"))
        transaction.get().join(Resource([], fails="tpc_vote", key="~"))
        with pytest.raises(ValueError, match="tpc_vote"):
            transaction.commit()
        model.DBSession.add(User(name="ada"))
        yield "one"
        model.DBSession.add(User(name="bob"))

    assert get(make_app(Root(body, commit=commit), model)).text == "one"
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


def test_twophase_session_is_undone_when_one_phase_fails(
    make_app: MakeApp, twophase: Model
) -> None:
    """Sessions in two phases vote first, so both sessions are rolled back."""
    model = twophase
    scoped = scoped_session(sessionmaker())

    def body() -> Iterator[str]:
        one = User(name="one phase")
        scoped.add(one)
        model.DBSession.add(User(name="two phases"))
        scoped.execute(
            sa.text(
                "CREATE TEMP TABLE once (x int UNIQUE DEFERRABLE INITIALLY DEFERRED)"
            )
        )
        scoped.execute(sa.text("INSERT INTO once VALUES (1), (1)"))
        yield "one"

    app = make_app(Root(body), model, tgstream__sessions=[scoped])
    scoped.configure(bind=model.engine)
    with pytest.raises(IntegrityError):
        get(app)
    assert model.names() == []
    assert_clean(model)
