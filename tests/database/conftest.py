"""Controllers, and checks of the database, for several files of tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session
from tg import TGController, expose

from tests.conftest import assert_clean, pool
from tests.model import Model, Note, User
from tests.wsgi import Call, get
from tgstream import Stream

Generator = Callable[[], Iterator[str]]


USERS = sa.table("users", sa.column("name"))


class ModelRoot(TGController):
    """A controller with a stream of ``body``, and pages that read and write."""

    def __init__(self, model: Model, body: Generator, **options: Any) -> None:
        self.model, self.body, self.options = model, body, options
        for method in (ModelRoot.index, ModelRoot.add, ModelRoot.names):
            # Not at import: the fixture make_app resets the milestones of TG.
            expose(content_type="text/plain")(method)

    def index(self) -> Stream:
        return Stream(self.body(), **self.options)

    def add(self, name: str) -> str:
        self.model.DBSession.add(User(name=name))
        return "added"

    def names(self) -> str:
        query = self.model.DBSession.query(User).order_by(User.id)
        return ",".join(user.name for user in query)


def assert_thread_works(app: Any, model: Model) -> None:
    """Check that the next request and the next change on this thread work."""
    before = model.names()
    assert get(app, "/add?name=next").text == "added"
    assert model.names() == [*before, "next"]
    assert get(app, "/names").text == ",".join(model.names())
    assert_clean(model)


@contextlib.contextmanager
def record_statements(model: Model) -> Iterator[list[str]]:
    """Record the statements that the application's engine executes meanwhile."""
    recorded: list[str] = []

    def record(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        recorded.append(statement)

    engine = model.engine
    sa.event.listen(engine, "before_cursor_execute", record)
    try:
        yield recorded
    finally:
        sa.event.remove(engine, "before_cursor_execute", record)


def find_user(model: Model, name: str) -> User:
    """The user of this name, in the session of the request or stream that runs here."""
    return model.DBSession.query(User).filter_by(name=name).one()


class Lines:
    """A format that joins its items."""

    content_type = "text/plain"

    def encode(self, items: Any) -> Iterator[str]:
        yield from items


def defer_unique_names(model: Model) -> None:
    """On PostgreSQL let a second user of a name fail in the commit, not the flush."""
    if not model.sqlite:
        with model.outside.begin() as outside:
            for change in (
                "DROP CONSTRAINT users_name_key",
                "ADD CONSTRAINT users_name_key UNIQUE (name)"
                " DEFERRABLE INITIALLY DEFERRED",
            ):
                outside.execute(sa.text(f"ALTER TABLE users {change}"))


def count_users_after_chunks(call: Call, model: Model) -> list[int]:
    """The number of committed users after each chunk. No connection is held then."""
    counts = []
    for _ in call:
        counts.append(len(model.names()))
        assert pool(model).checkedout() == 0
        assert model.idle_in_transaction() == 0
    call.close()
    return counts


class Resource:
    """A data manager like that of a mailer, which logs its steps.

    :param fails: the step that raises ``ValueError``.
    :param key: the ``sortKey``.
    """

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


def stream_or_plain(
    model: Model,
    body: Callable[[], Any],
    items: Callable[[], Any] = lambda: iter(["a", "b"]),
) -> Any:
    """A controller that calls ``body``, and then streams ``items`` or returns text."""

    class Root(TGController):
        @expose(content_type="text/plain")
        def stream(self) -> Stream:
            self.held = body()
            return Stream(items())

        @expose(content_type="text/plain")
        def plain(self) -> str:
            self.held = body()
            return "ab"

    return Root()


def seed_note(model: Model) -> None:
    """Commit a user with a note, from outside of the application."""
    with Session(model.outside) as session:
        session.add(User(name="ada", notes=[Note(text="secret")]))
        session.commit()
