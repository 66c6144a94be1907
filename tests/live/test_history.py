"""``ChannelHistory``: waiting listeners, and finalisers that interrupt any code."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from itertools import islice
from typing import Any

import pytest

from tests.conftest import MakeApp
from tests.forks import run_python
from tgstream import Event
from tgstream.live import history
from tgstream.live.history import ChannelHistory, Subscription
from tgstream.live.listener import iter_events

# Listeners that wait.


def test_history_stores_an_event_once() -> None:
    """Two readers of a server may append the same events. The order stays."""
    events = ChannelHistory((1, 0), 10)
    expected = {at: Event(str(at)) for at in [(1, 1), (2, 0), (2, 1)]}
    for at in [(1, 1), (1, 1), (2, 0), (1, 1), (2, 0), (2, 1)]:
        events.append(at, expected[at])
    stored = [events.wait_for_event(number, 1.0) for number in range(3)]
    assert stored == list(expected.values())
    assert events.snapshot() == (3, (2, 1))


def test_shorter_heartbeat_is_kept_beside_a_longer_one() -> None:
    """A listener with a shorter timeout does not wait for the first listener."""
    events, received = ChannelHistory((1, 0), 10), list[Any]()
    patient = threading.Thread(
        target=lambda: received.append(events.wait_for_event(0, 600.0))
    )
    patient.start()
    assert events.wait_for_event(0, 0.01) == Event()
    patient.join(10)
    assert received == [Event()]


def test_only_one_listener_waits_with_a_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With gevent each timeout is a timer, which costs CPU for each event."""
    waits, timeouts = threading.Semaphore(0), list[float | None]()

    class Signal(history._Signal):
        __slots__ = ()

        def wait(self, seconds: float | None) -> bool:
            timeouts.append(seconds)
            waits.release()
            return super().wait(seconds)

    monkeypatch.setattr(history, "_Signal", Signal)
    events = ChannelHistory((0, 0), 10)
    listeners = [
        threading.Thread(target=events.wait_for_event, args=[0, 600.0])
        for _ in range(4)
    ]
    for listener in listeners:
        listener.start()
        assert waits.acquire(timeout=10)
    events.append((1, 0), Event("x"))
    for listener in listeners:
        listener.join(10)
    assert timeouts == [600.0, None, None, None]


def test_listeners_that_end_do_not_delay_the_heartbeat_of_the_others() -> None:
    """The others are woken, too, and then wait for the rest of the time."""
    events, received = ChannelHistory((1, 0), 10), list[Any]()
    others = [
        threading.Thread(
            target=lambda: received.append(events.wait_for_event(0, 0.2)), daemon=True
        )
        for _ in range(2)
    ]
    started = time.monotonic()
    for other in others:
        other.start()
    while any(other.is_alive() for other in others):
        events.wake_ending()
        assert time.monotonic() < started + 10
    assert received == [history.HEARTBEAT] * 2
    assert time.monotonic() >= started + 0.2


KILLED = """
from gevent import monkey; monkey.patch_all()
import gevent
from tgstream.live.history import HEARTBEAT, ChannelHistory
events = ChannelHistory((1, 0), 10)
first, second = (gevent.spawn(events.wait_for_event, 0, 600.0) for _ in range(2))
gevent.sleep(0)
first.kill()
print(second.get(timeout=10) is HEARTBEAT)
"""


def test_killed_listener_does_not_block_the_others() -> None:
    """If it was the one with the timeout, another listener takes over."""
    command = [sys.executable, "-c", KILLED]
    assert subprocess.check_output(command, text=True) == "True\n"


def test_listener_is_not_woken_by_an_event_that_it_has_received(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However early it received the event, it waits for the next one."""
    waits, received = threading.Semaphore(0), list[Event]()

    class Signal(history._Signal):
        __slots__ = ()

        def __init__(self, *args: Any) -> None:
            if listener.ident is None:
                listener.start()
                assert waits.acquire(timeout=10)
            super().__init__(*args)

        def wait(self, seconds: float | None) -> bool:
            waits.release()
            return super().wait(seconds)

    def listen() -> None:
        for event in islice(iter_events(Subscription(events), 600.0), 1, None):
            received.append(event)
            if event.data == "two":
                return

    events, listener = ChannelHistory((0, 0), 10), threading.Thread(target=listen)
    events._signal.__class__ = Signal
    monkeypatch.setattr(history, "_Signal", Signal)
    events.append((1, 0), Event("one"))
    assert waits.acquire(timeout=10)
    events.append((2, 0), Event("two"))
    listener.join(10)
    assert received == [Event("one"), Event("two")]


def test_channels_can_be_created_while_all_listeners_are_woken() -> None:
    """drain() is not disturbed by requests that still arrive."""
    done, interval = threading.Event(), sys.getswitchinterval()

    def create_histories() -> None:
        while not done.is_set():
            for _ in [ChannelHistory((0, 0), 1) for _ in range(20)]:
                pass

    kept = [ChannelHistory((0, 0), 1) for _ in range(200)]
    creator = threading.Thread(target=create_histories)
    sys.setswitchinterval(1e-5)
    try:
        creator.start()
        for _ in range(3):
            history.wake_all_listeners()
    finally:
        sys.setswitchinterval(interval)
        done.set()
        creator.join(10)
    assert len(kept) == 200


# Finalisers.


COLLECTED = """
import gc, sys, threading
if sys.argv[1] == "gevent":
    from gevent import monkey; monkey.patch_all()
import faulthandler; faulthandler.dump_traceback_later(50, exit=True)
from itertools import islice
from tgstream import Channel
from tgstream.live import history

ROUNDS = 1000
channel, other = Channel("one"), Channel("two")


def body(number):
    try:
        yield b""
    finally:
        channel.publish(f"end {number}")
        other.publish("elsewhere")
        listeners.append(channel.listen())
        history.wake_all_listeners()


def listen(events, into):
    for event in events:
        if event.data is not None:
            into.append(event)
        if len(into) == 2 * ROUNDS:
            return


listeners, received = [channel.listen() for _ in range(3)], [[], [], []]
threads = [
    threading.Thread(target=listen, args=pair)
    for pair in zip(listeners, received, strict=True)
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
first = received[0]
assert first == received[1] == received[2]
expected = {f"{word} {number}" for word in ("round", "end") for number in range(ROUNDS)}
assert {event.data for event in first} == expected
numbers = [int(event.id.split("-")[1]) for event in first]
assert numbers == sorted(numbers) and len(set(numbers)) == 2 * ROUNDS
rounds = [event.data for event in first if "round" in event.data]
assert rounds == [f"round {number}" for number in range(ROUNDS)]
assert len(listeners) == 3 + ROUNDS
assert all(next(events).comment == "open" for events in listeners[3:])
print(max(numbers) == 2 * ROUNDS)
"""


@pytest.mark.parametrize("workers", ["threads", "gevent"])
def test_finaliser_can_publish_whenever_the_collector_runs_it(
    make_app: MakeApp, workers: str
) -> None:
    """It may publish to the channel that its thread publishes to. No event is lost."""
    command = [sys.executable, "-W", "ignore", "-c", COLLECTED, workers]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout == "True\n", result.stderr[-3000:]


INTERRUPTED = """
import faulthandler, sys
faulthandler.dump_traceback_later(50, exit=True)
from itertools import islice
from tgstream import Channel, listen, position
from tgstream.live import history, listener, merged, places
from tgstream.live.backends import memory

MODULES = history, memory, listener, merged, places
FILES = {module.__file__ for module in MODULES}
ACTIONS = {
    "publish": lambda: channel.publish("before"),
    "listen": lambda: next(channel.listen()),
    "resume": lambda: list(islice(channel.listen(after=id), 2)),
    "merge": lambda: list(islice(listen("one", "two", after=place), 2)),
    "store a place": lambda: list(islice(listen(*many, after=stored), 2)),
    "wake": history.wake_all_listeners,
    "time out": lambda: history.ChannelHistory((0, 0), 9).wait_for_event(0, 0.0),
}
# These have many byte codes. "wake" repeats 150 for each channel, and is interrupted at
# others of them in each pass.
STEPS = {"merge": 11, "store a place": 101, "wake": 11}
channel = Channel("one")
id = next(channel.listen()).id
many = ["one", *map(str, range(20))]
place, stored = position("one", "two"), position(*many)
channel.publish("first")


def receive(events):
    assert next(events).comment == "open"
    return list(iter(lambda: next(events).data, "after"))


for name, act in ACTIONS.items():
    at = 0
    while True:
        byte_codes, inside, outside = 0, [], channel.listen()

        def interrupt(frame, kind, argument):
            global byte_codes
            if frame.f_code.co_filename not in FILES:
                return None
            frame.f_trace_opcodes = True
            if kind == "opcode":
                if byte_codes == at:
                    sys.settrace(None)
                    channel.publish("inside")
                    history.wake_all_listeners()
                    inside.append(channel.listen())
                byte_codes += 1
            return interrupt

        sys.settrace(interrupt)
        act()
        sys.settrace(None)
        if not inside:
            break
        at += STEPS.get(name, 1)
        channel.publish("after")
        assert receive(outside).count("inside") == 1, (name, at)
        assert "inside" not in receive(inside[0]), (name, at)
    assert at > 20, (name, at)
print("complete")
"""


def test_finaliser_can_publish_at_every_byte_code(make_app: MakeApp) -> None:
    """It can listen and wake, too. Its event is received once, before the next one."""
    result = run_python("-c", INTERRUPTED)
    assert result.stdout == "complete\n", result.stderr[-3000:]
