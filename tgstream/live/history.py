"""What a process has of one channel: its newest events, and who waits for the next.

An event is kept once, however many listen, and for nobody in particular. A listener is
a number, that of its next event; one whose next event is kept no more has been
overtaken, and ends. One of those who wait looks at the clock, for all of them.

Python's collector runs finalisers (a generator's ``finally``, a ``__del__``) on the
thread that happens to allocate, in the middle of whatever that thread does. A finaliser
may publish, listen or wake. So nothing here waits for what its own thread holds:

- All changes go through :func:`in_turn`: one at a time in a process, in the order in
  which they were asked for. A finaliser that interrupts a change, or a thread that
  waits for its turn, only leaves its own in the queue: the interrupted call makes it
  before it returns.
- Readers take no lock. What they need together is in one object, which is replaced and
  never altered; an event is found by its number, or is kept no more.
- Who waits does so at a raw lock. A ``Condition`` has a lock of its own inside, which a
  finaliser that wakes others would wait for.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from weakref import WeakValueDictionary

from ..core.monitor import on_drain
from ..formats.sse import Event

Key = tuple[int, int]
"""The place of an event among all others: it has only to grow."""

BEAT = Event()
"""A comment, so that proxies keep the connection and a client that left is noticed."""


LONGEST = 10_000_000.0
"""Seconds that a lock can be waited for anywhere: some four months."""


class _Turns:
    """Changes that are made one at a time, on whichever thread has the lock."""

    def __init__(self) -> None:
        self._queue: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        # The threads (with gevent, greenlets) that hold the lock or wait for it.
        self._inside: set[int] = set()

    def make(self, change: Callable[[], None]) -> None:
        """Make a change, and return when it is made, but see :func:`in_turn`."""
        self._queue.append(change)
        me = threading.get_ident()
        if me in self._inside:
            return
        while True:
            self._inside.add(me)
            try:
                with self._lock:  # also where another thread may have made it: it has
                    self._drain()  # only then when it lets go of the lock
            finally:
                self._inside.discard(me)
            if not self._queue:  # a finaliser may have left something since
                return

    def _drain(self) -> None:
        while self._queue:
            self._queue.popleft()()


_turns = _Turns()


def in_turn(change: Callable[[], None]) -> None:
    """Make a change of the process's channels, alone and in order.

    It is made when this returns; but where this is called in the middle of another
    change on the same thread, by a finaliser, it is made when that one returns.

    :param change: makes it; it neither waits nor raises.
    """
    _turns.make(change)


def _forget_turns() -> None:
    """Begin again in a forked process: a thread that it has not may hold the lock."""
    global _turns
    _turns = _Turns()


os.register_at_fork(after_in_child=_forget_turns)


class Start:
    """Where a listener begins."""

    __slots__ = ("feed", "number", "opening")

    def __init__(
        self, feed: Feed | None = None, number: int = 0, opening: Iterable[Event] = ()
    ) -> None:
        self.feed, self.number = feed, number
        self.opening = opening  # what it is sent before


class _Change:
    """What those who have heard everything wait for, until it comes.

    :param end: the number of the event that is next, until then.
    :param floor: the place after which no event is missing.
    :param last: the place of the newest event.
    """

    __slots__ = ("beat", "come", "end", "floor", "last")

    def __init__(self, end: int, floor: Key, last: Key) -> None:
        self.end, self.floor, self.last = end, floor, last
        self.come = threading.Lock()  # held until then
        self.come.acquire()
        self.beat = float("inf")  # seconds until who looks at the clock ends it

    def wait(self, seconds: float) -> bool:
        """Whether it has come, once it has, or the time has passed."""
        if not self.come.acquire(timeout=min(seconds, LONGEST)):
            return False
        self.come.release()  # for the next of those who wait
        return True


class Feed:
    """The newest events of one channel.

    :param floor: the place after which no event is missing here.
    :param history: how many events are kept.
    """

    def __init__(self, floor: Key, history: int) -> None:
        self._history = history
        self._events: dict[int, tuple[Key, Event]] = {}  # by number, without a gap
        # Ended once, for all who wait, and replaced.
        self._change = _Change(0, floor, floor)
        _feeds[id(self)] = self

    @property
    def end(self) -> int:
        """The number of the next event."""
        return self._change.end

    @property
    def floor(self) -> Key:
        """The place after which no event is missing here."""
        return self._change.floor

    @property
    def last(self) -> Key:
        """The place of the newest event."""
        return self._change.last

    # Changes: each is made in its turn.

    def append(self, key: Key, event: Event) -> None:
        """Keep an event, unless it is there, and wake those who wait for it."""
        in_turn(lambda: self.append_now(key, event))

    def append_now(self, key: Key, event: Event) -> None:
        """As :meth:`append`, for who has the turn."""
        now, oldest = self._change, self._change.end - self._history
        if key <= now.last:
            return
        full = oldest in self._events
        self._add(key, event, self._events[oldest][0] if full else now.floor)
        if full:
            del self._events[oldest]

    def restart(self, key: Key, event: Event) -> None:
        """Go on from another place, with the event that says so."""

        def change() -> None:
            older = list(self._events)
            self._add(key, event, key)
            for number in older:
                del self._events[number]

        in_turn(change)

    def extend_back(
        self, floor: Key, until: Key, older: list[tuple[Key, Event]]
    ) -> None:
        """Keep what came before the oldest event that is here, as far as it fits.

        :param floor: the place before the first of ``older``.
        :param until: the floor of this feed that they go up to.
        """

        def change() -> None:
            now, room = self._change, self._history - len(self._events)
            if now.floor != until or room <= 0:
                return
            first = now.end - len(self._events)
            for number, entry in enumerate(older[-room:], first - len(older[-room:])):
                self._events[number] = entry
            place = floor if len(older) <= room else older[-room - 1][0]
            self._replace(_Change(now.end, place, now.last))

        in_turn(change)

    def _add(self, key: Key, event: Event, floor: Key) -> None:
        """Keep an event; older ones go after that, so that readers see it."""
        end = self._change.end
        self._events[end] = key, event
        self._replace(_Change(end + 1, floor, key))

    def wake(self) -> None:
        """Let all who wait go on, with an event or without, as after a silence."""
        in_turn(self._beat)

    def _beat(self) -> None:
        now = self._change
        self._replace(_Change(now.end, now.floor, now.last))

    def _replace(self, next: _Change) -> None:
        # What has come and what comes next are one: who has seen the one is not woken
        # for it.
        change, self._change = self._change, next
        change.come.release()

    # Readers: they take no lock.

    def now(self) -> tuple[int, Key]:
        """The number of the next event, and the place before it."""
        now = self._change
        return now.end, now.last

    def number_after(self, after: Key, exact: bool = False) -> int | None:
        """The number of the first event after a place; None where one is missing.

        :param exact: whether the place must be one that an event has had, here.
        """
        now = self._change
        if not now.floor <= after <= now.last:
            return None
        number = now.end
        while (found := self._events.get(number - 1)) is not None and found[0] > after:
            number -= 1
        if found is None and self._change.floor != now.floor:
            return None  # meanwhile its next event may have gone
        older = now.floor if found is None else found[0]
        return None if exact and older != after else number

    def take(self, number: int, seconds: float) -> Event | None:
        """The event of that number, once it is there; a comment after so many seconds.

        Or when it was woken. None where the event is kept no more.
        """
        change = self._change
        if change.end == number:
            self._wait(change, seconds)
            if self._change.end == number:
                return BEAT
        found = self._events.get(number)
        return None if found is None else found[1]

    def _wait(self, change: _Change, seconds: float) -> None:
        """Wait for a change; who is the first to wait ends it for all in time.

        A timer for each who waits costs more than all else that an event costs it.
        """
        if change.beat <= seconds:
            change.wait(LONGEST)
            return
        come = False
        try:
            change.beat = seconds
            come = change.wait(seconds)
        finally:  # a greenlet may be killed while it waits, and others rely on it
            if not come:
                in_turn(lambda: self._beat_after(change))

    def _beat_after(self, change: _Change) -> None:
        if self._change is change:
            self._beat()


_feeds: WeakValueDictionary[int, Feed] = WeakValueDictionary()


def wake() -> None:
    """Wake all who wait for an event in this process: their streams are to end."""
    for known in _feeds.valuerefs():  # a list: channels may be opened meanwhile
        if (feed := known()) is not None:
            feed.wake()


on_drain(wake)


def follow(start: Start, beat: float) -> Iterator[Event]:
    """What a listener is sent, until it is overtaken.

    :param start: where it begins; nowhere, where a finaliser listens and reads within
        a change that it interrupts: that listener ends.
    :param beat: after how many seconds of silence it is sent a comment.
    """
    yield from start.opening
    feed, number = start.feed, start.number
    del start  # and nothing of what was sent is held on to while it waits
    while feed is not None and (event := feed.take(number, beat)) is not None:
        number += event is not BEAT
        yield event
        del event


def opened(id: str | None) -> Event:
    """What comes first: the browser then knows that it is connected, and where."""
    return Event(comment="open", id=id)


def reset(id: str | None) -> Event:
    """What says that events are missing, and where it goes on."""
    return Event("", event="reset", id=id)
