"""Random transactions: the stored messages are those of the stored rows, in order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import pytest
import sqlalchemy as sa
import transaction

from tests.conftest import MakeApp
from tests.live.table_sender import TableSender, metadata
from tests.live.test_transactions import ActionController
from tests.model import MakeModel, Model, User
from tests.wsgi import get

SEEDS = range(5)


class MemorySender(TableSender):
    """A sender that does not store its messages in the database."""

    insert = None  # type: ignore[assignment]

    def publish_committed(self, messages: Sequence[str]) -> None:
        self.committed.append([*messages])

    def stored(self) -> list[str]:
        return [name for names in self.committed for name in names]


class Actions:
    """Random actions of an application. Each row is published where it is written.

    :param zope: whether ``transaction`` commits the session.
    """

    def __init__(
        self, model: Model, sender: TableSender, seed: int, zope: bool
    ) -> None:
        self.model, self.sender, self.zope = model, sender, zope
        self.random = random.Random(seed)
        self.names = count()
        self.savepoints: list[Any] = []
        self.steps = [self.add] * 4 + [self.begin_nested, self.end_nested] * 2
        self.steps += [self.add_listened, self.rollback, self.fail, self.commit]
        if zope:
            self.steps += [self.savepoint, self.undo_savepoint, self.abort]

    @property
    def session(self) -> Any:
        return self.model.DBSession()

    def run(self) -> None:
        for _ in range(self.random.randint(1, 25)):
            self.random.choice(self.steps)()
        if self.random.random() < 0.2:
            raise LookupError
        if not self.zope and self.random.random() < 0.8:
            self.session.commit()

    def add(self) -> None:
        name = f"row {next(self.names)}"
        self.session.add(User(name=name))
        if self.random.random() < 0.5:
            self.session.flush()
        self.sender.send(name)

    def add_listened(self) -> None:
        """The listener of the model publishes, when it is flushed."""
        self.session.add(User(name=f"listened {next(self.names)}"))
        if self.random.random() < 0.5:
            self.session.flush()

    def begin_nested(self) -> None:
        self.session.begin_nested()

    def end_nested(self) -> None:
        nested = self.session.get_nested_transaction()
        if nested is not None:
            self.random.choice([nested.commit, nested.rollback])()

    def rollback(self) -> None:
        if self.random.random() < 0.3:
            self.session.rollback()

    def fail(self) -> None:
        """A flush fails in a savepoint, which is rolled back."""
        self.session.flush()
        with suppress(sa.exc.IntegrityError), self.session.begin_nested():
            self.add()
            self.session.execute(sa.text("INSERT INTO users (id) VALUES (-1), (-1)"))

    def savepoint(self) -> None:
        self.savepoints.append(transaction.savepoint())

    def undo_savepoint(self) -> None:
        if self.savepoints:
            savepoint = self.savepoints.pop()
            if savepoint.valid:
                savepoint.rollback()

    def commit(self) -> None:
        if self.random.random() < 0.3:
            transaction.commit() if self.zope else self.session.commit()
            self.savepoints.clear()

    def abort(self) -> None:
        if self.random.random() < 0.3:
            transaction.abort()
            self.savepoints.clear()


def run_job(app: Any, act: Callable[[], None]) -> None:
    with transaction.manager:
        act()


def run_session(app: Any, act: Callable[[], None]) -> None:
    act()


def run_request(app: Any, act: Callable[[], None]) -> None:
    get(app, "/request")


def run_stream(app: Any, act: Callable[[], None]) -> None:
    get(app, "/items?commit=end")


@pytest.mark.parametrize("inserts", [True, False])
@pytest.mark.parametrize(
    ("run", "zope"),
    [
        (run_job, True),
        (run_request, True),
        (run_stream, True),
        (run_session, False),
        (run_request, False),
    ],
)
def test_messages_are_those_of_the_rows(
    make_app: MakeApp,
    make_model: MakeModel,
    postgresql: str,
    run: Callable[[Any, Callable[[], None]], None],
    zope: bool,
    inserts: bool,
) -> None:
    """Savepoints, rollbacks, aborts, failures and commits, in any order."""
    model = make_model(postgresql, zope=zope)
    metadata.drop_all(model.outside)
    metadata.create_all(model.outside)
    sender = TableSender(model) if inserts else MemorySender(model)
    root = ActionController(lambda: None)
    app = make_app(root, model, tm__enabled=zope)

    def publish_name(mapper: Any, connection: Any, user: User) -> None:
        if user.name.startswith("listened"):
            sender.send(user.name)

    sa.event.listen(User, "after_insert", publish_name)
    try:
        for seed in SEEDS:
            actions = Actions(model, sender, seed, zope)
            root.action = actions.run
            with suppress(Exception):
                run(app, actions.run)
            transaction.abort()
            model.DBSession.remove()
            check(model, sender, seed)
    finally:
        sa.event.remove(User, "after_insert", publish_name)


def check(model: Model, sender: TableSender, seed: int) -> None:
    """The messages were sent after the commit, and each of them once."""
    sent = [name for names in sender.committed for name in names]
    assert sender.stored() == sent, seed
    assert sorted(model.names()) == sorted(sent), seed
    rows = [name for name in model.names() if name.startswith("row")]
    assert [name for name in sent if name.startswith("row")] == rows, seed
    assert sender.published == [], seed
    model.execute("DELETE FROM users; DELETE FROM messages")
    sender.committed.clear()
