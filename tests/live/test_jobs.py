"""``Channel.publish()`` outside of requests, and with ``tm.enabled`` off.

A script, a job or a thread publishes in a transaction that it has begun itself.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import transaction
from sqlalchemy.orm import Session, object_session
from tg import TGController
from zope.sqlalchemy import register

from tests.conftest import MakeApp, Root
from tests.forks import run_python
from tests.live.listeners import open_listener, receive
from tests.live.test_transactions import ActionController
from tests.model import MakeModel, Model, User
from tests.wsgi import get
from tgstream import Channel

Publish = Callable[[], None]


@pytest.fixture
def model(make_model: MakeModel, tmp_path: Path) -> Model:
    """A model on an SQLite file. Tests that need PostgreSQL make their own."""
    return make_model(f"sqlite:///{tmp_path}/test.db")


@pytest.fixture
def plain_model(make_model: MakeModel, tmp_path: Path) -> Model:
    """A model whose session is not registered with zope.sqlalchemy."""
    return make_model(f"sqlite:///{tmp_path}/test.db", zope=False)


@pytest.fixture
def listener(channel: Channel) -> Iterator[None]:
    """The channel publishes the name of each user that is inserted."""

    def publish_name(mapper: Any, connection: Any, user: User) -> None:
        assert object_session(user) is not None
        channel.publish(user.name)

    sa.event.listen(User, "after_insert", publish_name)
    yield
    sa.event.remove(User, "after_insert", publish_name)


def assert_received(channel: Channel, events: Any, expected: list[str]) -> None:
    """The listener has received exactly these events."""
    channel.publish("end", now=True)
    assert receive(events, len(expected) + 1) == [*expected, "end"]


# The transaction of the thread.


def test_event_of_a_job_is_sent_when_its_transaction_commits(
    make_app: MakeApp, channel: Channel, model: Model, listener: None
) -> None:
    """The events of a model's listener follow the rows."""
    make_app(TGController(), model)
    events = open_listener(channel)
    with transaction.manager:
        model.DBSession.add(User(name="ada"))
        model.DBSession.flush()
        channel.publish("now", now=True)
    with pytest.raises(LookupError), transaction.manager:
        model.DBSession.add(User(name="undone"))
        model.DBSession.flush()
        raise LookupError
    with transaction.manager:
        model.DBSession.add(User(name="bob"))  # it is inserted by the commit
    assert_received(channel, events, ["now", "ada", "bob"])
    assert model.names() == ["ada", "bob"]


def test_event_before_the_first_statement_of_a_job_belongs_to_its_transaction(
    make_app: MakeApp, channel: Channel, model: Model
) -> None:
    """The session joins after the event, or not at all."""
    make_app(TGController(), model)
    events = open_listener(channel)
    for name, error in [("undone", LookupError), ("ada", None)]:
        try:
            with transaction.manager:
                channel.publish(name)
                model.DBSession.add(User(name=name))
                model.DBSession.flush()
                channel.publish("now", now=True)
                if error is not None:
                    raise error
        except LookupError:
            pass
    with transaction.manager:
        channel.publish("alone")
    assert_received(channel, events, ["now", "now", "ada", "alone"])


def test_event_of_a_session_that_has_joined_follows_the_transaction(
    make_app: MakeApp, channel: Channel, model: Model
) -> None:
    """A statement is enough: no block has begun the transaction."""
    make_app(TGController(), model)
    events = open_listener(channel)
    for end in transaction.abort, transaction.commit:
        model.DBSession.query(User).all()
        channel.publish(end.__name__)
        channel.publish("now", now=True)
        end()
    channel.publish("at once")
    assert_received(channel, events, ["now", "now", "commit", "at once"])


def test_event_of_a_session_that_has_only_begun_follows_the_transaction(
    make_app: MakeApp, channel: Channel, model: Model
) -> None:
    """zope.sqlalchemy lets it join with its first connection, not before."""
    make_app(TGController(), model)
    events = open_listener(channel)
    for end in transaction.abort, transaction.commit:
        model.DBSession.begin()
        channel.publish(end.__name__)
        channel.publish("now", now=True)
        end()
    assert_received(channel, events, ["now", "now", "commit"])


def test_event_of_a_session_of_the_job_itself_follows_the_transaction(
    make_app: MakeApp, channel: Channel, model: Model, listener: None
) -> None:
    """Any session that has joined counts, not only that of the application."""
    make_app(TGController(), model)
    events = open_listener(channel)
    for end in transaction.abort, transaction.commit:
        session = Session(model.engine)
        register(session)
        session.add(User(name=end.__name__))
        session.flush()
        channel.publish("now", now=True)
        end()
    assert_received(channel, events, ["now", "now", "commit"])


def test_event_of_a_thread_follows_the_transaction_of_the_thread(
    make_app: MakeApp, channel: Channel, model: Model
) -> None:
    """A transaction of another thread has no effect."""
    make_app(TGController(), model)
    events = open_listener(channel)

    def run() -> None:
        channel.publish("at once")
        with pytest.raises(LookupError), transaction.manager:
            model.DBSession.add(User(name="undone"))
            channel.publish("undone")
            raise LookupError
        with transaction.manager:
            model.DBSession.add(User(name="ada"))
            channel.publish("ada")
        model.DBSession.remove()

    with transaction.manager:
        channel.publish("last")
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert_received(channel, events, ["at once", "ada", "last"])


def test_event_of_a_savepoint_of_a_job_is_undone_with_it(
    make_app: MakeApp, channel: Channel, make_model: MakeModel, postgresql: str
) -> None:
    """Savepoints of the session, and of transaction."""
    model = make_model(postgresql)
    make_app(TGController(), model)
    events = open_listener(channel)
    with transaction.manager:
        model.DBSession.add(User(name="ada"))
        savepoint = transaction.savepoint()
        channel.publish("undone")
        savepoint.rollback()
        with model.DBSession.begin_nested() as nested:
            channel.publish("undone, too")
            nested.rollback()
        channel.publish("ada")
    assert_received(channel, events, ["ada"])


def test_event_of_attempts_is_sent_once(
    make_app: MakeApp, channel: Channel, model: Model
) -> None:
    """The first attempt fails with an error that is worth another one."""
    make_app(TGController(), model)
    events = open_listener(channel)
    for attempt in transaction.manager.attempts(2):
        with attempt:
            model.DBSession.add(User(name="ada"))
            channel.publish("ada")
            if attempt is not transaction.manager.manager:  # the last one
                raise transaction.interfaces.TransientError
    assert_received(channel, events, ["ada"])


@pytest.mark.parametrize("hook", ["addAfterCommitHook", "addAfterAbortHook"])
def test_event_of_a_hook_after_the_end_is_sent(
    make_app: MakeApp, channel: Channel, model: Model, hook: str
) -> None:
    """The transaction of the job is over by then."""
    make_app(TGController(), model)
    events = open_listener(channel)
    model.DBSession.query(User).all()
    getattr(transaction.get(), hook)(lambda *_: channel.publish("hook"))
    transaction.commit() if hook == "addAfterCommitHook" else transaction.abort()
    assert_received(channel, events, ["hook"])


def test_explicit_manager_is_followed(
    make_app: MakeApp,
    channel: Channel,
    make_model: MakeModel,
    tmp_path: Path,
) -> None:
    """The session has joined a transaction that is not that of the thread."""
    model = make_model(f"sqlite:///{tmp_path}/test.db", zope=False)
    manager = transaction.TransactionManager(explicit=True)
    register(model.DBSession, transaction_manager=manager)
    make_app(TGController(), model)
    events = open_listener(channel)
    for name in "undone", "ada":
        manager.begin()
        model.DBSession.query(User).all()
        channel.publish(name)
        channel.publish("now", now=True)
        manager.abort() if name == "undone" else manager.commit()
    assert_received(channel, events, ["now", "now", "ada"])


def test_event_of_a_transaction_that_never_ends_is_logged(
    make_app: MakeApp,
    channel: Channel,
    model: Model,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A thread that has read and published ends without a commit."""
    make_app(TGController(), model)
    events = open_listener(channel)

    def run() -> None:
        model.DBSession.query(User).all()
        channel.publish("lost")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    del thread
    gc.collect()
    assert_received(channel, events, [])
    (record,) = caplog.records
    assert record.getMessage() == (
        "Events are lost: their transaction was neither committed nor aborted. Commit "
        "after publish(), or call publish(..., now=True)"
    )


SCRIPT = """
import sys
from sqlalchemy.orm import scoped_session, sessionmaker
import tg, sqlalchemy, transaction, zope.sqlalchemy
from tgstream import Channel
DBSession = scoped_session(sessionmaker(sqlalchemy.create_engine("sqlite://")))
if sys.argv[1] == "zope":
    zope.sqlalchemy.register(DBSession)
tg.config["DBSession"] = DBSession
tg.config["tgstream.channels"] = "memory://"
DBSession.execute(sqlalchemy.text("SELECT 1"))
Channel("jobs").publish("lost")
{end}
"""


@pytest.mark.parametrize("session", ["zope", "plain"])
@pytest.mark.parametrize("ends", [True, False])
def test_script_that_ends_without_a_commit_logs_the_loss(
    session: str, ends: bool
) -> None:
    """The last chance to report it is the exit of the interpreter."""
    end = "transaction.commit(); DBSession.remove()" if ends else ""
    done = run_python("-c", SCRIPT.format(end=end), session)
    assert done.returncode == 0, done.stderr
    assert ("Events are lost: their transaction" in done.stderr) is not ends


# Sessions that commit by themselves.


def add_user(model: Model, name: str, publish: Publish) -> None:
    model.DBSession.add(User(name=name))
    publish()


def add_flushed(model: Model, name: str, publish: Publish) -> None:
    model.DBSession.add(User(name=name))
    model.DBSession.flush()
    publish()


def insert_user(model: Model, name: str, publish: Publish) -> None:
    model.DBSession.execute(sa.insert(User).values(name=name))
    publish()


def insert_on_connection(model: Model, name: str, publish: Publish) -> None:
    model.DBSession.connection().execute(sa.insert(User).values(name=name))
    publish()


def read_and_add(model: Model, name: str, publish: Publish) -> None:
    model.DBSession.query(User).all()
    publish()
    model.DBSession.add(User(name=name))
    model.DBSession.flush()


def read_and_insert(model: Model, name: str, publish: Publish) -> None:
    model.DBSession.query(User).all()
    publish()
    model.DBSession.execute(sa.insert(User).values(name=name))


WRITES = [
    add_user,
    add_flushed,
    insert_user,
    insert_on_connection,
    read_and_add,
    read_and_insert,
]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize(
    ("database", "undo"),
    [("sqlite", "rollback"), ("sqlite", "remove"), ("postgresql", "close")],
)
def test_event_of_a_session_follows_its_own_commit(
    make_app: MakeApp,
    channel: Channel,
    make_model: MakeModel,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    write: Callable[[Model, str, Publish], None],
    database: str,
    undo: str,
) -> None:
    """If the session rolls back what it has written, the event is not sent."""
    url = f"sqlite:///{tmp_path}/test.db"
    if database == "postgresql":
        url = request.getfixturevalue(database)
    model = make_model(url, zope=False)
    make_app(TGController(), model)
    events, session = open_listener(channel), model.DBSession
    write(model, "undone", lambda: channel.publish("undone"))
    getattr(session, undo)()
    write(model, "ada", lambda: channel.publish("ada"))
    channel.publish("now", now=True)
    session.commit()
    channel.publish("at once")
    assert_received(channel, events, ["now", "ada", "at once"])
    assert model.names() == ["ada"]


def test_event_of_a_listener_follows_the_commit_of_the_session(
    make_app: MakeApp, channel: Channel, plain_model: Model, listener: None
) -> None:
    """The commit itself flushes."""
    make_app(TGController(), plain_model)
    events, session = open_listener(channel), plain_model.DBSession
    session.add(User(name="ada"))
    session.commit()
    session.add(User(name="undone"))
    session.flush()
    session.rollback()
    session.add(User(name="bob"))
    session.flush()
    channel.publish("now", now=True)
    with session.begin_nested() as savepoint:
        session.add(User(name="undone"))
        session.flush()
        savepoint.rollback()
    session.add(User(name="ada"))  # this name is taken
    with pytest.raises(sa.exc.IntegrityError):
        session.commit()
    session.rollback()
    session.add(User(name="eve"))
    session.commit()
    assert_received(channel, events, ["ada", "now", "eve"])


@pytest.mark.parametrize("end", ["close", "remove", "commit"])
def test_event_of_a_session_that_only_reads_is_sent_when_its_transaction_ends(
    make_app: MakeApp, channel: Channel, plain_model: Model, end: str
) -> None:
    """Nothing is undone by its end. An explicit rollback undoes the event."""
    make_app(TGController(), plain_model)
    events, session = open_listener(channel), plain_model.DBSession
    for method in "rollback", end:
        session.query(User).all()
        channel.publish(method)
        getattr(session, method)()
    assert_received(channel, events, [end])


# Requests with ``tm.enabled`` off.


@pytest.mark.parametrize("how", ["commits", "forgets", "raises", "reads", "rolls back"])
def test_event_of_a_request_without_a_transaction_manager_follows_its_session(
    make_app: MakeApp, channel: Channel, plain_model: Model, how: str
) -> None:
    """TurboGears removes the session when the response ends."""
    session = plain_model.DBSession

    def act() -> None:
        if how == "reads":
            session.query(User).all()
        else:
            session.add(User(name="ada"))
            session.flush()
        channel.publish("ada")
        channel.publish("now", now=True)
        if how == "raises":
            raise LookupError
        if how == "commits":
            session.commit()
        if how == "rolls back":
            session.rollback()

    app = make_app(ActionController(act), plain_model, tm__enabled=False)
    events = open_listener(channel)
    get(app, "/request")
    expected = ["ada"] if how in ("commits", "reads") else []
    assert_received(channel, events, ["now", *expected])


def test_event_of_a_request_that_leaves_its_transaction_open_is_logged(
    make_app: MakeApp,
    channel: Channel,
    model: Model,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The session has joined the transaction of the thread, and nothing ends it."""

    def act() -> None:
        model.DBSession.query(User).all()
        channel.publish("event")
        if ends:
            transaction.commit()

    app = make_app(ActionController(act), model, tm__enabled=False)
    events = open_listener(channel)
    for ends in True, False:
        assert get(app, "/request").text == "done"
        gc.collect()
        assert len(caplog.records) == (0 if ends else 1)
    transaction.abort()
    assert_received(channel, events, ["event"])


def test_event_of_the_controller_of_a_stream_is_sent_if_its_session_only_read(
    make_app: MakeApp, channel: Channel, plain_model: Model
) -> None:
    """tgstream rolls back a session with changes before the stream begins."""
    session = plain_model.DBSession
    actions: list[Callable[[], None]] = []

    def act() -> None:
        for action in actions:
            action()
        session.query(User).all()
        channel.publish("written" if actions else "read")

    def items() -> Iterator[str]:
        yield "done"

    def start() -> Iterator[str]:
        act()
        return items()

    app = make_app(Root(start), plain_model, tm__enabled=False)
    events = open_listener(channel)
    assert get(app, "/").text == "done"
    actions.append(lambda: session.add(User(name="undone")))
    assert get(app, "/").text == "done"
    assert_received(channel, events, ["read"])
    assert plain_model.names() == []
