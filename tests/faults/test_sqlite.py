"""SQLite is busy: another connection holds the lock that a stream needs."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

import tgstream
from tests.faults.conftest import MakeFault
from tests.model import MakeModel, Model, User

BUSY = "database is locked"
WRITES, READS = "BEGIN IMMEDIATE", "SELECT id FROM users"
"""Statements that keep others from writing, and only from committing."""


@pytest.fixture
def model(make_model: MakeModel, tmp_path: Path) -> Model:
    """The model of an application on an SQLite file, with a short timeout."""
    return make_model(f"sqlite:///{tmp_path}/test.db?timeout=0.02")


@contextmanager
def keep_busy(model: Model, statement: str = WRITES) -> Iterator[None]:
    """Let another connection hold a lock on the database meanwhile."""
    with closing(sqlite3.connect(str(model.url.database))) as other:
        cursor = other.execute(statement)  # its rows are not read, so the lock stays
        yield
        cursor.close()


def add(model: Model, *names: str) -> None:
    model.DBSession.add_all([User(name=name) for name in names])


def test_busy_database_before_the_first_chunk_is_an_ordinary_error(
    make_fault: MakeFault, model: Model
) -> None:
    """The client gets a 500."""

    def body() -> Iterator[str]:
        add(model, "lost")
        tgstream.flush()
        yield "one"

    fault = make_fault(model, body)
    with keep_busy(model):
        fault.assert_fails_at_once(OperationalError, BUSY)
    fault.assert_leaves()


def test_busy_database_in_mid_stream_aborts_the_transfer(
    make_fault: MakeFault, model: Model
) -> None:
    """Only the changes that commit() has stored stay."""

    def body() -> Iterator[str]:
        add(model, "ada")
        tgstream.commit()
        yield "one"
        add(model, "lost")
        tgstream.flush()
        yield "two"

    fault = make_fault(model, body)
    call = fault.call()
    assert next(call) == b"one"
    with keep_busy(model):
        fault.assert_aborts(call, OperationalError, BUSY)
    fault.assert_leaves("ada")


@pytest.mark.parametrize("held", [WRITES, READS])
def test_busy_database_in_the_final_commit_aborts_the_transfer(
    make_fault: MakeFault, model: Model, held: str
) -> None:
    """A reader blocks only the COMMIT, after all changes were written."""
    model.seed("ada")

    def body() -> Iterator[str]:
        yield "one"
        add(model, "lost")

    fault = make_fault(model, body)
    call = fault.call()
    assert next(call) == b"one"
    with keep_busy(model, held):
        fault.assert_aborts(call, OperationalError, BUSY)
    fault.assert_leaves("ada")


@pytest.mark.parametrize("held", [WRITES, READS])
def test_busy_database_in_commit_does_not_end_the_stream(
    make_fault: MakeFault, model: Model, held: str
) -> None:
    """commit() aborts and raises. The next one succeeds."""
    model.seed("ada")

    def body() -> Iterator[str]:
        yield "one"
        add(model, "lost")
        with pytest.raises(OperationalError, match=BUSY):
            tgstream.commit()
        yield "two"
        add(model, "bob")

    fault = make_fault(model, body)
    call = fault.call()
    assert next(call) == b"one"
    with keep_busy(model, held):
        assert next(call) == b"two"
    assert call.read() == b""
    assert [report.reason for report in fault.reports] == ["completed"]
    fault.assert_leaves("ada", "bob")


def test_busy_database_keeps_the_item_from_being_sent(
    make_fault: MakeFault, model: Model
) -> None:
    """With ``commit='each'`` an item is not sent if its commit fails."""

    def body() -> Iterator[str]:
        for name in ["ada", "lost"]:
            add(model, name)
            yield name

    fault = make_fault(model, body, commit="each")
    call = fault.call()
    assert next(call) == b"ada"
    with keep_busy(model):
        fault.assert_aborts(call, OperationalError, BUSY)
    fault.assert_leaves("ada")
