"""Database errors that the generator catches, and their effect on the transaction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
import tg
from sqlalchemy.exc import DBAPIError, PendingRollbackError

import tgstream
from tests.faults.conftest import MakeFault
from tests.model import MakeModel, Model, User
from tests.wsgi import get
from tgstream import StreamError


@pytest.fixture
def postgres(make_model: MakeModel, postgresql: str) -> Model:
    """The model of an application on PostgreSQL."""
    return make_model(postgresql)


def add(model: Model, *names: str) -> None:
    model.DBSession.add_all([User(name=name) for name in names])


@pytest.mark.parametrize("commit", ["end", "each"])
def test_caught_flush_error_aborts_the_transfer(
    make_fault: MakeFault, model: Model, commit: str
) -> None:
    """The failed flush undoes earlier flushes too, so the response is incomplete."""
    model.seed("ada")

    def body() -> Iterator[str]:
        yield "one"
        add(model, "lost")
        tgstream.flush()
        add(model, "ada")
        with suppress(DBAPIError):
            tgstream.flush()
        if commit == "each":
            yield "never"

    fault = make_fault(model, body, commit=commit)
    call = fault.call()
    assert next(call) == b"one"
    fault.assert_aborts(call, PendingRollbackError)
    fault.assert_leaves("ada")


def fail_silently(model: Model, statement: str = "SELECT 1/0") -> None:
    with suppress(DBAPIError):
        model.DBSession.execute(sa.text(statement))


@pytest.mark.parametrize("commit", ["end", "each", 1])
@pytest.mark.parametrize("twophase", [False, True], ids=["", "twophase"])
def test_commit_of_a_failed_transaction_aborts_the_transfer(
    make_fault: MakeFault,
    make_model: MakeModel,
    postgresql: str,
    commit: Any,
    twophase: bool,
) -> None:
    """PostgreSQL undoes the transaction, although its COMMIT reports success."""
    model = make_model(postgresql, twophase=twophase)

    def body() -> Iterator[str]:
        yield "one"
        add(model, "lost")
        tgstream.flush()
        fail_silently(model)
        if commit != "end":
            yield "never"

    fault = make_fault(model, body, commit=commit)
    call = fault.call()
    assert next(call) == b"one"
    fault.assert_aborts(call, StreamError, r"call rollback\(\), or .*begin_nested")
    fault.assert_leaves()


def test_failed_transaction_in_commit_lets_the_stream_go_on(
    make_fault: MakeFault, postgres: Model
) -> None:
    """``commit()`` raises, and has aborted the transaction."""

    def body() -> Iterator[str]:
        add(postgres, "lost")
        tgstream.flush()
        fail_silently(postgres)
        with pytest.raises(StreamError, match="PostgreSQL would undo"):
            tgstream.commit()
        add(postgres, "ada")
        yield "one"

    fault = make_fault(postgres, body)
    assert get(fault.app).text == "one"
    fault.assert_leaves("ada")


@pytest.mark.parametrize("how", ["rollback", "savepoint"])
def test_advice_about_a_failed_statement_works(
    make_fault: MakeFault, postgres: Model, how: str
) -> None:
    """The two ways that the error message names keep the other changes."""

    def body() -> Iterator[str]:
        if how == "savepoint":
            add(postgres, "ada")
            with suppress(DBAPIError), postgres.DBSession.begin_nested():
                postgres.DBSession.execute(sa.text("SELECT 1/0"))
        else:
            fail_silently(postgres)
            tgstream.rollback()
            add(postgres, "ada")
        yield "one"
        yield "two"

    fault = make_fault(postgres, body)
    assert get(fault.app).text == "onetwo"
    fault.assert_leaves("ada")


def test_failed_read_may_become_an_error_page(
    make_fault: MakeFault, postgres: Model
) -> None:
    """Without changes in the transaction, ``abort(404)`` works after a failed read."""

    def body() -> Iterator[str]:
        try:
            postgres.DBSession.get(User, 10**30)
        except DBAPIError:
            tg.abort(404)
        yield "never"

    fault = make_fault(postgres, body)
    assert get(fault.app).status.startswith("404 ")
    fault.assert_leaves()
