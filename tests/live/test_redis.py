"""``redis://``: channels of many processes, over a real server that may go away."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import redis
from tg import TGController

from tests.conftest import MakeApp
from tests.live.test_channel import Live, assert_reset, heard, id_of
from tests.pages import DOCS, blocks
from tests.valkey import Valkey
from tests.wsgi import get
from tgstream import Channel, Event
from tgstream.doctor.settings_checks import settings
from tgstream.live.backends.redis import Redis
from tgstream.live.history import Feed
from tgstream.testing import open_stream

numbers = count()


class Server(Valkey):
    """A Valkey that forgets nothing when it is killed, unless it is told to."""

    def __init__(self, folder: Path, appendonly: str = "yes") -> None:
        super().__init__(
            folder,
            appendonly=appendonly,
            appendfsync="always",
            stream_node_max_entries=10,  # it trims by so many
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that stays."""
    with Server(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Server]:
    """One that the test may kill and start."""
    server = Server(tmp_path / "valkey")
    server.start()
    yield server
    server.terminate()


@pytest.fixture
def name() -> str:
    """A channel of this test alone."""
    return f"test {next(numbers)}"


def test_server_that_answers_can_be_asked(server: Server) -> None:
    """As the doctor does."""
    [found] = [
        each
        for each in settings({"tgstream.channels": server.url})
        if each.name == "channels"
    ]
    assert (found.mark, found.found) == ("ok", f"{server.url} answers")


MakeHub = Callable[..., Redis]


@pytest.fixture
def make_hub(server: Server) -> Iterator[MakeHub]:
    """Makes what one process has of the server."""
    made: list[Redis] = []

    def make(url: str = server.url, history: int = 1000) -> Redis:
        made.append(Redis(url, history))
        return made[-1]

    yield make
    for hub in made:
        hub._streams.client.connection_pool.disconnect()


def listening(hub: Redis, name: str, beat: float = 60.0) -> Iterator[Event]:
    """A listener that has been opened."""
    events = hub.listen(name, None, beat)
    assert next(events).comment == "open"
    return events


def again(hub: Redis, name: str, after: str) -> Iterator[Event]:
    return hub.listen(name, after, 60.0)


# What is heard.


def test_redis_hands_on_between_processes(
    server: Server, make_app: MakeApp, name: str
) -> None:
    """What another process publishes is heard here, with its type."""
    make_app(TGController(), tgstream__channels=server.url)
    events = Channel(name).listen()
    assert heard(events, 1) == ["open"]
    publish = (
        "import sys; from tgstream.live.backends.redis import Redis\n"
        "Redis(sys.argv[1], 9).publish(sys.argv[2], '{\"a\":\"é\\\\nb\"}', 'greeting')"
    )
    subprocess.run([sys.executable, "-c", publish, server.url, name], check=True)
    event = next(events)
    assert (event.data, event.event) == ('{"a":"é\\nb"}', "greeting")
    assert heard(Channel(name).listen(after=id_of(event)), 1) == ["open"]


@pytest.mark.parametrize("had", [0, 1, 2])
def test_redis_resumes_in_another_process(
    make_hub: MakeHub, name: str, had: int
) -> None:
    """By the ids of the server, also where no event had come yet."""
    first, second = make_hub(), make_hub()
    events = first.listen(name, None, 60.0)
    last = next(events)
    first.publish(name, "0", None)
    second.publish(name, "1", None)
    for _ in range(had):
        last = next(events)
    expected = (
        ["open", "0", "1"][: 1 + 2 - had] if not had else ["open", "1"][: 3 - had]
    )
    resumed = again(make_hub(), name, id_of(last))
    second.publish(name, "2", None)
    assert heard(resumed, len(expected) + 1) == [*expected, "2"]
    # And where this process listens already, and has them.
    assert heard(again(first, name, id_of(last)), len(expected) + 1) == [*expected, "2"]


def test_redis_resumes_where_its_thread_is_behind(make_hub: MakeHub, name: str) -> None:
    """An id that came from a process which is quicker is no gap."""
    slow, quick = make_hub(), make_hub()
    slow._reading = True  # so that it begins no thread
    behind, ahead = listening(slow, name), listening(quick, name)
    for text in "012":
        quick.publish(name, text, None)
    ids = [id_of(event) for event in islice(ahead, 3)]
    assert heard(again(slow, name, ids[1]), 2) == ["open", "2"]
    assert heard(behind, 3) == ["0", "1", "2"]


@pytest.mark.parametrize(
    "forged",
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
    ],
    ids=lambda value: repr(value[:20]),
)
def test_redis_tells_of_an_id_that_it_never_gave(
    make_app: MakeApp, server: Server, name: str, forged: str
) -> None:
    """Foreign, forged or from the future: nobody knows what its client has had."""
    make_app(TGController(), tgstream__channels=server.url)
    assert_reset(Channel(name), forged)


def test_redis_tells_of_an_id_that_is_old(make_hub: MakeHub, name: str) -> None:
    """What the server has trimmed cannot be told; what it keeps is."""
    hub = make_hub(history=20)
    events = hub.listen(name, None, 60.0)
    ids = [id_of(next(events))]
    for number in range(60):
        hub.publish(name, str(number), None)
        ids.append(id_of(next(events)))
    del events
    for process in hub, make_hub():
        resumed = again(process, name, ids[40])
        assert heard(resumed, 21) == ["open", *map(str, range(40, 60))]
        for old in ids[0], ids[10]:
            opened, gap = islice(again(process, name, old), 2)
            assert opened == Event(comment="open")
            assert gap == Event("", event="reset", id=ids[60])
        assert heard(again(process, name, ids[60]), 1) == ["open"]


def test_redis_cuts_off_who_never_reads_and_it_resumes(
    make_hub: MakeHub, name: str
) -> None:
    """The server has kept what this process does not."""
    hub = make_hub(history=10)
    slow, quick = hub.listen(name, None, 60.0), listening(hub, name)
    id = id_of(next(slow))
    for number in range(11):
        hub.publish(name, str(number), None)
        next(quick)
    assert list(slow) == []
    assert heard(again(hub, name, id), 12) == ["open", *map(str, range(11))]


def test_redis_reads_once_what_many_have_missed(
    server: Server, make_hub: MakeHub, name: str
) -> None:
    """And a listener holds on to nothing of what it was sent."""
    hub = make_hub()
    id = id_of(next(hub.listen(name, None, 60.0)))
    for number in range(1000):
        hub.publish(name, f"{number}".rjust(1000), None)
    process = make_hub()
    sent = int(server.ask("INFO", "stats")["total_net_output_bytes"])
    tracemalloc.start()
    try:
        listeners = [again(process, name, id) for _ in range(200)]
        for events in listeners:
            assert sum(1 for _ in islice(events, 1001)) == 1001
        grown, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20, (grown, peak)
    read = int(server.ask("INFO", "stats")["total_net_output_bytes"]) - sent
    assert 1_000_000 < read < 2_000_000
    hub.publish(name, "next", None)
    assert [next(events).data for events in listeners] == ["next"] * 200


def test_redis_reads_a_long_backlog_a_few_at_a_time(
    make_hub: MakeHub, name: str
) -> None:
    """Where the process keeps less than the client has missed."""
    hub, process = make_hub(), make_hub(history=10)
    id = id_of(next(hub.listen(name, None, 60.0)))
    expected = [f"{number}".rjust(1000) for number in range(900)]
    for text in expected:
        hub.publish(name, text, None)
    tracemalloc.start()
    try:
        listeners = [again(process, name, id) for _ in range(3)]
        found = [[event.data for event in islice(each, 1)] for each in listeners]
        for events in listeners:
            for text in expected[:-1]:
                assert next(events).data == text
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [[None]] * 3
    assert peak < 2**20
    hub.publish(name, "next", None)
    for events in listeners:
        assert heard(events, 2) == [expected[-1], "next"]


@pytest.mark.parametrize(
    "fields",
    [("text", "x"), ("data", b"\xff"), ("data", "x", "event", "a\nb")],
    ids=repr,
)
def test_redis_tells_of_an_entry_that_is_no_event(
    server: Server, make_hub: MakeHub, name: str, fields: tuple[Any, ...]
) -> None:
    """Somebody else has put it there; it is not passed over, and harms nobody."""
    hub = make_hub()
    events = listening(hub, name)
    id = server.ask("XADD", f"tgstream:{name}", "*", *fields).decode()
    hub.publish(name, "next", None)
    assert next(events) == Event("", event="reset", id=id)
    assert heard(events, 1) == ["next"]


def test_redis_tells_of_a_stream_that_was_deleted(
    server: Server, make_hub: MakeHub, name: str
) -> None:
    """The events that are gone with it may not have been heard."""
    hub = make_hub()
    events = listening(hub, name)
    hub.publish(name, "before", None)
    assert heard(events, 1) == ["before"]
    server.ask("DEL", f"tgstream:{name}")
    hub.publish(name, "lost, or not", None)
    assert next(events).event == "reset"
    hub.publish(name, "after", None)
    assert heard(events, 1) == ["after"]


# The connection and the thread.


def connections(server: Server) -> int:
    """How many the server has, but the one that asks."""
    listed = server.ask("CLIENT", "LIST")
    clients = listed if isinstance(listed, list) else listed.decode().splitlines()
    return len(clients) - 1


def test_redis_reads_by_one_connection_for_all_who_listen(
    mortal: Server, make_hub: MakeHub
) -> None:
    """Also for a channel that nobody listened to, which it is asked for at once."""
    hub = make_hub(mortal.url)
    listeners = [listening(hub, f"channel {number % 10}") for number in range(100)]
    for number in range(10):
        hub.publish(f"channel {number}", str(number), None)
    for number, events in enumerate(listeners):
        assert heard(events, 1) == [str(number % 10)]
    assert connections(mortal) == 2  # one reads, one has published


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "tgstream-channels"]


def test_redis_ends_its_thread_when_nobody_listens(
    make_hub: MakeHub, name: str
) -> None:
    """And begins it anew."""
    for thread in threads():
        thread.join(10)
    assert threads() == []
    hub = make_hub()
    for _ in range(2):
        events = listening(hub, name)
        (thread,) = threads()
        hub.publish(name, "x", None)
        assert heard(events, 1) == ["x"]
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


def test_script_that_loads_its_application_publishes_to_all(
    make_app: MakeApp, server: Server, tmp_path: Path
) -> None:
    """As the page on live streams shows it: the option is the application's."""
    make_app(TGController(), tgstream__channels=server.url)
    events = Channel("users").listen()
    assert heard(events, 1) == ["open"]
    ini = f"[app:main]\nuse = call:scripted:main\ntgstream.channels = {server.url}\n"
    (tmp_path / "development.ini").write_text(ini)
    (tmp_path / "scripted.py").write_text(SCRIPTED)
    script = blocks((DOCS / "live.rst").read_text())[-1]
    (tmp_path / "script.py").write_text(f"from tgstream import Channel\n{script}")
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environ, check=True)
    assert heard(events, 1) == ['{"name":"ada"}']


def test_redis_is_another_in_a_forked_process(
    make_app: MakeApp, server: Server, name: str
) -> None:
    """No connection is shared, and the two hear each other."""
    make_app(TGController(), tgstream__channels=server.url)
    channel = Channel(name)
    events = channel.listen()
    assert heard(events, 1) == ["open"]
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        try:
            inside = channel.listen()
            channel.publish("from the child")
            assert heard(inside, 2) == ["open", "from the child"]
        finally:
            os._exit(0)
    assert heard(events, 1) == ["from the child"]
    assert os.waitpid(pid, 0)[1] == 0
    channel.publish("from the parent")
    assert heard(events, 1) == ["from the parent"]


def test_redis_works_on_greenlets() -> None:
    """Listeners, the reader and who publishes take turns on one thread."""
    script = Path(__file__).parents[1] / "live_apps" / "greenlets.py"
    subprocess.run([sys.executable, script], check=True, timeout=60)


def test_redis_is_asked_for_where_it_is_not_installed(
    make_app: MakeApp, server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what to install; memory:// needs none."""
    make_app(TGController(), tgstream__channels=f"{server.url}?db=1")
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "tgstream.live.backends.redis")
    with pytest.raises(ImportError, match=r"pip install 'tgstream\[redis\]'"):
        Channel(name).publish("x")
    make_app(TGController(), tgstream__channels="memory://")
    Channel(name).publish("x")


# The server goes away.


def test_redis_that_is_killed_and_comes_back_loses_nothing(
    make_app: MakeApp, mortal: Server, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Under 100 open streams, which stay open: each hears each event once."""
    app = make_app(Live(Channel(name)), tgstream__channels=mortal.url)
    streams = [open_stream(app, "/feed") for _ in range(100)]
    everything = [stream.events() for stream in streams]
    for events in everything:
        assert heard(events, 1) == ["open"]
    expected = []
    for round in range(3):
        for number in range(3):
            expected.append(f"{round}.{number}")
            get(app, f"/post?text={expected[-1]}")
        mortal.terminate()
        mortal.start()
    get(app, "/post?text=last")
    for events in everything:
        assert heard(events, 10) == [*expected, "last"]
    for stream in streams:
        stream.close()
    told = [each.getMessage() for each in caplog.records if each.name == "tgstream"]
    assert sum("is lost, and who listens waits" in each for each in told) <= 3


def test_redis_that_comes_back_without_its_data_is_told_of(
    tmp_path: Path, make_hub: MakeHub, name: str
) -> None:
    """Nobody knows what was lost with it."""
    server = Server(tmp_path, appendonly="no")
    server.start()
    hub = make_hub(server.url)
    events, other = listening(hub, name), listening(hub, f"{name}?")
    hub.publish(name, "before", None)
    (before,) = islice(events, 1)
    server.terminate()
    server.start()
    gap = next(events)
    assert gap == Event("", event="reset", id="0-0")
    hub.publish(name, "after", None)
    hub.publish(f"{name}?", "the first", None)
    assert heard(events, 1) == ["after"]
    assert heard(other, 1) == ["the first"]
    assert heard(again(hub, name, id_of(gap)), 2) == ["open", "after"]
    assert [event.event for event in islice(again(hub, name, id_of(before)), 2)] == [
        None,
        "reset",
    ]
    server.terminate()


def test_redis_that_loses_a_channels_first_events_unheard_cannot_tell(
    tmp_path: Path, make_hub: MakeHub, name: str
) -> None:
    """Where there was no event there is no place that could prove the loss; this is
    the one gap that is passed over."""
    with Server(tmp_path, appendonly="no") as server:
        hub, other = make_hub(server.url), make_hub(server.url)
        hub._reading = True  # so that it reads nothing yet
        events = listening(hub, name)
        other.publish(name, "lost", None)
        server.terminate()
        server.start()
        hub._reading = False
        hub._read_on()
        other.publish(name, "after", None)
        assert heard(events, 1) == ["after"]


@pytest.mark.parametrize("resumes", [True, False])
def test_listener_that_comes_while_redis_is_away_waits(
    mortal: Server,
    make_hub: MakeHub,
    caplog: pytest.LogCaptureFixture,
    name: str,
    resumes: bool,
) -> None:
    """It opens and beats; then it resumes, or hears that it may have missed some."""
    hub = make_hub(mortal.url)
    hub.publish(name, "before", None)
    known = id_of(next(hub.listen(name, None, 60.0)))
    mortal.terminate()
    events = make_hub(mortal.url).listen(name, known if resumes else None, 0.01)
    assert next(events) == Event(comment="open")
    assert next(events) == Event()
    mortal.start()
    found = next(event for event in events if event.id is not None)
    assert (found.event, found.id) == (None if resumes else "reset", known)
    hub.publish(name, "after", None)
    found = next(event for event in events if event.data or event.event)
    assert (found.event, found.data) == (None, "after")
    (told, *rest) = [each for each in caplog.records if each.name == "tgstream"]
    assert "is lost, and who listens waits" in told.getMessage()
    assert [each.getMessage() for each in rest] == [
        "the server of tgstream.channels is back"
    ]


def test_publish_fails_while_redis_is_away(
    make_app: MakeApp, mortal: Server, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """At once it raises; in a transaction that has committed, the log has it."""
    root = Live(Channel(name))
    app = make_app(root, tgstream__channels=mortal.url, tm__enabled=True)
    mortal.terminate()
    assert get(app, "/post?text=lost").text == "posted"
    told = [each.getMessage() for each in caplog.records if each.name == "tgstream"]
    assert told == [
        f"an event of Channel('{name}') is lost: it could not be sent after the commit"
    ]
    with pytest.raises(redis.ConnectionError):
        Channel(name).publish("lost", now=True)


def test_listeners_may_leave_while_it_is_looked_who_is_there() -> None:
    """The thread that reads goes on without those, and ends with the last."""

    class Name(str):
        def __hash__(self) -> int:
            if len(held) == 2:
                held.pop()
            return super().__hash__()

    hub, held = Redis("redis://127.0.0.1:1/0", 10), list[Feed]()
    for name in "stays", "leaves":
        feed = hub._feeds[Name(name)] = Feed((0, 0), 10)
        held.append(feed)
        del feed
    assert hub._listened_to().keys() <= {"stays", "leaves"}
    assert hub._listened_to().keys() == {"stays"}
    held.clear()
    assert hub._listened_to() == {}
