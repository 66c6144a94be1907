"""``Channel`` in one process: who hears what, when, and what a gap looks like."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import tg
import transaction
from tg import TGController, expose

from tests.conftest import MakeApp
from tests.formats.test_sse import encoded, parsed
from tests.model import MakeModel, Model, User
from tests.wsgi import Call, get
from tgstream import (
    SSE,
    Channel,
    Event,
    Report,
    Stream,
    last_event_id,
    rollback,
    stream,
)
from tgstream.database.on_commit import send_on_commit
from tgstream.live import history as _feed
from tgstream.live.backends.memory import KEPT
from tgstream.live.history import Feed, Start, follow
from tgstream.testing import OpenStream, open_stream

numbers = count()


@pytest.fixture
def channel(make_app: MakeApp) -> Channel:
    """A channel of this test alone: they are the process's."""
    return Channel(f"test {next(numbers)}")


def heard(events: Iterator[Event], number: int) -> list[Any]:
    """The data of the next so many events; one that has none is its comment."""
    return [
        event.comment if event.data is None else event.data
        for event in islice(events, number)
    ]


def id_of(event: Event) -> str:
    assert isinstance(event.id, str)
    return event.id


# Without an application.


def test_channel_hands_on_what_is_published(channel: Channel) -> None:
    """To all who listen, in order, from the call of listen() on."""
    channel.publish("before")
    listeners = [channel.listen(), Channel(channel.name).listen()]
    channel.publish("text", event="greeting")
    channel.publish({"id": 7})
    channel.publish(None)
    for events in listeners:
        opened, *rest = islice(events, 4)
        assert opened == Event(comment="open", id=opened.id)
        assert [event.data for event in rest] == ["text", '{"id":7}', "null"]
        assert [event.event for event in rest] == ["greeting", None, None]


def test_channel_is_another_by_another_name(channel: Channel) -> None:
    """Nothing is heard of it."""
    events = channel.listen()
    Channel(f"{channel.name}?").publish("elsewhere")
    channel.publish("here")
    assert heard(events, 2) == ["open", "here"]


def test_event_is_encoded_once_for_all_who_listen(channel: Channel) -> None:
    """It is the same object for each, with its piece made."""
    listeners = [channel.listen() for _ in range(3)]
    channel.publish("a\r\nb", event="x")
    events = [list(islice(each, 2))[1] for each in listeners]
    assert events[0] is events[1] is events[2]
    pieces = [next(SSE().encode([event])) for event in events]
    assert pieces[0] is pieces[1] is pieces[2]
    fields = Event("a\r\nb", event="x", id=events[0].id)
    assert pieces[0] == encoded(fields)
    assert parsed(pieces[0]).messages[0].data == "a\nb"


@pytest.mark.parametrize("text", ["a\r\nb", "é", ""])
def test_publish_of_text_encodes_it_once(channel: Channel, text: str) -> None:
    """It makes no JSON encoder, and no event that is thrown away."""
    events, calls = waiting(channel), list[str]()

    def note(frame: Any, what: str, argument: Any) -> None:
        if what == "call" and "tgstream" in frame.f_code.co_filename:
            file = Path(frame.f_code.co_filename).stem
            calls.append(f"{file}.{frame.f_code.co_name}")

    channel.publish("before")
    sys.setprofile(note)
    try:
        channel.publish(text)
    finally:
        sys.setprofile(None)
    assert calls.count("sse._utf8") == calls.count("memory._append") == 1
    assert "sse.__post_init__" not in calls
    assert not [each for each in calls if each.startswith("json_encoder.")]
    assert heard(events, 2) == ["before", text]


@pytest.mark.parametrize("said", ["all", "some", "none"])
def test_listener_that_comes_back_gets_what_it_has_missed(
    channel: Channel, said: str
) -> None:
    """And nothing twice, wherever it was: also where it had heard nothing yet."""
    events = channel.listen()
    had = next(events)
    channel.publish("1")
    channel.publish("2")
    for _ in range({"all": 2, "some": 1, "none": 0}[said]):
        had = next(events)
    channel.publish("3")
    again = channel.listen(after=id_of(had))
    assert next(again) == Event(comment="open", id=had.id)
    channel.publish("4")
    missed = {"all": ["3", "4"], "some": ["2", "3", "4"], "none": ["1", "2", "3", "4"]}
    assert heard(again, len(missed[said])) == missed[said]


def test_listener_may_come_back_when_only_others_spoke(channel: Channel) -> None:
    """An id of a channel is good though all events since were in others."""
    events = channel.listen()
    Channel(f"{channel.name}?").publish("elsewhere")
    id = id_of(next(channel.listen()))
    Channel(f"{channel.name}?").publish("elsewhere")
    assert heard(channel.listen(after=id), 1) == ["open"]
    channel.publish("here")
    assert heard(channel.listen(after=id), 2) == ["open", "here"]
    assert heard(events, 2) == ["open", "here"]


def assert_reset(channel: Channel, after: str) -> None:
    """A listener with this id is told of a gap, and goes on from now."""
    channel.publish("missed")
    events = channel.listen(after=after)
    assert next(events) == Event(comment="open")
    gap = next(events)
    assert gap == Event("", event="reset", id=gap.id)
    channel.publish("next")
    assert heard(events, 1) == ["next"]
    assert heard(channel.listen(after=id_of(gap)), 2) == ["open", "next"]


@pytest.mark.parametrize(
    "forged",
    ["", "7", "x", "0" * 10_000, "a\r\nb", "a\0", "1-1", "00000000-1", "٣-٣"],
)
def test_id_that_is_foreign_is_a_gap(channel: Channel, forged: str) -> None:
    """Nobody knows what its client has had."""
    assert_reset(channel, forged)


def test_id_from_the_future_is_a_gap(channel: Channel) -> None:
    """It was never sent."""
    run, _, number = id_of(next(channel.listen())).partition("-")
    assert_reset(channel, f"{run}-{int(number) + 100}")
    assert_reset(channel, f"{run}-{10**30}")
    assert_reset(channel, f"{run}-0{number}")


def test_id_that_is_old_is_a_gap(make_app: MakeApp, channel: Channel) -> None:
    """What history keeps no more cannot be told; what it keeps is."""
    make_app(TGController(), tgstream__channel_history="3")
    events = channel.listen()
    ids = [id_of(next(events))]
    for number in range(4):
        channel.publish(str(number))
        ids.append(id_of(next(events)))
    assert heard(channel.listen(after=ids[1]), 4) == ["open", "1", "2", "3"]
    assert [event.event for event in islice(channel.listen(after=ids[0]), 2)] == [
        None,
        "reset",
    ]
    assert_reset(channel, ids[0])


def test_listener_that_never_reads_is_cut_off(
    make_app: MakeApp, channel: Channel
) -> None:
    """Its backlog is the history, which is one for all; then it is to come back."""
    make_app(TGController(), tgstream__channel_history=3)
    slow, quick = waiting(channel), waiting(channel)
    for number in range(3):
        channel.publish(str(number))
    had = list(islice(quick, 3))
    assert [event.data for event in had] == ["0", "1", "2"]
    channel.publish("3")
    assert list(slow) == []
    assert heard(quick, 1) == ["3"]
    assert heard(channel.listen(after=id_of(had[0])), 4) == ["open", "1", "2", "3"]
    for number in range(4, 8):
        channel.publish(str(number))
    assert list(quick) == []
    assert_reset(channel, id_of(had[0]))


def test_channels_that_nobody_listens_to_are_bounded(make_app: MakeApp) -> None:
    """Their names may be users'; what was forgotten is a gap, not the past."""
    first = Channel(f"test {next(numbers)}")
    events = first.listen()
    id = id_of(next(events))
    other = Channel(f"test {next(numbers)}")
    old = id_of(next(other.listen()))
    other.publish("forgotten")
    for number in range(KEPT):
        Channel(f"many {number}").publish("x")
    first.publish("kept, for there is a listener")
    assert heard(events, 1) == ["kept, for there is a listener"]
    assert heard(first.listen(after=id), 2)[1] == "kept, for there is a listener"
    assert_reset(other, old)


SCRIPT = """
import logging
from tgstream import Channel
logging.basicConfig(format="%(levelname)s %(message)s")
for text in "one", "two":
    Channel("users").publish(text)
"""


def test_script_without_an_application_is_warned() -> None:
    """Once: it publishes to itself, whatever the option of the application is."""
    said = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True
    )
    [line] = [each for each in said.stderr.splitlines() if "WARNING" in each]
    assert line.startswith("WARNING publish() was called where no application is loade")
    assert "paste.deploy.loadapp()" in line


def test_listener_hears_a_beat_when_nothing_was_sent(
    make_app: MakeApp, channel: Channel
) -> None:
    """A comment, which no id comes with, so that nothing is missed by it."""
    make_app(TGController(), tgstream__heartbeat_seconds="0.01")
    events = channel.listen()
    assert heard(events, 1) == ["open"]
    assert [next(events), next(events)] == [Event(), Event()]
    channel.publish("x")
    assert heard(events, 1) == ["x"]
    assert next(events) == Event()


def test_listener_waits_on_its_own_thread(channel: Channel) -> None:
    """And is woken by an event, not by a beat."""
    events, threads = channel.listen(), threading.active_count()
    assert heard(events, 1) == ["open"]
    waiting = threading.Thread(target=lambda: heard_by.extend(heard(events, 2)))
    heard_by: list[str] = []
    waiting.start()
    assert threading.active_count() == threads + 1
    channel.publish("1")
    channel.publish("2")
    waiting.join()
    assert heard_by == ["1", "2"]


def test_listeners_beat_together(make_app: MakeApp, channel: Channel) -> None:
    """One of them looks at the clock, and none is forgotten."""
    make_app(TGController(), tgstream__heartbeat_seconds="0.01")
    found: list[list[Event]] = [[] for _ in range(4)]
    listeners = [
        threading.Thread(target=each.extend, args=[islice(channel.listen(), 4)])
        for each in found
    ]
    for listener in listeners:
        listener.start()
    for listener in listeners:
        listener.join(10)
    assert [each[1:] for each in found] == [[Event()] * 3] * 4


def test_shorter_beat_is_kept_beside_a_longer_one() -> None:
    """Who comes later and may wait for less does not wait for the first."""
    feed = Feed((1, 0), 10)
    patient = threading.Thread(target=lambda: found.append(feed.take(0, 600.0)))
    found: list[Any] = []
    patient.start()
    assert feed.take(0, 0.01) == Event()
    patient.join(10)
    assert found == [Event()]


KILLED = """
from gevent import monkey; monkey.patch_all()
import gevent
from tgstream.live.history import BEAT, Feed
feed = Feed((1, 0), 10)
looks, waits = (gevent.spawn(feed.take, 0, 600.0) for _ in range(2))
gevent.sleep(0)
looks.kill()
print(waits.get(timeout=10) is BEAT)
"""


COLLECTED = """
import gc, sys, threading
if sys.argv[1] == "gevent":
    from gevent import monkey; monkey.patch_all()
import faulthandler; faulthandler.dump_traceback_later(50, exit=True)
from itertools import islice
from tgstream import Channel
from tgstream.live import history as _feed

ROUNDS = 1000
channel, other = Channel("one"), Channel("two")


def body(number):
    try:
        yield b""
    finally:
        channel.publish(f"end {number}")
        other.publish("elsewhere")
        listeners.append(channel.listen())
        _feed.wake()


def hear(events, into):
    for event in events:
        if event.data is not None:
            into.append(event)
        if len(into) == 2 * ROUNDS:
            return


listeners, heard = [channel.listen() for _ in range(3)], [[], [], []]
threads = [
    threading.Thread(target=hear, args=each)
    for each in zip(listeners, heard, strict=True)
]
for thread in threads:
    thread.start()
for number in range(ROUNDS):
    cycle = [body(number)]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    channel.publish(f"round {number}")
    if number % 100 == 0:
        threading.Event().wait(0)
gc.collect()
for thread in threads:
    thread.join()
assert heard[0] == heard[1] == heard[2]
expected = {f"{what} {number}" for what in ("round", "end") for number in range(ROUNDS)}
assert {event.data for event in heard[0]} == expected
numbers = [int(event.id.split("-")[1]) for event in heard[0]]
assert numbers == sorted(numbers) and len(set(numbers)) == 2 * ROUNDS
rounds = [event.data for event in heard[0] if "round" in event.data]
assert rounds == [f"round {number}" for number in range(ROUNDS)]
assert len(listeners) == 3 + ROUNDS
assert all(next(each).comment == "open" for each in listeners[3:])
print(max(numbers) >= 3 * ROUNDS - 1)
"""


@pytest.mark.parametrize("kind", ["threads", "gevent"])
def test_finaliser_that_the_collector_runs_anywhere_may_publish(
    make_app: MakeApp, kind: str
) -> None:
    """Also to the channel that its thread is publishing to; every event is heard."""
    command = [sys.executable, "-W", "ignore", "-c", COLLECTED, kind]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert said.stdout == "True\n", said.stderr[-3000:]


INTERRUPTED = """
import faulthandler, sys
faulthandler.dump_traceback_later(50, exit=True)
from itertools import islice
from tgstream import Channel
from tgstream.live import history as _feed

ACTIONS = {
    "publish": lambda: channel.publish("before"),
    "listen": lambda: next(channel.listen()),
    "resume": lambda: list(islice(channel.listen(after=id), 2)),
    "wake": _feed.wake,
    "beat": lambda: _feed.Feed((0, 0), 9).take(0, 0.0),
}
channel = Channel("one")
id = next(channel.listen()).id
channel.publish("first")


def heard(events):
    assert next(events).comment == "open"
    return list(iter(lambda: next(events).data, "after"))


for name, act in ACTIONS.items():
    at = 0
    while True:
        seen, inside, late = 0, [], channel.listen()

        def interrupt(frame, what, argument):
            global seen
            if not frame.f_code.co_filename.endswith(("/history.py", "/memory.py")):
                return None
            frame.f_trace_opcodes = True
            if what == "opcode":
                if seen == at:
                    sys.settrace(None)
                    channel.publish("inside")
                    _feed.wake()
                    inside.append(channel.listen())
                seen += 1
            return interrupt

        sys.settrace(interrupt)
        act()
        sys.settrace(None)
        if not inside:
            break
        at += 1
        channel.publish("after")
        assert heard(late).count("inside") == 1, (name, at)
        assert "inside" not in heard(inside[0]), (name, at)
    assert at > 20, (name, at)
print("all of it")
"""


def test_finaliser_may_publish_at_every_byte_code(make_app: MakeApp) -> None:
    """As it may listen and wake: its event is heard before the next, and once."""
    command = [sys.executable, "-W", "ignore", "-c", INTERRUPTED]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert said.stdout == "all of it\n", said.stderr[-3000:]


def test_listener_that_has_heard_an_event_is_not_woken_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However early it hears it: it waits for the next, and beats when that is late."""
    waits, heard_by = threading.Semaphore(0), list[Event]()

    class Change(_feed._Change):
        __slots__ = ()

        def __init__(self, *args: Any) -> None:
            if listener.ident is None:
                listener.start()
                assert waits.acquire(timeout=10)
            super().__init__(*args)

        def wait(self, seconds: float) -> bool:
            waits.release()
            return super().wait(seconds)

    def hear() -> None:
        for event in follow(Start(feed, 0, []), 600.0):
            heard_by.append(event)
            if event.data == "two":
                return

    feed, listener = Feed((0, 0), 10), threading.Thread(target=hear)
    feed._change.__class__ = Change
    monkeypatch.setattr(_feed, "_Change", Change)
    feed.append((1, 0), Event("one"))
    assert waits.acquire(timeout=10)
    feed.append((2, 0), Event("two"))
    listener.join(10)
    assert heard_by == [Event("one"), Event("two")]


def test_channels_may_be_opened_while_all_are_woken() -> None:
    """Whoever drains is not disturbed by requests that still come in."""
    over, interval = threading.Event(), sys.getswitchinterval()

    def open_channels() -> None:
        while not over.is_set():
            for _ in [Feed((0, 0), 1) for _ in range(20)]:
                pass

    kept = [Feed((0, 0), 1) for _ in range(200)]
    opening = threading.Thread(target=open_channels)
    sys.setswitchinterval(1e-5)
    try:
        opening.start()
        for _ in range(3):
            _feed.wake()
    finally:
        sys.setswitchinterval(interval)
        over.set()
        opening.join(10)
    assert len(kept) == 200


def test_killed_listener_lets_the_others_go_on() -> None:
    """It may be the one that looks at the clock: another one does, from then on."""
    command = [sys.executable, "-c", KILLED]
    assert subprocess.check_output(command, text=True) == "True\n"


def test_feed_keeps_an_event_once() -> None:
    """Two may read the same from a server; each hands on all of it, in order."""
    feed = Feed((1, 0), 10)
    events = {place: Event(str(place)) for place in [(1, 1), (2, 0), (2, 1)]}
    for place in [(1, 1), (1, 1), (2, 0), (1, 1), (2, 0), (2, 1)]:
        feed.append(place, events[place])
    assert [feed.take(number, 1.0) for number in range(3)] == list(events.values())
    assert feed.now() == (3, (2, 1))


def test_many_who_publish_and_listen_at_once_lose_nothing(channel: Channel) -> None:
    """Each listener hears all of them, in one order."""
    listeners = [channel.listen() for _ in range(4)]
    found: list[list[str]] = [[] for _ in listeners]

    def publish(name: int) -> None:
        for number in range(100):
            channel.publish(f"{name} {number}")

    def hear(events: Iterator[Event], into: list[str]) -> None:
        into.extend(heard(events, 401))

    works: list[threading.Thread] = [
        *(threading.Thread(target=publish, args=[name]) for name in range(4)),
        *(
            threading.Thread(target=hear, args=each)
            for each in zip(listeners, found, strict=True)
        ),
    ]
    for work in works:
        work.start()
    for work in works:
        work.join()
    assert found[0] == found[1] == found[2] == found[3]
    assert len(set(found[0])) == 401


@pytest.mark.parametrize("name", ["", "a\rb", "a\nb", "a\0b", "x" * 10_000, "\ud800"])
def test_channel_refuses_what_cannot_be_a_name(name: str) -> None:
    """A name is one line, and short."""
    with pytest.raises(ValueError, match=r"^Channel: '.* (cannot be|has a lone)"):
        Channel(name)


def test_channel_refuses_what_is_no_text() -> None:
    """Nor is an id."""
    with pytest.raises(TypeError, match="Channel: 7 is no text"):
        Channel(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="after=7 is no text"):
        Channel("x").listen(after=7)  # type: ignore[arg-type]
    assert repr(Channel("x")) == "Channel('x')"


@pytest.mark.parametrize(
    ("data", "event", "error", "match"),
    [
        (b"x", None, TypeError, r"to Channel\('x'\) cannot be an event: .* is bytes"),
        (float("nan"), None, ValueError, "cannot be an event: .*NaN"),
        (object(), None, TypeError, "cannot be JSON"),
        ("\ud800", None, ValueError, "lone surrogate"),
        ("x", "a\nb", ValueError, "CR, LF or NUL"),
        ("x", "a\0b", ValueError, "CR, LF or NUL"),
        ("x", 7, TypeError, "event=7 is no text"),
    ],
)
def test_publish_refuses_what_cannot_be_sent(
    data: Any, event: Any, error: type[Exception], match: str
) -> None:
    """Where it is published, and not where it is heard."""
    with pytest.raises(error, match=match):
        Channel("x").publish(data, event=event)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("channel_history", "0", "is '0'"),
        ("heartbeat_seconds", "-1", "is '-1'"),
        ("channels", "nats://:secret@x", "begins with 'nats', which"),
        ("channels", "redis://:secret@x?protocol=3&timeout=", "says protocol, timeout"),
        ("channels", "user:secret@x", "begins with 'user', which"),
        ("channels", "secret@x", "begins with '...', which"),
        ("channels", "redis//:secret@x", "begins with '...', which"),
        ("channels", "redis://:secret/x@localhost", "cannot be read: redis://...; "),
        ("channels", "redis://localhost:secret", "cannot be read: redis://...; "),
    ],
)
def test_option_of_channels_that_makes_no_sense_is_refused(
    make_app: MakeApp, channel: Channel, name: str, value: str, said: str
) -> None:
    """With its name, and what it may be, but without a password."""
    make_app(TGController())
    tg.config[f"tgstream.{name}"] = value
    match = re.escape(f"the option tgstream.{name} {said}")
    with pytest.raises(ValueError, match=match) as raised:
        channel.listen()
    assert "secret" not in str(raised.value)


def test_forked_process_has_channels_of_its_own(channel: Channel) -> None:
    """It hears nothing of the other, and ids of the other are foreign to it."""
    events = channel.listen()
    id = id_of(next(events))
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        try:
            channel.publish("in the child")
            found = [event.event for event in islice(channel.listen(after=id), 2)]
            os.write(writing, repr(found).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with open(reading) as pipe:
        assert pipe.read() == "[None, 'reset']"
    channel.publish("in the parent")
    assert heard(events, 1) == ["in the parent"]


# In an application.


class Live(TGController):
    """Requests that publish, and streams that publish or listen."""

    def __init__(self, channel: Channel, model: Model | None = None) -> None:
        self.channel, self.model = channel, model
        self.during: list[Callable[[], object]] = []
        for each in Live.feed, Live.post, Live.steps:  # TG forgets it between tests
            expose()(each)
        stream(SSE)(Live.feed)

    def feed(self) -> Iterator[Event]:
        return self.channel.listen(after=last_event_id())

    def write(self, text: str) -> None:
        if self.model is not None:
            self.model.DBSession.add(User(name=text))
        self.channel.publish(text)
        for each in self.during:
            each()

    def post(self, text: str) -> str:
        self.write(text)
        return "posted"

    def steps(self, commit: Any) -> Stream:
        def items() -> Iterator[str]:
            for number in range(1, 4):
                self.write(f"step {number}")
                yield f"{number}\n"

        return Stream(items(), commit=commit)


class Doing(TGController):
    """A request that does what the test says."""

    def __init__(self, do: Callable[[], object]) -> None:
        self.do = do
        expose()(Doing.now)

    def now(self) -> str:
        self.do()
        return "done"


def waiting(channel: Channel) -> Iterator[Event]:
    """A listener that has been opened."""
    events = channel.listen()
    assert next(events).comment == "open"
    return events


def test_stream_is_what_a_browser_resumes(make_app: MakeApp, channel: Channel) -> None:
    """It opens before the first event, and goes on where the client says it was."""
    app = make_app(Live(channel))
    with open_stream(app, "/feed") as response:
        events = response.events()
        had = next(events)
        assert had.comment == "open"
        get(app, "/post?text=1")
        first = next(events)
        assert (first.data, first.event) == ("1", None)
        assert first.id != had.id
    get(app, "/post?text=2")
    headers = {"Last-Event-ID": str(first.id)}
    with open_stream(app, "/feed", headers=headers) as response:
        assert heard(response.events(), 2) == ["open", "2"]
    with open_stream(app, f"/feed?lastEventId={had.id}") as response:
        assert heard(response.events(), 3) == ["open", "1", "2"]


def test_event_of_a_request_goes_out_when_it_commits(
    make_app: MakeApp, channel: Channel, sqlite_model: Model
) -> None:
    """What it tells of is in the database by then."""
    root = Live(channel, sqlite_model)
    app, events = make_app(root, sqlite_model), waiting(channel)
    root.during = [lambda: channel.publish("now", now=True)]
    assert get(app, "/post?text=ada").text == "posted"
    assert heard(events, 2) == ["now", "ada"]
    assert sqlite_model.names() == ["ada"]


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("how", ["raises", "aborts", "dooms", "vetoes", "rolls back"])
def test_event_of_a_request_that_aborts_never_goes_out(
    make_app: MakeApp,
    channel: Channel,
    sqlite_model: Model,
    how: str,
    with_model: bool,
) -> None:
    """However it does; and the next request is none the worse."""
    model = sqlite_model if with_model else None
    root = Live(channel, model)
    app = make_app(root, model, tm__enabled=True, tm__commit_veto=veto)
    events, failing = waiting(channel), ("raises", "aborts", "vetoes")
    root.during = {
        "raises": [lambda: 1 / 0],
        "aborts": [lambda: tg.abort(500)],
        "dooms": [transaction.doom],
        "vetoes": [lambda: setattr(tg.response, "status_int", 500)],
        "rolls back": [transaction.abort],
    }[how]
    assert (get(app, "/post?text=lost").status_int == 500) == (how in failing)
    root.during = []
    get(app, "/post?text=kept")
    assert heard(events, 1) == ["kept"]
    assert sqlite_model.names() == (["kept"] if with_model else [])


def veto(environ: Any, status: str, headers: Any) -> bool:
    return status.startswith("5")


class Failing:
    """A part in a transaction that fails when all that can fail have their say."""

    transaction_manager = None

    def nothing(self, transaction: Any) -> None:
        """Until the vote."""

    abort = tpc_begin = commit = tpc_abort = nothing

    def tpc_vote(self, transaction: Any) -> None:
        raise OSError("the disk is full")

    def sortKey(self) -> str:
        return "~~last"


def test_event_of_a_request_that_cannot_commit_never_goes_out(
    make_app: MakeApp, channel: Channel
) -> None:
    """Also where that is found out last."""
    root = Live(channel)
    app, events = make_app(root, tm__enabled=True), waiting(channel)
    root.during = [lambda: transaction.get().join(Failing())]
    assert get(app, "/post?text=lost").status_int == 500
    root.during = []
    get(app, "/post?text=kept")
    assert heard(events, 1) == ["kept"]


def test_event_of_a_savepoint_that_is_rolled_back_never_goes_out(
    make_app: MakeApp, channel: Channel
) -> None:
    """What was published before it, and after, does."""
    root = Live(channel)
    app, events = make_app(root, tm__enabled=True), waiting(channel)

    def part() -> None:
        savepoint = transaction.savepoint()
        channel.publish("undone")
        savepoint.rollback()
        channel.publish("after")

    root.during = [part]
    get(app, "/post?text=before")
    assert heard(events, 2) == ["before", "after"]


def test_event_after_a_savepoint_that_took_all_before_it_goes_out(
    make_app: MakeApp, channel: Channel
) -> None:
    """Also where nothing had been published before the savepoint was made."""

    def part() -> None:
        savepoint = transaction.savepoint()
        channel.publish("undone")
        savepoint.rollback()
        channel.publish("after")

    app, events = make_app(Doing(part), tm__enabled=True), waiting(channel)
    assert get(app, "/now").text == "done"
    assert heard(events, 1) == ["after"]


@pytest.mark.parametrize(
    "moment", ["after_flush", "before_commit", "after_commit", "after_insert"]
)
@pytest.mark.parametrize("first", [[], ["first"]])
def test_event_that_is_published_while_the_transaction_commits_goes_out(
    make_app: MakeApp,
    channel: Channel,
    sqlite_model: Model,
    moment: str,
    first: list[str],
) -> None:
    """As handlers of SQLAlchemy do; where the commit then fails, nothing is heard."""
    on: Any = User if moment == "after_insert" else sqlite_model.DBSession
    fails: list[Any] = []

    def publish(*_: Any) -> None:
        channel.publish("committed")
        for each in fails:
            raise each

    def add() -> None:
        for text in first:
            channel.publish(text)
        sqlite_model.DBSession.add(User(name="ada"))

    root = Doing(add)
    app, events = make_app(root, sqlite_model, tm__enabled=True), waiting(channel)
    sa.event.listen(on, moment, publish)
    try:
        assert get(app, "/now").text == "done"
        if moment != "after_commit":
            fails.append(LookupError("no commit"))
            assert get(app, "/now").status_int == 500
    finally:
        sa.event.remove(on, moment, publish)
    root.do = lambda: channel.publish("end")
    get(app, "/now")
    assert heard(events, 2 + len(first)) == [*first, "committed", "end"]
    assert sqlite_model.names() == ["ada"]


# SQLAlchemy's own savepoints and rollbacks.


def add(model: Model, channel: Channel, name: str) -> None:
    """A row that is written, and the event that tells of it."""
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
        model.DBSession.add(User(name="before"))  # which is there
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


def roll_back(model: Model, channel: Channel) -> None:
    add(model, channel, "undone")
    model.DBSession.rollback()
    add(model, channel, "before")
    add(model, channel, "after")


def close(model: Model, channel: Channel) -> None:
    add(model, channel, "undone")
    model.DBSession.close()
    add(model, channel, "before")
    add(model, channel, "after")


def remove(model: Model, channel: Channel) -> None:
    add(model, channel, "undone")
    model.DBSession.remove()
    add(model, channel, "before")
    add(model, channel, "after")


SAVEPOINTS = [
    *(undo_savepoint, release_savepoint, undo_inner_savepoint, undo_outer_savepoint),
    *(fail_to_flush, undo_savepoint_of_transaction, keep_savepoint_of_transaction),
]


@pytest.fixture
def postgresql_model(make_model: MakeModel, postgresql: str) -> Model:
    """The model of an application, where savepoints are all that SQL says."""
    return make_model(postgresql)


class Run(TGController):
    """A request, and a stream, that do the same."""

    def __init__(self, do: Callable[[], object]) -> None:
        self.do = do
        for each in Run.request, Run.items:  # TG forgets it between tests
            expose(content_type="text/plain")(each)

    def request(self) -> str:
        self.do()
        return "done"

    def items(self, commit: Any) -> Stream:
        def items() -> Iterator[str]:
            self.do()
            yield "done"

        return Stream(items(), commit=commit)


@pytest.mark.parametrize("how", SAVEPOINTS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("path", ["/request", "/items?commit=end"])
def test_event_inside_an_sqlalchemy_savepoint_shares_its_fate(
    make_app: MakeApp,
    channel: Channel,
    postgresql_model: Model,
    how: Callable[[Model, Channel], None],
    path: str,
) -> None:
    """It is sent if its savepoint, and all around that, are committed."""
    model = postgresql_model
    root = Run(lambda: how(model, channel))
    app, events = make_app(root, model, tm__enabled=True), waiting(channel)
    assert get(app, path).text == "done"
    channel.publish("end")
    assert heard(events, 3) == ["before", "after", "end"]
    assert model.names() == ["before", "after"]


@pytest.mark.parametrize("how", [roll_back, close, remove])
@pytest.mark.parametrize("commit", ["end", "each"])
def test_event_before_a_rollback_of_the_session_of_a_stream_is_never_sent(
    make_app: MakeApp,
    channel: Channel,
    model: Model,
    how: Callable[[Model, Channel], None],
    commit: str,
) -> None:
    """Nor where the session is closed with its transaction open."""
    root = Run(lambda: how(model, channel))
    app, events = make_app(root, model, tm__enabled=True), waiting(channel)
    assert get(app, f"/items?commit={commit}").text == "done"
    channel.publish("end")
    assert heard(events, 3) == ["before", "after", "end"]
    assert model.names() == ["before", "after"]


def test_event_before_a_rollback_of_the_session_of_a_request_is_never_sent(
    make_app: MakeApp, channel: Channel, model: Model
) -> None:
    """Where the request then has nothing to commit."""

    def do() -> None:
        model.DBSession.add(User(name="undone"))
        channel.publish("undone")
        model.DBSession.rollback()
        channel.publish("after")

    app, events = make_app(Run(do), model, tm__enabled=True), waiting(channel)
    assert get(app, "/request").text == "done"
    assert heard(events, 1) == ["after"]
    assert model.names() == []


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("commit", ["end", "each"])
def test_event_before_all_that_a_rollback_undoes_is_never_sent(
    make_app: MakeApp, channel: Channel, model: Model, used: bool, commit: str
) -> None:
    """It belongs to the transaction that the session begins next."""

    def do() -> None:
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

    app, events = make_app(Run(do), model, tm__enabled=True), waiting(channel)
    assert get(app, f"/items?commit={commit}").text == "done"
    channel.publish("end")
    assert heard(events, 3) == ["before", "after", "end"]
    assert model.names() == ["after"]


@pytest.mark.parametrize("path", ["/request", "/items?commit=end"])
def test_event_of_a_request_that_only_reads_is_sent(
    make_app: MakeApp, channel: Channel, model: Model, path: str
) -> None:
    """Its session is closed in the end, without a commit."""

    def do() -> None:
        model.DBSession.query(User).all()
        channel.publish("read")

    app, events = make_app(Run(do), model, tm__enabled=True), waiting(channel)
    assert get(app, path).text == "done"
    assert heard(events, 1) == ["read"]


@pytest.mark.parametrize("zope", [True, False])
@pytest.mark.parametrize("commit", ["end", "manual"])
def test_event_before_a_commit_of_the_session_alone_is_sent(
    make_app: MakeApp,
    channel: Channel,
    make_model: MakeModel,
    tmp_path: Path,
    zope: bool,
    commit: str,
) -> None:
    """A later rollback of the session does not concern it."""
    model = make_model(f"sqlite:///{tmp_path}/test.db", zope=zope)

    def do() -> None:
        add(model, channel, "committed")
        transaction.commit() if zope else model.DBSession.commit()
        add(model, channel, "undone")
        model.DBSession.rollback()
        transaction.commit()

    app, events = make_app(Run(do), model, tm__enabled=True), waiting(channel)
    assert get(app, f"/items?commit={commit}").text == "done"
    channel.publish("end")
    assert heard(events, 2) == ["committed", "end"]
    assert model.names() == ["committed"]


@pytest.mark.parametrize("path", ["/request", "/items?commit=end"])
def test_event_belongs_to_the_savepoint_of_any_session(
    make_app: MakeApp,
    channel: Channel,
    make_model: MakeModel,
    postgresql: str,
    path: str,
) -> None:
    """Of two, here the one of ``tgstream.sessions``; the rest is committed."""
    model = make_model(postgresql)
    other = make_model(postgresql, create=False)
    other.init_model(model.outside)

    def do() -> None:
        add(model, channel, "before")
        with other.DBSession.begin_nested() as savepoint:
            add(other, channel, "undone")
            savepoint.rollback()
        add(other, channel, "after")

    options = {"tm__enabled": True, "tgstream__sessions": [other.DBSession]}
    app, events = make_app(Run(do), model, **options), waiting(channel)
    assert get(app, path).text == "done"
    channel.publish("end")
    assert heard(events, 3) == ["before", "after", "end"]
    assert sorted(model.names()) == ["after", "before"]


# Hooks of the transaction.


@pytest.mark.parametrize("path", ["/request", "/items?commit=end"])
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
    """Once it has committed, and after those of the transaction."""

    def do() -> None:
        add(sqlite_model, channel, "first")
        getattr(transaction.get(), hook)(lambda *_: channel.publish("hook"))

    app, events = make_app(Run(do), sqlite_model, tm__enabled=True), waiting(channel)
    assert get(app, path).text == "done"
    channel.publish("end")
    assert heard(events, len(expected) + 1) == [*expected, "end"]
    assert sqlite_model.names() == ["first"]


@pytest.mark.parametrize("path", ["/request", "/items?commit=end"])
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
def test_event_of_a_hook_of_a_transaction_that_aborts_is_sent_after_it(
    make_app: MakeApp,
    channel: Channel,
    hook: str,
    expected: list[str],
    first: list[str],
    path: str,
) -> None:
    """What is published before the abort is lost with it; two hooks are heard both."""

    def do() -> None:
        for text in first:
            channel.publish(text)
        for _ in range(2):
            getattr(transaction.get(), hook)(lambda *_: channel.publish("hook"))
        transaction.doom()

    app, events = make_app(Run(do), tm__enabled=True), waiting(channel)
    get(app, path)
    channel.publish("end")
    assert heard(events, len(expected) + 1) == [*expected, "end"]


def test_event_of_a_hook_after_a_commit_that_failed_is_sent(
    make_app: MakeApp, channel: Channel
) -> None:
    """It is what the hook says of the failure; nothing else of it is."""

    def do() -> None:
        channel.publish("lost")
        transaction.get().join(Failing())
        transaction.get().addAfterCommitHook(
            lambda committed: channel.publish(f"committed: {committed}")
        )

    app, events = make_app(Run(do), tm__enabled=True), waiting(channel)
    assert get(app, "/request").status_int == 500
    channel.publish("end")
    assert heard(events, 2) == ["committed: False", "end"]


def test_event_of_a_hook_that_cannot_be_sent_is_logged(
    make_app: MakeApp, channel: Channel, caplog: pytest.LogCaptureFixture
) -> None:
    """After an abort too; the abort is none the worse, and the next event is sent."""

    def hook() -> None:
        send_on_commit("a thing", lambda: channel.publish(b"", now=True))
        channel.publish("hook")

    def do() -> None:
        transaction.get().addAfterAbortHook(hook)
        transaction.abort()

    app, events = make_app(Run(do), tm__enabled=True), waiting(channel)
    assert get(app, "/request").text == "done"
    assert heard(events, 1) == ["hook"]
    (record,) = caplog.records
    assert record.getMessage() == "a thing is lost: it could not be sent after an abort"


class Synchronizer:
    """One that publishes when a transaction is over."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def newTransaction(self, transaction: Any) -> None:
        """Nothing."""

    def beforeCompletion(self, transaction: Any) -> None:
        self.channel.publish("before completion")

    def afterCompletion(self, transaction: Any) -> None:
        self.channel.publish("after completion")


@pytest.mark.parametrize("path", ["/request", "/items?commit=end"])
def test_event_of_a_synchronizer_is_sent(
    make_app: MakeApp, channel: Channel, path: str
) -> None:
    """Of a transaction that commits; those of an abort belong to the next."""
    synchronizer = Synchronizer(channel)

    def do() -> None:
        transaction.manager.registerSynch(synchronizer)
        transaction.commit()
        transaction.manager.unregisterSynch(synchronizer)

    app, events = make_app(Run(do), tm__enabled=True), waiting(channel)
    assert get(app, path).text == "done"
    channel.publish("end")
    assert heard(events, 3) == ["before completion", "after completion", "end"]


@pytest.mark.parametrize("path", ["/request", "/items?commit=end"])
def test_event_of_after_is_sent(make_app: MakeApp, channel: Channel, path: str) -> None:
    """TG's ``_after`` runs in the request's transaction, or in the one after it."""

    class After(Run):
        def _after(self, *_: Any, **__: Any) -> None:
            channel.publish("after")

    app = make_app(After(lambda: channel.publish("inside")), tm__enabled=True)
    events = waiting(channel)
    assert get(app, path).text == "done"
    channel.publish("end")
    found = heard(events, 3)
    assert (sorted(found[:2]), found[2]) == (["after", "inside"], "end")


def test_event_goes_out_at_once_without_a_transaction(
    make_app: MakeApp, channel: Channel
) -> None:
    """Where TG runs none, and outside of requests."""
    root = Live(channel)
    app, events = make_app(root, tm__enabled=False), waiting(channel)
    root.during = [lambda: found.append(heard(events, 1))]
    found: list[list[str]] = []
    get(app, "/post?text=1")
    body = Call(app, "/steps?commit=end")
    assert [next(body), next(body)] == [b"1\n", b"2\n"]
    body.close()
    assert found == [["1"], ["step 1"], ["step 2"]]


def pulled(response: OpenStream, number: int) -> None:
    assert [next(response) for _ in range(number)] == [
        b"%d\n" % (each + 1) for each in range(number)
    ]


@pytest.mark.parametrize(
    ("commit", "expected"),
    [("each", ["step 1", "step 2"]), ("end", []), ("manual", [])],
)
@pytest.mark.parametrize("with_model", [True, False])
def test_event_of_a_stream_goes_out_when_the_stream_commits(
    make_app: MakeApp,
    channel: Channel,
    sqlite_model: Model,
    commit: str,
    expected: list[str],
    with_model: bool,
) -> None:
    """With every item, or in the end; what is lost with the client is not said."""
    model = sqlite_model if with_model else None
    app = make_app(Live(channel, model), model, tm__enabled=True)
    events = waiting(channel)
    with open_stream(app, f"/steps?commit={commit}") as response:
        pulled(response, 2)
    channel.publish("left")
    assert heard(events, len(expected) + 1) == [*expected, "left"]
    assert sqlite_model.names() == (expected if with_model else [])


def test_event_of_a_stream_that_completes_goes_out(
    make_app: MakeApp, channel: Channel, sqlite_model: Model
) -> None:
    """Where its items run out; but not what it has rolled back."""
    root = Live(channel, sqlite_model)
    app, events = make_app(root, sqlite_model), waiting(channel)

    def undo_once() -> None:
        root.during = []
        rollback()

    root.during = [undo_once]
    assert get(app, "/steps?commit=end").text == "1\n2\n3\n"
    assert heard(events, 2) == ["step 2", "step 3"]


@pytest.mark.parametrize("with_model", [True, False])
def test_event_of_a_report_goes_out_at_once(
    make_app: MakeApp, channel: Channel, sqlite_model: Model, with_model: bool
) -> None:
    """The stream's transaction is over where its end is told, whatever its end was."""
    model = sqlite_model if with_model else None
    root = Live(channel, model)
    app, events = make_app(root, model, tm__enabled=True), waiting(channel)

    def tell(report: Report) -> None:
        channel.publish(report.reason)

    tg.hooks.register("tgstream.finished", tell)
    try:
        with open_stream(app, "/steps?commit=end") as response:
            pulled(response, 1)
        root.during = [lambda: 1 / 0]
        get(app, "/steps?commit=end")
        root.during = []
        get(app, "/steps?commit=end")
    finally:
        tg.hooks.disconnect("tgstream.finished", tell)
    steps = ["step 1", "step 2", "step 3"]
    assert heard(events, 6) == ["disconnected", "failed", *steps, "completed"]


def test_event_that_cannot_be_sent_leaves_the_transaction_committed(
    make_app: MakeApp,
    channel: Channel,
    sqlite_model: Model,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What else was published goes out, and the log has what did not."""
    root = Live(channel, sqlite_model)
    app, events = make_app(root, sqlite_model), waiting(channel)
    root.during = [
        lambda: send_on_commit("a thing", lambda: channel.publish(b"", now=True))
    ]
    root.during += [lambda: channel.publish("after")]
    assert get(app, "/post?text=ada").text == "posted"
    assert heard(events, 2) == ["ada", "after"]
    assert sqlite_model.names() == ["ada"]
    (record,) = caplog.records
    assert (
        record.getMessage() == "a thing is lost: it could not be sent after the commit"
    )
    assert record.levelno == logging.ERROR


@pytest.mark.parametrize("processes", [True, False])
def test_memory_under_several_processes_is_warned_of_once(
    make_app: MakeApp,
    channel: Channel,
    caplog: pytest.LogCaptureFixture,
    processes: bool,
) -> None:
    """Once for each application, by the name of what would help."""
    for _ in range(2):
        app = make_app(Live(channel))
        for text in "ab":
            get(app, f"/post?text={text}", **{"wsgi.multiprocess": processes})
    told = [each.getMessage() for each in caplog.records if each.name == "tgstream"]
    assert len(told) == (2 if processes else 0)
    assert all("tgstream.channels is memory://" in each for each in told)
    assert all("redis://" in each for each in told)
