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
from typing import Any

import pytest
import sqlalchemy as sa
import tg
import transaction
from tg import TGController, expose

from tests.conftest import MakeApp
from tests.model import Model, User
from tests.test_sse import encoded, parsed
from tests.wsgi import Call, get
from tgstream import (
    SSE,
    Channel,
    Event,
    Report,
    Stream,
    _feed,
    last_event_id,
    rollback,
    stream,
)
from tgstream._feed import Feed, Start, follow
from tgstream._memory import KEPT
from tgstream._outbox import send
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
    assert list(feed.take(0, 0.01) or ()) == []
    patient.join(10)
    assert [list(each) for each in found] == [[]]


KILLED = """
from gevent import monkey; monkey.patch_all()
import gevent
from tgstream._feed import Feed, Start, follow
feed = Feed((1, 0), 10)
looks, waits = (gevent.spawn(feed.take, 0, 600.0) for _ in range(2))
gevent.sleep(0)
looks.kill()
print(waits.get(timeout=10))
"""


def test_listener_that_has_heard_an_event_is_not_woken_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However early it hears it: it waits for the next, and beats when that is late."""
    waits, heard_by = threading.Semaphore(0), list[Event]()

    class Told(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.release()
            return super().wait(timeout)

    class Change(_feed._Change):
        def __init__(self, *args: Any) -> None:
            if listener.ident is None:
                listener.start()
                assert waits.acquire(timeout=10)
            super().__init__(*args)
            self.come = Told()

    def hear() -> None:
        for event in follow(Start(feed, 0, []), 600.0):
            heard_by.append(event)
            if event.data == "two":
                return

    feed, listener = Feed((0, 0), 10), threading.Thread(target=hear)
    feed._change.come = Told()
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
    assert subprocess.check_output(command, text=True) == "[]\n"


def test_feed_keeps_an_event_once() -> None:
    """Two may read the same from a server; each hands on all of it, in order."""
    feed = Feed((1, 0), 10)
    events = {place: Event(str(place)) for place in [(1, 1), (2, 0), (2, 1)]}
    for place in [(1, 1), (1, 1), (2, 0), (1, 1), (2, 0), (2, 1)]:
        feed.append(place, events[place])
    assert feed.take(0, 1.0) == list(events.values())
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
    root.during = [lambda: send("a thing", lambda: channel.publish(b"", now=True))]
    root.during += [lambda: channel.publish("after")]
    assert get(app, "/post?text=ada").text == "posted"
    assert heard(events, 2) == ["ada", "after"]
    assert sqlite_model.names() == ["ada"]
    (record,) = caplog.records
    assert record.getMessage() == "a thing was committed, and could not be sent"
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
