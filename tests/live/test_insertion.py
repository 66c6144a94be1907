"""Messages that a back end stores in the application's own database.

They are in the transaction of the rows that they are about.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import tg
import transaction
from sqlalchemy.orm.exc import StaleDataError
from tg import TGController
from zope.sqlalchemy import register
from zope.sqlalchemy.datamanager import STATUS_READONLY

from tests.conftest import MakeApp, Root, assert_clean, pool
from tests.live.table_sender import MESSAGES, TableSender, metadata
from tests.live.test_transactions import (
    BOTH,
    SAVEPOINTS,
    ActionController,
    FailingManager,
    veto,
)
from tests.model import MakeModel, Model, User
from tests.wsgi import get
from tgstream import commit, rollback, rows
from tgstream.testing import open_stream


def make_sender(model: Model) -> TableSender:
    """A sender whose table is new."""
    metadata.drop_all(model.outside)
    metadata.create_all(model.outside)
    return TableSender(model)


@pytest.fixture
def model(make_model: MakeModel, tmp_path: Path) -> Model:
    """A model on an SQLite file. Tests that need PostgreSQL make their own."""
    return make_model(f"sqlite:///{tmp_path}/test.db")


@pytest.fixture
def plain_model(make_model: MakeModel, tmp_path: Path) -> Model:
    """A model whose session is not registered with zope.sqlalchemy."""
    return make_model(f"sqlite:///{tmp_path}/test.db", zope=False)


@pytest.fixture
def sender(model: Model) -> TableSender:
    return make_sender(model)


@pytest.fixture
def plain_sender(plain_model: Model) -> TableSender:
    """A sender of an application whose session commits by itself."""
    return make_sender(plain_model)


def add(model: Model, sender: TableSender, name: str) -> None:
    """Write a row, and publish its name."""
    model.DBSession.add(User(name=name))
    sender.send(name)


@pytest.fixture
def listener(sender: TableSender) -> Iterator[None]:
    """The sender publishes the name of each user that is inserted."""

    def publish_name(mapper: Any, connection: Any, user: User) -> None:
        sender.send(user.name)

    sa.event.listen(User, "after_insert", publish_name)
    yield
    sa.event.remove(User, "after_insert", publish_name)


def assert_stored(sender: TableSender, expected: list[str]) -> None:
    """The messages and the rows are the same, and were inserted by the session."""
    assert sender.stored() == expected
    assert sender.model.names() == expected
    assert [text for texts in sender.committed for text in texts] == expected
    assert sender.published == []


@BOTH
def test_message_is_inserted_with_the_rows_in_one_call(
    make_app: MakeApp, model: Model, sender: TableSender, path: str
) -> None:
    """It is inserted late: at the time of the commit."""

    def act() -> None:
        add(model, sender, "ada")
        add(model, sender, "bob")
        assert sender.insertions == []

    app = make_app(ActionController(act), model, tm__enabled=True)
    assert get(app, path).text == "done"
    assert sender.insertions == [["ada", "bob"]]
    assert sender.committed == [["ada", "bob"]]
    assert_stored(sender, ["ada", "bob"])
    assert_clean(model)


@BOTH
@pytest.mark.parametrize("reads", [True, False])
def test_message_of_a_request_without_changes_is_inserted(
    make_app: MakeApp, model: Model, sender: TableSender, path: str, reads: bool
) -> None:
    """zope.sqlalchemy does not commit a session that has only read."""

    def act() -> None:
        if reads:
            model.DBSession.query(User).all()
        sender.send("ada")

    app = make_app(ActionController(act), model, tm__enabled=True)
    assert get(app, path).text == "done"
    assert sender.insertions == sender.committed == [["ada"]]
    assert sender.stored() == ["ada"]
    assert_clean(model)


@pytest.mark.parametrize("how", ["raises", "dooms", "vetoes", "rolls back", "fails"])
def test_message_of_a_request_that_aborts_is_not_inserted(
    make_app: MakeApp, model: Model, sender: TableSender, how: str
) -> None:
    """The next request works as usual."""
    actions: dict[str, Callable[[], object]] = {
        "raises": lambda: 1 / 0,
        "dooms": transaction.doom,
        "vetoes": lambda: setattr(root.response, "status_int", 500),
        "rolls back": transaction.abort,
        "fails": lambda: transaction.get().join(EarlyFailingManager()),
    }

    def act() -> None:
        add(model, sender, "lost")
        actions[how]()

    root = RespondingController(act)
    app = make_app(root, model, tm__enabled=True, tm__commit_veto=veto)
    get(app, "/request")
    assert sender.stored() == model.names() == []
    root.action = lambda: add(model, sender, "kept")
    assert get(app, "/request").text == "done"
    assert_stored(sender, ["kept"])


class RespondingController(ActionController):
    @property
    def response(self) -> Any:
        return tg.response


class EarlyFailingManager(FailingManager):
    """It votes before the session does."""

    def sortKey(self) -> str:
        return "a"


def test_message_is_sent_although_another_manager_fails_after_the_commit(
    make_app: MakeApp, model: Model, sender: TableSender
) -> None:
    """The rows and the message are committed: the session is in one phase."""

    def act() -> None:
        add(model, sender, "ada")
        transaction.get().join(FailingManager())

    app = make_app(ActionController(act), model, tm__enabled=True)
    assert get(app, "/request").status_int == 500
    assert_stored(sender, ["ada"])


@BOTH
@pytest.mark.parametrize("flushes", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_message_of_a_listener_is_inserted(
    make_app: MakeApp,
    model: Model,
    sender: TableSender,
    listener: None,
    path: str,
    flushes: bool,
    first: bool,
) -> None:
    """The listener may run in the flush of the commit, and be the first to publish."""

    def act() -> None:
        if first:
            sender.send("first")
        model.DBSession.add(User(name="ada"))
        if flushes:
            model.DBSession.flush()
        model.DBSession.add(User(name="bob"))

    app = make_app(ActionController(act), model, tm__enabled=True)
    assert get(app, path).text == "done"
    expected = [*["first"] * first, "ada", "bob"]
    assert sender.insertions == sender.committed == [expected]
    assert sender.stored() == expected
    assert model.names() == ["ada", "bob"]


@BOTH
@pytest.mark.parametrize("savepoint", [True, False])
def test_message_of_the_last_flush_is_inserted(
    make_app: MakeApp,
    make_model: MakeModel,
    postgresql: str,
    path: str,
    savepoint: bool,
) -> None:
    """A handler of the commit adds a row, and its listener publishes."""
    model = make_model(postgresql)
    sender = make_sender(model)
    numbers = count()

    def add_late(session: Any) -> None:
        session.add(User(name=f"late {next(numbers)}"))

    def publish_name(mapper: Any, connection: Any, user: User) -> None:
        sender.send(user.name)

    def act() -> None:
        model.DBSession.add(User(name="ada"))
        model.DBSession.flush()
        if savepoint:
            transaction.savepoint()

    sa.event.listen(User, "after_insert", publish_name)
    sa.event.listen(model.DBSession, "before_commit", add_late)
    try:
        app = make_app(ActionController(act), model, tm__enabled=True)
        assert get(app, path).text == "done"
    finally:
        sa.event.remove(User, "after_insert", publish_name)
        sa.event.remove(model.DBSession, "before_commit", add_late)
    assert len(model.names()) >= 2
    assert_stored(sender, model.names())


@pytest.mark.parametrize("action", SAVEPOINTS, ids=lambda action: action.__name__)
@BOTH
def test_message_of_a_savepoint_is_inserted_if_the_savepoint_commits(
    make_app: MakeApp,
    make_model: MakeModel,
    postgresql: str,
    action: Callable[[Model, Any], None],
    path: str,
) -> None:
    """Savepoints of the session and of transaction, also those that stay open."""
    model = make_model(postgresql)
    sender = make_sender(model)

    class Publisher:
        publish = staticmethod(sender.send)

    app = make_app(ActionController(lambda: action(model, Publisher())), model)
    assert get(app, path).text == "done"
    assert_stored(sender, ["before", "after"])


@pytest.mark.parametrize("twophase", [True, False])
@BOTH
def test_message_of_a_session_in_two_phases_is_inserted(
    make_app: MakeApp, make_model: MakeModel, postgresql: str, path: str, twophase: bool
) -> None:
    """It is inserted before the transaction is prepared."""
    model = make_model(postgresql, twophase=twophase)
    sender = make_sender(model)
    app = make_app(ActionController(lambda: add(model, sender, "ada")), model)
    assert get(app, path).text == "done"
    assert_stored(sender, ["ada"])


@BOTH
@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "twophase"])
def test_missing_table_fails_the_commit(
    make_app: MakeApp,
    make_model: MakeModel,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    path: str,
    kind: str,
) -> None:
    """It is an error of the request or of the stream. The connection is clean."""
    url = f"sqlite:///{tmp_path}/test.db"
    if kind != "sqlite":
        url = request.getfixturevalue("postgresql")
    model = make_model(url, twophase=kind == "twophase")
    sender = make_sender(model)
    metadata.drop_all(model.outside)
    root = ActionController(lambda: add(model, sender, "ada"))
    app = make_app(root, model, tm__enabled=True)
    fails = path == "/items?commit=end"
    with pytest.raises(sa.exc.SQLAlchemyError) if fails else nullcontext():
        assert get(app, path).status_int == 500
    assert_clean(model)
    root.action = lambda: model.DBSession.add(User(name="bob"))
    assert get(app, path).text == "done"
    assert sender.committed == sender.published == []
    assert model.names() == ["bob"]


@pytest.mark.parametrize("used", [True, False])
def test_message_of_a_second_session_is_inserted_by_the_first(
    make_app: MakeApp,
    make_model: MakeModel,
    model: Model,
    sender: TableSender,
    listener: None,
    tmp_path: Path,
    used: bool,
) -> None:
    """The flush of the second session publishes, while the transaction commits.

    The first session cannot join any more. If it has not, the message is stored after
    the commit.
    """
    other = make_model(f"sqlite:///{tmp_path}/other.db")
    other.init_model(other.outside)

    def act() -> None:
        if used:
            model.DBSession.query(User).all()
        other.DBSession.add(User(name="ada"))

    options = {"tm__enabled": True, "tgstream__sessions": [other.DBSession]}
    app = make_app(ActionController(act), model, **options)
    assert get(app, "/request").text == "done"
    assert sender.stored() == other.names() == ["ada"]
    assert (sender.committed, sender.published) == (
        ([["ada"]], []) if used else ([], [["ada"]])
    )
    assert_clean(model)


def test_message_of_a_request_that_is_tried_again_is_inserted_once(
    make_app: MakeApp, model: Model, sender: TableSender
) -> None:
    """The first attempt fails in its flush, with an error that is worth another one."""
    errors = [StaleDataError()]

    def fail(*_: Any) -> None:
        if errors:
            raise errors.pop()

    root = ActionController(lambda: add(model, sender, "ada"))
    app = make_app(root, model, tm__enabled=True, tm__attempts=2)
    sa.event.listen(model.DBSession, "after_flush", fail)
    try:
        assert get(app, "/request").text == "done"
    finally:
        sa.event.remove(model.DBSession, "after_flush", fail)
    assert_stored(sender, ["ada"])


@pytest.mark.parametrize("moment", ["after_commit", "addAfterCommitHook"])
def test_message_after_the_commit_is_published_at_once(
    make_app: MakeApp, model: Model, sender: TableSender, moment: str
) -> None:
    """Its own transaction stores it."""

    def publish(*_: Any) -> None:
        sender.send("late")

    def act() -> None:
        add(model, sender, "ada")
        if moment == "addAfterCommitHook":
            transaction.get().addAfterCommitHook(publish)

    app = make_app(ActionController(act), model, tm__enabled=True)
    if moment == "after_commit":
        sa.event.listen(model.DBSession, moment, publish)
    try:
        assert get(app, "/request").text == "done"
    finally:
        if moment == "after_commit":
            sa.event.remove(model.DBSession, moment, publish)
    assert sender.stored() == ["ada", "late"]
    assert sender.published == [["late"]]


def test_request_that_publishes_nothing_installs_no_handler(
    make_app: MakeApp, model: Model
) -> None:
    """Handlers are installed for sessions and connections that publish."""
    seen: list[bool] = []

    def act() -> None:
        session = model.DBSession()
        session.add(User(name="ada"))
        handlers = session.connection().dispatch.commit, session.dispatch.after_commit
        seen.extend(map(bool, handlers))

    app = make_app(ActionController(act), model, tm__enabled=True)
    assert get(app, "/request").text == "done"
    assert seen == [False, False]


# Streams.


def test_messages_of_a_stream_are_inserted_by_each_of_its_commits(
    make_app: MakeApp, model: Model, sender: TableSender
) -> None:
    """Between two items the stream holds no connection."""

    def items() -> Iterator[str]:
        for name in "ada", "bob", "eve":
            add(model, sender, name)
            yield name

    app = make_app(Root(items, commit="each"), model, tm__enabled=True)
    with open_stream(app, "/") as response:
        for count in 1, 2:
            next(response)
            assert len(sender.stored()) == count
            assert pool(model).checkedout() == 0
    assert sender.insertions == [["ada"], ["bob"]]
    assert_stored(sender, ["ada", "bob"])


def test_messages_of_a_stream_follow_commit_and_rollback(
    make_app: MakeApp, model: Model, sender: TableSender
) -> None:
    """With ``commit='manual'`` only ``commit()`` inserts them."""

    def items() -> Iterator[str]:
        add(model, sender, "ada")
        commit()
        assert sender.stored() == ["ada"]
        add(model, sender, "undone")
        rollback()
        add(model, sender, "bob")
        yield "item"
        commit()
        model.DBSession.remove()
        add(model, sender, "eve")
        commit()
        sender.send("uncommitted")

    app = make_app(Root(items, commit="manual"), model, tm__enabled=True)
    assert get(app, "/").text == "item"
    assert_stored(sender, ["ada", "bob", "eve"])


def test_message_of_a_stream_without_zope_is_inserted(
    make_app: MakeApp, plain_model: Model, plain_sender: TableSender
) -> None:
    """This holds with ``tm.enabled`` off, too."""
    model, sender = plain_model, plain_sender
    root = ActionController(lambda: add(model, sender, "ada"))
    app = make_app(root, model, tm__enabled=False)
    assert get(app, "/items?commit=end").text == "done"
    assert_stored(sender, ["ada"])


def test_rows_by_key_do_not_commit_a_message(
    make_app: MakeApp, model: Model, sender: TableSender
) -> None:
    """They end the transactions of their own batches only."""

    model.seed("ada", "bob", "eve")
    users = sa.select(User)

    def items() -> Iterator[str]:
        sender.send("undone")
        for user in rows(users, key=User.id, batch=1):
            yield user.name
        assert sender.insertions == []
        rollback()

    app = make_app(Root(items, commit="manual"), model, tm__enabled=True)
    assert get(app, "/").text == "adabobeve"
    assert sender.stored() == []


# Jobs, and sessions that commit by themselves.


def test_message_of_a_job_is_inserted_by_its_transaction(
    make_app: MakeApp, model: Model, sender: TableSender, listener: None
) -> None:
    """Also if the job does nothing but publish."""
    make_app(TGController(), model)
    with transaction.manager:
        model.DBSession.add(User(name="ada"))
    with pytest.raises(LookupError), transaction.manager:
        model.DBSession.add(User(name="undone"))
        model.DBSession.flush()
        raise LookupError
    with transaction.manager:
        sender.send("alone")
    sender.send("at once")
    assert sender.stored() == ["ada", "alone", "at once"]
    assert sender.insertions == sender.committed == [["ada"], ["alone"]]
    assert sender.published == [["at once"]]
    assert model.names() == ["ada"]
    assert pool(model).checkedout() == 0


def test_message_from_before_a_session_begins_is_inserted_by_it(
    make_app: MakeApp, make_model: MakeModel, tmp_path: Path
) -> None:
    """The job begins it itself, after it has published."""
    model = make_model(f"sqlite:///{tmp_path}/test.db", autobegin=False)
    sender = make_sender(model)
    make_app(TGController(), model)
    with transaction.manager:
        sender.send("before")
        model.DBSession.begin()
        model.DBSession.add(User(name="ada"))
        sender.send("inserted")
    with transaction.manager:
        sender.send("alone")
    assert sender.committed == [["before", "inserted"]]
    assert sender.published == [["alone"]]
    assert model.names() == ["ada"]


def test_message_of_a_read_only_manager_is_inserted(
    make_app: MakeApp, plain_model: Model, plain_sender: TableSender
) -> None:
    """The session has joined a transaction that is not that of the thread."""
    model, sender = plain_model, plain_sender
    manager = transaction.TransactionManager(explicit=True)
    register(model.DBSession, transaction_manager=manager)
    make_app(TGController(), model)
    for end in manager.abort, manager.commit:
        manager.begin()
        model.DBSession.query(User).all()
        sender.send(end.__name__)
        end()
    assert sender.stored() == ["commit"]
    assert sender.published == []


@pytest.mark.parametrize("tm", [True, False, None])
def test_message_of_a_session_that_commits_by_itself_is_inserted(
    make_app: MakeApp, plain_model: Model, plain_sender: TableSender, tm: bool | None
) -> None:
    """This holds in requests, with ``tm.enabled`` on and off, and in jobs."""
    model, sender = plain_model, plain_sender
    session = model.DBSession

    def act() -> None:
        add(model, sender, "undone")
        session.flush()
        session.rollback()
        add(model, sender, "ada")
        session.commit()
        assert sender.stored() == ["ada"]
        add(model, sender, "undone, too")
        session.close()
        add(model, sender, "bob")
        session.commit()

    app = make_app(ActionController(act), model, tm__enabled=bool(tm))
    if tm is None:
        act()
    else:
        assert get(app, "/request").text == "done"
    assert sender.insertions == [["ada"], ["bob"]]
    assert_stored(sender, ["ada", "bob"])


def test_message_of_a_job_without_zope_is_published_after_its_transaction(
    make_app: MakeApp, plain_model: Model, plain_sender: TableSender
) -> None:
    """Nothing would commit the session, so it is not used."""
    make_app(TGController(), plain_model)
    with transaction.manager:
        plain_sender.send("ada")
        assert pool(plain_model).checkedout() == 0
        assert plain_sender.stored() == []
    assert plain_sender.published == [["ada"]]


@pytest.mark.parametrize("tm", [True, False])
def test_message_after_the_commit_of_a_plain_session_is_published(
    make_app: MakeApp, plain_model: Model, plain_sender: TableSender, tm: bool
) -> None:
    """Reading an attribute begins a transaction, which nothing commits."""
    model, sender = plain_model, plain_sender
    session = model.DBSession

    def act() -> None:
        user = User(name="ada")
        session.add(user)
        session.commit()
        sender.send(user.name)

    app = make_app(ActionController(act), model, tm__enabled=tm)
    assert get(app, "/request").text == "done"
    assert sender.stored() == model.names() == ["ada"]
    assert sender.published == [["ada"]]
    assert_clean(model)


def test_message_of_a_read_only_session_is_published_after_the_commit(
    make_app: MakeApp, plain_model: Model, plain_sender: TableSender
) -> None:
    """zope.sqlalchemy does not commit a session with this state."""
    model, sender = plain_model, plain_sender
    register(model.DBSession, initial_state=STATUS_READONLY)

    def act() -> None:
        model.DBSession.query(User).all()
        sender.send("ada")

    app = make_app(ActionController(act), model, tm__enabled=True)
    assert get(app, "/request").text == "done"
    assert sender.published == [["ada"]]
    assert_clean(model)


def test_message_is_inserted_in_a_transaction_of_the_connection(
    make_app: MakeApp, model: Model, sender: TableSender
) -> None:
    """A test has begun it, and rolls back all that the application commits."""
    session = model.DBSession
    app = make_app(ActionController(lambda: add(model, sender, "ada")), model)
    with model.engine.connect() as connection:
        outer = connection.begin()
        session.configure(bind=connection)
        sender.checks = False
        assert get(app, "/request").text == "done"
        stored = connection.execute(sa.select(MESSAGES.c.text)).scalars().all()
        outer.rollback()
    assert stored == ["ada"]
    assert sender.published == []
    assert sender.stored() == model.names() == []


def test_message_without_an_application_session_is_published_after_the_commit(
    make_app: MakeApp,
    model: Model,
    sender: TableSender,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A failure is logged."""
    app = make_app(ActionController(lambda: sender.send("ada")), tm__enabled=True)
    assert get(app, "/request").text == "done"
    assert sender.published == [["ada"]]
    sa.Table.drop(MESSAGES, model.outside)
    assert get(app, "/request").text == "done"
    (record,) = caplog.records
    assert record.getMessage().startswith("Events are lost: 1 could not be sent")
    assert record.levelno == logging.ERROR
