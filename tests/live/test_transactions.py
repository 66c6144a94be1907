"""``Channel.publish()`` in transactions: which events are sent, and when."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import tg
import transaction
from tg import TGController, expose

from tests.conftest import MakeApp
from tests.live.listeners import LiveController, open_listener, receive
from tests.model import MakeModel, Model, User
from tests.wsgi import Call, get
from tgstream import Channel, Report, Stream, rollback
from tgstream.database.on_commit import send_on_commit
from tgstream.testing import OpenStream, open_stream


class FailingSender:
    """A back end that fails."""

    def publish_committed(self, messages: Sequence[Any]) -> None:
        raise RuntimeError


class ActionController(TGController):
    """A request, and a stream, that call the same function."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action
        for method in ActionController.request, ActionController.items:
            expose(content_type="text/plain")(method)  # TG forgets it between tests

    def request(self) -> str:
        self.action()
        return "done"

    def items(self, commit: Any) -> Stream:
        def items() -> Iterator[str]:
            self.action()
            yield "done"

        return Stream(items(), commit=commit)


BOTH = pytest.mark.parametrize("path", ["/request", "/items?commit=end"])
"""Run a test in a request and in a stream."""


def test_event_of_a_request_is_sent_when_it_commits(
    make_app: MakeApp, channel: Channel, sqlite_model: Model
) -> None:
    """The row is in the database by then."""
    root = LiveController(channel, sqlite_model)
    app = make_app(root, sqlite_model)
    events = open_listener(channel)
    root.after_publish = [lambda: channel.publish("now", now=True)]
    assert get(app, "/post?text=ada").text == "posted"
    assert receive(events, 2) == ["now", "ada"]
    assert sqlite_model.names() == ["ada"]


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("how", ["raises", "aborts", "dooms", "vetoes", "rolls back"])
def test_event_of_a_request_that_aborts_is_not_sent(
    make_app: MakeApp,
    channel: Channel,
    sqlite_model: Model,
    how: str,
    with_model: bool,
) -> None:
    """This holds for every kind of abort, and the next request works as usual."""
    model = sqlite_model if with_model else None
    root = LiveController(channel, model)
    app = make_app(root, model, tm__enabled=True, tm__commit_veto=veto)
    events, failing = open_listener(channel), ("raises", "aborts", "vetoes")
    root.after_publish = {
        "raises": [lambda: 1 / 0],
        "aborts": [lambda: tg.abort(500)],
        "dooms": [transaction.doom],
        "vetoes": [lambda: setattr(tg.response, "status_int", 500)],
        "rolls back": [transaction.abort],
    }[how]
    assert (get(app, "/post?text=lost").status_int == 500) == (how in failing)
    root.after_publish = []
    get(app, "/post?text=kept")
    assert receive(events, 1) == ["kept"]
    assert sqlite_model.names() == (["kept"] if with_model else [])


def veto(environ: Any, status: str, headers: Any) -> bool:
    return status.startswith("5")


class FailingManager:
    """A data manager that fails in the last vote."""

    transaction_manager = None

    def nothing(self, transaction: Any) -> None:
        """Do nothing before the vote."""

    abort = tpc_begin = commit = tpc_abort = nothing

    def tpc_vote(self, transaction: Any) -> None:
        raise OSError("the disk is full")

    def sortKey(self) -> str:
        return "~~last"


def test_event_of_a_request_that_cannot_commit_is_not_sent(
    make_app: MakeApp, channel: Channel
) -> None:
    """The last data manager of the transaction fails."""
    root = LiveController(channel)
    app = make_app(root, tm__enabled=True)
    events = open_listener(channel)
    root.after_publish = [lambda: transaction.get().join(FailingManager())]
    assert get(app, "/post?text=lost").status_int == 500
    root.after_publish = []
    get(app, "/post?text=kept")
    assert receive(events, 1) == ["kept"]


def test_event_of_a_savepoint_that_is_rolled_back_is_not_sent(
    make_app: MakeApp, channel: Channel
) -> None:
    """Events from before the savepoint and after it are sent."""
    root = LiveController(channel)
    app = make_app(root, tm__enabled=True)
    events = open_listener(channel)

    def undo() -> None:
        savepoint = transaction.savepoint()
        channel.publish("undone")
        savepoint.rollback()
        channel.publish("after")

    root.after_publish = [undo]
    get(app, "/post?text=before")
    assert receive(events, 2) == ["before", "after"]


def test_event_after_the_rollback_of_a_savepoint_is_sent(
    make_app: MakeApp, channel: Channel
) -> None:
    """No event was published before the savepoint."""

    def undo() -> None:
        savepoint = transaction.savepoint()
        channel.publish("undone")
        savepoint.rollback()
        channel.publish("after")

    app = make_app(ActionController(undo), tm__enabled=True)
    events = open_listener(channel)
    assert get(app, "/request").text == "done"
    assert receive(events, 1) == ["after"]


@pytest.mark.parametrize(
    "moment", ["after_flush", "before_commit", "after_commit", "after_insert"]
)
@pytest.mark.parametrize("first", [[], ["first"]])
def test_event_published_while_the_transaction_commits_is_sent(
    make_app: MakeApp,
    channel: Channel,
    sqlite_model: Model,
    moment: str,
    first: list[str],
) -> None:
    """Handlers of SQLAlchemy can do this. If the commit then fails, it is not sent."""
    target: Any = User if moment == "after_insert" else sqlite_model.DBSession
    errors: list[Exception] = []

    def publish(*_: Any) -> None:
        channel.publish("committed")
        for error in errors:
            raise error

    def write() -> None:
        for text in first:
            channel.publish(text)
        sqlite_model.DBSession.add(User(name="ada"))

    root = ActionController(write)
    app = make_app(root, sqlite_model, tm__enabled=True)
    events = open_listener(channel)
    sa.event.listen(target, moment, publish)
    try:
        assert get(app, "/request").text == "done"
        if moment != "after_commit":
            errors.append(LookupError("no commit"))
            assert get(app, "/request").status_int == 500
    finally:
        sa.event.remove(target, moment, publish)
    root.action = lambda: channel.publish("end")
    get(app, "/request")
    assert receive(events, 2 + len(first)) == [*first, "committed", "end"]
    assert sqlite_model.names() == ["ada"]


# Savepoints and rollbacks of SQLAlchemy.


def add(model: Model, channel: Channel, name: str) -> None:
    """Write a row, and publish its name."""
    model.DBSession.add(User(name=name))
    model.DBSession.flush()
    channel.publish(name)


def undo_savepoint(model: Model, channel: Channel) -> None:
    add(model, channel, "before")
    with pytest.raises(LookupError), model.DBSession.begin_nested():
        add(model, channel, "undone")
        raise LookupError
    add(model, channel, "after")


def release_savepoint(model: Model, channel: Channel) -> None:
    add(model, channel, "before")
    with model.DBSession.begin_nested():
        add(model, channel, "after")


def undo_inner_savepoint(model: Model, channel: Channel) -> None:
    with model.DBSession.begin_nested():
        add(model, channel, "before")
        with model.DBSession.begin_nested() as inner:
            add(model, channel, "undone")
            inner.rollback()
        add(model, channel, "after")


def undo_outer_savepoint(model: Model, channel: Channel) -> None:
    add(model, channel, "before")
    outer = model.DBSession.begin_nested()
    with model.DBSession.begin_nested():
        add(model, channel, "undone")
    model.DBSession.begin_nested()
    add(model, channel, "undone, too")
    outer.rollback()
    add(model, channel, "after")


def fail_to_flush(model: Model, channel: Channel) -> None:
    add(model, channel, "before")
    with model.DBSession.begin_nested():
        add(model, channel, "undone")
        model.DBSession.add(User(name="before"))  # this name is taken
        with pytest.raises(sa.exc.IntegrityError):
            model.DBSession.flush()
    add(model, channel, "after")


def undo_savepoint_of_transaction(model: Model, channel: Channel) -> None:
    add(model, channel, "before")
    savepoint = transaction.savepoint()
    add(model, channel, "undone")
    savepoint.rollback()
    add(model, channel, "after")


def keep_savepoint_of_transaction(model: Model, channel: Channel) -> None:
    add(model, channel, "before")
    transaction.savepoint()
    add(model, channel, "after")


SAVEPOINTS = [
    undo_savepoint,
    release_savepoint,
    undo_inner_savepoint,
    undo_outer_savepoint,
    fail_to_flush,
    undo_savepoint_of_transaction,
    keep_savepoint_of_transaction,
]


@pytest.fixture
def postgresql_model(make_model: MakeModel, postgresql: str) -> Model:
    """A model on PostgreSQL, whose driver does not change savepoints."""
    return make_model(postgresql)


@pytest.mark.parametrize("action", SAVEPOINTS, ids=lambda action: action.__name__)
@BOTH
def test_event_inside_an_sqlalchemy_savepoint_is_sent_if_the_savepoint_commits(
    make_app: MakeApp,
    channel: Channel,
    postgresql_model: Model,
    action: Callable[[Model, Channel], None],
    path: str,
) -> None:
    """Everything around the savepoint must commit, too."""
    model = postgresql_model
    root = ActionController(lambda: action(model, channel))
    app = make_app(root, model, tm__enabled=True)
    events = open_listener(channel)
    assert get(app, path).text == "done"
    channel.publish("end")
    assert receive(events, 3) == ["before", "after", "end"]
    assert model.names() == ["before", "after"]


@pytest.mark.parametrize("method", ["rollback", "close", "remove"])
@pytest.mark.parametrize("commit", ["end", "each"])
def test_event_before_a_rollback_of_a_stream_session_is_not_sent(
    make_app: MakeApp,
    channel: Channel,
    model: Model,
    method: str,
    commit: str,
) -> None:
    """Closing the session while its transaction is open counts as a rollback."""

    def act() -> None:
        add(model, channel, "undone")
        getattr(model.DBSession, method)()
        add(model, channel, "before")
        add(model, channel, "after")

    app = make_app(ActionController(act), model, tm__enabled=True)
    events = open_listener(channel)
    assert get(app, f"/items?commit={commit}").text == "done"
    channel.publish("end")
    assert receive(events, 3) == ["before", "after", "end"]
    assert model.names() == ["before", "after"]


def test_event_before_a_rollback_of_a_request_session_is_not_sent(
    make_app: MakeApp, channel: Channel, model: Model
) -> None:
    """The request has nothing left to commit."""

    def act() -> None:
        model.DBSession.add(User(name="undone"))
        channel.publish("undone")
        model.DBSession.rollback()
        channel.publish("after")

    app = make_app(ActionController(act), model, tm__enabled=True)
    events = open_listener(channel)
    assert get(app, "/request").text == "done"
    assert receive(events, 1) == ["after"]
    assert model.names() == []


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("commit", ["end", "each"])
def test_event_before_the_first_statement_belongs_to_the_next_transaction(
    make_app: MakeApp, channel: Channel, model: Model, used: bool, commit: str
) -> None:
    """If that transaction of the session is rolled back, the event is not sent."""

    def act() -> None:
        if used:
            model.DBSession.query(User).all()
            transaction.commit()
        channel.publish("undone")
        channel.publish("undone, too")
        model.DBSession.add(User(name="undone"))
        model.DBSession.flush()
        model.DBSession.rollback()
        channel.publish("before")
        add(model, channel, "after")
        with pytest.raises(LookupError), model.DBSession.begin_nested():
            raise LookupError

    app = make_app(ActionController(act), model, tm__enabled=True)
    events = open_listener(channel)
    assert get(app, f"/items?commit={commit}").text == "done"
    channel.publish("end")
    assert receive(events, 3) == ["before", "after", "end"]
    assert model.names() == ["after"]


@BOTH
def test_event_of_a_request_that_only_reads_is_sent(
    make_app: MakeApp, channel: Channel, model: Model, path: str
) -> None:
    """Its session is closed at the end without a commit."""

    def act() -> None:
        model.DBSession.query(User).all()
        channel.publish("read")

    app = make_app(ActionController(act), model, tm__enabled=True)
    events = open_listener(channel)
    assert get(app, path).text == "done"
    assert receive(events, 1) == ["read"]


@pytest.mark.parametrize("zope", [True, False])
@pytest.mark.parametrize("commit", ["end", "manual"])
def test_event_before_a_commit_of_the_session_is_sent(
    make_app: MakeApp,
    channel: Channel,
    make_model: MakeModel,
    tmp_path: Path,
    zope: bool,
    commit: str,
) -> None:
    """A later rollback of the session has no effect on it."""
    model = make_model(f"sqlite:///{tmp_path}/test.db", zope=zope)

    def act() -> None:
        add(model, channel, "committed")
        transaction.commit() if zope else model.DBSession.commit()
        add(model, channel, "undone")
        model.DBSession.rollback()
        transaction.commit()

    app = make_app(ActionController(act), model, tm__enabled=True)
    events = open_listener(channel)
    assert get(app, f"/items?commit={commit}").text == "done"
    channel.publish("end")
    assert receive(events, 2) == ["committed", "end"]
    assert model.names() == ["committed"]


@BOTH
def test_event_belongs_to_the_savepoints_of_all_sessions(
    make_app: MakeApp,
    channel: Channel,
    make_model: MakeModel,
    postgresql: str,
    path: str,
) -> None:
    """The savepoint of one session is rolled back, everything else is committed."""
    model = make_model(postgresql)
    other = make_model(postgresql, create=False)
    other.init_model(model.outside)

    def act() -> None:
        add(model, channel, "before")
        with other.DBSession.begin_nested() as savepoint:
            add(other, channel, "undone")
            savepoint.rollback()
        add(other, channel, "after")

    options = {"tm__enabled": True, "tgstream__sessions": [other.DBSession]}
    app = make_app(ActionController(act), model, **options)
    events = open_listener(channel)
    assert get(app, path).text == "done"
    channel.publish("end")
    assert receive(events, 3) == ["before", "after", "end"]
    assert sorted(model.names()) == ["after", "before"]


# Hooks of transaction, TurboGears and tgstream.


@BOTH
@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        ("addBeforeCommitHook", ["first", "hook"]),
        ("addAfterCommitHook", ["first", "hook"]),
        ("addBeforeAbortHook", ["first"]),
        ("addAfterAbortHook", ["first"]),
    ],
)
def test_event_of_a_hook_of_a_transaction_that_commits_is_sent(
    make_app: MakeApp,
    channel: Channel,
    sqlite_model: Model,
    hook: str,
    expected: list[str],
    path: str,
) -> None:
    """It is sent after the commit, and after the events of the transaction."""

    def act() -> None:
        add(sqlite_model, channel, "first")
        getattr(transaction.get(), hook)(lambda *_: channel.publish("hook"))

    app = make_app(ActionController(act), sqlite_model, tm__enabled=True)
    events = open_listener(channel)
    assert get(app, path).text == "done"
    channel.publish("end")
    assert receive(events, len(expected) + 1) == [*expected, "end"]
    assert sqlite_model.names() == ["first"]


@BOTH
@pytest.mark.parametrize("first", [[], ["first"]])
@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        ("addBeforeCommitHook", []),
        ("addAfterCommitHook", []),
        ("addBeforeAbortHook", []),
        ("addAfterAbortHook", ["hook", "hook"]),
    ],
)
def test_event_of_a_hook_after_an_abort_is_sent(
    make_app: MakeApp,
    channel: Channel,
    hook: str,
    expected: list[str],
    first: list[str],
    path: str,
) -> None:
    """The events of both hooks are sent. Events from before the abort are not sent."""

    def act() -> None:
        for text in first:
            channel.publish(text)
        for _ in range(2):
            getattr(transaction.get(), hook)(lambda *_: channel.publish("hook"))
        transaction.doom()

    app = make_app(ActionController(act), tm__enabled=True)
    events = open_listener(channel)
    get(app, path)
    channel.publish("end")
    assert receive(events, len(expected) + 1) == [*expected, "end"]


def test_event_of_a_hook_after_a_failed_commit_is_sent(
    make_app: MakeApp, channel: Channel
) -> None:
    """The other events of the transaction are not sent."""

    def act() -> None:
        channel.publish("lost")
        transaction.get().join(FailingManager())
        transaction.get().addAfterCommitHook(
            lambda committed: channel.publish(f"committed: {committed}")
        )

    app = make_app(ActionController(act), tm__enabled=True)
    events = open_listener(channel)
    assert get(app, "/request").status_int == 500
    channel.publish("end")
    assert receive(events, 2) == ["committed: False", "end"]


def test_event_of_a_hook_that_cannot_be_sent_is_logged(
    make_app: MakeApp, channel: Channel, caplog: pytest.LogCaptureFixture
) -> None:
    """The abort succeeds, and the next event is sent."""

    def hook() -> None:
        send_on_commit("a thing", FailingSender())
        channel.publish("hook")

    def act() -> None:
        transaction.get().addAfterAbortHook(hook)
        transaction.abort()

    app = make_app(ActionController(act), tm__enabled=True)
    events = open_listener(channel)
    assert get(app, "/request").text == "done"
    assert receive(events, 1) == ["hook"]
    (record,) = caplog.records
    assert record.getMessage() == "Events are lost: 1 could not be sent after the abort"


class Synchronizer:
    """A synchronizer that publishes when a transaction completes."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def newTransaction(self, transaction: Any) -> None:
        """Do nothing."""

    def beforeCompletion(self, transaction: Any) -> None:
        self.channel.publish("before completion")

    def afterCompletion(self, transaction: Any) -> None:
        self.channel.publish("after completion")


@BOTH
def test_event_of_a_synchronizer_is_sent(
    make_app: MakeApp, channel: Channel, path: str
) -> None:
    """The transaction commits. Events after an abort belong to the next transaction."""
    synchronizer = Synchronizer(channel)

    def act() -> None:
        transaction.manager.registerSynch(synchronizer)
        transaction.commit()
        transaction.manager.unregisterSynch(synchronizer)

    app = make_app(ActionController(act), tm__enabled=True)
    events = open_listener(channel)
    assert get(app, path).text == "done"
    channel.publish("end")
    assert receive(events, 3) == ["before completion", "after completion", "end"]


@BOTH
def test_event_of_the_after_method_of_a_controller_is_sent(
    make_app: MakeApp, channel: Channel, path: str
) -> None:
    """TG calls ``_after`` in the request's transaction, or after it."""

    class After(ActionController):
        def _after(self, *_: Any, **__: Any) -> None:
            channel.publish("after")

    app = make_app(After(lambda: channel.publish("inside")), tm__enabled=True)
    events = open_listener(channel)
    assert get(app, path).text == "done"
    channel.publish("end")
    *first, last = receive(events, 3)
    assert (sorted(first), last) == (["after", "inside"], "end")


def test_event_without_a_transaction_is_sent_at_once(
    make_app: MakeApp, channel: Channel
) -> None:
    """This holds if ``tm.enabled`` is off, in requests and in streams."""
    root = LiveController(channel)
    app = make_app(root, tm__enabled=False)
    events = open_listener(channel)
    received: list[list[str]] = []
    root.after_publish = [lambda: received.append(receive(events, 1))]
    get(app, "/post?text=1")
    body = Call(app, "/steps?commit=end")
    assert [next(body), next(body)] == [b"1\n", b"2\n"]
    body.close()
    assert received == [["1"], ["step 1"], ["step 2"]]


def assert_items(response: OpenStream, count: int) -> None:
    """Pull the first items of ``LiveController.steps``."""
    expected = [b"%d\n" % (number + 1) for number in range(count)]
    assert [next(response) for _ in range(count)] == expected


@pytest.mark.parametrize(
    ("commit", "expected"),
    [("each", ["step 1", "step 2"]), ("end", []), ("manual", [])],
)
@pytest.mark.parametrize("with_model", [True, False])
def test_event_of_a_stream_is_sent_when_the_stream_commits(
    make_app: MakeApp,
    channel: Channel,
    sqlite_model: Model,
    commit: str,
    expected: list[str],
    with_model: bool,
) -> None:
    """If the client disconnects before a commit, the event is not sent."""
    model = sqlite_model if with_model else None
    app = make_app(LiveController(channel, model), model, tm__enabled=True)
    events = open_listener(channel)
    with open_stream(app, f"/steps?commit={commit}") as response:
        assert_items(response, 2)
    channel.publish("disconnected")
    assert receive(events, len(expected) + 1) == [*expected, "disconnected"]
    assert sqlite_model.names() == (expected if with_model else [])


def test_event_of_a_stream_that_completes_is_sent(
    make_app: MakeApp, channel: Channel, sqlite_model: Model
) -> None:
    """Events that the stream has rolled back are not sent."""
    root = LiveController(channel, sqlite_model)
    app = make_app(root, sqlite_model)
    events = open_listener(channel)

    def undo_once() -> None:
        root.after_publish = []
        rollback()

    root.after_publish = [undo_once]
    assert get(app, "/steps?commit=end").text == "1\n2\n3\n"
    assert receive(events, 2) == ["step 2", "step 3"]


@pytest.mark.parametrize("with_model", [True, False])
def test_event_of_the_finished_hook_is_sent_at_once(
    make_app: MakeApp, channel: Channel, sqlite_model: Model, with_model: bool
) -> None:
    """The transaction of the stream is over before ``tgstream.finished`` is called."""
    model = sqlite_model if with_model else None
    root = LiveController(channel, model)
    app = make_app(root, model, tm__enabled=True)
    events = open_listener(channel)

    def publish_reason(report: Report) -> None:
        channel.publish(report.reason)

    tg.hooks.register("tgstream.finished", publish_reason)
    try:
        with open_stream(app, "/steps?commit=end") as response:
            assert_items(response, 1)
        root.after_publish = [lambda: 1 / 0]
        get(app, "/steps?commit=end")
        root.after_publish = []
        get(app, "/steps?commit=end")
    finally:
        tg.hooks.disconnect("tgstream.finished", publish_reason)
    steps = ["step 1", "step 2", "step 3"]
    assert receive(events, 6) == ["disconnected", "failed", *steps, "completed"]


def test_event_that_cannot_be_sent_leaves_the_transaction_committed(
    make_app: MakeApp,
    channel: Channel,
    sqlite_model: Model,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The other events are sent, and the failure is logged."""
    root = LiveController(channel, sqlite_model)
    app = make_app(root, sqlite_model)
    events = open_listener(channel)
    root.after_publish = [lambda: send_on_commit("a thing", FailingSender())]
    root.after_publish += [lambda: channel.publish("after")]
    assert get(app, "/post?text=ada").text == "posted"
    assert receive(events, 2) == ["ada", "after"]
    assert sqlite_model.names() == ["ada"]
    (record,) = caplog.records
    assert (
        record.getMessage() == "Events are lost: 1 could not be sent after the commit"
    )
    assert record.levelno == logging.ERROR
