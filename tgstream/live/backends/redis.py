"""The back end of ``redis://``: channels of several processes.

Every channel is a stream of Redis or Valkey. In each process one thread reads, over one
connection, the new events of all channels that have listeners, and it runs only while
there are listeners. When the connection is lost, the listeners wait. After a reconnect
they continue where they were. If events are missing, they receive ``event: reset``.

The position of an event is the id that the server gave it. The server removes the
oldest events of a stream first. So if the event at a position is still in the stream,
no event after it is missing. If it is not, ``has_all_after()`` needs another proof.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

from ...core.report import log
from ...formats.sse import Event, Message
from ..history import (
    Backlog,
    ChannelHistory,
    Position,
    Subscription,
    reset_event,
)
from ..protocols import ChannelSettings, ConnectionLost

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise ImportError(
        "tgstream.channels uses Redis or Valkey, but the package redis is not "
        "installed. Run: pip install 'tgstream[redis]'"
    ) from error

CONNECTION_ERRORS = redis.RedisError, OSError
READ_SECONDS = 1.0
"""Maximum seconds that one read waits on the server for new events."""
TIMEOUT_SECONDS = 5.0
"""Seconds without an answer after which a connection is given up."""
MIN_RECONNECT_SECONDS = 0.05
MAX_RECONNECT_SECONDS = 1.0
"""Seconds between two attempts to connect. They double from the minimum on."""
MAX_CONNECTIONS = 8
"""Connections for publishing and resuming. If all are in use, others wait."""
MAX_READ = 1000
"""Maximum events of one read of the thread."""
MAX_PAGE = 20
"""Maximum events of one read for a single listener."""
KEY_PREFIX = "tgstream:"

Entry = tuple[Position, Event]

START: Position = (0, 0)
"""The position before the first event of a stream."""


class RedisBackend:
    """The channels of a Redis or Valkey server, in this process.

    :param url: the URL of the server, as the package redis reads it.
    :param settings: the other options of the application.
    """

    def __init__(self, url: str, settings: ChannelSettings) -> None:
        self._url = url
        self._max_events = settings.history
        pool = redis.BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=TIMEOUT_SECONDS,
            **_connection_options(),
        )
        self._streams = RedisStreams(redis.Redis(connection_pool=pool))
        self._histories: WeakValueDictionary[str, ChannelHistory] = (
            WeakValueDictionary()
        )
        self._lock = threading.Lock()
        self._backlog_lock = threading.Lock()
        self._reader_runs = False
        self._connection_lost = False
        self._client_id: int | None = None  # of the reader's connection

    def publish(self, messages: Sequence[Message]) -> None:
        """Send events to all listeners of all processes."""
        for message in messages:
            self._streams.add(message, self._max_events)

    def publish_committed(self, messages: Sequence[Message]) -> None:
        """Send the events of a transaction that has committed."""
        for message in messages:
            try:
                self._streams.add(message, self._max_events)
            except CONNECTION_ERRORS:
                log.exception(
                    "an event of Channel(%r) is lost: it could not be sent after the "
                    "commit",
                    message.channel,
                )

    def position(self, channel: str) -> str:
        """The id of the newest event of a channel."""
        try:
            return format_id(self._streams.newest(channel))
        except CONNECTION_ERRORS as error:
            self._log_lost_connection(error)
            raise ConnectionLost from error

    # Listeners.

    def subscribe(
        self, channel: str, after: str | None, since: float | None = None
    ) -> Subscription:
        """Start a listener of a channel."""
        try:
            return self._subscribe(channel, after)
        except CONNECTION_ERRORS as error:
            self._log_lost_connection(error)
            raise ConnectionLost from error

    def _subscribe(self, channel: str, after: str | None) -> Subscription:
        history = self._history(channel)
        next_number, newest = history.snapshot()
        if after is None:
            return Subscription(history, next_number, format_id(newest))
        position = parse_id(after)
        if position is None:
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
            until, count = history.first_position, self._max_events + 1
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
        for entry_position, event in self._streams.all_after(
            channel, history.last_position
        ):
            history.append(entry_position, event)
        return history.number_after(position, exact=True)

    # The reader: a thread.

    def _history(self, channel: str) -> ChannelHistory:
        history = self._histories.get(channel)
        if history is None:
            new = ChannelHistory(self._streams.newest(channel), self._max_events)
            with self._lock:
                history = self._histories.setdefault(channel, new)
                self._ensure_reader()
            self._interrupt_read()
        return history

    def _ensure_reader(self) -> None:
        if not self._reader_runs:
            threading.Thread(
                target=self._run_reader, name="tgstream-channels", daemon=True
            ).start()
            self._reader_runs = True

    def _interrupt_read(self) -> None:
        """Let the reader read a new channel at once, and not after READ_SECONDS."""
        if self._client_id is not None:
            with suppress(*CONNECTION_ERRORS):
                self._streams.client.client_unblock(self._client_id)

    def _run_reader(self) -> None:
        streams, pause = None, MIN_RECONNECT_SECONDS
        while histories := self._active_histories():
            try:
                if streams is None:
                    streams = self._connect()
                    self._resync(streams, histories)
                    self._log_reconnect()
                    pause = MIN_RECONNECT_SECONDS
                self._read(streams, histories)
            except Exception as error:  # all listeners depend on this thread
                self._close(streams)
                self._log_lost_connection(error)
                streams = None
                histories.clear()
                time.sleep(pause)
                pause = min(pause * 2, MAX_RECONNECT_SECONDS)
            histories.clear()  # so that a channel without listeners is freed
        self._close(streams)

    def _active_histories(self) -> dict[str, ChannelHistory]:
        """The histories that have listeners, by channel. If empty, the reader ends."""
        with self._lock:
            # A list, because listeners may disconnect meanwhile.
            references = self._histories.valuerefs()
            histories = {
                reference.key: history
                for reference in references
                if (history := reference()) is not None
            }
            self._reader_runs = bool(histories)
            return histories

    def _connect(self) -> RedisStreams:
        client: Any = redis.Redis.from_url(
            self._url,
            single_connection_client=True,
            **_connection_options(READ_SECONDS),
        )
        self._client_id = client.client_id()
        return RedisStreams(client)

    def _log_lost_connection(self, error: Exception) -> None:
        if not self._connection_lost:
            self._connection_lost = True
            log.warning(
                "Lost the connection to Redis (tgstream.channels): %s. Listeners wait "
                "until it reconnects",
                str(error).rstrip("."),
            )

    def _log_reconnect(self) -> None:
        if self._connection_lost:
            self._connection_lost = False
            log.info("Reconnected to Redis (tgstream.channels)")

    def _close(self, streams: RedisStreams | None) -> None:
        self._client_id = None
        if streams is not None:
            with suppress(*CONNECTION_ERRORS):
                streams.client.close()

    def _resync(
        self, streams: RedisStreams, histories: dict[str, ChannelHistory]
    ) -> None:
        """Send a reset in each channel whose events the server has lost."""
        for channel, history in histories.items():
            if not streams.has_all_after(channel, history.last_position):
                newest = streams.newest(channel)
                history.restart(newest, reset_event(format_id(newest)))

    def _read(
        self, streams: RedisStreams, histories: dict[str, ChannelHistory]
    ) -> None:
        positions = {
            channel: history.last_position for channel, history in histories.items()
        }
        for channel, entries in streams.wait(positions, READ_SECONDS).items():
            newest, history = entries[-1][0], histories[channel]
            if not streams.has_all_after(channel, positions[channel]):
                history.restart(newest, reset_event(format_id(newest)))
                continue
            for position, event in entries:
                history.append(position, event)


class RedisStreams:
    """Reads and writes the streams of the channels.

    :param client: a client of the package redis, for RESP2, that does not decode.
    """

    def __init__(self, client: Any) -> None:
        self.client = client

    def add(self, message: Message, max_events: int) -> None:
        """Append an event, and let the server remove the oldest ones."""
        fields = {"data": message.text}
        if message.event is not None:
            fields["event"] = message.event
        # The server keeps one more: its position proves that the oldest is the next.
        self.client.xadd(
            _key(message.channel), fields, maxlen=max_events + 1, approximate=True
        )

    def newest(self, channel: str) -> Position:
        """The position of the newest event, even if the event was removed."""
        return self._newest_and_complete(channel)[0]

    def _newest_and_complete(self, channel: str) -> tuple[Position, bool]:
        """The newest position, and whether no event was ever removed."""
        if not self.client.exists(_key(channel)):
            return START, True
        info = self.client.xinfo_stream(_key(channel))
        newest = parse_id(_decode(info["last-generated-id"]))
        # Only Redis 7 and Valkey count the added events. Without it there is no proof.
        return newest or START, info.get("entries-added") == info["length"]

    def has_all_after(self, channel: str, position: Position) -> bool:
        """True if it is certain that no event after a position is missing."""
        id = format_id(position)
        if self.client.xrange(_key(channel), id, id):
            return True
        newest, complete = self._newest_and_complete(channel)
        return position == newest or (position == START and complete)

    def all_after(self, channel: str, position: Position) -> list[Entry]:
        """All events after a position."""
        return _entries(self.client.xrange(_key(channel), f"({format_id(position)}"))

    def newest_between(
        self, channel: str, after: Position, until: Position, count: int
    ) -> list[Entry]:
        """The newest events after one position, up to and including another."""
        first, last = f"({format_id(after)}", format_id(until)
        answer = self.client.xrevrange(_key(channel), last, first, count)
        return _entries(reversed(answer))

    def page(self, channel: str, after: Position) -> list[Entry]:
        """The next few events after a position."""
        first = f"({format_id(after)}"
        return _entries(self.client.xrange(_key(channel), first, "+", MAX_PAGE))

    def wait(
        self, positions: Mapping[str, Position], seconds: float
    ) -> dict[str, list[Entry]]:
        """Wait for the next events after the position of each channel.

        :returns: the events of the channels that have new ones.
        """
        ids = {_key(channel): format_id(at) for channel, at in positions.items()}
        answer = self.client.xread(ids, MAX_READ, int(seconds * 1000))
        return {
            _decode(key).removeprefix(KEY_PREFIX): _entries(entries)
            for key, entries in answer
        }


def _key(channel: str) -> str:
    return f"{KEY_PREFIX}{channel}"


def format_id(position: Position) -> str:
    """The id of a position, as the server writes it."""
    return f"{position[0]}-{position[1]}"


def parse_id(id: str) -> Position | None:
    """The position of an id. None if no server can have written the id."""
    match = re.fullmatch(r"(0|[1-9][0-9]{0,19})-(0|[1-9][0-9]{0,19})", id, re.ASCII)
    if match is None:
        return None
    position = int(match[1]), int(match[2])
    return position if max(position) < 2**64 else None


def _entries(answer: Any) -> list[Entry]:
    return [_entry(_decode(id), fields) for id, fields in answer]


def _entry(id: str, fields: Mapping[bytes, bytes]) -> Entry:
    """An event. If another program wrote an invalid one, it is a reset."""
    position, type = parse_id(id), fields.get(b"event")
    assert position is not None
    try:
        event = None if type is None else _decode(type)
        message = Message("", _decode(fields[b"data"]), event)
        return position, message.with_id(id)
    except (KeyError, ValueError):
        return position, reset_event(id)


def _decode(value: Any) -> str:
    text: str = value.decode()
    return text


def ping(url: str) -> None:
    """Check that a server answers.

    :raises Exception: of the package redis, or of the system, if it does not answer.
    """
    client: Any = redis.Redis.from_url(url, **_connection_options())
    with client:
        client.ping()


def _connection_options(read_seconds: float = 0.0) -> dict[str, Any]:
    """Options of a connection: no second attempt, and no endless wait.

    :param read_seconds: how long the server may wait before it answers.
    """
    return {
        "protocol": 2,
        "socket_connect_timeout": TIMEOUT_SECONDS,
        "socket_timeout": TIMEOUT_SECONDS + read_seconds,
        "retry": Retry(NoBackoff(), 0),
    }
