"""A stream's transaction manager, its savepoints, and its attempts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
import transaction
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import scoped_session, sessionmaker
from transaction.interfaces import (
    DoomedTransaction,
    InvalidSavepointRollbackError,
    TransactionFailedError,
)

import tgstream
from tests.conftest import MakeApp, Root, assert_clean
from tests.database.conftest import Resource
from tests.faults.conftest import wait_until_blocked
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import Call, get
from tgstream import Report

# The manager.


def test_manager_commits_other_resources_with_the_sessions(
    make_app: MakeApp, model: Model
) -> None:
    """A mail of the generator is sent when its rows are stored."""
    log: list[str] = []

    def body() -> Iterator[str]:
        transaction.get().join(Resource(log))
        model.DBSession.add(User(name="ada"))
        yield "one"
        assert log == []

    assert get(make_app(Root(body), model)).text == "one"
    assert log == ["tpc_begin", "commit", "tpc_vote", "tpc_finish"]
    assert model.names() == ["ada"]
    assert_clean(model)


def test_manager_commits_other_resources_of_each_item(
    make_app: MakeApp, model: Model
) -> None:
    """With commit='each' a mail is sent before its item, also without a session."""
    log: list[str] = []

    def body() -> Iterator[str]:
        for _ in range(2):
            transaction.get().join(Resource(log))
            yield "item"

    call = Call(make_app(Root(body, commit="each"), model))
    assert [log.count("tpc_finish") for _ in call] == [1, 2]
    call.close()
    assert_clean(model)


@pytest.mark.parametrize("step", ["tpc_begin", "commit", "tpc_vote"])
def test_manager_stores_nothing_when_a_resource_refuses(
    make_app: MakeApp, model: Model, step: str
) -> None:
    """The database votes last, so it stores nothing that another resource refuses."""
    log: list[str] = []

    def body() -> Iterator[str]:
        transaction.get().join(Resource(log, fails=step))
        model.DBSession.add(User(name="lost"))
        with pytest.raises(ValueError, match=step):
            transaction.commit()
        yield "one"
        model.DBSession.add(User(name="ada"))

    assert get(make_app(Root(body), model)).text == "one"
    assert "tpc_finish" not in log
    assert model.names() == ["ada"]
    assert_clean(model)


def test_manager_aborts_other_resources_when_the_database_refuses(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """A mail is not sent if its rows could not be stored."""
    model.seed("ada")
    log: list[str] = []

    def body() -> Iterator[str]:
        yield "one"
        transaction.get().join(Resource(log))
        model.DBSession.add(User(name="ada"))

    with pytest.raises(IntegrityError):
        get(make_app(Root(body), model))
    assert "tpc_finish" not in log
    assert "abort" in log
    assert [report.reason for report in reports] == ["failed"]
    assert_clean(model)


def test_manager_releases_the_sessions_when_an_abort_fails(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """Each step of the end runs. The error is in the report."""

    def body() -> Iterator[str]:
        transaction.get().join(Resource([], fails="abort"))
        model.DBSession.add(User(name="lost"))
        model.DBSession.flush()
        yield "one"

    call = Call(make_app(Root(body), model))
    next(call)
    call.close()
    assert model.names() == []
    assert [str(report.error) for report in reports] == ["in abort"]
    assert_clean(model)


def test_manager_runs_the_hooks_of_its_transactions(
    make_app: MakeApp, model: Model
) -> None:
    """``addAfterCommitHook`` is called after the stream's commit, in the stream."""
    calls: list[tuple[bool, list[str]]] = []

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        transaction.get().addAfterCommitHook(
            lambda status: calls.append((status, model.names()))
        )
        yield "one"
        assert calls == []

    assert get(make_app(Root(body), model)).text == "one"
    assert calls == [(True, ["ada"])]
    assert_clean(model)


def test_manager_begin_aborts_uncommitted_changes(
    make_app: MakeApp, model: Model
) -> None:
    """``transaction.begin()`` undoes changes that are not committed, as usual."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="lost"))
        model.DBSession.flush()
        transaction.begin()
        model.DBSession.add(User(name="ada"))
        yield "one"

    assert get(make_app(Root(body), model)).text == "one"
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

    assert get(make_app(Root(body, commit="manual"), model)).text == "one"
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


@pytest.mark.parametrize("commit", [tgstream.commit, transaction.commit])
def test_manager_refuses_to_commit_a_doomed_transaction(
    make_app: MakeApp, model: Model, commit: Callable[[], None]
) -> None:
    """The commit raises and aborts, and the stream goes on."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="lost"))
        transaction.doom()
        with pytest.raises(DoomedTransaction):
            commit()
        assert not transaction.isDoomed()
        model.DBSession.add(User(name="ada"))
        yield "one"

    assert get(make_app(Root(body), model)).text == "one"
    assert model.names() == ["ada"]
    assert_clean(model)


def test_manager_fails_a_stream_that_hides_a_failed_commit(
    make_app: MakeApp, model: Model
) -> None:
    """A stream that catches the error of ``get().commit()`` does not complete."""
    model.seed("ada")

    def body() -> Iterator[str]:
        yield "one"
        model.DBSession.add(User(name="ada"))
        with pytest.raises(IntegrityError):
            transaction.get().commit()

    with pytest.raises(TransactionFailedError):
        get(make_app(Root(body), model))
    assert_clean(model)


def test_manager_is_not_the_threads_between_pulls(
    make_app: MakeApp, model: Model
) -> None:
    """A doomed stream does not doom the other transactions of its thread."""

    def body() -> Iterator[str]:
        transaction.doom()
        yield "one"
        assert transaction.isDoomed()
        yield "two"

    call = Call(make_app(Root(body), model))
    next(call)
    assert not transaction.isDoomed()
    assert call.read() == b"two"
    assert_clean(model)


def test_manager_counts_its_commits(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """The report counts committed transactions, without aborted ones."""

    def body() -> Iterator[str]:
        for name in ("ada", "bob"):
            model.DBSession.add(User(name=name))
            tgstream.commit()
            yield name
        model.DBSession.add(User(name="undone"))
        tgstream.rollback()

    get(make_app(Root(body), model))
    assert [report.commits for report in reports] == [2]
    assert_clean(model)


# Savepoints.


def test_savepoint_undoes_later_changes(
    make_app: MakeApp, make_model: MakeModel, postgresql: str
) -> None:
    """``transaction.savepoint()`` rolls back to where it was made, also twice."""
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

    assert get(make_app(Root(body), model)).text == "ada"
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


def test_session_joins_again_after_the_rollback_of_an_earlier_savepoint(
    make_app: MakeApp, model: Model
) -> None:
    """The savepoint is from before the first use of the session."""

    def body() -> Iterator[str]:
        savepoint = transaction.savepoint()
        for name in "undone", "undone, too":
            model.DBSession.add(User(name=name))
            model.DBSession.flush()
            savepoint.rollback()
        model.DBSession.add(User(name="ada"))
        yield "one"

    assert get(make_app(Root(body), model)).text == "one"
    assert model.names() == ["ada"]
    assert_clean(model)


@pytest.mark.parametrize("commit", ["end", "manual"])
def test_savepoint_before_the_first_use_of_a_session_undoes_later_changes(
    make_app: MakeApp, make_model: MakeModel, postgresql: str, commit: str
) -> None:
    """The session then goes on in the same transaction, which commits and aborts it."""
    model = make_model(postgresql)

    def add(name: str) -> None:
        model.DBSession.add(User(name=name))
        model.DBSession.flush()

    def body() -> Iterator[str]:
        for end in transaction.commit, transaction.abort:
            first = transaction.savepoint()
            add("undone")
            first.rollback()
            add("undone, too")
            first.rollback()
            add(end.__name__)
            second = transaction.savepoint()
            add("undone, as well")
            second.rollback()
            end()
            model.DBSession.remove()
        first = transaction.savepoint()
        add("undone")
        first.rollback()
        add("end")
        yield "one"

    get(make_app(Root(body, commit=commit), model))
    assert model.names() == ["commit", *(["end"] if commit == "end" else [])]
    assert_clean(model)


def test_savepoint_ends_with_its_transaction(
    make_app: MakeApp, make_model: MakeModel, postgresql: str
) -> None:
    """After a commit a savepoint is invalid, and its changes are stored."""
    model = make_model(postgresql)

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        savepoint = transaction.savepoint()
        model.DBSession.add(User(name="bob"))
        yield "one"
        tgstream.commit()
        with pytest.raises(InvalidSavepointRollbackError):
            savepoint.rollback()

    get(make_app(Root(body), model))
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


def test_savepoint_is_refused_on_sqlite(make_app: MakeApp, sqlite_model: Model) -> None:
    """As in zope.sqlalchemy, an optimistic savepoint only fails when it is used."""
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

    assert get(make_app(Root(body), model)).text == "one"
    assert model.names() == ["bob"]
    assert_clean(model)


def test_savepoint_works_with_several_binds(
    make_app: MakeApp, make_model: MakeModel, postgresql: str
) -> None:
    """A session that is bound by class has savepoints, too."""
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

    app = make_app(Root(body), model, tgstream__sessions=[scoped])
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
    """Change the row of ada in another transaction."""
    model.execute("UPDATE users SET name = name || ' of another' WHERE id = 1")


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
    """A statement is refused. The next attempt reads the changed row."""
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

    app = make_app(Root(body, commit=commit), model, **STRICT)
    twice = "ada of another of another"
    assert get(app).text == f"{twice} of the stream"
    assert seen == ["ada", "ada of another", twice]
    assert model.fetch("SELECT name FROM users WHERE id = 1")[0][0] == (
        f"{twice} of the stream"
    )
    assert model.texts() == ["attempt 3"]
    assert [report.commits for report in reports] == [1 + (commit != "manual")]
    assert_clean(model)


@pytest.mark.parametrize("retry", [retry_by_attempts, retry_by_run])
def test_attempt_is_repeated_after_a_refused_commit(
    make_app: MakeApp,
    serializable: Model,
    retry: Callable[[Callable[[], None]], None],
) -> None:
    """The attempt's own commit fails."""
    model = serializable
    runs: list[int] = []

    def body() -> Iterator[str]:
        yield "one"

        def work() -> None:
            runs.append(model.DBSession.query(User).count())
            if len(runs) == 1:
                model.DBSession.connection()
                model.execute(
                    "BEGIN ISOLATION LEVEL SERIALIZABLE;"
                    "SELECT name FROM users;"
                    "INSERT INTO users (name) VALUES ('zoe');"
                    "COMMIT"
                )
            model.DBSession.add(User(name="eve"))

        retry(work)

    app = make_app(Root(body), model, sqlalchemy__isolation_level="SERIALIZABLE")
    assert get(app).text == "one"
    assert runs == [2, 3]
    assert model.names()[2:] == ["zoe", "eve"]
    assert_clean(model)


@pytest.mark.parametrize("caught", [True, False])
def test_attempt_that_fails_each_time_raises_its_last_error(
    make_app: MakeApp, serializable: Model, reports: list[Report], caught: bool
) -> None:
    """After the last attempt the generator gets the error, and may catch it."""
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

    call = Call(make_app(Root(body), model, **STRICT))
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

    assert get(make_app(Root(body), model)).text == "one"
    assert len(runs) == 2
    assert model.fetch("SELECT name FROM users WHERE id = 1") == [("eve",)]
    assert_clean(model)


def test_attempt_is_repeated_after_a_stale_version(
    make_app: MakeApp, model: Model
) -> None:
    """A row was deleted meanwhile. The error is SQLAlchemy's, on each database."""
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

    assert get(make_app(Root(body), model)).text == "one"
    assert len(runs) == 2
    assert (model.names(), model.texts()) == (["ada"], ["stored"])
    assert_clean(model)


class Conflict(Exception):
    """The retryable error of a resource that is not a database."""


class Conflicting(Resource):
    """A data manager that refuses its vote, and allows another attempt."""

    def tpc_vote(self, transaction: Any) -> None:
        raise Conflict

    def should_retry(self, error: Exception) -> bool:
        return isinstance(error, Conflict)


@pytest.mark.parametrize("retry", [retry_by_attempts, retry_by_run])
def test_attempt_is_repeated_if_another_resource_allows_it(
    make_app: MakeApp, model: Model, retry: Callable[[Callable[[], None]], None]
) -> None:
    """Its ``should_retry`` decides, although the transaction has ended by then."""
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

    assert get(make_app(Root(body), model)).text == "one"
    assert model.names() == ["ada 2"]
    assert_clean(model)


@pytest.mark.parametrize("commit", ["end", "each"])
def test_attempt_is_not_repeated_for_the_commit_of_the_stream(
    make_app: MakeApp, serializable: Model, commit: str
) -> None:
    """The controller and the generator run once, and the error is raised."""
    model = serializable
    runs: list[int] = []

    def body() -> Iterator[str]:
        runs.append(1)
        ada = model.DBSession.get_one(User, 1)
        overtake(model)
        ada.name = "lost"
        yield "one"

    app = make_app(Root(body, commit=commit), model, tm__attempts=3, **STRICT)
    if commit == "each":  # in the first pull, inside the request
        assert get(app).status.startswith("500")
    else:
        with pytest.raises(OperationalError, match="could not serialize"):
            get(app)
    assert runs == [1]
    assert model.names() == ["ada of another", "bob"]
    assert_clean(model)
