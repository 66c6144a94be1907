"""Listeners of ``redis://``: subscriptions, gaps, failover, and refused commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.live.listeners import id_of, receive, types_of_first_two
from tests.live.redis_servers import RedisProxy, blocked, close_backends
from tests.pages import DOCS
from tests.valkey import DurableValkey, Valkey
from tgstream import Event
from tgstream.core.errors import StreamError
from tgstream.formats.sse import Message
from tgstream.live.backends import redis_reader, redis_streams
from tgstream.live.backends.redis import RedisBackend
from tgstream.live.backends.redis_reader import RedisReader
from tgstream.live.backends.redis_script import (
    PUBLISH,
    Names,
    publish_arguments,
    run_script,
)
from tgstream.live.history import Subscription
from tgstream.live.listener import listen
from tgstream.live.protocols import ChannelSettings, ConnectionLost


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A server for the tests that do not end it."""
    with DurableValkey(tmp_path_factory.mktemp("valkey"), appendonly="no") as server:
        yield server


MakeBackend = Callable[..., RedisBackend]


@pytest.fixture
def make_backend(server: Valkey) -> Iterator[MakeBackend]:
    """Creates the back ends of several processes."""
    backends: list[RedisBackend] = []

    def make(url: str = server.url, **settings: Any) -> RedisBackend:
        backends.append(RedisBackend(url, ChannelSettings(**settings)))
        return backends[-1]

    yield make
    close_backends(backends)


@pytest.fixture
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader notices a server that hangs after about a second."""
    monkeypatch.setattr(redis_reader, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(redis_reader, "READ_SECONDS", 0.05)
    for module in redis_reader, redis_streams:
        monkeypatch.setattr(module, "TIMEOUT_SECONDS", 1.0)


def publish(backend: RedisBackend, name: str, *texts: str) -> None:
    """Publish texts from the process of a back end."""
    backend.publish([Message(name, text) for text in texts])


def open_listener(backend: RedisBackend, name: str) -> Iterator[Event]:
    """A listener that has received its opening comment."""
    events = listen(backend, name, None, 60.0)
    assert next(events).comment == "open"
    return events


def logged(caplog: pytest.LogCaptureFixture, level: str) -> list[str]:
    """The messages of a level that tgstream logged."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "tgstream" and record.levelname == level
    ]


def wait_until(condition: Callable[[], Any]) -> None:
    """Poll a condition of the server, which no event announces."""
    deadline, pause = time.monotonic() + 20, threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        pause.wait(0.01)


def subscribers(server: Valkey, name: str) -> int:
    """The number of connections that receive the messages of a channel."""
    count: int = server.execute("PUBSUB", "NUMSUB", f"tgstream:{name}")[1]
    return count


# Subscriptions.


def test_process_subscribes_to_the_channels_that_have_listeners(
    server: Valkey, make_backend: MakeBackend, name: str
) -> None:
    """It unsubscribes when the last listener of a channel disconnects."""
    backend = make_backend()
    listeners = [open_listener(backend, name) for _ in range(2)]
    other = open_listener(backend, f"{name}?")
    assert subscribers(server, name) == subscribers(server, f"{name}?") == 1
    listeners.pop()
    publish(backend, name, "x")
    assert receive(listeners[0], 1) == ["x"]
    listeners.clear()
    wait_until(lambda: subscribers(server, name) == 0)
    assert subscribers(server, f"{name}?") == 1
    publish(backend, f"{name}?", "y")
    assert receive(other, 1) == ["y"]


def test_listener_receives_each_event_from_its_start_on(
    server: Valkey, make_backend: MakeBackend, name: str
) -> None:
    """Listeners of few channels start and end while events are published."""
    backend, other, stop = make_backend(), make_backend(), threading.Event()
    names = [f"{name} {number}" for number in range(3)]
    published = dict.fromkeys(names, 0)

    def publish_all() -> None:
        while not stop.is_set():
            for channel in names:
                published[channel] += 1
                publish(other, channel, str(published[channel]))

    def listen_often(channel: str) -> int:
        for _ in range(40):
            events = listen(backend, channel, None, 60.0)
            next_number = published[channel] + 1
            numbers = [int(event.data) for event in islice(events, 1, 4)]
            assert numbers == list(range(numbers[0], numbers[0] + 3))
            assert numbers[0] <= next_number, "an event was lost"
            del events
        return 40

    with ThreadPoolExecutor() as pool:
        publisher = pool.submit(publish_all)
        try:
            assert list(pool.map(listen_often, names * 2)) == [40] * 6
        finally:
            stop.set()
        publisher.result()


def test_health_checks_of_the_url_do_not_disconnect_the_process(
    make_backend: MakeBackend,
    server: Valkey,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The package redis cannot check a connection that has subscriptions."""
    backend = make_backend(f"{server.url}?health_check_interval=1")
    events, other = open_listener(backend, name), open_listener(backend, f"{name}?")
    backend._reader._connection.next_health_check = 0.1
    del other
    wait_until(lambda: subscribers(server, f"{name}?") == 0)
    publish(backend, name, "x")
    assert receive(events, 1) == ["x"]
    assert logged(caplog, "WARNING") == []


def test_channels_are_read_together_after_the_server_has_forgotten_the_script(
    server: Valkey, make_backend: MakeBackend, name: str
) -> None:
    """A reconnect does not cost a round trip for each channel."""
    with RedisProxy(server.port) as proxy:
        backend, other = make_backend(proxy.url), make_backend()
        listeners = [open_listener(backend, f"{name} {at}") for at in range(40)]
        turns = proxy.turns
        server.execute("SCRIPT", "FLUSH")
        server.execute("CLIENT", "KILL", "TYPE", "pubsub")
        for at, events in enumerate(listeners):
            publish(other, f"{name} {at}", "x")
            assert receive(events, 1) == ["x"]
        assert proxy.turns - turns < 20


def test_databases_of_a_server_do_not_share_channels(
    server: Valkey, make_backend: MakeBackend, name: str
) -> None:
    """The server sends the messages of all databases to all of them."""
    first, second = make_backend(), make_backend(server.url.replace("/0", "/1"))
    listeners = [open_listener(backend, name) for backend in (first, second)]
    publish(second, name, "two")
    publish(first, name, "one")
    assert [receive(events, 1) for events in listeners] == [["one"], ["two"]]


def test_burst_of_events_causes_no_reset(
    server: Valkey, make_backend: MakeBackend, name: str
) -> None:
    """The server removes events before the process has received all of them."""
    backend, other = make_backend(), make_backend(history=20)
    events = open_listener(backend, name)
    received: list[Event] = []

    def receive_all() -> None:
        for event in events:
            received.append(event)
            if event.data == "last":
                return

    listener = threading.Thread(target=receive_all)
    listener.start()
    for number in range(2000):
        publish(other, name, str(number))
    publish(other, name, "last")
    listener.join(20)
    resets = [event for event in received if event.event == "reset"]
    assert (len(received), resets) == (2001, [])


def iter_as_browser(backend: RedisBackend, name: str) -> Iterator[Event]:
    """The events of a client that reconnects when its stream ends."""
    id = None
    while True:
        for event in listen(backend, name, id, 60.0):
            id = id_of(event) if event.id else id
            yield event


def test_process_that_is_disconnected_in_a_burst_reports_one_reset(
    server: Valkey, make_backend: MakeBackend, name: str
) -> None:
    """The server has removed the events that the process has missed."""
    backend, other = make_backend(), make_backend(history=20)
    events = iter_as_browser(backend, name)
    assert next(events).comment == "open"
    for _ in range(3):
        server.execute("CLIENT", "KILL", "TYPE", "pubsub")
        publish(other, name, *map(str, range(500)))
    received, newest = [next(events)], other.position(name)
    while received[-1].id != newest:
        received.append(next(events))
    assert sum(event.event == "reset" for event in received) <= 3


def test_events_and_resets_name_their_channel(
    server: Valkey, make_backend: MakeBackend, name: str
) -> None:
    """This holds for messages and for events that are read from the stream."""
    backend, other = make_backend(), make_backend()
    events, id = open_listener(backend, name), backend.position(name)
    backend.publish([Message(name, "{}", "type", True), Message(name, "", "reset")])
    resumed = islice(listen(other, name, id, 60.0), 1, None)
    for received in events, resumed:
        event, reset = next(received), next(received)
        assert (event.channel, event.event, event.json()) == (name, "type", {})
        assert (reset.channel, reset.event, reset.data) == (name, "reset", name)
    server.execute("DEL", f"tgstream:{name}")
    publish(backend, name, "x")
    reset = next(events)
    assert (reset.channel, reset.event, reset.data) == (name, "reset", name)


def test_event_that_another_program_added_without_a_message_is_received(
    server: Valkey, make_backend: MakeBackend, name: str
) -> None:
    """The next message shows it."""
    backend = make_backend()
    events = open_listener(backend, name)
    server.execute("XADD", f"tgstream:{name}", "*", "data", "[1]", "json", "1")
    server.execute("PUBLISH", f"tgstream:{name}", "not a message")
    event = next(events)
    assert (event.channel, event.json()) == (name, [1])
    server.execute("XADD", f"tgstream:{name}", "*", "data", "again")
    publish(backend, name, "next")
    assert receive(events, 2) == ["again", "next"]


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "new"])
def test_finaliser_that_interrupts_the_reader_can_listen(
    make_backend: MakeBackend, name: str, is_known: bool
) -> None:
    """It does not wait for the thread that it interrupts."""

    class Cycle:
        def __del__(self) -> None:
            subscriptions.append(backend.subscribe(name if is_known else "new", None))

    def receive_and_collect(response: Any) -> None:
        del reader._receive
        Cycle()
        reader._receive(response)

    backend, subscriptions = make_backend(), list[Subscription]()
    events, reader = open_listener(backend, name), backend._reader
    reader._receive = receive_and_collect  # type: ignore[method-assign]
    publish(backend, name, "x")
    assert receive(events, 1) == ["x"]
    assert [each.history is not None for each in subscriptions] == [is_known]


# Unused channels.


def test_channel_disappears_after_its_last_event(
    server: Valkey, make_backend: MakeBackend, name: str
) -> None:
    """Each event extends its life."""
    backend = make_backend(seconds=100.0)
    publish(backend, name, "x")
    assert 99_000 < server.execute("PTTL", f"tgstream:{name}") <= 100_000
    server.execute("PERSIST", f"tgstream:{name}")
    publish(backend, name, "x")
    assert 99_000 < server.execute("PTTL", f"tgstream:{name}") <= 100_000
    assert make_backend(seconds=100.0).position(f"{name}?") != "0-0"
    assert 99_000 < server.execute("PTTL", f"tgstream:{name}?") <= 100_000


@pytest.mark.parametrize("is_opened", [True, False], ids=["opened", "not opened"])
def test_listener_of_a_channel_that_disappeared_receives_the_next_event(
    server: Valkey, make_backend: MakeBackend, name: str, is_opened: bool
) -> None:
    """No event is lost, so there is no reset."""
    backend, other = make_backend(seconds=0.05), make_backend(seconds=0.05)
    events, silent = open_listener(backend, name), open_listener(backend, f"{name}?")
    publish(other, name, "first")
    assert receive(events, 1) == ["first"]
    for channel in name, f"{name}?":
        while server.execute("EXISTS", f"tgstream:{channel}"):
            threading.Event().wait(0.01)
        if is_opened:
            other.position(channel)
    publish(other, name, "second")
    publish(other, f"{name}?", "the first")
    assert receive(events, 1) == ["second"]
    assert receive(silent, 1) == ["the first"]


def test_burst_after_a_channel_disappeared_causes_a_reset(
    make_backend: MakeBackend, name: str
) -> None:
    """The server has removed the first events before the process reads them."""
    backend = make_backend(seconds=0.3)
    other = make_backend(seconds=0.3, history=20)
    events = open_listener(backend, name)
    publish(other, name, "before")
    assert receive(events, 1) == ["before"]
    wait_until(lambda: not other._streams.all(name)[1])
    with blocked(backend._reader):
        publish(other, name, *map(str, range(300)))
    assert next(events).event == "reset"
    publish(other, name, "after")
    assert receive(events, 1) == ["after"]


def test_channel_that_disappeared_while_the_process_reconnected_causes_a_reset(
    server: Valkey, make_backend: MakeBackend, name: str
) -> None:
    """A message arrives before the process has read the newest ids."""
    backend, other = make_backend(seconds=0.2), make_backend(seconds=0.2)
    events, reader = open_listener(backend, name), backend._reader

    def subscribe_and_publish(keys: list[bytes]) -> Any:
        del reader._subscribe
        publish(other, name, "missed")
        wait_until(lambda: not other._streams.all(name)[1])
        reader._subscribe(keys)
        publish(other, name, "received")
        return reader._subscribe(keys)

    reader._subscribe = subscribe_and_publish  # type: ignore[method-assign]
    server.execute("CLIENT", "KILL", "TYPE", "pubsub")
    assert next(events).event == "reset"


# Ids.


@pytest.mark.parametrize("id", [f"{2**64 - 1}-{2**64 - 1}", f"{2**63}-0"])
def test_id_from_the_future_causes_a_reset_and_no_outage(
    make_backend: MakeBackend, name: str, id: str, caplog: pytest.LogCaptureFixture
) -> None:
    """This also holds for a channel without events and for a full one."""
    backend = make_backend(history=2)
    for channel in name, f"{name}?":
        for _ in range(2):
            assert types_of_first_two(listen(backend, channel, id, 60.0))[1] == "reset"
        publish(backend, name, *"123456")
    assert logged(caplog, "WARNING") == []


def test_first_id_replays_only_events_that_are_recent(
    server: Valkey, make_backend: MakeBackend, name: str
) -> None:
    """An event that is older than ``since`` counts as missing."""
    seconds = int(server.execute("TIME")[0])
    for age in 500, 200, 100:
        server.execute("XADD", f"tgstream:{name}", f"{seconds - age}000-0", "data", age)
    for backend in make_backend(), make_backend(history=2):
        for since, expected in [
            (None, ["500", "200", "100"]),
            (1000.0, ["500", "200", "100"]),
            (300.0, None),
        ]:
            start = backend.subscribe(name, "0-0", since)
            assert start.has_gap == (expected is None), since
        start = backend.subscribe(name, f"{seconds - 500}000-0", 300.0)
        assert not start.has_gap
        start = backend.subscribe(name, f"{seconds - 500}000-0", 150.0)
        assert start.has_gap
    brief = make_backend(seconds=150.0)
    assert brief.subscribe(name, f"{seconds - 500}000-0").has_gap
    assert not brief.subscribe(name, f"{seconds - 200}000-0").has_gap


def test_first_id_of_a_channel_that_was_deleted_causes_a_reset(
    server: Valkey, make_backend: MakeBackend, name: str
) -> None:
    """Another listener of the channel is still connected."""
    backend = make_backend()
    events = open_listener(backend, name)
    server.execute("DEL", f"tgstream:{name}")
    assert types_of_first_two(listen(backend, name, "0-0", 60.0))[1] == "reset"
    publish(backend, name, "next")
    assert next(events).event == "reset"


def test_position_is_where_a_listener_starts(
    server: Valkey, make_backend: MakeBackend, name: str
) -> None:
    """It proves the loss of the channel's first event, too."""
    backend = make_backend()
    first = backend.position(name)
    publish(backend, name, "one")
    second = backend.position(name)
    publish(backend, name, "two")
    assert receive(listen(backend, name, first, 60.0), 3) == ["open", "one", "two"]
    assert receive(listen(backend, name, second, 60.0), 2) == ["open", "two"]
    server.execute("DEL", f"tgstream:{name}")
    for process in backend, make_backend():
        resumed = listen(process, name, first, 60.0)
        assert types_of_first_two(resumed) == [None, "reset"]


# Failover.


@pytest.mark.usefixtures("quick_checks")
def test_listeners_follow_the_address_to_the_new_primary(
    tmp_path: Path,
    make_backend: MakeBackend,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The old primary is still reachable, as a replica that receives no events."""
    caplog.set_level("INFO", "tgstream")
    with (
        Valkey(tmp_path / "old", repl_diskless_sync_delay=0) as old,
        Valkey(tmp_path / "new") as new,
        RedisProxy(old.port) as proxy,
    ):
        backend = make_backend(proxy.url)
        events = open_listener(backend, name)
        publish(backend, name, "before")
        assert receive(events, 1) == ["before"]
        new.execute("REPLICAOF", "127.0.0.1", old.port)
        wait_until(lambda: b"master_link_status:up" in raw_info(new))
        proxy.target = new.port
        new.execute("REPLICAOF", "NO", "ONE")
        old.execute("REPLICAOF", "127.0.0.1", "1")
        publish(make_backend(new.url), name, "after")
        assert receive(events, 1) == ["after"]
        assert backend.position(name) == make_backend(new.url).position(name)
    (warning,) = logged(caplog, "WARNING")[:1]
    assert warning.startswith("Lost the connection to Redis")
    assert logged(caplog, "INFO") == ["Reconnected to Redis (tgstream.channels)"]


def raw_info(server: Valkey) -> bytes:
    """The state of the replication."""
    with redis.Redis.from_url(server.url) as client:
        client.set_response_callback("INFO", lambda answer: answer)
        answer: bytes = client.execute_command("INFO", "replication")
        return answer


@pytest.mark.usefixtures("quick_checks")
def test_subscription_to_a_former_primary_is_noticed(
    tmp_path: Path, make_backend: MakeBackend, name: str
) -> None:
    """All other connections lead to the new primary."""
    with (
        Valkey(tmp_path / "old") as old,
        Valkey(tmp_path / "new") as new,
        RedisProxy(old.port) as proxy,
    ):
        backend = make_backend(proxy.url)
        events = open_listener(backend, name)
        proxy.target = new.port
        backend._streams.close()
        publish(make_backend(new.url), name, "after")
        assert next(events).event == "reset"
        publish(make_backend(new.url), name, "next")
        assert receive(events, 1) == ["next"]


@pytest.mark.usefixtures("quick_checks")
def test_server_that_hangs_is_noticed(
    tmp_path: Path,
    make_backend: MakeBackend,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log has its start and its end. A listener that starts meanwhile waits."""
    caplog.set_level("INFO", "tgstream")
    with DurableValkey(tmp_path / "valkey") as server:
        assert server._process is not None
        with RedisProxy(server.port) as proxy:
            backend = make_backend(proxy.url)
            events = open_listener(backend, name)
            os.kill(server._process.pid, signal.SIGSTOP)
            try:
                wait_until(lambda: logged(caplog, "WARNING"))
                with pytest.raises(ConnectionLost):
                    backend.subscribe(f"{name}?", None)
            finally:
                os.kill(server._process.pid, signal.SIGCONT)
            wait_until(lambda: logged(caplog, "INFO"))
            publish(make_backend(server.url), name, "after")
            assert receive(events, 1) == ["after"]
            (lost,) = logged(caplog, "WARNING")
            assert lost.startswith("Lost the connection to Redis (tgstream.channels)")
            (end,) = logged(caplog, "INFO")
            assert end == "Reconnected to Redis (tgstream.channels)"


def test_each_outage_is_logged_by_a_process_without_listeners(
    tmp_path: Path,
    make_backend: MakeBackend,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It only requests positions."""
    caplog.set_level("INFO", "tgstream")
    with Valkey(tmp_path / "valkey") as server:
        backend = make_backend(server.url)
        for number in 1, 2:
            server.terminate()
            for _ in range(2):
                with pytest.raises(ConnectionLost):
                    backend.position(name)
            server.start()
            assert backend.position(name)
            assert len(logged(caplog, "WARNING")) == number
            assert len(logged(caplog, "INFO")) == number


@pytest.mark.usefixtures("quick_checks")
def test_process_that_is_behind_does_not_reconnect(
    make_backend: MakeBackend, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The message to itself arrives after all events that were sent before."""
    backend, pause = make_backend(), threading.Event()
    events, reader = open_listener(backend, name), backend._reader

    def receive_slowly(response: Any) -> None:
        pause.wait(0.2)
        RedisReader._receive(reader, response)

    reader._receive = receive_slowly  # type: ignore[method-assign]
    publish(make_backend(), name, *map(str, range(8)))
    assert receive(events, 8) == list(map(str, range(8)))
    assert logged(caplog, "WARNING") == []


# Refused commands.


@contextmanager
def user(server: Valkey, *rules: str) -> Iterator[str]:
    """The URL of a user with these rights."""
    server.execute("ACL", "SETUSER", "limited", "reset", "on", ">secret", *rules)
    try:
        yield server.url.replace("redis://", "redis://limited:secret@")
    finally:
        server.execute("ACL", "DELUSER", "limited")


def connections_so_far(server: Valkey) -> int:
    """The number of connections that the server has accepted."""
    count: int = server.execute("INFO", "stats")["total_connections_received"]
    return count


def check_listener(server: Valkey, events: Iterator[Event], name: str) -> None:
    """The listener receives events, and its process does not connect again."""
    before = connections_so_far(server)
    with redis.Redis.from_url(server.url) as client:
        for text in "abc":
            message = Message(name, text)
            arguments = publish_arguments(message, ChannelSettings(), Names())
            run_script(client, PUBLISH, arguments)
            assert receive(events, 1) == [text]
    assert connections_so_far(server) - before <= 2


def test_rights_of_the_documentation_are_enough(
    server: Valkey,
    make_backend: MakeBackend,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A user with exactly these rights publishes, listens, resumes and reconnects."""
    text = (DOCS / "security.rst").read_text()
    (rules,) = [line for line in text.splitlines() if "ACL SETUSER" in line]
    _, _, rights = rules.partition(">password ")
    with user(server, *rights.split()) as url:
        backend = make_backend(url, history=10)
        events = open_listener(backend, name)
        id = backend.position(name)
        start = time.monotonic()
        publish(backend, name, "first")
        assert receive(events, 1) == ["first"]
        assert time.monotonic() - start < 0.5
        publish(backend, name, *"abc")
        assert receive(listen(make_backend(url), name, id, 60.0), 3)[1:] == [
            "first",
            "a",
        ]
        assert receive(listen(backend, name, "0-0", 60.0), 2) == ["open", "first"]
        server.execute("CLIENT", "KILL", "USER", "limited")
        publish(make_backend(url), name, "d")
        assert receive(events, 4) == ["a", "b", "c", "d"]
        server.execute("SCRIPT", "FLUSH")
        publish(backend, name, "e")
        assert receive(events, 1) == ["e"]
    assert logged(caplog, "ERROR") == []


@pytest.mark.parametrize(
    ("rules", "right"),
    [
        (
            ["~tgstream:*", "&tgstream:ok*", "&tgstream:process:*", "+@all"],
            "&tgstream:*",
        ),
        (["~tgstream:ok*", "~tgstream:process:*", "&*", "+@all"], "~tgstream:*"),
    ],
    ids=["channel", "key"],
)
def test_channel_without_permission_is_refused_alone(
    server: Valkey,
    make_backend: MakeBackend,
    name: str,
    rules: list[str],
    right: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The error names the channel and the right that it needs."""
    good = f"ok {name}"
    with user(server, "+@all", *rules) as url:
        backend = make_backend(url)
        events = open_listener(backend, good)
        for _ in range(2):
            with pytest.raises(StreamError) as error:
                backend.subscribe(name, None)
            assert repr(name) in str(error.value)
            assert right in str(error.value)
        check_listener(server, events, good)
        assert logged(caplog, "WARNING") == logged(caplog, "ERROR") == []


def test_permission_that_is_withdrawn_ends_the_listeners_of_its_channel(
    server: Valkey,
    make_backend: MakeBackend,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The server closes the connection. One log line names the channel."""
    good = f"ok {name}"
    with user(server, "~tgstream:*", "&*", "+@all") as url:
        backend = make_backend(url)
        events, others = open_listener(backend, good), open_listener(backend, name)
        rules = "resetchannels", "&tgstream:ok*", "&tgstream:process:*"
        server.execute("ACL", "SETUSER", "limited", *rules)
        assert list(others) == []
        check_listener(server, events, good)
    (error,) = logged(caplog, "ERROR")
    assert repr(name) in error
    assert "&tgstream:*" in error


def test_command_without_permission_refuses_all_channels_once(
    server: Valkey,
    make_backend: MakeBackend,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The process does not try again by itself."""
    with user(server, "~*", "&*", "+@all", "-subscribe") as url:
        backend = make_backend(url)
        with pytest.raises(StreamError, match=name):
            backend.subscribe(name, None)
        wait_until(lambda: not backend._reader._running.locked())
        assert logged(caplog, "WARNING") == logged(caplog, "ERROR") == []


def test_key_of_another_type_ends_the_listeners_of_its_channel(
    server: Valkey,
    make_backend: MakeBackend,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Other channels continue, also after a reconnect."""
    backend, good = make_backend(), f"ok {name}"
    events, others = open_listener(backend, good), open_listener(backend, name)
    server.execute("SET", f"tgstream:{name}", "x")
    server.execute("PUBLISH", f"tgstream:{name}", "x")
    assert list(others) == []
    (error,) = logged(caplog, "ERROR")
    assert f"Channel({name!r})" in error
    assert f"'tgstream:{name}'" in error
    with pytest.raises(StreamError, match="WRONGTYPE"):
        backend.subscribe(name, None)
    with pytest.raises(StreamError, match="WRONGTYPE"):
        backend.position(name)
    server.execute("CLIENT", "KILL", "TYPE", "pubsub")
    publish(backend, good, "after")
    assert receive(events, 1) == ["after"]
    server.execute("DEL", f"tgstream:{name}")
    assert id_of(next(listen(backend, name, None, 60.0)))
    assert logged(caplog, "ERROR") == [error]


def test_listener_that_starts_while_its_channel_is_refused_is_not_deaf(
    make_backend: MakeBackend, name: str
) -> None:
    """It starts again, so that it is refused or receives events."""
    backend = make_backend()
    reader, before = backend._reader, open_listener(backend, name)

    def find_and_refuse(channel: str) -> Any:
        history = RedisReader.history(reader, channel)
        del reader.history
        reader._end(reader._channels[reader._key(channel)])
        return history

    reader.history = find_and_refuse  # type: ignore[method-assign]
    events = open_listener(backend, name)
    assert list(before) == []
    publish(backend, name, "x")
    assert receive(events, 1) == ["x"]


def test_key_of_another_type_is_found_after_a_reconnect(
    server: Valkey,
    make_backend: MakeBackend,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Only the listeners of this channel end."""
    backend, good = make_backend(), f"ok {name}"
    events, others = open_listener(backend, good), open_listener(backend, name)
    server.execute("SET", f"tgstream:{name}", "x")
    server.execute("CLIENT", "KILL", "TYPE", "pubsub")
    assert list(others) == []
    check_listener(server, events, good)
    (error,) = logged(caplog, "ERROR")
    assert f"Channel({name!r})" in error


BURST = """
from gevent import monkey; monkey.patch_all()
import os, sys
import gevent
from tgstream.live.backends.redis import RedisBackend
from tgstream.live.listener import listen
from tgstream.live.protocols import ChannelSettings

PUBLISH = '''
import sys
from tgstream.formats.sse import Message
from tgstream.live.backends.redis import RedisBackend
from tgstream.live.protocols import ChannelSettings
messages = [Message("burst", str(number)) for number in range(2000)]
RedisBackend(sys.argv[1], ChannelSettings(publish_timeout=20.0)).publish(messages)
'''
backend = RedisBackend(sys.argv[1], ChannelSettings())
subscription = backend.subscribe("burst", None)
numbers = [subscription.history.next_number]


def note_progress():
    while numbers[-1] < 2000:
        gevent.sleep(0)
        numbers.append(subscription.history.next_number)


# The hub does not run until all events are published.
pid = os.fork()
if pid == 0:
    os.execv(sys.executable, [sys.executable, "-c", PUBLISH, sys.argv[1]])
monkey.get_original("os", "waitpid")(pid, 0)
gevent.spawn(note_progress).join(timeout=30)
print(max(after - before for before, after in zip(numbers, numbers[1:])))
"""


def test_burst_does_not_stop_the_other_greenlets(server: Valkey) -> None:
    """The reader pauses after some events, although there are more."""
    command = [sys.executable, "-W", "ignore", "-c", BURST, server.url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert int(result.stdout) <= 200, result.stderr[-3000:]
