"""A listener of several channels, as one stream receives them.

It waits for all of them at once, on the thread of its stream. The order of the events
of a channel is kept. Each event has an id that holds the place in all channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from ..core.heartbeat import begin_wait, end_wait
from ..core.options import clock
from ..formats.sse import Event, replace_id
from .history import HEARTBEAT, Backlog, Subscription, Waiter, reset_event
from .listener import (
    INVALID_ID,
    check_thread,
    end_lagging,
    opening_event,
    wait_until_connected,
)
from .places import UNKNOWN, Places
from .protocols import Backend, ConnectionLost


def listen_to_all(
    backend: Backend,
    channels: Iterable[str],
    after: str | None,
    heartbeat_seconds: float,
    since: float | None = None,
) -> Iterator[Event]:
    """The events of several channels from this call on.

    :param channels: the names of the channels.
    :param after: the id of the last event that the client received. The events after it
        come first. A channel that misses some of them sends ``event: reset`` instead.
    :param heartbeat_seconds: yield ``HEARTBEAT`` after this time without an event.
    :param since: seconds. Older events are not sent, and count as missing.
    """
    start = _Start(Places(backend, channels), backend, after, since)
    start.connect()
    return _iter_events(start, heartbeat_seconds)


class _Start:
    """The start of a listener of several channels."""

    def __init__(
        self, places: Places, backend: Backend, after: str | None, since: float | None
    ) -> None:
        self.places: Final = places
        self.subscriptions: list[Subscription] = []
        self._backend, self._after, self._since = backend, after, since
        self._starts: list[str | None] | None = None

    @property
    def is_connected(self) -> bool:
        return len(self.subscriptions) == len(self.places.channels)

    @property
    def id_while_lost(self) -> str | None:
        """The id of the opening comment while the server cannot be reached."""
        return INVALID_ID if self._after is None else None

    def connect(self) -> bool:
        """Start to listen to the channels that are left.

        :returns: False if the server cannot be reached.
        """
        channels, subscriptions = self.places.channels, self.subscriptions
        try:
            if self._starts is None:
                self._starts = self._find_starts()
            while len(subscriptions) < len(channels):
                index = len(subscriptions)
                subscriptions.append(
                    self._backend.subscribe(
                        channels[index], self._starts[index], self._since
                    )
                )
        except ConnectionLost:
            if self._starts is not None:
                # Without a place they may miss events from now on.
                self._starts = [start or UNKNOWN for start in self._starts]
            return False
        return True

    def _find_starts(self) -> list[str | None]:
        if self._after is None:
            return [None] * len(self.places.channels)
        return [*self.places.parse(self._after)]


def _iter_events(start: _Start, heartbeat_seconds: float) -> Iterator[Event]:
    was_connected = start.is_connected
    if not was_connected:
        yield opening_event(start.id_while_lost)
        yield from wait_until_connected(start.connect, heartbeat_seconds)
    places, subscriptions = start.places, start.subscriptions
    if any(subscription.history is None for subscription in subscriptions):
        return
    gaps = [index for index, each in enumerate(subscriptions) if each.has_gap]
    id = places.move_all([UNKNOWN if s.has_gap else s.id for s in subscriptions])
    if was_connected or not gaps:
        yield opening_event(None if gaps else id)
    for index in gaps:
        id = places.move(index, subscriptions[index].id)
        yield reset_event(id, places.channels[index])
    yield from _iter_started(places, subscriptions, heartbeat_seconds)


def _iter_started(
    places: Places, subscriptions: list[Subscription], heartbeat_seconds: float
) -> Iterator[Event]:
    histories, numbers, waiter = [], [], Waiter()
    for index, subscription in enumerate(subscriptions):
        number: int | None = subscription.next_number
        if subscription.backlog is not None:
            number = yield from _iter_backlog(places, index, subscription.backlog)
        history = subscription.history
        if history is None or number is None:
            yield from end_lagging()
            return
        history.add_waiter(waiter)
        histories.append(history)
        numbers.append(number)
    check_thread()
    heartbeat_due = clock() + heartbeat_seconds
    wake = waiter.wake_ending
    begin_wait(wake)
    try:
        while True:
            for index, history in enumerate(histories):
                last = history.next_number  # a busy channel does not delay the others
                while numbers[index] < last:
                    event = history.wait_for_event(numbers[index], 0.0)
                    if event is None:
                        yield from end_lagging()
                        return
                    numbers[index] += 1
                    yield _place_event(places, index, event)
                    del event
                    heartbeat_due = clock() + heartbeat_seconds
            if not waiter.wait(heartbeat_due - clock()):
                yield HEARTBEAT
                heartbeat_due = clock() + heartbeat_seconds
    finally:
        end_wait(wake)


def _iter_backlog(places: Places, index: int, backlog: Backlog) -> Backlog:
    """The events before those of a history. Returns the number of the next one."""
    while True:
        try:
            event = next(backlog)
        except StopIteration as end:
            number: int | None = end.value
            return number
        yield _place_event(places, index, event)
        del event


def _place_event(places: Places, index: int, event: Event) -> Event:
    """The event of a channel, with the id that holds the place in all of them."""
    id, channel = places.move(index, str(event.id)), places.channels[index]
    if event.event == "reset":
        return reset_event(id, channel)
    return replace_id(event, id, channel)
