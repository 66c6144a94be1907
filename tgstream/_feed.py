"""What a process has of one channel: its newest events, and who waits for the next.

Rule: an event is kept once, however many listen, and for nobody in particular. A
listener is a number, that of its next event; one whose next event is kept no more has
been overtaken, and ends. One of those who wait looks at the clock, for all of them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple
from weakref import WeakValueDictionary

from ._sse import Event

Key = tuple[int, int]
"""The place of an event among all others: it has only to grow."""

BEAT = Event()
"""A comment, so that proxies keep the connection and a client that left is noticed."""


class Start(NamedTuple):
    """Where a listener begins."""

    feed: Feed
    number: int
    opening: Iterable[Event]  # what it is sent before


class _Change:
    """What those who have heard everything wait for, until it comes.

    :param end: the number of the event that is next, until then.
    :param newest: the one before it.
    """

    __slots__ = ("beat", "come", "end", "newest")

    def __init__(self, end: int, newest: Sequence[Event]) -> None:
        self.end, self.newest = end, newest
        self.come = threading.Event()
        self.beat = float("inf")  # seconds until who looks at the clock ends it


class Feed:
    """The newest events of one channel.

    :param floor: the place after which no event is missing here.
    :param history: how many events are kept.
    """

    def __init__(self, floor: Key, history: int) -> None:
        self.floor = self.last = floor
        self._events: deque[tuple[Key, Event]] = deque(maxlen=history)
        self._lock = threading.Lock()
        # Ended once, for all who wait, and replaced; read without the lock.
        self._change = _Change(0, ())
        _feeds[id(self)] = self

    @property
    def end(self) -> int:
        """The number of the next event."""
        return self._change.end

    def append(self, key: Key, event: Event) -> None:
        """Keep an event, unless it is there, and wake those who wait for it."""
        with self._lock:
            if key <= self.last:
                return
            if len(self._events) == self._events.maxlen:
                self.floor = self._events[0][0]
            self._add(key, event)

    def restart(self, key: Key, event: Event) -> None:
        """Go on from another place, with the event that says so."""
        with self._lock:
            self._events.clear()
            self.floor = key
            self._add(key, event)

    def _add(self, key: Key, event: Event) -> None:
        self._events.append((key, event))
        self.last = key
        self._tell(_Change(self.end + 1, (event,)))

    def now(self) -> tuple[int, Key]:
        """The number of the next event, and the place before it."""
        with self._lock:
            return self.end, self.last

    def number_after(self, after: Key, exact: bool = False) -> int | None:
        """The number of the first event after a place; None where one is missing.

        :param exact: whether the place must be one that an event has had, here.
        """
        with self._lock:
            if not self.floor <= after <= self.last:
                return None
            newer, older = 0, self.floor
            for key, _ in reversed(self._events):
                if key <= after:
                    older = key
                    break
                newer += 1
            return None if exact and older != after else self.end - newer

    def take(self, number: int, seconds: float) -> Sequence[Event] | None:
        """The events from ``number`` on, once there are some, or the time has passed.

        Or when it was woken. None where the first of them is kept no more.
        """
        change = self._change
        if change.end == number:
            self._wait(change, seconds)
            change = self._change
        if change.end == number + 1:  # as a rule: all have had what came before
            return change.newest
        with self._lock:
            missed = self.end - number
            if missed > len(self._events):
                return None
            events = [event for _, event in islice(reversed(self._events), missed)]
        events.reverse()
        return events

    def _wait(self, change: _Change, seconds: float) -> None:
        """Wait for a change; who is the first to wait ends it for all in time.

        A timer for each who waits costs more than all else that an event costs it.
        """
        if change.beat <= seconds:
            change.come.wait()
            return
        come = False
        try:
            change.beat = seconds
            come = change.come.wait(seconds)
        finally:  # a greenlet may be killed while it waits, and others rely on it
            if not come:
                with self._lock:
                    if self._change is change:
                        self._tell(_Change(change.end, change.newest))

    def wake(self) -> None:
        """Let all who wait go on, with an event or without, as after a silence."""
        with self._lock:
            self._tell(_Change(self.end, self._change.newest))

    def _tell(self, next: _Change) -> None:
        # Not a Condition: it makes a lock for each who waits, each time. What has come
        # and what comes next are one: who has seen the one is not woken for it.
        change, self._change = self._change, next
        change.come.set()


_feeds: WeakValueDictionary[int, Feed] = WeakValueDictionary()


def wake() -> None:
    """Wake all who wait for an event in this process: their streams are to end."""
    for known in _feeds.valuerefs():  # a list: channels may be opened meanwhile
        if (feed := known()) is not None:
            feed.wake()


def follow(start: Start, beat: float) -> Iterator[Event]:
    """What a listener is sent, until it is overtaken.

    :param start: where it begins.
    :param beat: after how many seconds of silence it is sent a comment.
    """
    yield from start.opening
    feed, number, _ = start
    while (events := feed.take(number, beat)) is not None:
        if not events:
            yield BEAT
            continue
        number += len(events)
        yield from events


def opened(id: str | None) -> Event:
    """What comes first: the browser then knows that it is connected, and where."""
    return Event(comment="open", id=id)


def reset(id: str | None) -> Event:
    """What says that events are missing, and where it goes on."""
    return Event("", event="reset", id=id)
