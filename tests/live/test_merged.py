"""``listen()`` for several channels, and ``position()``."""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
from tg import TGController, expose

import tgstream
from tests.conftest import MakeApp
from tests.formats.support import parse_events
from tests.live.listeners import id_of, receive
from tests.live.redis_servers import close_backends
from tests.model import MakeModel
from tests.valkey import DurableValkey, Valkey
from tests.wsgi import Call, get
from tgstream import SSE, Channel, Event, last_event_id, listen, position, stream
from tgstream.channels import metadata
from tgstream.formats.sse import Message
from tgstream.live import places
from tgstream.live.backends.database import DatabaseBackend
from tgstream.live.backends.database_tables import create_tables
from tgstream.live.backends.memory import MemoryBackend
from tgstream.live.backends.redis import RedisBackend
from tgstream.live.history import HEARTBEAT, wake_all_listeners
from tgstream.live.merged import listen_to_all
from tgstream.live.places import read_position
from tgstream.live.protocols import Backend, ChannelSettings

Process = Callable[[], Backend]
"""Returns the back end of a process. All processes share their channels."""


@pytest.fixture
def names(make_app: MakeApp, name: str) -> list[str]:
    """Names of three channels that no other test uses."""
    return [f"{name} {letter}" for letter in "abc"]


def texts(events: Iterator[Event], count: int) -> list[tuple[str | None, Any]]:
    """The channels and the data of the next events."""
    return [(event.channel, event.data) for event in islice(events, count)]


def open_all(*names: str, after: str | None = None) -> tuple[Iterator[Event], str]:
    """A listener that has received its opening comment, and its id."""
    events = listen(*names, after=after)
    opening = next(events)
    assert opening == Event(comment="open", id=opening.id)
    return events, id_of(opening)


def assert_resets(names: list[str], after: str | None) -> None:
    """Each channel sends a reset, and then the stream goes on from there."""
    events = listen(*names, after=after)
    assert next(events) == Event(comment="open")
    resets = list(islice(events, len(names)))
    expected = [
        Event(name, event="reset", id=reset.id, channel=name)
        for name, reset in zip(sorted(names), resets, strict=True)
    ]
    assert resets == expected
    Channel(names[0]).publish("next")
    assert texts(events, 1) == [(names[0], "next")]
    again, _ = open_all(*names, after=id_of(resets[-1]))
    assert texts(again, 1) == [(names[0], "next")]


# Parameters.


def test_listen_accepts_names_and_channels(names: list[str]) -> None:
    """A channel that is given twice is listened to once."""
    events, _ = open_all(names[0], names[1])
    same = listen(Channel(names[0]), names[1], Channel(names[1]))
    Channel(names[0]).publish("1")
    Channel(names[1]).publish("2")
    expected = [(names[0], "1"), (names[1], "2")]
    assert texts(events, 2) == expected
    assert texts(same, 3)[1:] == expected


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((), {}, TypeError, r"^listen\(\) needs at least one channel"),
        ((7,), {}, TypeError, "Channel name must be a str, got int: 7"),
        (("a", ""), {}, ValueError, "Channel name must be 1 to 256 characters"),
        (("a\nb",), {}, ValueError, "without CR, LF or NUL"),
        (("a", "b"), {"after": 7}, TypeError, "after must be a str or None, got int"),
        (("a",), {"since": 0}, ValueError, "since must be a number of seconds > 0"),
        (("a", "b"), {"since": "1"}, ValueError, "since must be a number of seconds"),
    ],
)
def test_listen_rejects_invalid_parameters(
    arguments: Any, options: Any, error: type[Exception], match: str
) -> None:
    """The call raises, and not the stream."""
    with pytest.raises(error, match=match):
        listen(*arguments, **options)


def test_listen_to_one_channel_is_the_listener_of_the_channel(
    names: list[str],
) -> None:
    """It sends the same events, with the ids of the channel."""
    first, second = listen(names[0]), Channel(names[0]).listen()
    Channel(names[0]).publish("x")
    assert list(islice(first, 2))[1] is list(islice(second, 2))[1]
    assert position(names[0]) == Channel(names[0]).position()


# Events.


def test_event_names_its_channel(names: list[str]) -> None:
    """A listener of one channel has the name, too. The bytes do not contain it."""
    one, all_of_them = Channel(names[0]).listen(), listen(*names)
    Channel(names[0]).publish({"a": "b\nc"}, event="x")
    for events in one, all_of_them:
        event = list(islice(events, 2))[1]
        assert (event.channel, event.event, event.json()) == (
            names[0],
            "x",
            {"a": "b\nc"},
        )
        [chunk] = SSE().encode([event])
        assert chunk == (
            f'event: x\nid: {event.id}\ndata: {{"a":"b\\nc"}}\n\n'.encode()
        )


def test_merged_listener_shares_the_encoded_data(names: list[str]) -> None:
    """Only the id differs from that of a listener of this channel alone."""
    text = "line\r\n" * 3
    one, all_of_them = Channel(names[0]).listen(), listen(*names)
    Channel(names[0]).publish(text, event="x")
    chunks = [
        next(SSE().encode([list(islice(events, 2))[1]]))
        for events in (one, all_of_them)
    ]
    first, second = [chunk.partition(b"data: ")[2] for chunk in chunks]
    assert first == second
    assert parse_events(chunks[1]).messages[0].data == text.replace("\r\n", "\n")


def test_merged_listener_keeps_the_order_of_each_channel(names: list[str]) -> None:
    """No event is lost, and none is sent twice, with several publishers."""
    listeners = [listen(*names) for _ in range(3)]
    received: list[list[tuple[str | None, Any]]] = [[] for _ in listeners]

    def publish(name: str) -> None:
        for number in range(100):
            Channel(name).publish(str(number))

    def read(events: Iterator[Event], into: list[Any]) -> None:
        into += texts(events, 301)[1:]

    threads: list[threading.Thread] = [
        threading.Thread(target=publish, args=[name]) for name in names
    ]
    for pair in zip(listeners, received, strict=True):
        threads.append(threading.Thread(target=read, args=pair))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for events in received:
        for name in names:
            own = [data for channel, data in events if channel == name]
            assert own == [str(number) for number in range(100)]


# Reconnecting.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A server for all tests of this file."""
    with Valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(params=["memory", "redis", "sqlite", "postgresql"])
def process(
    request: pytest.FixtureRequest, server: Valkey, make_model: MakeModel
) -> Iterator[Process]:
    """Creates the back ends of processes. ``memory://`` has one process."""
    memory, settings = MemoryBackend(ChannelSettings()), ChannelSettings()
    engines: list[sa.Engine] = []
    if request.param in ("sqlite", "postgresql"):
        folder = request.getfixturevalue("tmp_path")
        url = f"sqlite:///{folder}/test.db"
        if request.param == "postgresql":
            url = request.getfixturevalue("postgresql")
        model = make_model(url)
        metadata.drop_all(model.outside)
        create_tables(model.outside)

    def make() -> Backend:
        if request.param == "memory":
            return memory
        if request.param == "redis":
            return RedisBackend(server.url, settings)
        engines.append(sa.create_engine(model.url))
        model._skip_fsync(engines[-1])
        return DatabaseBackend(model.DBSession, engines[-1], settings)

    yield make
    for engine in engines:
        engine.dispose()
    gc.collect()


def publish_to(backend: Backend, name: str, text: str) -> None:
    backend.publish([Message(name, text)])


@pytest.mark.parametrize("count", [2, 15, 40])
def test_client_can_reconnect_at_every_event(
    process: Process, name: str, count: int
) -> None:
    """Each id is short, and any process resumes exactly after its event."""
    names = [f"{name} {number}" for number in range(count)]
    random, backend = Random(count), process()
    events = listen_to_all(backend, names, None, 60.0)
    ids, sent = [id_of(next(events))], []
    for number in range(30):
        sent.append((random.choice(names), str(number)))
        publish_to(backend, *sent[-1])
        event = next(events)
        assert (event.channel, event.data) == sent[-1]
        ids.append(id_of(event))
    assert len(set(ids)) == len(ids)
    for id in ids:
        assert re.fullmatch("[A-Za-z0-9._~-]{1,256}", id)
    for index in range(0, 31, 6):
        resumed = listen_to_all(process(), reversed(names), ids[index], 60.0)
        assert next(resumed) == Event(comment="open", id=ids[index])
        missed = texts(resumed, 30 - index)
        assert sorted(missed) == sorted(sent[index:])
        for each in names:
            own = [data for channel, data in missed if channel == each]
            assert own == [data for channel, data in sent[index:] if channel == each]


def test_client_can_reconnect_in_the_middle_of_the_missed_events(
    process: Process, name: str
) -> None:
    """The order of the channels differs after the reconnect, and nothing is lost."""
    names, backend = [f"{name} {letter}" for letter in "abc"], process()
    start = id_of(next(listen_to_all(backend, names, None, 60.0)))
    sent = {(each, str(number)) for number in range(4) for each in names}
    for each, text in sorted(sent):
        publish_to(backend, each, text)
    id, received = start, list[Any]()
    while len(received) < len(sent):
        events = listen_to_all(process(), names, id, 60.0)
        assert next(events) == Event(comment="open", id=id)
        for event in islice(events, 1):
            received.append((event.channel, event.data))
            id = id_of(event)
    assert len(received) == len(set(received))
    assert set(received) == sent


def test_gap_in_one_channel_resets_this_channel_only(
    make_app: MakeApp, names: list[str]
) -> None:
    """The missed events of the other channels follow."""
    make_app(TGController(), tgstream__channel_history="3")
    _, id = open_all(*names)
    for number in range(4):
        Channel(names[1]).publish(str(number))
    Channel(names[0]).publish("first")
    Channel(names[2]).publish("last")
    for _ in range(2):  # the opening comment has no id, so the client keeps its own
        events = listen(*names, after=id)
        assert next(events) == Event(comment="open")
    reset, first, last = islice(events, 3)
    expected = Event(names[1], event="reset", id=reset.id, channel=names[1])
    assert reset == expected
    assert [(each.channel, each.data) for each in (first, last)] == [
        (names[0], "first"),
        (names[2], "last"),
    ]
    again, _ = open_all(*names, after=id_of(reset))
    assert texts(again, 2) == [(names[0], "first"), (names[2], "last")]
    again, _ = open_all(*names, after=id_of(last))
    Channel(names[1]).publish("next")
    assert texts(again, 1) == [(names[1], "next")]


def test_client_that_disconnects_between_two_resets_receives_the_second_one(
    names: list[str],
) -> None:
    """The id of the first reset does not hold a place in the other channel."""
    events = listen(*names[:2], after="unknown")
    first = list(islice(events, 2))[1]
    resumed = listen(*names[:2], after=id_of(first))
    assert next(resumed) == Event(comment="open")
    second = next(resumed)
    expected = Event(names[1], event="reset", id=second.id, channel=names[1])
    assert second == expected


@pytest.mark.parametrize(
    "id",
    [
        *("", "7", "x", "0" * 10_000, "a\r\nb", "a\0", "1-1", "00000000-1", "٣-٣"),
        *("m", "m.", "m........", "s", "s.", "s..", "s....", "m" * 256, "." * 10_000),
        *("00000000-0.00000000-0.00000000-0", "~", "s.0-0.x.0~0-0"),
    ],
)
def test_foreign_id_resets_all_channels(names: list[str], id: str) -> None:
    """The id may be of one channel, forged, or very long."""
    assert_resets(names, id)


def test_id_of_other_channels_resets_all_channels(names: list[str]) -> None:
    """The id of more channels, of fewer channels and of one channel."""
    for others in names[:2], [*names, "other"], [*names[:2], "other"], names[:1]:
        assert_resets(names, position(*others))
    reset = list(islice(listen(names[0], after=position(*names)), 2))[1]
    assert (reset.event, reset.data) == ("reset", names[0])


@pytest.mark.parametrize("count", [3, 40])
def test_changed_id_is_another_place_or_causes_a_reset(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    """An id that was cut or forged never raises, and gives no other events."""
    make_app(TGController(), tgstream__heartbeat_seconds="0.001")
    monkeypatch.setattr(places, "LOAD_SECONDS", 0.001)
    names = [f"{name} {number}" for number in range(count)]
    events, id = open_all(*names)
    Channel(names[0]).publish("first")
    id, random = id_of(next(events)), Random(7)
    forged = [id[:length] for length in range(len(id))]
    for _ in range(100):
        at = random.randrange(len(id))
        change = random.choice(["", "~", ".", "0", "9" * 30, "-", "\u0663", "s"])
        forged.append(id[:at] + change + id[at + random.randrange(3) :])
    changes = "0", "0~", "40~0-0", "99999999~1", "-1~1", "0~" + "9" * 10_000, "~"
    forged += [f"{id}.{change}" for change in changes]
    for after in forged:
        opening, second = islice(listen(*names, after=after), 2)
        assert opening.comment == "open"
        if opening.id is None:
            assert (second.event, second.data in names) == ("reset", True)
        else:
            assert second in (HEARTBEAT, Event("first", id=second.id, channel=names[0]))


def test_places_that_cannot_be_stored_cause_a_reset(
    make_app: MakeApp,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The events are sent, and a reconnect resets all channels. One line is logged."""

    class Failing(MemoryBackend):
        def publish(self, messages: Any) -> None:
            if messages[0].channel.startswith("\n"):
                raise PermissionError("not allowed.")
            super().publish(messages)

    names, backend = (
        [f"{name} {number}" for number in range(40)],
        Failing(ChannelSettings()),
    )
    events = listen_to_all(backend, names, None, 60.0)
    opening = next(events)
    publish_to(backend, names[5], "x")
    event = next(events)
    assert (event.channel, event.data, event.id) == (names[5], "x", opening.id)
    resumed = listen_to_all(backend, names, id_of(event), 60.0)
    resets = list(islice(resumed, 41))[1:]
    assert [reset.data for reset in resets] == sorted(names)
    [record] = caplog.records
    assert record.getMessage() == (
        "Cannot store the place of a stream of 40 channels: not allowed. Its client "
        "receives a reset when it reconnects"
    )


def test_stored_place_that_is_lost_resets_all_channels(name: str) -> None:
    """Another process of ``memory://`` does not have it."""
    names = [f"{name} {number}" for number in range(40)]
    id = read_position(MemoryBackend(ChannelSettings()), names)
    assert id.startswith("s")
    events = listen_to_all(MemoryBackend(ChannelSettings()), names, id, 60.0)
    assert [event.event for event in islice(events, 41)] == [None] + ["reset"] * 40


def test_forged_place_in_a_busy_storage_causes_a_reset(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parser does not wait as long as other clients store places."""
    monkeypatch.setattr(places, "LOAD_SECONDS", 0.2)
    backend, stop = MemoryBackend(ChannelSettings()), threading.Event()
    names = [f"{name} {number}" for number in range(40)]
    id = read_position(backend, names)
    storage = places.Places(backend, names)._storage

    def store_often() -> None:
        while not stop.wait(0.05):
            publish_to(backend, storage, "nonce.place")

    def stop_after_a_time() -> None:
        if not stop.wait(5):
            stop.set()
            late.append(True)

    late: list[bool] = []
    threads = [
        threading.Thread(target=each) for each in (store_often, stop_after_a_time)
    ]
    for thread in threads:
        thread.start()
    forged = f"{id.rpartition('.')[0]}.forged"
    events = listen_to_all(backend, names, forged, 60.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert late == []
    assert [event.event for event in islice(events, 41)] == [None] + ["reset"] * 40


def test_listeners_of_one_process_share_their_stored_places(name: str) -> None:
    """A place is stored once in about twelve events, however many clients listen."""
    names = [f"{name} {number}" for number in range(40)]
    backend, stored = MemoryBackend(ChannelSettings()), 0
    listeners = [listen_to_all(backend, names, None, 60.0) for _ in range(10)]
    storage = places.Places(backend, names)._storage
    for events in listeners:
        next(events)
    for each in names:
        publish_to(backend, each, "x")
        for events in listeners:
            assert next(events).channel == each
    stored = backend._histories[storage].next_number
    assert 3 <= stored <= 6


def test_since_bounds_the_age_of_missed_events(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A channel with an older event sends a reset, with one channel or several."""
    now = 1000.0
    monkeypatch.setattr("tgstream.live.backends.memory.clock", lambda: now)
    _, id = open_all(*names)
    own_id = position(names[0])
    Channel(names[0]).publish("old")
    now += 60
    Channel(names[1]).publish("new")
    first, second = islice(listen(*names, after=id, since=59), 1, 3)
    assert (first.event, first.channel) == ("reset", names[0])
    assert (second.event, second.data) == (None, "new")
    assert texts(listen(*names, after=id, since=61), 2)[1] == (names[0], "old")
    one = listen(names[0], after=own_id, since=59)
    assert [event.event for event in islice(one, 2)] == [None, "reset"]
    assert receive(listen(names[0], after=own_id, since=61.0), 2) == ["open", "old"]
    assert receive(Channel(names[0]).listen(own_id, since=61.0), 2)[1] == "old"


# Waiting.


def test_merged_listener_receives_a_heartbeat_after_a_time_without_events(
    make_app: MakeApp, names: list[str]
) -> None:
    """It is a comment without an id, so that a reconnect misses nothing."""
    make_app(TGController(), tgstream__heartbeat_seconds="0.01")
    events, _ = open_all(*names)
    assert [next(events), next(events)] == [Event(), Event()]
    Channel(names[2]).publish("x")
    assert texts(events, 1) == [(names[2], "x")]
    assert next(events) == Event()


def test_merged_listener_waits_on_its_own_thread(names: list[str]) -> None:
    """An event of any channel wakes it, and sends no heartbeat."""
    (events, _), threads = open_all(*names), threading.active_count()
    received: list[Any] = []
    listener = threading.Thread(target=lambda: received.extend(texts(events, 3)))
    listener.start()
    assert threading.active_count() == threads + 1
    expected = [(names[1], "1"), (names[0], "2"), (names[2], "3")]
    for name, text in expected:
        Channel(name).publish(text)
    listener.join(10)
    assert sorted(received) == sorted(expected)


def test_wake_all_listeners_wakes_a_merged_listener(names: list[str]) -> None:
    """It receives a heartbeat, so that drain() can end its stream."""
    events, _ = open_all(*names)
    received: list[Event] = []
    listener = threading.Thread(target=lambda: received.append(next(events)))
    listener.start()
    while listener.is_alive():
        wake_all_listeners()
        listener.join(0.01)
    assert received == [HEARTBEAT]


def test_timeout_of_another_listener_does_not_wake_a_merged_listener(
    names: list[str],
) -> None:
    """A listener of one channel with a short heartbeat wakes only its own kind."""
    backend = MemoryBackend(ChannelSettings())
    events = listen_to_all(backend, names, None, 60.0)
    next(events)
    received: list[Event] = []
    listener = threading.Thread(target=lambda: received.append(next(events)))
    listener.start()
    history = backend.subscribe(names[0], None).history
    assert history is not None
    for _ in range(3):
        assert history.wait_for_event(0, 0.01) is HEARTBEAT
    publish_to(backend, names[1], "x")
    listener.join(10)
    assert [event.data for event in received] == ["x"]


def test_merged_listener_that_never_reads_is_disconnected(
    make_app: MakeApp, names: list[str]
) -> None:
    """The stream ends, and the client resumes each channel as far as it is stored."""
    make_app(TGController(), tgstream__channel_history=3)
    events, _ = open_all(*names)
    Channel(names[0]).publish("first")
    for number in range(4):
        Channel(names[1]).publish(str(number))
    first, *others = events
    assert (first.data, others) == ("first", [])
    resumed = listen(*names, after=id_of(first))
    assert [event.event for event in islice(resumed, 2)] == [None, "reset"]


def test_dropped_merged_listener_is_freed(names: list[str]) -> None:
    """The histories of its channels do not keep it."""
    backend = MemoryBackend(ChannelSettings())
    events = listen_to_all(backend, names, None, 0.001)
    assert list(islice(events, 2))[1] is HEARTBEAT
    histories = [backend.subscribe(name, None).history for name in names]
    del events
    for history in histories:
        assert history is not None
        assert history._waiters is not None
        assert list(history._waiters.values()) == []


# A server that is lost.


def test_merged_listener_waits_while_the_server_is_lost(
    tmp_path: Path, names: list[str]
) -> None:
    """It sends heartbeats, and then a reset for each channel, or all missed events."""
    server = DurableValkey(tmp_path)
    server.start()
    backends = [RedisBackend(server.url, ChannelSettings()) for _ in range(3)]
    try:
        backend = backends[0]
        id = read_position(backend, names)
        publish_to(backend, names[1], "missed")
        server.terminate()
        assert re.fullmatch("m[^.]+", read_position(backend, names))
        new, resumed = (
            listen_to_all(other, names, after, 0.01)
            for other, after in zip(backends[1:], (None, id), strict=True)
        )
        for events, opening_id in (new, "lost"), (resumed, None):
            opening = Event(comment="open", id=opening_id)
            assert list(islice(events, 2)) == [opening, HEARTBEAT]
        server.start()
        resets = [event for event in islice(new, 100) if event is not HEARTBEAT][:3]
        assert [(each.event, each.channel) for each in resets] == [
            ("reset", each) for each in names
        ]
        rest = (event for event in resumed if event is not HEARTBEAT)
        assert next(rest) == Event(comment="open", id=id)
        assert texts(rest, 1) == [(names[1], "missed")]
        del new, resumed, rest, events
    finally:
        close_backends(backends)
        server.terminate()


def test_position_does_not_raise_while_the_server_is_lost(
    make_app: MakeApp, names: list[str], server: Valkey
) -> None:
    """The page is rendered, and its stream begins with a reset."""
    make_app(TGController(), tgstream__channels="redis://127.0.0.1:1")
    one, several = position(names[0]), position(*names)
    assert re.fullmatch("[A-Za-z0-9._~-]{1,256}", several)
    make_app(TGController(), tgstream__channels=server.url)
    for channels, after in ((names[:1], one), (names, several)):
        events = list(islice(listen(*channels, after=after), 1 + len(channels)))
        assert [event.event for event in events[1:]] == ["reset"] * len(channels)


# Pages.


class Shop(TGController):
    """A page that shows the events so far, and its stream."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        expose()(Shop.page)
        expose()(Shop.buy)
        expose()(Shop.feed)
        stream(SSE)(Shop.feed)

    def page(self) -> str:
        return position(*self.names)

    def buy(self, name: str) -> str:
        Channel(name).publish({"bought": name})
        return position(*self.names)

    def feed(self) -> Iterator[Event]:
        return listen(*self.names, after=last_event_id())


@pytest.mark.parametrize("count", [1, 3])
def test_page_misses_no_event_after_its_position(
    make_app: MakeApp, names: list[str], count: int
) -> None:
    """Events between the page and its stream are sent, and no earlier ones."""
    app = make_app(Shop(names[:count]), tm__enabled=True)
    get(app, "/buy", QUERY_STRING=f"name={names[0]}")
    id = get(app, "/page").text
    Channel(names[0]).publish("between")
    body = Call(app, f"/feed?lastEventId={id}")
    assert b": open" in next(body)
    assert b"data: between" in next(body)
    body.close()


def test_position_is_before_the_uncommitted_events_of_its_request(
    make_app: MakeApp, names: list[str]
) -> None:
    """They are sent after the commit, so the page's stream contains them."""
    app = make_app(Shop(names), tm__enabled=True)
    id = get(app, "/buy", QUERY_STRING=f"name={names[0]}").text
    events, _ = open_all(*names, after=id)
    event = next(events)
    assert event.json() == {"bought": names[0]}


def test_position_and_listen_are_public() -> None:
    """They can be imported from the package and from ``tgstream.channels``."""
    from tgstream import channels

    assert channels.listen is tgstream.listen
    assert channels.position is tgstream.position
