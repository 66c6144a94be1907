"""A lost database connection, at every use by a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
import transaction
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError

import tgstream
from tests.faults.conftest import Fault, MakeFault, wait_until
from tests.model import MakeModel, Model, User
from tests.wsgi import get
from tgstream import NDJSON, copy, rows

CONNECTION_LOST = (DBAPIError, psycopg.Error)


@pytest.fixture
def model(make_model: MakeModel, postgresql: str) -> Model:
    """The model of an application on PostgreSQL."""
    return make_model(postgresql)


def pid(model: Model) -> int:
    return int(model.DBSession.scalar(sa.text("SELECT pg_backend_pid()")) or 0)


def terminate(model: Model, pid: int) -> None:
    """End a backend, and wait until it is gone."""
    assert model.fetch(f"SELECT pg_terminate_backend({pid}, 10000)") == [(True,)]


def lose_connection(model: Model) -> None:
    """End the backend of the running stream."""
    terminate(model, pid(model))


def test_connection_lost_in_the_controller_is_an_ordinary_error(
    make_fault: MakeFault, model: Model
) -> None:
    """The request's transaction cannot end, and the stream does not start."""
    started: list[bool] = []

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="lost"))
        model.DBSession.flush()
        lose_connection(model)

        def items() -> Iterator[str]:
            started.append(True)
            yield "one"

        return items()

    fault = make_fault(model, body)
    assert get(fault.app).status.startswith("500 ")
    assert (started, fault.reports, fault.lines()) == ([], [], [])
    fault.assert_leaves()


def test_stream_continues_after_rollback_of_a_lost_connection(
    make_fault: MakeFault, model: Model
) -> None:
    """``rollback()`` raises the database's error, but later changes are stored."""

    def body() -> Iterator[str]:
        ada = User(name="ada")
        model.DBSession.add(ada)
        tgstream.commit()
        ada.name = "lost"
        tgstream.flush()
        lose_connection(model)
        with pytest.raises(OperationalError):
            tgstream.rollback()
        yield ada.name
        model.DBSession.add(User(name="bob"))

    fault = make_fault(model, body)
    assert get(fault.app).text == "ada"
    assert [report.reason for report in fault.reports] == ["completed"]
    fault.assert_leaves("ada", "bob")


def fail() -> None:
    raise LookupError("the first")


@pytest.mark.parametrize("how", ["raises", "hook", "flush"])
def test_first_error_is_reported_although_the_connection_is_lost(
    make_fault: MakeFault, model: Model, how: str
) -> None:
    """The abort fails too, but its error does not hide the first error."""
    fault: Fault

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="lost"))
        tgstream.flush()
        yield "one"
        lose_connection(model)
        fault.expected_noise = {"txn"}  # transaction logs the failed abort
        if how == "raises":
            fail()
        if how == "hook":
            transaction.get().addBeforeCommitHook(fail)
        else:
            model.DBSession.add(User(name="lost, too"))
            sa.event.listen(model.DBSession(), "before_flush", lambda *_: fail())

    fault = make_fault(model, body)
    call = fault.call()
    assert next(call) == b"one"
    fault.assert_aborts(call, LookupError, "the first")
    fault.assert_leaves()


def test_idle_in_transaction_timeout_aborts_the_transfer(
    make_fault: MakeFault, model: Model
) -> None:
    """PostgreSQL may end a connection that a slow client keeps idle in transaction."""

    def body() -> Iterator[str]:
        model.DBSession.execute(
            sa.text("SET idle_in_transaction_session_timeout = '10ms'")
        )
        model.DBSession.add(User(name="lost"))
        tgstream.flush()
        yield str(pid(model))

    fault = make_fault(model, body)
    call = fault.call()
    query = f"SELECT 1 FROM pg_stat_activity WHERE pid = {int(next(call))}"
    wait_until(lambda: not model.fetch(query), "the backend has not ended")
    fault.assert_aborts(call, CONNECTION_LOST)
    fault.assert_leaves()


# Long reads.


def everything() -> Any:
    """Select more rows than a driver fetches at once."""
    number = sa.func.generate_series(1, 200_000).column_valued()
    return sa.select(number, sa.func.repeat("x", 100))


def result_of(model: Model) -> Iterator[Any]:
    """Read the rows without ``rows()``."""
    options = {"yield_per": 10}
    with model.DBSession.execute(everything(), execution_options=options) as result:
        yield from result


READERS: dict[str, Callable[[Model], Any]] = {
    "rows": lambda model: rows(everything()),
    "keyset": lambda model: rows(sa.select(User), key=User.id, batch=10),
    "copy": lambda model: copy(everything()),
    "copy JSON": lambda model: copy(everything()).for_format(NDJSON()),
    "result": lambda model: result_of(model),
}


@pytest.mark.parametrize("wrote", [False, True], ids=["", "wrote"])
@pytest.mark.parametrize("how", READERS)
def test_connection_lost_during_a_read_aborts_the_transfer(
    make_fault: MakeFault, model: Model, how: str, wrote: bool
) -> None:
    """The error is the driver's, and no cursor remains."""
    users = [f"user{number:03}" for number in range(500)]
    model.seed(*users)

    def body() -> Iterator[Any]:
        yield str(pid(model))
        if wrote:
            model.DBSession.add(User(name="ada"))
            tgstream.commit()
            model.DBSession.add(User(name="lost"))
            tgstream.flush()
        for item in READERS[how](model):
            yield bytes(item) if how.startswith("copy") else f"{item}\n".encode()

    fault = make_fault(model, body)
    call = fault.call()
    backend = int(next(call))
    assert [next(call) for _ in range(15)]
    terminate(model, backend)
    with pytest.raises(CONNECTION_LOST):
        for _ in call:
            pass
    call.close()
    fault.assert_reported(CONNECTION_LOST)
    names = [*users, "ada"] if wrote else users
    fault.assert_leaves(*names)


def test_error_of_a_statement_is_not_mistaken_for_a_closed_cursor(
    make_fault: MakeFault, model: Model
) -> None:
    """PostgreSQL's message quotes the statement, so its words must not mislead."""

    def body() -> Iterator[str]:
        yield "one"
        model.DBSession.add(User(name="ada"))
        tgstream.commit()
        for row in rows(sa.text("SELECT missing FROM users")):
            yield str(row)

    fault = make_fault(model, body)
    call = fault.call()
    assert next(call) == b"one"
    fault.assert_aborts(call, ProgrammingError, "missing")
    fault.assert_leaves("ada")
