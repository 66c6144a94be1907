"""A connection that is gone, met by everything that a stream does with one."""

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
from tgstream import copy, rows

GONE = (DBAPIError, psycopg.Error)


@pytest.fixture
def model(make_model: MakeModel, postgresql: str) -> Model:
    """The model of an application on PostgreSQL."""
    return make_model(postgresql)


def pid(model: Model) -> int:
    return int(model.DBSession.scalar(sa.text("SELECT pg_backend_pid()")) or 0)


def terminate(model: Model, pid: int) -> None:
    """End a backend, and wait until it is gone."""
    assert model.look(f"SELECT pg_terminate_backend({pid}, 10000)") == [(True,)]


def lose(model: Model) -> None:
    """End the backend of the running stream."""
    terminate(model, pid(model))


def test_connection_lost_in_the_controller_is_an_ordinary_error(
    make_fault: MakeFault, model: Model
) -> None:
    """The request's transaction cannot be ended; the stream never begins."""
    started: list[bool] = []

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="lost"))
        model.DBSession.flush()
        lose(model)

        def items() -> Iterator[str]:
            started.append(True)
            yield "one"

        return items()

    fault = make_fault(model, body)
    assert get(fault.app).status.startswith("500 ")
    assert (started, fault.reports, fault.lines()) == ([], [], [])
    fault.assert_leaves()


def test_rollback_of_a_lost_connection_lets_the_stream_go_on(
    make_fault: MakeFault, model: Model
) -> None:
    """rollback() raises what it met, and has undone all; what comes after is stored."""

    def body() -> Iterator[str]:
        ada = User(name="ada")
        model.DBSession.add(ada)
        tgstream.commit()
        ada.name = "lost"
        tgstream.flush()
        lose(model)
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
def test_first_error_is_told_though_the_connection_is_lost(
    make_fault: MakeFault, model: Model, how: str
) -> None:
    """That the abort after it fails as well hides nothing."""
    fault: Fault

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="lost"))
        tgstream.flush()
        yield "one"
        lose(model)
        fault.expected_noise = {"txn"}  # which tells of the abort, too
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
    fault.assert_breaks(call, LookupError, "the first")
    fault.assert_leaves()


def test_connection_ended_for_idleness_breaks_the_transfer(
    make_fault: MakeFault, model: Model
) -> None:
    """PostgreSQL may end what a slow client keeps idle in transaction."""

    def body() -> Iterator[str]:
        model.DBSession.execute(
            sa.text("SET idle_in_transaction_session_timeout = '10ms'")
        )
        model.DBSession.add(User(name="lost"))
        tgstream.flush()
        yield str(pid(model))

    fault = make_fault(model, body)
    call = fault.call()
    asks = f"SELECT 1 FROM pg_stat_activity WHERE pid = {int(next(call))}"
    wait_until(lambda: not model.look(asks), "it is idle for ever")
    fault.assert_breaks(call, GONE)
    fault.assert_leaves()


# What reads much.


def everything() -> Any:
    """More than comes at once."""
    number = sa.func.generate_series(1, 200_000).column_valued()
    return sa.select(number, sa.func.repeat("x", 100))


def result_of(model: Model) -> Iterator[Any]:
    """What an application does that knows no rows()."""
    options = {"yield_per": 10}
    with model.DBSession.execute(everything(), execution_options=options) as result:
        yield from result


READERS: dict[str, Callable[[Model], Any]] = {
    "rows": lambda model: rows(everything()),
    "keyset": lambda model: rows(sa.select(User), key=User.id, batch=10),
    "copy": lambda model: copy(everything()),
    "result": lambda model: result_of(model),
}


@pytest.mark.parametrize("wrote", [False, True], ids=["", "wrote"])
@pytest.mark.parametrize("how", READERS)
def test_connection_lost_while_it_is_read_breaks_the_transfer(
    make_fault: MakeFault, model: Model, how: str, wrote: bool
) -> None:
    """Whatever reads: the error is the driver's, and no cursor is left."""
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
            yield bytes(item) if how == "copy" else f"{item}\n".encode()

    fault = make_fault(model, body)
    call = fault.call()
    backend = int(next(call))
    assert [next(call) for _ in range(15)]
    terminate(model, backend)
    with pytest.raises(GONE):
        for _ in call:
            pass
    call.close()
    fault.assert_told(GONE)
    names = [*users, "ada"] if wrote else users
    fault.assert_leaves(*names)


def test_error_of_a_statement_is_not_taken_for_a_cursor_that_a_commit_ended(
    make_fault: MakeFault, model: Model
) -> None:
    """PostgreSQL shows the statement, in which the word is."""

    def body() -> Iterator[str]:
        yield "one"
        model.DBSession.add(User(name="ada"))
        tgstream.commit()
        for row in rows(sa.text("SELECT missing FROM users")):
            yield str(row)

    fault = make_fault(model, body)
    call = fault.call()
    assert next(call) == b"one"
    fault.assert_breaks(call, ProgrammingError, "missing")
    fault.assert_leaves("ada")
