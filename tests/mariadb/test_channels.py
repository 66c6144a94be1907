"""Channels with ``database://`` on MariaDB."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from tests.mariadb.conftest import MariaModel
from tests.model import User
from tgstream import Event
from tgstream.channels import metadata
from tgstream.formats.sse import Message
from tgstream.live.backends.database import DatabaseBackend
from tgstream.live.backends.database_tables import create_tables, find_missing_tables
from tgstream.live.backends.database_worker import remove_idle_channels
from tgstream.live.listener import listen
from tgstream.live.protocols import ChannelSettings

MakeBackend = Callable[..., DatabaseBackend]


@pytest.fixture
def make_backend(model: MariaModel) -> Iterator[MakeBackend]:
    """Creates the back ends of several processes, on new tables."""
    metadata.drop_all(model.outside)
    create_tables(model.outside)
    engines: list[sa.Engine] = []

    def make(**settings: Any) -> DatabaseBackend:
        engines.append(sa.create_engine(model.url))
        settings = {"poll_seconds": 0.02} | settings
        return DatabaseBackend(
            model.DBSession, engines[-1], ChannelSettings(**settings)
        )

    yield make
    for engine in engines:
        engine.dispose()


def open_listener(backend: DatabaseBackend, name: str) -> tuple[Iterator[Event], str]:
    """A listener that has received its opening comment, and its first id."""
    events = listen(backend, name, None, 60.0)
    return events, str(next(events).id)


def test_events_arrive_and_listeners_resume(make_backend: MakeBackend) -> None:
    """Names that differ by case, an accent or a space are different channels."""
    backend, other = make_backend(), make_backend()
    names = ["e", "E", "é", "e ", "😀"]
    opened = [open_listener(backend, name) for name in names]
    for name in names:
        other.publish([Message(name, f"<{name}> \0 😀", "type")])
    for name, (events, start) in zip(names, opened, strict=True):
        event = next(events)
        assert (event.data, event.event) == (f"<{name}> \0 😀", "type")
        again = [*islice(listen(other, name, start, 60.0), 2)]
        assert again[1].data == event.data


def test_event_is_committed_with_the_rows_of_its_transaction(
    make_backend: MakeBackend, model: MariaModel
) -> None:
    """A rollback leaves neither."""
    backend = make_backend()
    events, _ = open_listener(backend, "users")
    with Session(backend.engine) as session:
        for name in "ada", "bob":
            session.add(User(name=name))
            session.flush()
            backend.insert(session.connection(), [Message("users", name)])
            if name == "ada":
                session.rollback()
        session.commit()
    assert next(events).data == "bob"
    assert model.names() == ["bob"]


def test_concurrent_publishers_neither_deadlock_nor_leave_a_gap(
    make_backend: MakeBackend,
) -> None:
    """Each transaction publishes in several channels, which are created meanwhile."""
    listening = make_backend()
    names = [f"channel {number}" for number in range(20)]
    listeners = [open_listener(listening, name)[0] for name in names]
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        backend, order = make_backend(publish_timeout=30.0), random.Random(seed)
        try:
            for _ in range(30):
                chosen = order.sample(names, 3)
                backend.publish([Message(name, "x") for name in chosen])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    received = 0
    for name, events in zip(names, listeners, strict=True):
        listening.publish([Message(name, "end")])
        numbers = []
        for event in events:
            numbers.append(int(str(event.id).split("-")[1]))
            if event.data == "end":
                break
        assert numbers == list(range(1, len(numbers) + 1))
        received += len(numbers) - 1
    assert received == 4 * 30 * 3


@pytest.fixture(params=["OFF", "ON"])
def snapshot_isolation(
    model: MariaModel, request: pytest.FixtureRequest
) -> Iterator[None]:
    """MariaDB refuses changes of newer rows, as it does since version 11.6.2."""
    statement = "SET GLOBAL innodb_snapshot_isolation = {}"
    model.execute(statement.format(request.param))
    yield
    model.execute(statement.format("OFF"))


@pytest.mark.usefixtures("snapshot_isolation")
@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_transaction_publishes_after_others_have_published_since_its_begin(
    make_backend: MakeBackend, names: list[str]
) -> None:
    """It has read before, so it does not see their events. Some channels are new."""
    backend = make_backend()
    backend.publish([Message("a", "0")])
    with Session(backend.engine) as session:
        assert session.scalar(sa.select(sa.func.count(User.id))) == 0
        backend.publish([Message(name, "1") for name in names])
        backend.insert(session.connection(), [Message(name, "2") for name in names])
        session.commit()
    numbers = [backend.position(name).partition("-")[2] for name in names]
    assert numbers == ["3", *["2"] * (len(names) - 1)]


def test_late_commit_is_found_although_later_events_were_read(
    make_backend: MakeBackend,
) -> None:
    """Transactions do not commit in the order of the ids of their events."""
    backend, publisher = make_backend(), make_backend()
    late, _ = open_listener(backend, "late")
    other, _ = open_listener(backend, "other")
    with publisher.engine.begin() as connection:
        publisher.insert(connection, [Message("late", "0"), Message("late", "1")])
        publisher.publish([Message("other", "x")])
        assert next(other).data == "x"
    assert [event.data for event in islice(late, 2)] == ["0", "1"]


def test_old_events_and_idle_channels_are_removed(
    make_backend: MakeBackend, model: MariaModel
) -> None:
    """Ids from before cause a reset."""
    backend = make_backend(history=10)
    _, start = open_listener(backend, "channel")
    for number in range(30):
        backend.publish([Message("channel", str(number))])
    backend._worker.finish()
    ((count,),) = model.fetch("SELECT count(*) FROM tgstream_events")
    assert 10 <= count <= 11
    assert [event.event for event in islice(listen(backend, "channel", start, 9), 2)][
        1
    ] == "reset"
    model.execute("UPDATE tgstream_channels SET last_created = last_created - 100")
    with backend._connect() as connection:
        remove_idle_channels(connection, 50.0)
    assert model.fetch("SELECT count(*) FROM tgstream_events") == [(0,)]
    assert find_missing_tables(model.outside) == []


def test_publish_waits_for_another_transaction_with_a_time_limit(
    make_backend: MakeBackend,
) -> None:
    """Publishers to the same channel commit one after another."""
    backend = make_backend(publish_timeout=1.0)
    with backend.engine.begin() as connection:
        backend.insert(connection, [Message("channel", "0")])
        with pytest.raises(sa.exc.OperationalError, match="Lock wait timeout"):
            backend.publish([Message("channel", "1")])
