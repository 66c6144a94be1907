"""Publishing to ``redis://``: outages lose no event, and cost a request little."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.exceptions import MovedError

from tests.conftest import MakeApp
from tests.forks import run_python
from tests.live.listeners import LiveController, receive
from tests.live.redis_servers import RedisProxy, once, paused, wait_for
from tests.valkey import DurableValkey, Valkey
from tests.wsgi import get
from tgstream import Channel
from tgstream.formats.sse import Message
from tgstream.live.backends.redis_connection import (
    NEEDED_PERMISSIONS,
    explain_refusal,
)
from tgstream.live.backends.redis_publisher import RedisPublisher
from tgstream.live.protocols import ChannelSettings


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A server for the tests that do not end it."""
    with DurableValkey(tmp_path_factory.mktemp("valkey"), appendonly="no") as server:
        yield server


@pytest.fixture
def failing_server(tmp_path: Path) -> Iterator[DurableValkey]:
    """A server that the test may pause, kill and restart."""
    with DurableValkey(tmp_path / "valkey") as server:
        yield server


@pytest.fixture
def proxy(server: Valkey) -> Iterator[RedisProxy]:
    """A proxy before the server."""
    with RedisProxy(server.port) as proxy:
        yield proxy


MakePublisher = Callable[..., RedisPublisher]


@pytest.fixture
def make_publisher(caplog: pytest.LogCaptureFixture) -> Iterator[MakePublisher]:
    """Creates the publishers of several processes."""
    caplog.set_level("INFO", "tgstream")
    publishers: list[RedisPublisher] = []

    def make(url: str, **settings: Any) -> RedisPublisher:
        publishers.append(RedisPublisher(url, ChannelSettings(**settings)))
        return publishers[-1]

    yield make
    for publisher in publishers:
        publisher.close()


def commit(publisher: RedisPublisher, name: str, *texts: str) -> float:
    """Publish the events of a transaction. Returns the seconds that it took."""
    start = time.perf_counter()
    publisher.publish_committed([Message(name, text) for text in texts])
    return time.perf_counter() - start


def commit_last(publisher: RedisPublisher, server: Valkey, name: str) -> list[str]:
    """Publish one more event, and return all, when all have arrived."""
    commit(publisher, name, "last")
    received = wait_for(server, name, "last")[:-1]
    commit(publisher, name, "end")  # so that the thread of an outage has gone on
    wait_for(server, name, "end")
    return received


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages that tgstream logged."""
    return [
        record.getMessage() for record in caplog.records if record.name == "tgstream"
    ]


LOST = "Cannot send events to Redis (tgstream.channels): "
BACK = "Events are sent to Redis again (tgstream.channels)"

# One round trip.


def test_events_of_a_transaction_are_sent_in_one_round_trip(
    server: Valkey, proxy: RedisProxy, make_publisher: MakePublisher, name: str
) -> None:
    """Their order stays."""
    publisher, texts = make_publisher(proxy.url), [str(number) for number in range(50)]
    commit(publisher, f"{name}?", "the first of the connection")
    for first in range(0, 50, 10):
        turns = proxy.turns
        commit(publisher, name, *texts[first : first + 10])
        assert proxy.turns == turns + 1
    assert commit_last(publisher, server, name) == texts


def test_script_that_the_server_has_forgotten_is_sent_again(
    server: Valkey,
    make_publisher: MakePublisher,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """It does not count as an outage."""
    publisher = make_publisher(server.url)
    for number in range(3):
        commit(publisher, name, f"{number}.0", f"{number}.1", f"{number}.2")
        server.execute("SCRIPT", "FLUSH")
    expected = [f"{number}.{event}" for number in range(3) for event in range(3)]
    assert commit_last(publisher, server, name) == expected
    assert logged(caplog) == []


def test_transaction_with_more_events_than_the_backlog_is_sent(
    server: Valkey, make_publisher: MakePublisher, name: str
) -> None:
    """The limit of the backlog is for outages."""
    publisher = make_publisher(server.url, backlog=5, history=5000)
    texts = [str(number) for number in range(2500)]
    commit(publisher, name, *texts)
    assert commit_last(publisher, server, name) == texts


# Outages.


def test_events_of_an_outage_are_sent_in_order_when_redis_is_back(
    make_publisher: MakePublisher,
    failing_server: DurableValkey,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """Events of later transactions are sent after them."""
    publisher = make_publisher(failing_server.url)
    commit(publisher, name, "0", "1")
    failing_server.terminate()
    commit(publisher, name, "2", "3")
    commit(publisher, name, "4")
    failing_server.start()
    commit(publisher, name, "5")
    assert wait_for(failing_server, name, "5") == ["0", "1", "2", "3", "4", "5"]
    assert commit_last(publisher, failing_server, name) == [*"012345"]
    lost, back = logged(caplog)
    assert lost.startswith(LOST)
    assert lost.endswith(" refused. They are kept, and sent when it is back")
    assert back == BACK


def test_listeners_receive_the_events_of_an_outage(
    make_app: MakeApp, failing_server: DurableValkey, name: str
) -> None:
    """Their requests succeed, and publish(now=True) raises."""
    root = LiveController(Channel(name))
    app = make_app(root, tgstream__channels=failing_server.url, tm__enabled=True)
    events = Channel(name).listen()
    assert receive(events, 1) == ["open"]
    assert get(app, "/post?text=before").text == "posted"
    failing_server.terminate()
    assert get(app, "/post?text=kept").text == "posted"
    start = time.perf_counter()
    with pytest.raises(redis.ConnectionError, match=r"refused"):
        Channel(name).publish("raised", now=True)
    assert time.perf_counter() - start < 0.1
    failing_server.start()
    assert get(app, "/post?text=after").text == "posted"
    received = []
    for event in events:
        if event.data is not None:
            received.append(event.data)
        if event.data == "after":
            break
    assert received == ["before", "kept", "after"]


def test_publish_now_raises_when_redis_cannot_be_reached(
    make_publisher: MakePublisher, failing_server: DurableValkey, name: str
) -> None:
    """It raises before the limit if the error is known, and sends nothing later."""
    publisher = make_publisher(failing_server.url, publish_timeout=10.0)
    commit(publisher, name, "before")
    failing_server.terminate()
    start = time.perf_counter()
    with pytest.raises(redis.ConnectionError):
        publisher.publish([Message(name, "raised")])
    assert time.perf_counter() - start < 5
    failing_server.start()
    assert commit_last(publisher, failing_server, name) == ["before"]


def test_closed_connection_is_replaced_at_once(
    server: Valkey,
    make_publisher: MakePublisher,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """Servers and firewalls close idle connections. The server is not lost."""
    publisher = make_publisher(server.url)
    for number in range(5):
        publisher.publish([Message(name, str(number))])
        server.execute("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert commit_last(publisher, server, name) == [*"01234"]
    assert logged(caplog) == []


# Lost answers.


@pytest.mark.parametrize("cut", ["cuts_request", "cuts_answer"])
@pytest.mark.parametrize("now", [True, False])
def test_event_whose_answer_is_lost_is_sent_once(
    server: Valkey,
    proxy: RedisProxy,
    make_publisher: MakePublisher,
    caplog: pytest.LogCaptureFixture,
    name: str,
    cut: str,
    now: bool,
) -> None:
    """The connection is lost before or after the server has appended the event."""
    publisher = make_publisher(proxy.url)
    send = publisher.publish if now else publisher.publish_committed
    commit(publisher, name, "first")
    for number in range(0, 9, 3):
        setattr(proxy, cut, once())
        send([Message(name, str(event)) for event in range(number, number + 3)])
    assert commit_last(publisher, server, name) == ["first", *"012345678"]
    assert logged(caplog) == []


@pytest.mark.parametrize("cut", ["cuts_request", "cuts_answer"])
def test_lost_answer_of_a_full_channel_is_found_by_an_earlier_event(
    server: Valkey,
    proxy: RedisProxy,
    make_publisher: MakePublisher,
    name: str,
    cut: str,
) -> None:
    """The server has removed events of the channel, but none after this event."""
    publisher = make_publisher(proxy.url, history=20)
    texts = [str(number) for number in range(80)]
    commit(publisher, name, *texts[:-1])
    setattr(proxy, cut, once())
    commit(publisher, name, texts[-1])
    received = commit_last(publisher, server, name)
    assert received == texts[-len(received) :]
    assert 20 <= len(received) < 60


@pytest.mark.parametrize("cut", ["cuts_request", "cuts_answer"])
def test_event_that_the_server_may_have_removed_is_a_reset(
    server: Valkey,
    proxy: RedisProxy,
    make_publisher: MakePublisher,
    name: str,
    cut: str,
) -> None:
    """Other processes have published more events than the server keeps."""
    publisher, other = make_publisher(proxy.url, history=20), make_publisher(server.url)
    answers = once()

    def interfere() -> bool:
        if is_cut := answers():
            with redis.Redis.from_url(server.url) as client:
                pipeline = client.pipeline()
                for number in range(80):
                    pipeline.xadd(f"tgstream:{name}", {"data": f"o{number}"})
                pipeline.xtrim(f"tgstream:{name}", 30, approximate=False)
                pipeline.execute()
        return is_cut

    commit(publisher, name, "first")
    setattr(proxy, cut, interfere)
    commit(publisher, name, "lost")
    wait_for(server, name, "reset")
    commit(other, name, "next")
    assert commit_last(publisher, server, name)[-3:] == ["o79", "reset", "next"]


def test_event_that_reaches_the_server_late_is_not_sent_twice(
    server: Valkey, proxy: RedisProxy, make_publisher: MakePublisher, name: str
) -> None:
    """The server receives the events of a lost connection after those sent again."""
    publisher = make_publisher(proxy.url)
    commit(publisher, name, "first")
    proxy.delays_request = once()
    commit(publisher, name, "0", "1", "2")
    wait_for(server, name, "2")
    proxy.forward_delayed.set()
    assert proxy.delayed_is_done.wait(10)
    assert commit_last(publisher, server, name) == ["first", *"012"]


def test_threads_publish_each_event_once_while_connections_fail(
    server: Valkey, proxy: RedisProxy, make_publisher: MakePublisher, name: str
) -> None:
    """The order of each thread stays."""
    publisher, chance = make_publisher(proxy.url), random.Random(7)
    proxy.cuts_request = proxy.cuts_answer = lambda: chance.random() < 0.1

    def run(thread: int) -> None:
        for number in range(30):
            commit(publisher, name, f"{thread}.{number}", f"{thread}.{number}+")

    threads = [threading.Thread(target=run, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    proxy.cuts_request = proxy.cuts_answer = lambda: False
    received = commit_last(publisher, server, name)
    for number in range(4):
        own = [text for text in received if text.startswith(f"{number}.")]
        expected = [
            f"{number}.{event}{end}" for event in range(30) for end in ("", "+")
        ]
        assert own == expected
    assert len(received) == 240


# The time limit.


def test_server_that_hangs_costs_all_events_one_limit(
    make_publisher: MakePublisher,
    failing_server: DurableValkey,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """While it is known to be lost, publishing costs nothing. All events arrive."""
    publisher = make_publisher(failing_server.url, publish_timeout=0.3)
    commit(publisher, name, "0")
    with paused(failing_server):
        assert 0.3 <= commit(publisher, name, "1", "2", "3", "4") < 0.5
        assert commit(publisher, name, "5") < 0.05
        with pytest.raises(redis.ConnectionError):
            publisher.publish([Message(name, "raised")])
    assert commit_last(publisher, failing_server, name) == [*"012345"]
    lost, back = logged(caplog)
    assert lost.startswith(LOST)
    assert back == BACK


def test_large_event_to_a_server_that_hangs_costs_one_limit(
    make_publisher: MakePublisher, failing_server: DurableValkey, name: str
) -> None:
    """The buffers between are full, so that it cannot be written."""
    publisher = make_publisher(failing_server.url, publish_timeout=0.3)
    commit(publisher, name, "0")
    with paused(failing_server):
        assert 0.3 <= commit(publisher, name, "x" * 20_000_000) < 0.6
    assert [len(text) for text in commit_last(publisher, failing_server, name)] == [
        1,
        20_000_000,
    ]


def test_requests_that_wait_for_the_same_server_wait_one_limit(
    make_publisher: MakePublisher, failing_server: DurableValkey, name: str
) -> None:
    """They do not wait for each other."""
    publisher, seconds = make_publisher(failing_server.url, publish_timeout=0.3), []
    commit(publisher, name, "0")
    with paused(failing_server):
        threads = [
            threading.Thread(
                target=lambda: seconds.append(commit(publisher, name, "x"))
            )
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seconds) == 8
        assert max(seconds) < 0.6
    assert commit_last(publisher, failing_server, name) == ["0", *["x"] * 8]


def test_connecting_counts_into_the_limit(
    make_publisher: MakePublisher, server: Valkey, name: str
) -> None:
    """The kernel drops the SYN, because the queue of the listener is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(address)
            url = f"redis://127.0.0.1:{address[1]}"
            publisher = make_publisher(url, publish_timeout=0.3)
            assert 0.3 <= commit(publisher, name, "0", "1") < 0.5
            assert commit(publisher, name, "2") < 0.05
        finally:
            for filler in fillers:
                filler.close()
            publisher._queue.clear()


# The end of the backlog, and of the process.


def test_channels_whose_events_do_not_fit_receive_a_reset(
    make_publisher: MakePublisher,
    failing_server: DurableValkey,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """Events that are kept are sent before. Later events are sent after."""
    publisher = make_publisher(failing_server.url, backlog=3)
    commit(publisher, name, "before")
    failing_server.terminate()
    commit(publisher, name, "0", "1")
    commit(publisher, f"{name}?", "fits")
    for number in range(2, 9):
        commit(publisher, name, str(number))
    commit(publisher, f"{name}?", "fits not")
    commit(publisher, f"{name}!", "fits not")
    assert len(publisher._queue) == 3
    failing_server.start()
    assert wait_for(failing_server, name, "reset") == ["before", "0", "1", "reset"]
    assert wait_for(failing_server, f"{name}!", "reset") == ["reset"]
    assert wait_for(failing_server, f"{name}?", "reset") == ["fits", "reset"]
    assert commit_last(publisher, failing_server, name)[-1] == "reset"
    assert [text for text in logged(caplog) if not text.startswith(LOST)] == [
        "More than 3 events wait for Redis (tgstream.channel_backlog). Further ones "
        "are dropped, and their listeners receive a reset when it is back",
        BACK,
    ]


SCRIPT = """
import sys
from tgstream.formats.sse import Message
from tgstream.live.backends.redis_connection import (
    NEEDED_PERMISSIONS,
    explain_refusal,
)
from tgstream.live.backends.redis_publisher import RedisPublisher
from tgstream.live.protocols import ChannelSettings

publisher = RedisPublisher(sys.argv[1], ChannelSettings(publish_timeout=0.2))
publisher.publish([Message(sys.argv[2], "before")])
print("published", flush=True)
input()
publisher.publish_committed([Message(sys.argv[2], str(number)) for number in range(3)])
publisher.publish_committed([Message("other", "3")])
print("kept", flush=True)
input()
"""


def start_script(url: str, name: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, url, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "published\n"
    return process


def continue_script(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "kept\n"


def test_process_that_ends_sends_its_events_once_more(
    failing_server: DurableValkey, name: str
) -> None:
    """The server is back at this time."""
    process = start_script(failing_server.url, name)
    failing_server.terminate()
    continue_script(process)
    failing_server.start()
    _, errors = process.communicate("\n", timeout=10)
    assert wait_for(failing_server, name, "2") == ["before", "0", "1", "2"]
    assert "may be lost" not in errors


def test_process_that_ends_while_redis_is_lost_logs_the_channels(
    failing_server: DurableValkey, name: str
) -> None:
    """Nobody else has the events."""
    process = start_script(failing_server.url, name)
    failing_server.terminate()
    continue_script(process)
    _, errors = process.communicate("\n", timeout=10)
    lost, end = errors.strip().splitlines()
    assert lost.startswith(LOST)
    assert end.startswith(
        "The process ends while Redis (tgstream.channels) is lost: Error 111"
    )
    assert end.endswith(
        ". 4 kept events may be lost, and listeners of these channels receive no "
        f"reset: '{name}', 'other'"
    )


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_process_does_not_send_the_events_of_its_parent(
    make_publisher: MakePublisher, failing_server: DurableValkey, name: str
) -> None:
    """It can send its own."""
    publisher = make_publisher(failing_server.url)
    commit(publisher, name, "0")
    failing_server.terminate()
    commit(publisher, name, "1")
    ready, start = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        status = 1
        try:
            os.read(ready, 1)
            commit(publisher, f"{name}?", "of the child")
            publisher.close()
            status = 0
        finally:
            os._exit(status)
    failing_server.start()
    assert wait_for(failing_server, name, "1") == ["0", "1"]
    os.write(start, b"x")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(ready)
    os.close(start)
    assert wait_for(failing_server, f"{name}?", "of the child") == ["of the child"]
    assert commit_last(publisher, failing_server, name) == ["0", "1"]


# Failover.


@contextmanager
def pair(folder: Path) -> Iterator[tuple[Valkey, Valkey]]:
    """A primary and its replica."""
    folder.mkdir()
    primary, replica = (
        Valkey(folder / name, repl_diskless_sync_delay=0)
        for name in ("primary", "replica")
    )
    with primary, replica:
        replica.execute("REPLICAOF", "127.0.0.1", primary.port)
        yield primary, replica


def test_publisher_follows_an_address_that_moves_to_a_new_primary(
    make_publisher: MakePublisher,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    name: str,
) -> None:
    """The old primary stays up as a replica, and its connections stay open."""
    with pair(tmp_path / "pair") as (old, new), RedisProxy(old.port) as proxy:
        publisher = make_publisher(proxy.url)
        commit(publisher, name, "0")
        wait_for(new, name, "0")
        proxy.target = new.port
        new.execute("REPLICAOF", "NO", "ONE")
        old.execute("REPLICAOF", "127.0.0.1", new.port)
        assert commit(publisher, name, "1", "2") < 0.5
        publisher.publish([Message(name, "3")])
        assert wait_for(new, name, "3") == [*"0123"]
        assert logged(caplog) == []
        publisher.close()


@pytest.mark.parametrize("state", ["READONLY", "MASTERDOWN", "LOADING", "OOM"])
def test_events_wait_for_a_server_that_cannot_write(
    make_publisher: MakePublisher,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    name: str,
    state: str,
) -> None:
    """It answers, but it is a replica, loads its data, or has no memory."""
    server = Valkey(
        tmp_path,
        enable_debug_command="yes",
        loading_process_events_interval_bytes=1024,
        rdbcompression="no",
    )
    with server:
        publisher = make_publisher(server.url, publish_timeout=0.3)
        commit(publisher, name, "0")
        leave = enter(state, server)
        assert commit(publisher, name, "1", "2") < 0.5
        assert commit(publisher, name, "3") < 0.05
        leave()
        assert wait_for(server, name, "3") == [*"0123"]
        assert commit_last(publisher, server, name) == [*"0123"]
        lost, back = logged(caplog)
        assert lost.startswith(LOST)
        assert back == BACK


def enter(state: str, server: Valkey) -> Callable[[], Any]:
    """Let a server refuse all events. The result ends this."""
    if state == "OOM":
        server.execute("CONFIG", "SET", "maxmemory", "1")
        return lambda: server.execute("CONFIG", "SET", "maxmemory", "0")
    if state == "LOADING":
        return start_to_load(server)
    if state == "MASTERDOWN":
        server.execute("CONFIG", "SET", "replica-serve-stale-data", "no")
    server.execute("REPLICAOF", "127.0.0.1", "1")  # nobody listens there
    return lambda: server.execute("REPLICAOF", "NO", "ONE")


def start_to_load(server: Valkey) -> Callable[[], None]:
    """Let a server load its data again, for about a second."""
    with redis.Redis.from_url(server.url, protocol=2) as client:
        client.mset({f"key {number}": "x" * 2000 for number in range(100)})
        server.execute("CONFIG", "SET", "key-load-delay", "7000")
        load = threading.Thread(target=server.execute, args=["DEBUG", "RELOAD"])
        load.start()
        with pytest.raises(redis.BusyLoadingError):
            while load.is_alive():
                client.get("key 0")
    return load.join


# Refused events.


def test_channel_whose_key_has_another_type_does_not_hold_up_others(
    server: Valkey,
    make_publisher: MakePublisher,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """Its event is logged, once. The connection stays."""
    publisher, bad = make_publisher(server.url), f"{name}?"
    server.execute("SET", f"tgstream:{bad}", "text")
    messages = [Message(name, "0"), Message(bad, "refused"), Message(name, "1")]
    publisher.publish_committed(messages)
    assert commit_last(publisher, server, name) == ["0", "1"]
    (line,) = logged(caplog)
    assert line.startswith(f"Redis refused an event of Channel({bad!r}): ")
    assert "WRONGTYPE" in line
    assert line.endswith(
        f". Delete or rename the key 'tgstream:{bad}', which must be a stream"
    )
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        publisher.publish(messages)
    assert wait_for(server, name, "1")[:3] == ["0", "1", "last"]


@pytest.mark.parametrize(
    "rights",
    [
        "~tgstream:{name} &* +@all",
        "~* &tgstream:{name} +@all",
    ],
)
def test_permission_that_is_missing_for_a_channel_is_logged(
    server: Valkey,
    make_publisher: MakePublisher,
    caplog: pytest.LogCaptureFixture,
    name: str,
    rights: str,
) -> None:
    """Other channels are not held up."""
    server.execute(
        "ACL", "SETUSER", "u", "reset", "on", ">p", *rights.format(name="a*").split()
    )
    publisher = make_publisher(server.url.replace("//", "//u:p@"))
    publisher.publish_committed(
        [Message(f"a{name}", "0"), Message(name, "no"), Message(f"a{name}", "1")]
    )
    assert commit_last(publisher, server, f"a{name}") == ["0", "1"]
    (line,) = logged(caplog)
    assert line.startswith(f"Redis refused an event of Channel({name!r}): ")
    assert line.endswith(
        ". Give the user of tgstream.channels the permissions ~tgstream:* &tgstream:* "
        "+@stream +@pubsub +@scripting +@connection +pexpire +time"
    )


@pytest.mark.parametrize("right", ["-publish", "-pexpire"])
def test_refused_event_is_not_received_later(
    server: Valkey, make_publisher: MakePublisher, name: str, right: str
) -> None:
    """The server has appended the event before it refuses the next command."""
    server.execute(
        "ACL", "SETUSER", "w", "reset", "on", ">p", "~*", "&*", "+@all", right
    )
    publisher = make_publisher(server.url.replace("//", "//w:p@"))
    with pytest.raises(redis.ResponseError, match=right.removeprefix("-")):
        publisher.publish([Message(name, "refused")])
    assert server.execute("XLEN", f"tgstream:{name}") == 0


def test_documented_permissions_are_enough(
    server: Valkey, proxy: RedisProxy, make_publisher: MakePublisher, name: str
) -> None:
    """Also to send an event again."""
    rights = NEEDED_PERMISSIONS.partition("permissions ")[2].split()
    server.execute("ACL", "SETUSER", "v", "reset", "on", ">p", *rights)
    publisher = make_publisher(proxy.url.replace("//", "//v:p@"))
    commit(publisher, name, "0")
    proxy.cuts_answer = once()
    commit(publisher, name, "1")
    assert commit_last(publisher, server, name) == ["0", "1"]


def test_server_of_a_cluster_is_named_as_the_cause() -> None:
    """It refuses the channels of other servers."""
    text = explain_refusal(MovedError("1 127.0.0.1:6379"), "tgstream:x")
    assert text.startswith("MovedError: ")
    assert text.endswith(". The server is part of a cluster: use redis+cluster://")


# Sentinel.


def test_sentinel_leads_to_the_new_primary(
    make_publisher: MakePublisher, tmp_path: Path, name: str
) -> None:
    """The old primary is dead."""
    with (
        pair(tmp_path / "pair") as (primary, replica),
        Sentinel(tmp_path / "sentinel", primary) as sentinel,
    ):
        publisher = make_publisher(sentinel.url)
        commit(publisher, name, "0")
        wait_for(replica, name, "0")
        primary.terminate()
        commit(publisher, name, "1")
        commit(publisher, name, "2")
        assert wait_for(replica, name, "2") == [*"012"]
        publisher.close()


class Sentinel(Valkey):
    """A sentinel of a primary that has one replica."""

    def __init__(self, folder: Path, primary: Valkey) -> None:
        super().__init__(folder)
        config = folder / "sentinel.conf"
        config.write_text(
            f"port {self.port}\n"
            f"dir {folder}\n"
            f"sentinel monitor main 127.0.0.1 {primary.port} 1\n"
            "sentinel down-after-milliseconds main 300\n"
        )
        self._command = [self._command[0], str(config), "--sentinel"]
        self._server_url = self.url
        self.url = f"redis+sentinel://127.0.0.1:{self.port}/main"

    def execute(self, *command: Any) -> Any:
        with redis.Redis.from_url(self._server_url, protocol=2) as client:
            return client.execute_command(*command)

    def start(self) -> None:
        """Start, and wait until the replica is known."""
        super().start()
        with redis.Redis.from_url(self._server_url, protocol=2) as client:
            while not client.sentinel_master("main")["num-slaves"]:
                pass


# Finalisers.

INTERRUPTED = """
import faulthandler, sys, time
faulthandler.dump_traceback_later(50, exit=True)
import redis
from tgstream.formats.sse import Message
from tgstream.live.backends import redis_publisher, redis_sender
from tgstream.live.protocols import ChannelSettings

FILES = redis_publisher.__file__, redis_sender.__file__
publisher = redis_publisher.RedisPublisher(sys.argv[1], ChannelSettings(100_000))
client = redis.Redis.from_url(sys.argv[1])
sent, seconds = [], []


def publish(text):
    sent.append(text)
    publisher.publish_committed([Message(sys.argv[2], text)])


def publish_and_interrupt(text, at):
    byte_codes, is_interrupted = 0, False

    def interrupt(frame, kind, argument):
        nonlocal byte_codes, is_interrupted
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = True
        if kind == "opcode":
            if byte_codes == at:
                sys.settrace(None)
                is_interrupted = True
                publish(f"inside {text}")
            byte_codes += 1
        return interrupt

    start = time.perf_counter()
    sys.settrace(interrupt)
    publish(text)
    sys.settrace(None)
    seconds.append(time.perf_counter() - start)
    return is_interrupted


publish("first")
for case in "connected", "closed":
    at = 0
    while publish_and_interrupt(f"{case} {at}", at):
        at += 1 if case == "connected" else 3
        if case == "closed":
            client.client_kill_filter(_type="normal", skipme=True)
    assert at > 100, at
assert max(seconds) < 0.9, max(seconds)  # no call has waited for itself
publish("last")
print(*sorted(sent), sep="\\n")
"""


def test_finaliser_can_publish_at_every_byte_code(server: Valkey, name: str) -> None:
    """It does not wait for a lock that its thread has. No event is lost."""
    result = run_python("-c", INTERRUPTED, server.url, name)
    sent = result.stdout.splitlines()
    assert len(sent) > 200, result.stderr[-3000:]
    assert sorted(wait_for(server, name, "last")) == sent


GREENLETS = """
from gevent import monkey; monkey.patch_all()
import sys
from pathlib import Path
import gevent
from tests.live.redis_servers import paused, wait_for
from tests.valkey import DurableValkey
from tgstream.formats.sse import Message
from tgstream.live.backends.redis_publisher import RedisPublisher
from tgstream.live.protocols import ChannelSettings

def publish(text):
    publisher.publish_committed([Message("x", text)])

def publish_more(number):
    for event in range(5):
        publish(f"{number}.{event}")
        gevent.sleep(0.01)

with DurableValkey(Path(sys.argv[1])) as server:
    publisher = RedisPublisher(server.url, ChannelSettings(publish_timeout=0.3))
    publish("first")
    greenlets = [gevent.spawn(publish_more, number) for number in range(50)]
    gevent.sleep(0.02)
    server.terminate()
    server.start()
    gevent.joinall(greenlets)
    publish("last")
    received = wait_for(server, "x", "last")
    for number in range(50):
        own = [text for text in received if text.startswith(f"{number}.")]
        assert own == [f"{number}.{event}" for event in range(5)], own
    assert len(received) == 252

    with paused(server):
        killed = gevent.spawn(publish, "of a killed greenlet")
        gevent.sleep(0.05)
        killed.kill()
    publish("second")
    assert wait_for(server, "x", "second")[252:] == ["of a killed greenlet", "second"]

    gevent.get_hub().loop.run_callback(publish, "in the hub")
    gevent.sleep(0.05)
    publish("third")
    assert wait_for(server, "x", "third")[254:] == ["in the hub", "third"]
print("complete")
"""


def test_publisher_works_with_greenlets(tmp_path: Path) -> None:
    """A greenlet may be killed while it publishes, and the hub may publish."""
    command = [sys.executable, "-W", "ignore", "-c", GREENLETS, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout == "complete\n", result.stderr[-3000:]
