"""A commit that SQLite refuses is undone: nothing of it reaches the next commit.

SQLite keeps the transaction of a refused commit open, and SQLAlchemy does not.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

import tgstream
from tests.conftest import MakeApp
from tests.database.conftest import ModelRoot, assert_thread_works
from tests.database.test_request_transaction import WritingRoot
from tests.live.table_sender import TableSender, metadata
from tests.live.test_transactions import ActionController
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import get


@pytest.fixture
def model(make_model: MakeModel, tmp_path: Path) -> Model:
    """A model whose connections do not wait for the lock of another one."""
    model = make_model(f"sqlite:///{tmp_path}/test.db?timeout=0.01")
    model.seed("ada", "bob")
    return model


@contextmanager
def reading(model: Model) -> Iterator[None]:
    """Read meanwhile from outside, so that SQLite refuses each commit."""
    with closing(sqlite3.connect(str(model.url.database))) as outside:
        rows = outside.execute("SELECT name FROM users")
        rows.fetchone()
        yield
        rows.close()


def test_refused_commit_of_a_controller_is_undone(
    make_app: MakeApp, model: Model
) -> None:
    """Its stream does not begin, and zope.sqlalchemy closes the session."""
    app = make_app(WritingRoot(model, lambda: iter(["one"])), model)
    with reading(model):
        assert get(app).status.startswith("500")
    assert_thread_works(app, model)
    assert model.texts() == []


def test_refused_commit_of_a_stream_is_undone(make_app: MakeApp, model: Model) -> None:
    """The generator catches the error, and goes on without a session."""

    def body() -> Iterator[str]:
        model.DBSession.add(Note(text="refused"))
        with reading(model), pytest.raises(sa.exc.OperationalError):
            tgstream.commit()
        model.DBSession.remove()
        yield "one"

    app = make_app(ModelRoot(model, body), model)
    assert get(app).text == "one"
    assert_thread_works(app, model)
    assert model.texts() == []


def test_refused_commit_of_a_request_that_publishes_is_undone(
    make_app: MakeApp, model: Model
) -> None:
    """Its message is undone with it."""
    metadata.create_all(model.outside)
    sender = TableSender(model)

    def act() -> None:
        model.DBSession.add(User(name="refused"))
        sender.send("refused")

    app = make_app(ActionController(act), model, tm__enabled=True)
    with reading(model):
        assert get(app, "/request").status.startswith("500")
    with model.engine.begin() as connection:
        connection.execute(sa.insert(User).values(name="next"))
    assert model.names() == ["ada", "bob", "next"]
    assert sender.stored() == []
