"""The back end of ``redis://``: channels of several processes.

Every channel is a stream of Redis or Valkey. A script appends an event to the stream
and reports it to the processes that listen to the channel. When the connection is lost,
the listeners wait. After a reconnect they continue where they were. If events are
missing, they receive ``event: reset``.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from ...formats.sse import Message
from ..history import Backlog, ChannelHistory, Position, Subscription
from ..protocols import ChannelSettings, ConnectionLost
from .redis_connection import CONNECTION_ERRORS, is_outage
from .redis_publisher import RedisPublisher
from .redis_reader import Outage, RedisReader
from .redis_streams import TIMEOUT_SECONDS, RedisStreams, format_id, parse_id

Result = TypeVar("Result")


class RedisBackend:
    """The channels of a Redis or Valkey server, in this process.

    :param url: the URL of the server, as the package redis reads it.
    :param settings: the other options of the application.
    """

    def __init__(self, url: str, settings: ChannelSettings) -> None:
        self._publisher = RedisPublisher(url, settings)
        self._settings = settings
        self._streams = RedisStreams(url, settings)
        self._outage = Outage()
        self._reader = RedisReader(self._streams, settings, self._outage)
        self._backlog_lock = threading.Lock()

    @property
    def backlog(self) -> int:
        """The number of events that this process keeps until it can send them."""
        return self._publisher.backlog

    def publish(self, messages: Sequence[Message]) -> None:
        """Send events to all listeners of all processes."""
        self._publisher.publish(messages)

    def publish_committed(self, messages: Sequence[Message]) -> None:
        """Send the events of a transaction that has committed."""
        self._publisher.publish_committed(messages)

    def position(self, channel: str) -> str:
        """The id of the newest event of a channel."""
        return self._ask(channel, lambda: format_id(self._streams.newest(channel)))

    # Listeners.

    def subscribe(
        self, channel: str, after: str | None, since: float | None = None
    ) -> Subscription:
        """Start a listener of a channel.

        :raises StreamError: if the server refuses the channel.
        """
        while True:
            start = self._ask(channel, lambda: self._subscribe(channel, after, since))
            history = start.history
            # If the channel was refused meanwhile, the history receives no event.
            if history is None or self._reader.has(channel, history):
                return start

    def _ask(self, channel: str, function: Callable[[], Result]) -> Result:
        """Call a function that uses the server, and convert its errors."""
        try:
            result = function()
        except CONNECTION_ERRORS as error:
            if not is_outage(error):
                raise self._reader.refusal(channel, error) from error
            self._streams.close_after(error)
            self._outage.log_start(error)
            raise ConnectionLost from error
        if not self._reader.is_running:  # else it logs when it is connected
            self._outage.log_end()
        return result

    def _subscribe(
        self, channel: str, after: str | None, since: float | None
    ) -> Subscription:
        history = self._reader.history(channel)
        if history is None:
            return Subscription()
        next_number, newest = history.snapshot()
        if after is None:
            return Subscription(history, next_number, format_id(newest))
        position = parse_id(after)
        if position is None or self._is_too_old(channel, position, since):
            return self._subscribe_after_gap(history)
        number = history.number_after(position, exact=True)
        if number is None and position < history.first_position:
            if not self._load_backlog(history, channel, position):
                return self._subscribe_after_gap(history)
            number = history.number_after(position, exact=True)
            if number is None:  # the backlog is longer than a history
                backlog = self._iter_backlog(history, channel, position)
                return Subscription(history, id=after, backlog=backlog)
        if number is None and position > newest:
            number = self._catch_up(history, channel, position)
        if number is None:
            return self._subscribe_after_gap(history)
        return Subscription(history, number, after)

    def _is_too_old(
        self, channel: str, position: Position, since: float | None
    ) -> bool:
        """True if an event after a position is older than ``since`` seconds."""
        seconds = self._settings.seconds
        if since is not None:
            seconds = min(seconds, since)
        oldest = int((self._reader.server_seconds() - seconds) * 1000)
        if position[0] >= oldest:
            return False
        return self._streams.has_event_between(channel, position, oldest)

    def _subscribe_after_gap(self, history: ChannelHistory) -> Subscription:
        next_number, newest = history.snapshot()
        return Subscription(history, next_number, format_id(newest), has_gap=True)

    def _load_backlog(
        self, history: ChannelHistory, channel: str, position: Position
    ) -> bool:
        """Read the events after a position into the history, for all listeners.

        :returns: False if the server has removed some of them. If it is True, the
            history has the newest of them, as many as there is room for.
        """
        # One listener reads. The others wait for its result, but not forever.
        acquired = self._backlog_lock.acquire(timeout=TIMEOUT_SECONDS)
        try:
            if history.number_after(position, exact=True) is not None:
                return True
            # Read one more than fits: its position is that before the oldest that fits.
            until, count = history.first_position, self._settings.history + 1
            older = self._streams.newest_between(channel, position, until, count)
            # Checked after the read: events that are complete now were complete then.
            if not self._streams.has_all_after(channel, position):
                return False
            if len(older) == count:
                (position, _), *older = older
            history.prepend(position, until, older)
            return True
        finally:
            if acquired:
                self._backlog_lock.release()

    def _iter_backlog(
        self, history: ChannelHistory, channel: str, position: Position
    ) -> Backlog:
        """Read a backlog that is longer than a history page by page.

        If an event is missing, the listener ends. The browser then reconnects, and
        receives a reset.
        """
        while (number := history.number_after(position, exact=True)) is None:
            try:
                page = deque(self._streams.page(channel, position))
                if not page or not self._streams.has_all_after(channel, position):
                    return None
            except CONNECTION_ERRORS:
                return None
            while page:
                position, event = page.popleft()
                yield event
                del event
        return number

    def _catch_up(
        self, history: ChannelHistory, channel: str, position: Position
    ) -> int | None:
        """Read the events that the reader's thread has not read yet.

        :returns: the number of the first event after ``position``. None if an event
            after it is missing.
        """
        if not self._streams.has_all_after(channel, position):
            return None
        for missed in self._streams.after(channel, history.last_position) or []:
            history.append(*missed)
        return history.number_after(position, exact=True)


def ping(url: str) -> None:
    """Check that a server answers.

    :raises Exception: of the package redis, or of the system, if it does not answer.
    """
    streams = RedisStreams(url, ChannelSettings())
    try:
        streams.ping()
    finally:
        streams.close()
