"""SQLite is busy: somebody else has what a stream needs to write, and keeps it."""

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
"""What keeps others from writing, and what keeps them from committing alone."""


@pytest.fixture
def model(make_model: MakeModel, tmp_path: Path) -> Model:
    """The model of an application on an SQLite file, which does not wait long."""
    return make_model(f"sqlite:///{tmp_path}/test.db?timeout=0.02")


@contextmanager
def busy(model: Model, statement: str = WRITES) -> Iterator[None]:
    """Somebody else uses the database meanwhile."""
    with closing(sqlite3.connect(str(model.url.database))) as other:
        cursor = other.execute(statement)  # a reader's lock is held as it is not read
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
    with busy(model):
        fault.assert_fails_at_once(OperationalError, BUSY)
    fault.assert_leaves()


def test_busy_database_in_mid_stream_breaks_the_transfer(
    make_fault: MakeFault, model: Model
) -> None:
    """What commit() has stored is there, and nothing else."""

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
    with busy(model):
        fault.assert_aborts(call, OperationalError, BUSY)
    fault.assert_leaves("ada")


@pytest.mark.parametrize("held", [WRITES, READS])
def test_busy_database_in_the_final_commit_breaks_the_transfer(
    make_fault: MakeFault, model: Model, held: str
) -> None:
    """A reader refuses the COMMIT itself, when all was written."""
    model.seed("ada")

    def body() -> Iterator[str]:
        yield "one"
        add(model, "lost")

    fault = make_fault(model, body)
    call = fault.call()
    assert next(call) == b"one"
    with busy(model, held):
        fault.assert_aborts(call, OperationalError, BUSY)
    fault.assert_leaves("ada")


@pytest.mark.parametrize("held", [WRITES, READS])
def test_busy_database_in_commit_lets_the_stream_go_on(
    make_fault: MakeFault, model: Model, held: str
) -> None:
    """commit() raises and has aborted; a later one finds the database free."""
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
    with busy(model, held):
        assert next(call) == b"two"
    assert call.read() == b""
    assert [report.reason for report in fault.reports] == ["completed"]
    fault.assert_leaves("ada", "bob")


def test_busy_database_sends_no_item_that_is_not_stored(
    make_fault: MakeFault, model: Model
) -> None:
    """With ``commit='each'`` the item whose commit is refused does not leave."""

    def body() -> Iterator[str]:
        for name in ["ada", "lost"]:
            add(model, name)
            yield name

    fault = make_fault(model, body, commit="each")
    call = fault.call()
    assert next(call) == b"ada"
    with busy(model):
        fault.assert_aborts(call, OperationalError, BUSY)
    fault.assert_leaves("ada")
