"""A stream's transaction manager, and its sessions' part in two-phase commits."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
import transaction
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from tg import TGController, expose
from transaction.interfaces import (
    DoomedTransaction,
    InvalidSavepointRollbackError,
    TransactionFailedError,
)

import tgstream
from tests.conftest import MakeApp, assert_clean
from tests.faults.conftest import wait_until_blocked
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import Call, get
from tgstream import Report, Stream

Generator = Callable[[], Iterator[str]]


def make_root(body: Generator, **options: Any) -> TGController:
    """A root with a stream of ``body``."""

    class Root(TGController):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            return Stream(body(), **options)

    return Root()


class Resource:
    """A data manager as a mailer has it, which tells what it is asked to do."""

    transaction_manager = None

    def __init__(self, log: list[str], fails: str = "", key: str = "0") -> None:
        self.log, self.fails, self.key = log, fails, key

    def _note(self, step: str) -> None:
        self.log.append(step)
        if step == self.fails:
            raise ValueError(f"in {step}")

    def sortKey(self) -> str:
        return self.key

    def abort(self, transaction: Any) -> None:
        self._note("abort")

    def tpc_begin(self, transaction: Any) -> None:
        self._note("tpc_begin")

    def commit(self, transaction: Any) -> None:
        self._note("commit")

    def tpc_vote(self, transaction: Any) -> None:
        self._note("tpc_vote")

    def tpc_finish(self, transaction: Any) -> None:
        self._note("tpc_finish")

    def tpc_abort(self, transaction: Any) -> None:
        self._note("tpc_abort")


# The manager.


def test_manager_commits_other_resources_with_the_sessions(
    make_app: MakeApp, model: Model
) -> None:
    """A mail that the generator sends leaves when its rows are stored."""
    log: list[str] = []

    def body() -> Iterator[str]:
        transaction.get().join(Resource(log))
        model.DBSession.add(User(name="ada"))
        yield "one"
        assert log == []

    assert get(make_app(make_root(body), model)).text == "one"
    assert log == ["tpc_begin", "commit", "tpc_vote", "tpc_finish"]
    assert model.names() == ["ada"]
    assert_clean(model)


def test_manager_commits_other_resources_of_each_item(
    make_app: MakeApp, model: Model
) -> None:
    """With commit='each' a mail leaves before its item, with no session in use."""
    log: list[str] = []

    def body() -> Iterator[str]:
        for _ in range(2):
            transaction.get().join(Resource(log))
            yield "item"

    call = Call(make_app(make_root(body, commit="each"), model))
    assert [log.count("tpc_finish") for _ in call] == [1, 2]
    call.close()
    assert_clean(model)


@pytest.mark.parametrize("step", ["tpc_begin", "commit", "tpc_vote"])
def test_manager_stores_nothing_when_a_resource_refuses(
    make_app: MakeApp, model: Model, step: str
) -> None:
    """The database votes last: what another resource refuses is not stored."""
    log: list[str] = []

    def body() -> Iterator[str]:
        transaction.get().join(Resource(log, fails=step))
        model.DBSession.add(User(name="lost"))
        with pytest.raises(ValueError, match=step):
            transaction.commit()
        yield "one"
        model.DBSession.add(User(name="ada"))

    assert get(make_app(make_root(body), model)).text == "one"
    assert "tpc_finish" not in log
    assert model.names() == ["ada"]
    assert_clean(model)


def test_manager_aborts_other_resources_when_the_database_refuses(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """A mail is not sent for rows that could not be stored."""
    model.seed("ada")
    log: list[str] = []

    def body() -> Iterator[str]:
        yield "one"
        transaction.get().join(Resource(log))
        model.DBSession.add(User(name="ada"))

    with pytest.raises(IntegrityError):
        get(make_app(make_root(body), model))
    assert "tpc_finish" not in log
    assert "abort" in log
    assert [report.reason for report in reports] == ["failed"]
    assert_clean(model)


def test_manager_releases_the_sessions_when_an_abort_fails(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """Each step of the end runs though the one before failed; its error is told."""

    def body() -> Iterator[str]:
        transaction.get().join(Resource([], fails="abort"))
        model.DBSession.add(User(name="lost"))
        model.DBSession.flush()
        yield "one"

    call = Call(make_app(make_root(body), model))
    next(call)
    call.close()
    assert model.names() == []
    assert [str(report.error) for report in reports] == ["in abort"]
    assert_clean(model)


def test_manager_runs_the_hooks_of_its_transactions(
    make_app: MakeApp, model: Model
) -> None:
    """``addAfterCommitHook`` tells of the stream's commit, in the stream."""
    told: list[tuple[bool, list[str]]] = []

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        transaction.get().addAfterCommitHook(
            lambda status: told.append((status, model.names()))
        )
        yield "one"
        assert told == []

    assert get(make_app(make_root(body), model)).text == "one"
    assert told == [(True, ["ada"])]
    assert_clean(model)


def test_manager_begin_aborts_what_was_written(make_app: MakeApp, model: Model) -> None:
    """``transaction.begin()`` undoes what is not committed, as anywhere."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="lost"))
        model.DBSession.flush()
        transaction.begin()
        model.DBSession.add(User(name="ada"))
        yield "one"

    assert get(make_app(make_root(body), model)).text == "one"
    assert model.names() == ["ada"]
    assert_clean(model)


def test_manager_is_a_context_manager(make_app: MakeApp, model: Model) -> None:
    """``with transaction.manager`` commits, or aborts and raises."""

    def body() -> Iterator[str]:
        with transaction.manager:
            model.DBSession.add(User(name="ada"))
        assert model.names() == ["ada"]
        with pytest.raises(ValueError, match="no"), transaction.manager:
            model.DBSession.add(User(name="lost"))
            raise ValueError("no")
        yield "one"
        for attempt in transaction.attempts(2):
            with attempt:
                model.DBSession.add(User(name="bob"))
        assert model.names() == ["ada", "bob"]

    assert get(make_app(make_root(body, commit="manual"), model)).text == "one"
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


@pytest.mark.parametrize("commit", [tgstream.commit, transaction.commit])
def test_manager_refuses_to_commit_what_is_doomed(
    make_app: MakeApp, model: Model, commit: Callable[[], None]
) -> None:
    """To commit a doomed transaction raises, undoes it, and the stream goes on."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="lost"))
        transaction.doom()
        with pytest.raises(DoomedTransaction):
            commit()
        assert not transaction.isDoomed()
        model.DBSession.add(User(name="ada"))
        yield "one"

    assert get(make_app(make_root(body), model)).text == "one"
    assert model.names() == ["ada"]
    assert_clean(model)


def test_manager_breaks_a_stream_that_hides_a_failed_transaction(
    make_app: MakeApp, model: Model
) -> None:
    """``transaction.get().commit()`` that failed is not taken for a stored stream."""
    model.seed("ada")

    def body() -> Iterator[str]:
        yield "one"
        model.DBSession.add(User(name="ada"))
        with pytest.raises(IntegrityError):
            transaction.get().commit()

    with pytest.raises(TransactionFailedError):
        get(make_app(make_root(body), model))
    assert_clean(model)


def test_manager_is_not_the_threads_between_pulls(
    make_app: MakeApp, model: Model
) -> None:
    """A doomed stream dooms nobody else on its thread."""

    def body() -> Iterator[str]:
        transaction.doom()
        yield "one"
        assert transaction.isDoomed()
        yield "two"

    call = Call(make_app(make_root(body), model))
    next(call)
    assert not transaction.isDoomed()
    assert call.read() == b"two"
    assert_clean(model)


def test_manager_reports_how_often_it_committed(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """The report counts transactions that were committed, not those undone."""

    def body() -> Iterator[str]:
        for name in ("ada", "bob"):
            model.DBSession.add(User(name=name))
            tgstream.commit()
            yield name
        model.DBSession.add(User(name="undone"))
        tgstream.rollback()

    get(make_app(make_root(body), model))
    assert [report.commits for report in reports] == [2]
    assert_clean(model)


# Savepoints.


def test_savepoint_undoes_what_came_after_it(
    make_app: MakeApp, make_model: MakeModel, postgresql: str
) -> None:
    """``transaction.savepoint()`` rolls back to where it was made, twice if asked."""
    model = make_model(postgresql)

    def body() -> Iterator[str]:
        ada = User(name="ada")
        model.DBSession.add(ada)
        savepoint = transaction.savepoint()
        for name in ("lost", "lost, too"):
            model.DBSession.add(User(name=name))
            model.DBSession.flush()
            savepoint.rollback()
            savepoint = transaction.savepoint()
        assert ada in model.DBSession
        yield ada.name
        with pytest.raises(IntegrityError):
            model.DBSession.add(User(name="ada"))
            model.DBSession.flush()
        savepoint.rollback()
        model.DBSession.add(User(name="bob"))

    assert get(make_app(make_root(body), model)).text == "ada"
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


def test_savepoint_ends_with_its_transaction(
    make_app: MakeApp, make_model: MakeModel, postgresql: str
) -> None:
    """After a commit a savepoint is no more, and what it held is stored."""
    model = make_model(postgresql)

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        savepoint = transaction.savepoint()
        model.DBSession.add(User(name="bob"))
        yield "one"
        tgstream.commit()
        with pytest.raises(InvalidSavepointRollbackError):
            savepoint.rollback()

    get(make_app(make_root(body), model))
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


def test_savepoint_is_refused_on_sqlite(make_app: MakeApp, sqlite_model: Model) -> None:
    """As in zope.sqlalchemy; an optimistic one is made, and cannot be rolled back."""
    model = sqlite_model

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        optimistic = transaction.savepoint(optimistic=True)
        yield "one"
        with pytest.raises(TypeError, match="Savepoints unsupported"):
            optimistic.rollback()
        transaction.abort()
        with pytest.raises(TypeError, match="Savepoints unsupported"):
            transaction.savepoint()
        transaction.abort()
        model.DBSession.add(User(name="bob"))

    assert get(make_app(make_root(body), model)).text == "one"
    assert model.names() == ["bob"]
    assert_clean(model)


def test_savepoint_of_a_session_with_several_binds(
    make_app: MakeApp, make_model: MakeModel, postgresql: str
) -> None:
    """A session bound by class has savepoints, too, wherever it is connected."""
    model = make_model(postgresql)
    scoped = scoped_session(sessionmaker())

    def body() -> Iterator[str]:
        scoped.add(User(name="ada"))
        scoped.flush()
        savepoint = transaction.savepoint()
        scoped.add(User(name="lost"))
        scoped.flush()
        savepoint.rollback()
        yield "one"

    app = make_app(make_root(body), model, tgstream__sessions=[scoped])
    scoped.configure(binds={User: model.engine})
    assert get(app).text == "one"
    assert model.names() == ["ada"]
    assert_clean(model)


# Attempts.


@pytest.fixture
def serializable(make_model: MakeModel, postgresql: str) -> Model:
    """A model with two users, on PostgreSQL."""
    model = make_model(postgresql)
    model.seed("ada", "bob")
    return model


STRICT = {"sqlalchemy__isolation_level": "REPEATABLE READ"}


def overtake(model: Model) -> None:
    """Change the row of ada in a transaction of somebody else."""
    model.change("UPDATE users SET name = name || ' of another' WHERE id = 1")


def retry_by_attempts(work: Callable[[], None]) -> None:
    for attempt in transaction.manager.attempts(3):
        with attempt:
            work()


def retry_by_run(work: Callable[[], None]) -> None:
    transaction.manager.run(work, tries=3)


@pytest.mark.parametrize("retry", [retry_by_attempts, retry_by_run])
@pytest.mark.parametrize("commit", ["end", "each", "manual"])
def test_attempt_is_repeated_after_a_serialization_failure(
    make_app: MakeApp,
    serializable: Model,
    reports: list[Report],
    retry: Callable[[Callable[[], None]], None],
    commit: str,
) -> None:
    """The statement is refused, and the next attempt reads what is stored by then."""
    model = serializable
    seen: list[str] = []

    def body() -> Iterator[str]:
        held = model.DBSession.get_one(User, 1)

        def work() -> None:
            ada = model.DBSession.get_one(User, 1)
            seen.append(ada.name)
            if len(seen) < 3:
                overtake(model)
            ada.name += " of the stream"
            model.DBSession.add(Note(text=f"attempt {len(seen)}"))
            model.DBSession.flush()

        retry(work)
        assert held in model.DBSession
        yield held.name

    app = make_app(make_root(body, commit=commit), model, **STRICT)
    twice = "ada of another of another"
    assert get(app).text == f"{twice} of the stream"
    assert seen == ["ada", "ada of another", twice]
    assert model.look("SELECT name FROM users WHERE id = 1")[0][0] == (
        f"{twice} of the stream"
    )
    assert model.texts() == ["attempt 3"]
    assert [report.commits for report in reports] == [1 + (commit != "manual")]
    assert_clean(model)


@pytest.mark.parametrize("retry", [retry_by_attempts, retry_by_run])
def test_attempt_is_repeated_after_a_commit_that_was_refused(
    make_app: MakeApp,
    serializable: Model,
    retry: Callable[[Callable[[], None]], None],
) -> None:
    """The commit that fails is the attempt's own."""
    model = serializable
    runs: list[int] = []

    def body() -> Iterator[str]:
        yield "one"

        def work() -> None:
            runs.append(model.DBSession.query(User).count())
            if len(runs) == 1:
                model.DBSession.connection()
                model.change(
                    "BEGIN ISOLATION LEVEL SERIALIZABLE;"
                    "SELECT name FROM users;"
                    "INSERT INTO users (name) VALUES ('zoe');"
                    "COMMIT"
                )
            model.DBSession.add(User(name="eve"))

        retry(work)

    app = make_app(make_root(body), model, sqlalchemy__isolation_level="SERIALIZABLE")
    assert get(app).text == "one"
    assert runs == [2, 3]
    assert model.names()[2:] == ["zoe", "eve"]
    assert_clean(model)


@pytest.mark.parametrize("caught", [True, False])
def test_attempt_that_fails_each_time_raises_its_last_error(
    make_app: MakeApp, serializable: Model, reports: list[Report], caught: bool
) -> None:
    """After the last attempt the error is the stream's, or the generator's to catch."""
    model = serializable
    runs: list[int] = []

    def work() -> None:
        runs.append(1)
        ada = model.DBSession.get_one(User, 1)
        overtake(model)
        ada.name = "lost"

    def body() -> Iterator[str]:
        yield "one"
        if caught:
            with pytest.raises(OperationalError, match="could not serialize"):
                retry_by_attempts(work)
            model.DBSession.add(User(name="eve"))
        else:
            retry_by_attempts(work)

    call = Call(make_app(make_root(body), model, **STRICT))
    assert next(call) == b"one"
    if caught:
        assert call.read() == b""
        assert "eve" in model.names()
    else:
        with pytest.raises(OperationalError, match="could not serialize"):
            call.read()
    assert len(runs) == 3
    assert [report.reason for report in reports] == [
        "completed" if caught else "failed"
    ]
    assert "lost" not in model.names()
    assert_clean(model)


def test_attempt_is_repeated_after_a_deadlock(
    make_app: MakeApp, serializable: Model
) -> None:
    """PostgreSQL chooses the stream as the victim, and the next attempt succeeds."""
    model = serializable
    runs: list[int] = []

    def body() -> Iterator[str]:
        with (
            psycopg.connect(**model.connection_options()) as other,
            ThreadPoolExecutor(1) as thread,
        ):
            for attempt in transaction.manager.attempts(2):
                with attempt:
                    runs.append(1)
                    if len(runs) == 1:
                        other.execute("UPDATE users SET name = 'zoe' WHERE id = 2")
                    change = sa.text("UPDATE users SET name = 'eve' WHERE id = :id")
                    model.DBSession.execute(sa.text("SET deadlock_timeout = '10ms'"))
                    model.DBSession.execute(change, {"id": 1})
                    if len(runs) == 1:
                        waits = thread.submit(
                            other.execute, "DELETE FROM users WHERE id = 1"
                        )
                        wait_until_blocked(model, other.info.backend_pid)
                        model.DBSession.execute(change, {"id": 2})
                waits.result()
                other.rollback()
        yield "one"

    assert get(make_app(make_root(body), model)).text == "one"
    assert len(runs) == 2
    assert model.look("SELECT name FROM users WHERE id = 1") == [("eve",)]
    assert_clean(model)


def test_attempt_is_repeated_after_a_stale_version(
    make_app: MakeApp, model: Model
) -> None:
    """A row that was deleted meanwhile: SQLAlchemy's own error, on any database."""
    model.seed("ada")
    runs: list[int] = []

    def body() -> Iterator[str]:
        for attempt in transaction.manager.attempts(2):
            with attempt:
                runs.append(1)
                if len(runs) == 1:
                    ada = model.DBSession.query(User).one()
                    model.DBSession.connection().exec_driver_sql("DELETE FROM users")
                    ada.name = "gone"
                model.DBSession.add(Note(text="stored"))
        yield "one"

    assert get(make_app(make_root(body), model)).text == "one"
    assert len(runs) == 2
    assert (model.names(), model.texts()) == (["ada"], ["stored"])
    assert_clean(model)


class Conflict(Exception):
    """The error of a resource that is no database, and knows that it may be tried."""


class Conflicting(Resource):
    """A data manager that refuses its vote, and lets the work be tried again."""

    def tpc_vote(self, transaction: Any) -> None:
        raise Conflict

    def should_retry(self, error: Exception) -> bool:
        return isinstance(error, Conflict)


@pytest.mark.parametrize("retry", [retry_by_attempts, retry_by_run])
def test_attempt_is_repeated_where_another_resource_asks_for_it(
    make_app: MakeApp, model: Model, retry: Callable[[Callable[[], None]], None]
) -> None:
    """Its ``should_retry`` decides, although the failed transaction is over by then."""
    runs: list[int] = []

    def work() -> None:
        runs.append(1)
        model.DBSession.add(User(name=f"ada {len(runs)}"))
        if len(runs) == 1:
            transaction.get().join(Conflicting([]))

    def body() -> Iterator[str]:
        retry(work)
        yield "one"
        with pytest.raises(Conflict):
            transaction.get().join(Conflicting([]))
            transaction.commit()
        with pytest.raises(Conflict), next(transaction.manager.attempts(2)):
            raise Conflict

    assert get(make_app(make_root(body), model)).text == "one"
    assert model.names() == ["ada 2"]
    assert_clean(model)


@pytest.mark.parametrize("commit", ["end", "each"])
def test_attempt_is_not_repeated_for_the_commit_of_the_stream(
    make_app: MakeApp, serializable: Model, commit: str
) -> None:
    """The request's controller and the generator run once, and the error is raised."""
    model = serializable
    runs: list[int] = []

    def body() -> Iterator[str]:
        runs.append(1)
        ada = model.DBSession.get_one(User, 1)
        overtake(model)
        ada.name = "lost"
        yield "one"

    app = make_app(make_root(body, commit=commit), model, tm__attempts=3, **STRICT)
    if commit == "each":  # in the first pull, inside the request
        assert get(app).status.startswith("500")
    else:
        with pytest.raises(OperationalError, match="could not serialize"):
            get(app)
    assert runs == [1]
    assert model.names() == ["ada of another", "bob"]
    assert_clean(model)


# Several databases.


def two_databases(make_model: MakeModel, tmp_path: Path) -> tuple[Model, Model]:
    """Two SQLite files; the second refuses a note of an unknown user at its commit."""
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


def not_atomic(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings about commits of several sessions."""
    messages = (each.getMessage() for each in caplog.records)
    return [each for each in messages if "one after the other" in each]


@pytest.mark.parametrize("commit", ["end", "each"])
def test_databases_that_commit_one_by_one_are_warned_of_once(
    make_app: MakeApp,
    make_model: MakeModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    commit: str,
) -> None:
    """Once for each application, before the first commit that can come apart."""
    first, second = two_databases(make_model, tmp_path)
    refused = False

    def body() -> Iterator[str]:
        yield "one"
        first.DBSession.add(Note(text="first"))
        first.DBSession.flush()
        second.DBSession.add(Note(text="second", user_id=7 if refused else None))
        yield "two"

    app = make_app(
        make_root(body, commit=commit), first, tgstream__sessions=[second.DBSession]
    )
    for _ in range(2):
        assert get(app).text == "onetwo"
    assert (first.texts(), second.texts()) == (["first"] * 2, ["second"] * 2)
    [warning] = not_atomic(caplog)
    assert "twophase=True" in warning
    refused = True
    with pytest.raises(IntegrityError):
        get(app)
    assert second.texts() == ["second"] * 2
    assert len(not_atomic(caplog)) == 1
    assert_clean(first)
    assert_clean(second)


def test_database_that_refuses_leaves_the_one_before_committed(
    make_app: MakeApp, make_model: MakeModel, tmp_path: Path
) -> None:
    """As the table of the explanation has it; each session commits once."""
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
    app = make_app(make_root(body), first, tgstream__sessions=[second.DBSession])
    with pytest.raises(IntegrityError):
        get(app)
    assert second.texts() == []
    assert first.texts() == (["stays"] if order[0] else [])
    assert_clean(first)
    assert_clean(second)


def test_databases_of_which_one_is_only_read_are_not_warned_of(
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

    app = make_app(make_root(body), first, tgstream__sessions=[second.DBSession])
    assert get(app).text == "0"
    assert first.texts() == ["first"]
    assert not_atomic(caplog) == []
    assert_clean(first)


def test_databases_in_two_phases_are_not_warned_of(
    make_app: MakeApp, twophase: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """All sessions but one in two phases: nothing can come apart."""
    scoped = scoped_session(sessionmaker())

    def body() -> Iterator[str]:
        scoped.add(User(name="one phase"))
        twophase.DBSession.add(User(name="two phases"))
        yield "one"

    app = make_app(make_root(body), twophase, tgstream__sessions=[scoped])
    scoped.configure(bind=twophase.engine)
    assert get(app).text == "one"
    assert sorted(twophase.names()) == ["one phase", "two phases"]
    assert not_atomic(caplog) == []
    assert_clean(twophase)


# Two phases.


@pytest.fixture
def twophase(make_model: MakeModel, postgresql: str) -> Iterator[Model]:
    """A model whose sessions commit in two phases."""
    model = make_model(postgresql, twophase=True)
    yield model
    assert model.look("SELECT * FROM pg_prepared_xacts") == []


def test_twophase_session_votes_before_it_is_stored(
    make_app: MakeApp, twophase: Model
) -> None:
    """It is prepared in the vote, and stored when all others have voted."""
    model = twophase
    seen: list[int] = []

    class Watching(Resource):
        def tpc_vote(self, transaction: Any) -> None:
            assert model.names() == []
            seen.append(len(model.look("SELECT * FROM pg_prepared_xacts")))

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        transaction.get().join(Watching([], key="~"))
        yield "one"
        ada = model.DBSession.query(User).one()
        tgstream.commit()
        yield ada.name
        model.DBSession.execute(sa.text("INSERT INTO users (name) VALUES ('core')"))

    assert get(make_app(make_root(body), model)).text == "oneada"
    assert seen == [1]
    assert model.names() == ["ada", "core"]
    assert_clean(model)


@pytest.mark.parametrize("commit", ["each", "end"])
def test_twophase_session_is_undone_when_another_refuses(
    make_app: MakeApp, twophase: Model, commit: str
) -> None:
    """What was prepared is rolled back, and the stream can go on."""
    model = twophase

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="lost"))
        transaction.get().join(Resource([], fails="tpc_vote", key="~"))
        with pytest.raises(ValueError, match="tpc_vote"):
            transaction.commit()
        model.DBSession.add(User(name="ada"))
        yield "one"
        model.DBSession.add(User(name="bob"))

    assert get(make_app(make_root(body, commit=commit), model)).text == "one"
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


def test_twophase_session_stores_with_one_of_one_phase_or_not_at_all(
    make_app: MakeApp, twophase: Model
) -> None:
    """Two phases vote first, so that one phase that fails undoes both."""
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

    app = make_app(make_root(body), model, tgstream__sessions=[scoped])
    scoped.configure(bind=model.engine)
    with pytest.raises(IntegrityError):
        get(app)
    assert model.names() == []
    assert_clean(model)


# What is left.


def test_stream_sessions_are_collected(make_app: MakeApp, sqlite_model: Model) -> None:
    """Nothing keeps a stream's session once the stream has ended."""
    model = sqlite_model
    sessions: list[weakref.ref[Session]] = []

    def body() -> Iterator[str]:
        sessions.append(weakref.ref(model.DBSession()))
        model.DBSession.add(User(name=f"user{len(sessions)}"))
        yield "one"
        yield "two"

    app = make_app(make_root(body), model)
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


def test_stream_ends_when_the_request_did_not_end_well(
    make_app: MakeApp, model: Model
) -> None:
    """After a request that left its transaction failed the next stream works."""

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
