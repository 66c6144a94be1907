"""A listener: the events of a channel, as one stream receives them.

While the server of the back end cannot be reached, a listener receives heartbeats.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from ..core.context import thread
from ..core.errors import StreamError
from ..core.heartbeat import (
    begin_response,
    begin_wait,
    check_ending,
    end_wait,
    is_ending,
)
from ..core.monitor import event_loops
from ..core.options import clock
from ..formats.sse import SSE, Event
from .history import HEARTBEAT, Subscription, Waiter, reset_event
from .protocols import Backend, ConnectionLost

INVALID_ID = "lost"
"""An id that no back end accepts, so that the channel sends a reset."""
MAX_PAUSE = 1.0
"""Maximum seconds between two attempts to start a listener."""


def listen(
    backend: Backend,
    channel: str,
    after: str | None,
    heartbeat_seconds: float,
    since: float | None = None,
) -> Iterator[Event]:
    """The events of a channel from this call on.

    :param after: the id of the last event that the client received. The events after it
        come first, or ``event: reset`` if some of them are missing.
    :param heartbeat_seconds: yield ``HEARTBEAT`` after this time without an event.
    :param since: seconds. Older events are not sent, and count as missing.
    """
    try:
        subscription = backend.subscribe(channel, after, since)
    except ConnectionLost:
        return _listen_when_connected(backend, channel, after, heartbeat_seconds, since)
    return iter_events(subscription, heartbeat_seconds, channel)


def iter_events(
    subscription: Subscription,
    heartbeat_seconds: float,
    channel: str = "",
    has_opening: bool = True,
) -> Iterator[Event]:
    """Yield the events of a listener, until it is too far behind.

    It is one generator: with gevent a second one takes 0.6 KiB more of an open stream.

    :param heartbeat_seconds: yield ``HEARTBEAT`` after this time without an event.
    :param channel: the name of the channel, for a reset.
    :param has_opening: whether to begin with the opening comment.
    """
    history = subscription.history
    if history is None:
        return
    if has_opening:
        yield opening_event(None if subscription.has_gap else subscription.id)
    if subscription.has_gap:
        yield reset_event(subscription.id, channel)
    number: int | None = subscription.next_number
    if subscription.backlog is not None:
        number = yield from subscription.backlog
    if number is not None:
        check_thread()
        wake = history.wake_ending
        begin_wait(wake)
        try:
            while (
                event := history.wait_for_event(number, heartbeat_seconds)
            ) is not None:
                number += event is not HEARTBEAT
                yield event
                del event
        finally:
            end_wait(wake)
    yield from end_lagging()


def check_thread() -> None:
    """Refuse to wait for events on the thread of an event loop.

    :raises StreamError: on this thread.
    """
    if threading.get_ident() in event_loops:
        raise StreamError(
            "listen() would wait for events on the thread of the event loop, and stop "
            "all async generators of this process. Listen in an ordinary generator"
        )


def end_lagging() -> Iterator[Event]:
    """End the stream of a listener that is too far behind.

    It must not count as complete: the format must not send the end of a complete one.
    """
    if (body := thread.record.body) is not None:
        body.ask_to_end("lagged")
        yield HEARTBEAT


def _listen_when_connected(
    backend: Backend,
    channel: str,
    after: str | None,
    heartbeat_seconds: float,
    since: float | None,
) -> Iterator[Event]:
    """The events of a listener that began while the server could not be reached."""
    subscriptions: list[Subscription] = []

    def connect() -> bool:
        try:
            # Without an id it may have missed events until now. An invalid id makes the
            # channel send a reset.
            subscriptions.append(backend.subscribe(channel, after or "", since))
        except ConnectionLost:
            return False
        return True

    # If the client is cut off before the channel sends a reset, it reconnects with the
    # invalid id, and receives the reset then.
    yield opening_event(INVALID_ID if after is None else None)
    yield from wait_until_connected(connect, heartbeat_seconds)
    subscription = subscriptions.pop()
    if not subscription.has_gap:
        yield opening_event(subscription.id)
    yield from iter_events(subscription, heartbeat_seconds, channel, has_opening=False)


def wait_until_connected(
    connect: Callable[[], bool], heartbeat_seconds: float
) -> Iterator[Event]:
    """Yield ``HEARTBEAT`` while the server cannot be reached.

    :param connect: makes an attempt. False if it failed.
    """
    next_heartbeat, waiter = clock() + heartbeat_seconds, Waiter()
    wake = waiter.wake_ending
    begin_wait(wake)
    try:
        while not connect():
            if clock() > next_heartbeat or is_ending():
                yield HEARTBEAT
                next_heartbeat = clock() + heartbeat_seconds
            waiter.wait(min(MAX_PAUSE, heartbeat_seconds))
    finally:
        end_wait(wake)


def without_comments(events: Iterator[Event]) -> Iterator[Event]:
    """The events without the comments, for a generator that chooses events.

    The response of its stream begins when the generator takes the first event.

    :raises StreamError: when the stream has no heartbeat of its own.
    :raises StreamEnding: when the stream is to end. The generator may drop all events.
    """
    for event in events:
        if event.data is None:
            begin_response(*SSE().encode([event]))
        else:
            check_ending()
            yield event
        del event


def opening_event(id: str | None) -> Event:
    """The first event of a listener: a comment that shows the browser it is connected.

    :param id: the place where the listener starts, so that a reconnect misses nothing.
    """
    return Event(comment="open", id=id)
