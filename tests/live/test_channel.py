"""``Channel`` with ``memory://``: which events a listener receives, and when."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tg
from tg import TGController

from tests.conftest import MakeApp
from tests.forks import run_python
from tests.formats.support import encode_events, parse_events
from tests.live.listeners import (
    LiveController,
    assert_reset,
    id_of,
    open_listener,
    receive,
    types_of_first_two,
)
from tests.wsgi import get
from tgstream import SSE, Channel, Event
from tgstream.live.backends.memory import MAX_CHANNELS, MemoryBackend
from tgstream.live.protocols import ChannelSettings
from tgstream.testing import open_stream

# Names.


@pytest.mark.parametrize("name", ["", "a\rb", "a\nb", "a\0b", "x" * 10_000, "\ud800"])
def test_invalid_channel_name_is_rejected(name: str) -> None:
    """A name is one short line."""
    match = r"^Channel name must (be 1 to 256|not contain a lone)"
    with pytest.raises(ValueError, match=match):
        Channel(name)


def test_channel_name_and_event_id_must_be_text() -> None:
    """The error shows the type and the value."""
    with pytest.raises(TypeError, match=r"^Channel name must be a str, got int: 7$"):
        Channel(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="after must be a str or None, got int: 7"):
        Channel("x").listen(after=7)  # type: ignore[arg-type]


def test_channels_with_the_same_name_are_equal() -> None:
    """They can be keys of a dictionary, because nothing can change their names."""
    channel = Channel("a")
    assert channel == Channel("a")
    assert hash(channel) == hash(Channel("a"))
    assert channel != Channel("b")
    text: object = "a"
    assert channel != text
    assert len({channel, Channel("a"), Channel("b")}) == 2
    with pytest.raises(AttributeError):
        channel.name = "b"  # type: ignore[misc]
    assert repr(channel) == "Channel('a')"


# Events.


def test_listeners_receive_what_is_published_after_listen(channel: Channel) -> None:
    """All of them receive the same events in the same order."""
    channel.publish("before")
    listeners = [channel.listen(), Channel(channel.name).listen()]
    channel.publish("text", event="greeting")
    channel.publish({"id": 7})
    channel.publish(None)
    for events in listeners:
        opening, *rest = islice(events, 4)
        assert opening == Event(comment="open", id=opening.id)
        assert [event.data for event in rest] == ["text", '{"id":7}', "null"]
        assert [event.event for event in rest] == ["greeting", None, None]


def test_listener_does_not_receive_events_of_another_channel(channel: Channel) -> None:
    """A channel with another name is another channel."""
    events = channel.listen()
    Channel(f"{channel.name}?").publish("elsewhere")
    channel.publish("here")
    assert receive(events, 2) == ["open", "here"]


def test_event_is_encoded_once_for_all_listeners(channel: Channel) -> None:
    """All listeners receive the same object, which holds its bytes."""
    listeners = [channel.listen() for _ in range(3)]
    channel.publish("a\r\nb", event="x")
    events = [list(islice(listener, 2))[1] for listener in listeners]
    assert events[0] is events[1] is events[2]
    chunks = [next(SSE().encode([event])) for event in events]
    assert chunks[0] is chunks[1] is chunks[2]
    fields = Event("a\r\nb", event="x", id=events[0].id)
    assert chunks[0] == encode_events(fields)
    assert parse_events(chunks[0]).messages[0].data == "a\nb"


@pytest.mark.parametrize("text", ["a\r\nb", "é", ""])
def test_publish_encodes_text_once(channel: Channel, text: str) -> None:
    """It creates no JSON encoder, and no event that it does not store."""
    events, calls = open_listener(channel), list[str]()

    def note_call(frame: Any, kind: str, argument: Any) -> None:
        if kind == "call" and "tgstream" in frame.f_code.co_filename:
            module = Path(frame.f_code.co_filename).stem
            calls.append(f"{module}.{frame.f_code.co_name}")

    channel.publish("before")
    sys.setprofile(note_call)
    try:
        channel.publish(text)
    finally:
        sys.setprofile(None)
    assert calls.count("sse._encode_utf8") == calls.count("memory._append") == 1
    assert "sse.__post_init__" not in calls
    assert not [call for call in calls if call.startswith("json_encoder.")]
    assert receive(events, 2) == ["before", text]


@pytest.mark.parametrize(
    ("data", "event", "error", "match"),
    [
        (
            b"x",
            None,
            TypeError,
            r"to Channel\('x'\) cannot be sent as an event: .*got bytes",
        ),
        (float("nan"), None, ValueError, "cannot be sent as an event: .*NaN"),
        (object(), None, TypeError, "cannot be encoded as JSON"),
        ("\ud800", None, ValueError, "lone surrogate"),
        ("x", "a\nb", ValueError, "CR, LF or NUL"),
        ("x", "a\0b", ValueError, "CR, LF or NUL"),
        ("x", 7, TypeError, "event must be a str or None, got int: 7"),
    ],
)
def test_publish_rejects_invalid_events(
    data: Any, event: Any, error: type[Exception], match: str
) -> None:
    """The call to publish() raises, and not the stream of a listener."""
    with pytest.raises(error, match=match):
        Channel("x").publish(data, event=event)


def test_concurrent_publishers_and_listeners_lose_no_event(channel: Channel) -> None:
    """Each listener receives all events, in the same order."""
    listeners = [channel.listen() for _ in range(4)]
    received: list[list[str]] = [[] for _ in listeners]

    def publish(name: int) -> None:
        for number in range(100):
            channel.publish(f"{name} {number}")

    def listen(events: Iterator[Event], into: list[str]) -> None:
        into.extend(receive(events, 401))

    threads: list[threading.Thread] = [
        *(threading.Thread(target=publish, args=[name]) for name in range(4)),
        *(
            threading.Thread(target=listen, args=pair)
            for pair in zip(listeners, received, strict=True)
        ),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert received[0] == received[1] == received[2] == received[3]
    assert len(set(received[0])) == 401


# Reconnecting.


@pytest.mark.parametrize("received", ["all", "some", "none"])
def test_listener_that_reconnects_receives_the_events_it_missed(
    channel: Channel, received: str
) -> None:
    """It receives no event twice. The opening comment has an id, too."""
    events = channel.listen()
    last = next(events)
    channel.publish("1")
    channel.publish("2")
    for _ in range({"all": 2, "some": 1, "none": 0}[received]):
        last = next(events)
    channel.publish("3")
    reconnected = channel.listen(after=id_of(last))
    assert next(reconnected) == Event(comment="open", id=last.id)
    channel.publish("4")
    missed = {"all": ["3", "4"], "some": ["2", "3", "4"], "none": ["1", "2", "3", "4"]}
    assert receive(reconnected, len(missed[received])) == missed[received]


def test_listener_can_reconnect_after_events_of_other_channels(
    channel: Channel,
) -> None:
    """An id stays valid if all newer events are in other channels."""
    events = channel.listen()
    Channel(f"{channel.name}?").publish("elsewhere")
    id = id_of(next(channel.listen()))
    Channel(f"{channel.name}?").publish("elsewhere")
    assert receive(channel.listen(after=id), 1) == ["open"]
    channel.publish("here")
    assert receive(channel.listen(after=id), 2) == ["open", "here"]
    assert receive(events, 2) == ["open", "here"]


@pytest.mark.parametrize(
    "id",
    [
        *("", "7", "x", "0" * 10_000, "a\r\nb", "a\0", "1-1", "00000000-1", "٣-٣"),
        *("18446744073709551615-18446744073709551615", "18446744073709551615-0"),
        *("18446744073709551616-0", "0-18446744073709551615"),
    ],
)
def test_foreign_event_id_causes_a_reset(channel: Channel, id: str) -> None:
    """The channel cannot determine which events the client missed."""
    assert_reset(channel, id)


def test_event_id_from_the_future_causes_a_reset(channel: Channel) -> None:
    """The channel has not sent this id."""
    process, _, number = id_of(next(channel.listen())).partition("-")
    assert_reset(channel, f"{process}-{int(number) + 100}")
    assert_reset(channel, f"{process}-{10**30}")
    assert_reset(channel, f"{process}-0{number}")


def test_event_id_that_is_too_old_causes_a_reset(
    make_app: MakeApp, channel: Channel
) -> None:
    """An event after it is no longer stored."""
    make_app(TGController(), tgstream__channel_history="3")
    events = channel.listen()
    ids = [id_of(next(events))]
    for number in range(4):
        channel.publish(str(number))
        ids.append(id_of(next(events)))
    assert receive(channel.listen(after=ids[1]), 4) == ["open", "1", "2", "3"]
    assert types_of_first_two(channel.listen(after=ids[0])) == [None, "reset"]
    assert_reset(channel, ids[0])


def test_listener_that_never_reads_is_disconnected(
    make_app: MakeApp, channel: Channel
) -> None:
    """It may be behind by as many events as are stored. Then it must reconnect."""
    make_app(TGController(), tgstream__channel_history=3)
    slow, quick = open_listener(channel), open_listener(channel)
    for number in range(3):
        channel.publish(str(number))
    received = list(islice(quick, 3))
    assert [event.data for event in received] == ["0", "1", "2"]
    channel.publish("3")
    assert list(slow) == []
    assert receive(quick, 1) == ["3"]
    reconnected = channel.listen(after=id_of(received[0]))
    assert receive(reconnected, 4) == ["open", "1", "2", "3"]
    for number in range(4, 8):
        channel.publish(str(number))
    assert list(quick) == []
    assert_reset(channel, id_of(received[0]))


def test_number_of_channels_without_listeners_is_bounded(
    make_app: MakeApp, channel: Channel
) -> None:
    """Users may choose the names. A channel that was dropped causes a reset."""
    events = channel.listen()
    id = id_of(next(events))
    dropped = Channel(f"{channel.name}, dropped")
    old_id = id_of(next(dropped.listen()))
    dropped.publish("dropped")
    for number in range(MAX_CHANNELS):
        Channel(f"many {number}").publish("x")
    channel.publish("kept")
    assert receive(events, 1) == ["kept"]
    assert receive(channel.listen(after=id), 2)[1] == "kept"
    assert_reset(dropped, old_id)


def test_event_id_does_not_count_the_events_of_other_channels(
    channel: Channel,
) -> None:
    """An id shows only its own channel's number of events."""
    events, other = channel.listen(), Channel(f"{channel.name}?")
    ids = [id_of(next(events))]
    for _ in range(2):
        other.publish("elsewhere")
        channel.publish("here")
        ids.append(id_of(next(events)))
    random_parts, numbers = zip(*(id.split("-") for id in ids), strict=True)
    assert (len(set(random_parts)), numbers) == (1, ("0", "1", "2"))
    assert not other.position().startswith(random_parts[0])


def test_idle_channel_is_removed(
    make_app: MakeApp, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts from the last event. A listener receives the next event, too."""
    now = 1000.0
    monkeypatch.setattr("tgstream.live.backends.memory.clock", lambda: now)
    make_app(TGController(), tgstream__channel_seconds="60")
    listener, idle = open_listener(channel), Channel(f"{channel.name}, idle")
    old, old_idle = channel.position(), idle.position()
    channel.publish("old")
    idle.publish("old")
    event = next(listener)
    now += 60
    assert receive(channel.listen(after=old), 2) == ["open", "old"]
    now += 1
    assert types_of_first_two(channel.listen(after=old)) == [None, "reset"]
    resumed = channel.listen(after=id_of(event))
    channel.publish("new")
    assert receive(resumed, 2) == ["open", "new"]
    assert receive(listener, 1) == ["new"]
    assert_reset(idle, old_idle)


def test_idle_channels_do_not_fill_the_memory(
    make_app: MakeApp, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are removed when another channel is used."""
    now = 1000.0
    monkeypatch.setattr("tgstream.live.backends.memory.clock", lambda: now)
    backend = MemoryBackend(ChannelSettings(seconds=60.0))
    for number in range(10):
        backend.position(str(number))
    gc.collect()
    assert len(backend._histories) == 10
    now += 61
    backend.position("another")
    assert list(backend._histories) == ["another"]


def test_browser_resumes_its_stream(make_app: MakeApp, channel: Channel) -> None:
    """It sends the last id in the header or in the query."""
    app = make_app(LiveController(channel))
    with open_stream(app, "/feed") as response:
        events = response.events()
        opening = next(events)
        assert opening.comment == "open"
        get(app, "/post?text=1")
        first = next(events)
        assert (first.data, first.event) == ("1", None)
        assert first.id != opening.id
    get(app, "/post?text=2")
    headers = {"Last-Event-ID": str(first.id)}
    with open_stream(app, "/feed", headers=headers) as response:
        assert receive(response.events(), 2) == ["open", "2"]
    with open_stream(app, f"/feed?lastEventId={opening.id}") as response:
        assert receive(response.events(), 3) == ["open", "1", "2"]


# Waiting.


def test_listener_receives_a_heartbeat_after_a_time_without_events(
    make_app: MakeApp, channel: Channel
) -> None:
    """It is a comment without an id, so that a reconnect misses nothing."""
    make_app(TGController(), tgstream__heartbeat_seconds="0.01")
    events = channel.listen()
    assert receive(events, 1) == ["open"]
    assert [next(events), next(events)] == [Event(), Event()]
    channel.publish("x")
    assert receive(events, 1) == ["x"]
    assert next(events) == Event()


def test_listener_waits_on_its_own_thread(channel: Channel) -> None:
    """An event wakes it, and no other thread is needed."""
    events, threads = open_listener(channel), threading.active_count()
    received: list[str] = []
    listener = threading.Thread(target=lambda: received.extend(receive(events, 2)))
    listener.start()
    assert threading.active_count() == threads + 1
    channel.publish("1")
    channel.publish("2")
    listener.join()
    assert received == ["1", "2"]


def test_all_listeners_of_a_channel_receive_heartbeats(
    make_app: MakeApp, channel: Channel
) -> None:
    """Only one of them waits with a timeout, and it wakes the others."""
    make_app(TGController(), tgstream__heartbeat_seconds="0.01")
    received: list[list[Event]] = [[] for _ in range(4)]
    listeners = [
        threading.Thread(target=events.extend, args=[islice(channel.listen(), 4)])
        for events in received
    ]
    for listener in listeners:
        listener.start()
    for listener in listeners:
        listener.join(10)
    assert [events[1:] for events in received] == [[Event()] * 3] * 4


# Options and processes.


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("channel_history", "0", r"tgstream\.channel_history .*'0'"),
        ("heartbeat_seconds", "-1", r"tgstream\.heartbeat_seconds .*'-1'"),
        ("channels", "nats://:secret@x", "unsupported scheme 'nats' in tgstream"),
        ("channels", "redis://:secret@x?protocol=3&timeout=", "set protocol, timeout "),
        ("channels", "user:secret@x", "unsupported scheme 'user' in tgstream"),
        ("channels", "secret@x", r"unsupported scheme '\.\.\.' in tgstream"),
        ("channels", "redis//:secret@x", r"unsupported scheme '\.\.\.' in tgstream"),
        ("channels", "redis://:secret/x@localhost", r"cannot parse redis://\.\.\. in"),
        ("channels", "redis://localhost:secret", r"cannot parse redis://\.\.\. in"),
        ("channels", "database://u:secret@x", "database:// .* takes no host"),
        ("channels", "memory://secret", "memory:// .* takes no host"),
    ],
)
def test_invalid_option_of_channels_is_rejected(
    make_app: MakeApp, channel: Channel, name: str, value: str, message: str
) -> None:
    """The error names the option, and does not show the password."""
    make_app(TGController())
    tg.config[f"tgstream.{name}"] = value
    with pytest.raises(ValueError, match=message) as raised:
        channel.listen()
    assert f"tgstream.{name}" in str(raised.value)
    assert "secret" not in str(raised.value)


def test_forked_process_has_its_own_channels(channel: Channel) -> None:
    """It does not receive events of its parent, and does not accept its ids."""
    events = channel.listen()
    id = id_of(next(events))
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        try:
            channel.publish("in the child")
            types = types_of_first_two(channel.listen(after=id))
            os.write(writing, repr(types).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with open(reading) as pipe:
        assert pipe.read() == "[None, 'reset']"
    channel.publish("in the parent")
    assert receive(events, 1) == ["in the parent"]


SCRIPT = """
import logging
from tgstream import Channel
logging.basicConfig(format="%(levelname)s %(message)s")
for text in "one", "two":
    Channel("users").publish(text)
"""


def test_publish_without_an_application_logs_one_warning() -> None:
    """No other process receives the event, whatever the option of the application."""
    result = run_python("-c", SCRIPT)
    [line] = [line for line in result.stderr.splitlines() if "WARNING" in line]
    assert line.startswith("WARNING publish() was called without a loaded application")
    assert "paste.deploy.loadapp()" in line


@pytest.mark.parametrize("multiprocess", [True, False])
def test_memory_with_several_processes_logs_one_warning(
    make_app: MakeApp,
    channel: Channel,
    caplog: pytest.LogCaptureFixture,
    multiprocess: bool,
) -> None:
    """It is logged once for each application, and names the option to set."""
    for _ in range(2):
        app = make_app(LiveController(channel))
        for text in "ab":
            get(app, f"/post?text={text}", **{"wsgi.multiprocess": multiprocess})
    messages = [
        record.getMessage() for record in caplog.records if record.name == "tgstream"
    ]
    assert len(messages) == (2 if multiprocess else 0)
    assert all("tgstream.channels is memory://" in message for message in messages)
    assert all("redis://" in message for message in messages)
