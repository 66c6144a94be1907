"""Channels with ``redis://``: several processes, and a real server that may fail."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tg import TGController

from tests.conftest import MakeApp
from tests.forks import run_python
from tests.live.listeners import (
    LiveController,
    assert_reset,
    id_of,
    receive,
    types_of_first_two,
)
from tests.live.redis_servers import blocked, close_backends
from tests.pages import DOCS, blocks
from tests.valkey import DurableValkey
from tests.wsgi import get
from tgstream import Channel, Event
from tgstream.doctor.settings_checks import check_settings
from tgstream.formats.sse import Message
from tgstream.live.backends.redis import RedisBackend
from tgstream.live.history import reset_event
from tgstream.live.listener import listen
from tgstream.live.protocols import ChannelSettings
from tgstream.testing import open_stream


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DurableValkey]:
    """A server for all tests of this file."""
    with DurableValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def failing_server(tmp_path: Path) -> Iterator[DurableValkey]:
    """A server that the test may kill and restart."""
    server = DurableValkey(tmp_path / "valkey")
    server.start()
    yield server
    server.terminate()


def test_doctor_reports_a_server_that_answers(server: DurableValkey) -> None:
    """It connects to the server."""
    [finding] = [
        finding
        for finding in check_settings({"tgstream.channels": server.url})
        if finding.check == "channels"
    ]
    assert (finding.mark, finding.result) == ("ok", f"{server.url} responds")


MakeBackend = Callable[..., RedisBackend]


@pytest.fixture
def make_backend(server: DurableValkey) -> Iterator[MakeBackend]:
    """Creates the back ends of several processes."""
    backends: list[RedisBackend] = []

    def make(url: str = server.url, history: int = 1000) -> RedisBackend:
        backends.append(RedisBackend(url, ChannelSettings(history)))
        return backends[-1]

    yield make
    close_backends(backends)


def publish(backend: RedisBackend, name: str, text: str) -> None:
    """Publish a text from the process of a back end."""
    backend.publish([Message(name, text)])


def open_listener(backend: RedisBackend, name: str) -> Iterator[Event]:
    """A listener that has received its opening comment."""
    events = listen(backend, name, None, 60.0)
    assert next(events).comment == "open"
    return events


def reconnect(backend: RedisBackend, name: str, after: str) -> Iterator[Event]:
    """A listener that has received an event with this id before."""
    return listen(backend, name, after, 60.0)


# Events and reconnects.


def test_redis_sends_events_to_other_processes(
    server: DurableValkey, make_app: MakeApp, name: str
) -> None:
    """They arrive with their type."""
    make_app(TGController(), tgstream__channels=server.url)
    events = Channel(name).listen()
    assert receive(events, 1) == ["open"]
    publish = (
        "import sys; from tgstream.live.backends.redis import RedisBackend\n"
        "from tgstream.formats.sse import Message\n"
        "from tgstream.live.protocols import ChannelSettings\n"
        "message = Message(sys.argv[2], '{\"a\":\"é\\\\nb\"}', 'greeting', True)\n"
        "RedisBackend(sys.argv[1], ChannelSettings(9)).publish([message])"
    )
    run_python("-c", publish, server.url, name).check_returncode()
    event = next(events)
    assert (event.data, event.event) == ('{"a":"é\\nb"}', "greeting")
    assert receive(Channel(name).listen(after=id_of(event)), 1) == ["open"]


@pytest.mark.parametrize("received", [0, 1, 2])
def test_client_can_reconnect_to_another_process(
    make_backend: MakeBackend, name: str, received: int
) -> None:
    """The server assigns the ids. The opening comment has an id, too."""
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
    assert receive(reconnect(first, name, id_of(last)), len(expected) + 1) == [
        *expected,
        "2",
    ]


def test_client_can_reconnect_to_a_process_that_is_behind(
    make_backend: MakeBackend, name: str
) -> None:
    """An id from a faster process does not cause a reset."""
    slow, quick = make_backend(), make_backend()
    behind, ahead = open_listener(slow, name), open_listener(quick, name)
    with blocked(slow._reader):
        for text in "012":
            publish(quick, name, text)
        ids = [id_of(event) for event in islice(ahead, 3)]
        assert receive(reconnect(slow, name, ids[1]), 2) == ["open", "2"]
        assert receive(behind, 3) == ["0", "1", "2"]
    publish(quick, name, "3")
    assert receive(behind, 1) == ["3"]


@pytest.mark.parametrize(
    "id",
    [
        "",
        "7",
        "x" * 10_000,
        "a\r\nb-1",
        "1-1",
        "01-1",
        "٣-٣",
        f"{2**64}-0",
        f"{2**63}-0",
        f"{2**64 - 1}-{2**64 - 1}",  # no id is larger, and XRANGE refuses it
        f"{2**64 - 1}-0",
        f"0-{2**64 - 1}",
    ],
    ids=lambda value: repr(value[:20]),
)
def test_foreign_event_id_causes_a_reset(
    make_app: MakeApp, server: DurableValkey, name: str, id: str
) -> None:
    """The server has not assigned this id."""
    make_app(TGController(), tgstream__channels=server.url)
    assert_reset(Channel(name), id)


def test_event_id_that_is_too_old_causes_a_reset(
    make_backend: MakeBackend, name: str
) -> None:
    """The server has removed an event after it."""
    backend = make_backend(history=20)
    events = listen(backend, name, None, 60.0)
    ids = [id_of(next(events))]
    for number in range(60):
        publish(backend, name, str(number))
        ids.append(id_of(next(events)))
    del events
    for process in backend, make_backend():
        resumed = reconnect(process, name, ids[40])
        assert receive(resumed, 21) == ["open", *map(str, range(40, 60))]
        for old_id in ids[0], ids[10]:
            opening, reset = islice(reconnect(process, name, old_id), 2)
            assert opening == Event(comment="open")
            assert reset == Event(name, event="reset", id=ids[60], channel=name)
        assert receive(reconnect(process, name, ids[60]), 1) == ["open"]


def test_listener_that_never_reads_is_disconnected_and_can_reconnect(
    make_backend: MakeBackend, name: str
) -> None:
    """The server stores more events than this process."""
    backend = make_backend(history=10)
    slow, quick = listen(backend, name, None, 60.0), open_listener(backend, name)
    id = id_of(next(slow))
    for number in range(11):
        publish(backend, name, str(number))
        next(quick)
    assert list(slow) == []
    assert receive(reconnect(backend, name, id), 12) == ["open", *map(str, range(11))]


def test_missed_events_are_read_once_for_all_listeners(
    server: DurableValkey, make_backend: MakeBackend, name: str
) -> None:
    """A listener keeps no event in memory after it is sent."""
    backend = make_backend()
    id = id_of(next(listen(backend, name, None, 60.0)))
    for number in range(1000):
        publish(backend, name, f"{number}".rjust(1000))
    process = make_backend()
    sent = int(server.execute("INFO", "stats")["total_net_output_bytes"])
    tracemalloc.start()
    try:
        listeners = [reconnect(process, name, id) for _ in range(200)]
        for events in listeners:
            assert sum(1 for _ in islice(events, 1001)) == 1001
        grown, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20, (grown, peak)
    read = int(server.execute("INFO", "stats")["total_net_output_bytes"]) - sent
    assert 1_000_000 < read < 2_000_000
    publish(backend, name, "next")
    assert [next(events).data for events in listeners] == ["next"] * 200


def test_long_backlog_is_read_page_by_page(
    make_backend: MakeBackend, name: str
) -> None:
    """The process stores fewer events than the client missed."""
    backend, process = make_backend(), make_backend(history=10)
    id = id_of(next(listen(backend, name, None, 60.0)))
    expected = [f"{number}".rjust(1000) for number in range(900)]
    for text in expected:
        publish(backend, name, text)
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


@pytest.mark.parametrize(
    "fields",
    [("text", "x"), ("data", b"\xff"), ("data", "x", "event", "a\nb")],
    ids=repr,
)
def test_invalid_entry_of_a_stream_causes_a_reset(
    server: DurableValkey, make_backend: MakeBackend, name: str, fields: tuple[Any, ...]
) -> None:
    """Another program wrote it. Later events arrive as usual."""
    backend = make_backend()
    events = open_listener(backend, name)
    id = server.execute("XADD", f"tgstream:{name}", "*", *fields).decode()
    publish(backend, name, "next")
    assert next(events) == reset_event(id, name)
    assert receive(events, 1) == ["next"]


def test_deleted_stream_causes_a_reset(
    server: DurableValkey, make_backend: MakeBackend, name: str
) -> None:
    """Listeners may have missed an event that was deleted."""
    backend = make_backend()
    events = open_listener(backend, name)
    publish(backend, name, "before")
    assert receive(events, 1) == ["before"]
    server.execute("DEL", f"tgstream:{name}")
    publish(backend, name, "lost, or not")
    assert next(events).event == "reset"
    publish(backend, name, "after")
    assert receive(events, 1) == ["after"]


# The connection and the thread of a process.


def subscribed_connections(server: DurableValkey) -> int:
    """The number of connections that receive messages."""
    listed = server.execute("CLIENT", "LIST", "TYPE", "PUBSUB")
    return len(listed if isinstance(listed, list) else listed.decode().splitlines())


def test_process_reads_over_one_connection_for_all_listeners(
    failing_server: DurableValkey, make_backend: MakeBackend
) -> None:
    """A new channel is read at once over the same connection."""
    backend = make_backend(failing_server.url)
    listeners = [
        open_listener(backend, f"channel {number % 10}") for number in range(100)
    ]
    for number in range(10):
        publish(backend, f"channel {number}", str(number))
    for number, events in enumerate(listeners):
        assert receive(events, 1) == [str(number % 10)]
    assert subscribed_connections(failing_server) == 1


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


SCRIPTED = """
from tg import MinimalApplicationConfigurator, TGController
import tgstream


def main(global_conf, **app_conf):
    config = MinimalApplicationConfigurator()
    config.update_blueprint({"root_controller": TGController()})
    tgstream.plugme(config)
    return config.make_wsgi_app(global_conf, app_conf)
"""


def test_script_that_loads_its_application_publishes_to_all_processes(
    make_app: MakeApp, server: DurableValkey, tmp_path: Path
) -> None:
    """The script is the one of the page on live streams."""
    make_app(TGController(), tgstream__channels=server.url)
    events = Channel("users").listen()
    assert receive(events, 1) == ["open"]
    ini = f"[app:main]\nuse = call:scripted:main\ntgstream.channels = {server.url}\n"
    (tmp_path / "development.ini").write_text(ini)
    (tmp_path / "scripted.py").write_text(SCRIPTED)
    page = blocks((DOCS / "live.rst").read_text())
    [script] = [block for block in page if "loadapp" in block]
    (tmp_path / "script.py").write_text(f"from tgstream import Channel\n{script}")
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environ, check=True)
    assert receive(events, 1) == ['{"name":"ada"}']


def test_forked_process_has_its_own_connection(
    make_app: MakeApp, server: DurableValkey, name: str
) -> None:
    """Each process receives the events of the other."""
    make_app(TGController(), tgstream__channels=server.url)
    channel = Channel(name)
    events = channel.listen()
    assert receive(events, 1) == ["open"]
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        try:
            events_of_child = channel.listen()
            channel.publish("from the child")
            assert receive(events_of_child, 2) == ["open", "from the child"]
        finally:
            os._exit(0)
    assert receive(events, 1) == ["from the child"]
    assert os.waitpid(pid, 0)[1] == 0
    channel.publish("from the parent")
    assert receive(events, 1) == ["from the parent"]


def test_redis_works_with_greenlets() -> None:
    """Listeners, the reader and the publisher share one thread."""
    script = Path(__file__).parents[1] / "live_apps" / "greenlets.py"
    subprocess.run([sys.executable, script], check=True, timeout=60)


def test_redis_url_without_the_package_redis_is_rejected(
    make_app: MakeApp, server: DurableValkey, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error contains the pip command. memory:// does not need the package."""
    make_app(TGController(), tgstream__channels=f"{server.url}?db=1")
    monkeypatch.setitem(sys.modules, "redis", None)
    for module in [m for m in sys.modules if "tgstream.live.backends.redis" in m]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=r"pip install 'tgstream\[redis\]'"):
        Channel(name).publish("x")
    make_app(TGController(), tgstream__channels="memory://")
    Channel(name).publish("x")


@pytest.mark.parametrize("url", ["redis://h", "redis+sentinel://h/s", "unix:///s"])
def test_redis_url_with_an_unknown_option_is_rejected(
    make_app: MakeApp, name: str, url: str
) -> None:
    """A listener would wait forever, because no connection can be made."""
    make_app(TGController(), tgstream__channels=f"{url}?speed=3")
    with pytest.raises(ValueError, match=r"'speed'\. Remove the option"):
        Channel(name).publish("x")


# Failures of the server.


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages that tgstream logged."""
    return [
        record.getMessage() for record in caplog.records if record.name == "tgstream"
    ]


def test_killed_and_restarted_server_loses_no_event(
    make_app: MakeApp,
    failing_server: DurableValkey,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """100 streams stay open, and each receives each event once."""
    app = make_app(LiveController(Channel(name)), tgstream__channels=failing_server.url)
    streams = [open_stream(app, "/feed") for _ in range(100)]
    listeners = [stream.events() for stream in streams]
    for events in listeners:
        assert receive(events, 1) == ["open"]
    expected = []
    for round in range(3):
        for number in range(3):
            expected.append(f"{round}.{number}")
            get(app, f"/post?text={expected[-1]}")
        failing_server.terminate()
        failing_server.start()
    get(app, "/post?text=last")
    for events in listeners:
        assert receive(events, 10) == [*expected, "last"]
    for stream in streams:
        stream.close()
    lost = [text for text in logged(caplog) if text.startswith("Lost the connection")]
    assert len(lost) <= 3


def test_server_that_restarts_without_its_data_causes_a_reset(
    tmp_path: Path, make_backend: MakeBackend, name: str
) -> None:
    """Listeners may have missed an event."""
    server = DurableValkey(tmp_path, appendonly="no")
    server.start()
    backend = make_backend(server.url)
    events, other = open_listener(backend, name), open_listener(backend, f"{name}?")
    publish(backend, name, "before")
    (before,) = islice(events, 1)
    server.terminate()
    server.start()
    reset = next(events)
    assert reset == reset_event(id_of(reset), name)
    publish(backend, name, "after")
    publish(backend, f"{name}?", "the first")
    assert receive(events, 1) == ["after"]
    assert next(other).event == "reset"
    assert receive(other, 1) == ["the first"]
    assert receive(reconnect(backend, name, id_of(reset)), 2) == ["open", "after"]
    reconnected = reconnect(backend, name, id_of(before))
    assert types_of_first_two(reconnected) == [None, "reset"]
    server.terminate()


def test_lost_first_events_of_a_channel_cause_a_reset(
    tmp_path: Path, make_backend: MakeBackend, name: str
) -> None:
    """The position of the listener proves the loss."""
    with DurableValkey(tmp_path, appendonly="no") as server:
        backend, other = make_backend(server.url), make_backend(server.url)
        events = open_listener(backend, name)
        with blocked(backend._reader):
            publish(other, name, "lost")
            server.terminate()
            server.start()
            publish(other, name, "after")
        event = next(events)
        if event.data == "lost":  # its message had arrived
            event = next(events)
        assert event.event == "reset"


def test_first_events_that_were_lost_without_a_message_cause_a_reset(
    tmp_path: Path, make_backend: MakeBackend, name: str
) -> None:
    """The connection of the process was cut before these events."""
    with DurableValkey(tmp_path, appendonly="no") as server:
        backend, other = make_backend(server.url), make_backend(server.url)
        events = open_listener(backend, name)
        id = id_of(next(listen(other, name, None, 60.0)))
        with blocked(backend._reader):
            server.execute("CLIENT", "KILL", "TYPE", "pubsub")
            publish(other, name, "lost")
            server.terminate()
            server.start()
        assert next(events).event == "reset"
        publish(other, name, "after")
        assert receive(events, 1) == ["after"]
        assert types_of_first_two(reconnect(other, name, id)) == [None, "reset"]


@pytest.mark.parametrize("resumes", [True, False])
def test_listener_that_starts_while_redis_is_down_waits(
    failing_server: DurableValkey,
    make_backend: MakeBackend,
    caplog: pytest.LogCaptureFixture,
    name: str,
    resumes: bool,
) -> None:
    """It receives heartbeats until it resumes. Without an id it receives a reset."""
    caplog.set_level("INFO", "tgstream")
    backend = make_backend(failing_server.url)
    publish(backend, name, "before")
    known_id = backend.position(name)
    failing_server.terminate()
    events = listen(
        make_backend(failing_server.url), name, known_id if resumes else None, 0.01
    )
    # With this id, a client that is cut off now receives the reset when it reconnects.
    assert next(events) == Event(comment="open", id=None if resumes else "lost")
    assert next(events) == Event()
    failing_server.start()
    first = next(event for event in events if event.id is not None)
    assert (first.event, first.id) == (None if resumes else "reset", known_id)
    publish(backend, name, "after")
    second = next(event for event in events if event.data or event.event)
    assert (second.event, second.data) == (None, "after")
    lost, *rest = [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "tgstream"
    ]
    assert lost[0] == "WARNING"
    assert lost[1].startswith("Lost the connection to Redis (tgstream.channels): ")
    assert lost[1].endswith("d. Listeners wait until it reconnects")
    assert rest == [("INFO", "Reconnected to Redis (tgstream.channels)")]
