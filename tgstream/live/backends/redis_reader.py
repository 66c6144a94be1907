"""Receives the new events of all channels of a process, over one connection.

One thread subscribes to exactly the channels that have listeners, and it runs only
while there are listeners. It alone uses its connection, and it alone creates and
changes the histories, except for events that a listener reads earlier. Other threads
give it a request and wait for its result. No thread waits for a lock that a finaliser
could need: a flag is a lock that is acquired without waiting.

*Start of a channel*: the thread subscribes, and then reads the newest id. Every later
event arrives as a message. A message with an older id is ignored.

*Gaps*: each message has the id of the event before it. If this id is not that of the
newest event of the history, the thread reads the events after the newest one from the
stream. If they cannot be complete, the history continues with a reset.

*Lost connections*: a server that has hung or that is no longer the primary does not
close its connections. So the thread regularly sends a message to itself, over another
connection, by a command that only a primary accepts.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from secrets import token_hex
from typing import Any
from weakref import ref

import redis

from ...core.errors import StreamError
from ...core.options import clock
from ...core.report import log
from ..history import ChannelHistory, Position, reset_event
from ..observation import report_reconnect
from ..protocols import ChannelSettings, ConnectionLost
from .redis_connection import CONNECTION_ERRORS, explain_refusal, is_outage
from .redis_script import KEY_PREFIX
from .redis_streams import (
    START,
    TIMEOUT_SECONDS,
    Entry,
    RedisStreams,
    format_id,
    parse_message,
)

READ_SECONDS = 0.5
"""Maximum seconds until the thread notices that a channel has no listeners."""
CHECK_SECONDS = 2.0
"""Seconds between two checks of the connection."""
MIN_RECONNECT_SECONDS = 0.05
MAX_RECONNECT_SECONDS = 1.0
"""Seconds between two attempts to connect. They double from the minimum on."""
MAX_MESSAGES = 50
"""Maximum messages after which gevent runs other greenlets."""
MAX_NAMES = 500
"""Maximum channels of one command."""


class Outage:
    """Logs an outage of the server once, and its end."""

    def __init__(self) -> None:
        self.is_lost = False

    def log_start(self, error: Exception) -> None:
        """Log that the connection is lost, unless this is known."""
        if not self.is_lost:
            self.is_lost = True
            log.warning(
                "Lost the connection to Redis (tgstream.channels): %s. Listeners wait "
                "until it reconnects",
                str(error).rstrip("."),
            )

    def log_end(self) -> None:
        """Log that the connection is back, if it was lost."""
        if self.is_lost:
            self.is_lost = False
            log.info("Reconnected to Redis (tgstream.channels)")
            report_reconnect()


class _Request:
    """A listener that waits for the history of its channel."""

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self._result: ChannelHistory | Exception = ConnectionLost()
        self._lock = threading.Lock()  # held until there is a result
        self._lock.acquire()

    def finish(self, result: ChannelHistory | Exception) -> None:
        self._result = result
        self._lock.release()

    def wait(self) -> ChannelHistory:
        """Wait for the history.

        :raises ConnectionLost: if the server cannot be reached.
        :raises StreamError: if the server refuses the channel.
        """
        self._lock.acquire(timeout=TIMEOUT_SECONDS)
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


class _Channel:
    """A channel that the thread has subscribed to.

    :param key: the channel of Redis.
    :param unused: receives the key when the last listener disconnects.
    """

    __slots__ = "history", "key", "name", "previous"

    def __init__(
        self, key: bytes, name: str, history: ChannelHistory, unused: deque[bytes]
    ) -> None:
        self.key = key
        self.name = name
        self.history = ref(history, lambda _: unused.append(key))
        # The position of the event of the last message.
        self.previous = history.last_position


class RedisReader:
    """Receives the new events of all channels that have listeners.

    :param streams: reads the streams, over other connections.
    :param settings: the options of the application.
    :param outage: logs when the connection is lost.
    """

    def __init__(
        self,
        streams: RedisStreams,
        settings: ChannelSettings,
        outage: Outage,
    ) -> None:
        self._streams = streams
        self._settings = settings
        self._outage = outage
        self._own_channel = streams.names.key(f"process:{token_hex(8)}")
        # By the channel of Redis. Only the thread changes it.
        self._channels: dict[bytes, _Channel] = {}
        self._requests: deque[_Request] = deque()
        self._unused: deque[bytes] = deque()
        self._running = threading.Lock()  # held by the thread
        self._thread_id: int | None = None
        self._connection: Any = None
        self._is_connected = self._is_synced = False
        self._is_woken = False  # a message to the thread is on its way
        self._messages = 0
        self._clock_offset = 0.0
        # Seconds of the monotonic clock.
        self._next_check = self._answer_until = float("inf")

    # Called by any thread.

    def history(self, channel: str) -> ChannelHistory | None:
        """The history of a channel. It receives the events from this call on.

        :returns: None in a finaliser that interrupts the thread of the reader.
        :raises ConnectionLost: if the server cannot be reached.
        :raises StreamError: if the server refuses the channel.
        """
        known = self._channels.get(self._key(channel))
        history = None if known is None else known.history()
        if history is not None:
            return history
        if self._thread_id == threading.get_ident():
            return None
        request = _Request(channel)
        self._requests.append(request)
        self._start()
        if self._is_connected and not self._is_woken:
            with suppress(*CONNECTION_ERRORS):  # the thread notices it, too
                self._wake()
        return request.wait()

    def has(self, channel: str, history: ChannelHistory) -> bool:
        """Whether a history still receives the events of its channel."""
        known = self._channels.get(self._key(channel))
        return known is not None and known.history() is history

    @property
    def is_running(self) -> bool:
        """Whether there are listeners."""
        return self._running.locked()

    def refusal(self, channel: str, error: Exception) -> StreamError:
        """The error of a channel that the server refuses."""
        explanation = explain_refusal(error, self._streams.names.key(channel))
        return StreamError(f"Redis refuses Channel({channel!r}): {explanation}")

    def server_seconds(self) -> float:
        """The time of the server, in seconds since 1970."""
        return clock() + self._clock_offset

    def _key(self, channel: str) -> bytes:
        return self._streams.names.message_channel(channel).encode()

    def _start(self) -> None:
        if self._running.acquire(blocking=False):
            try:
                threading.Thread(
                    target=self._run, name="tgstream-channels", daemon=True
                ).start()
            except RuntimeError:  # it has not started
                self._running.release()
                raise

    def _wake(self) -> None:
        """Send a message to the thread."""
        self._is_woken = True
        self._clock_offset = self._streams.check(self._own_channel) - clock()

    # The thread.

    def _run(self) -> None:
        while True:
            self._thread_id = threading.get_ident()
            try:
                self._serve()
            finally:
                self._disconnect()
                self._thread_id = None
                self._running.release()
            # A request that came before the release has not started a thread.
            if not (self._requests and self._running.acquire(blocking=False)):
                return

    def _serve(self) -> None:
        pause = MIN_RECONNECT_SECONDS
        while self._channels or self._requests:
            try:
                if self._connection is None:
                    self._connect()
                    pause = MIN_RECONNECT_SECONDS
                self._step()
            except Exception as error:  # all listeners depend on this thread
                self._disconnect()
                if not is_outage(error):
                    self._refuse_all(error)
                    continue
                self._streams.close_after(error)
                self._pop_unused()
                if not self._channels and not self._requests:
                    return
                self._outage.log_start(error)
                while self._requests:
                    self._requests.popleft().finish(ConnectionLost())
                time.sleep(pause)
                pause = min(pause * 2, MAX_RECONNECT_SECONDS)
                self._pop_unused()

    def _connect(self) -> None:
        connection = self._connection = self._streams.create_connection()
        connection.connect()
        self._command("SUBSCRIBE", [self._own_channel.encode()])
        self._is_woken, self._is_connected = False, True
        self._next_check = self._answer_until = float("inf")
        self._check()
        self._pop_unused()
        keys = list(self._channels)
        for key, error in self._subscribe(keys).items():
            self._refuse(self._channels[key], error)
        self._resync()
        self._is_synced = True
        if self._answer_until == float("inf"):
            self._outage.log_end()

    def _disconnect(self) -> None:
        self._is_connected = self._is_synced = False
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(*CONNECTION_ERRORS):
                connection.disconnect()

    def _step(self) -> None:
        """Receive a message, or wait for some time."""
        if self._unused and (keys := self._pop_unused()):
            with suppress(redis.ResponseError):
                self._command("UNSUBSCRIBE", keys)
        if self._requests:
            self._answer_requests()
        if self._connection.can_read(READ_SECONDS):
            self._receive(self._connection.read_response())
            self._messages += 1
            if self._messages % MAX_MESSAGES == 0:
                time.sleep(0)
        else:
            self._is_woken = False
        if clock() > self._next_check:
            self._check()

    def _check(self) -> None:
        """Check that a message arrives that is sent over another connection."""
        # If there is more to read, the message may be behind it.
        if clock() > self._answer_until and not self._connection.can_read(0):
            raise redis.ConnectionError(
                f"no message arrived for {TIMEOUT_SECONDS:g} seconds"
            )
        if self._answer_until == float("inf"):
            self._answer_until = clock() + TIMEOUT_SECONDS
            self._wake()
        self._next_check = clock() + CHECK_SECONDS

    # Messages.

    def _receive(self, response: Any) -> None:
        kind, key, payload = response
        if kind == b"sunsubscribe":
            raise redis.ConnectionError("the slot belongs to another server now")
        if kind not in (b"message", b"smessage"):
            return
        channel = self._channels.get(key)
        if channel is not None:
            history = channel.history()
            if history is not None:
                self._receive_event(channel, history, payload)
        elif key == self._own_channel.encode():
            self._is_woken = False
            self._answer_until = float("inf")
            if self._is_synced:
                self._outage.log_end()

    def _receive_event(
        self, channel: _Channel, history: ChannelHistory, payload: bytes
    ) -> None:
        newest = history.last_position
        try:
            before, position, event = parse_message(channel.name, payload)
        except ValueError:
            self._read_gap(channel, history)
            return
        if before == newest:
            history.append(position, event)
        elif before != channel.previous or position > newest:
            self._read_gap(channel, history, position)
        channel.previous = position

    def _read_gap(
        self, channel: _Channel, history: ChannelHistory, position: Position = START
    ) -> None:
        """Read the events that the history does not have.

        :param position: that of the first event which is not in the history.
        """
        newest = history.last_position
        try:
            entries = self._streams.after(channel.name, newest)
            if entries is None:
                first, entries = self._streams.all(channel.name)
                # If the server removed the unused channel, no event is missing,
                # unless it has removed events of the new stream, too.
                unused_from = newest[0] + self._settings.seconds * 1000
                is_complete = self._is_synced and unused_from <= first[0]
                if not is_complete or first > position:
                    _report_loss(channel, history, self._streams.newest(channel.name))
                    return
        except redis.ResponseError as error:
            if is_outage(error):
                raise
            self._refuse(channel, error)
            return
        _append_all(history, entries)

    def _resync(self) -> None:
        """Read the events that all channels have missed."""
        channels = [
            (channel, history)
            for channel in list(self._channels.values())
            if (history := channel.history()) is not None
        ]
        newest = self._streams.newest_of([channel.name for channel, _ in channels])
        behind = []
        for (channel, history), position in zip(channels, newest, strict=True):
            if isinstance(position, Exception):
                self._refuse(channel, position)
                continue
            channel.previous = position
            if position != history.last_position:
                behind.append((channel, history, position))
        missed = self._streams.after_each(
            [(channel.name, history.last_position) for channel, history, _ in behind]
        )
        for (channel, history, position), entries in zip(behind, missed, strict=True):
            if isinstance(entries, Exception):
                self._refuse(channel, entries)
            elif entries is None:
                _report_loss(channel, history, position)
            else:
                _append_all(history, entries)

    # Subscriptions.

    def _answer_requests(self) -> None:
        requests: dict[str, list[_Request]] = {}
        while self._requests:
            request = self._requests.popleft()
            requests.setdefault(request.channel, []).append(request)
        try:
            results = self._open(list(requests))
        except BaseException:
            for waiting in requests.values():
                self._requests.extend(waiting)
            raise
        for name, waiting in requests.items():
            result = results[name]
            for request in waiting:
                if isinstance(result, Exception):
                    request.finish(self.refusal(name, result))
                else:
                    request.finish(result)

    def _open(self, names: Sequence[str]) -> dict[str, ChannelHistory | Exception]:
        """Subscribe to channels, and create their histories.

        :returns: the history of each channel, or the error that the server returned.
        """
        results: dict[str, ChannelHistory | Exception] = {}
        new = {}
        for name in names:
            key = self._key(name)
            channel = self._channels.get(key)
            history = None if channel is None else channel.history()
            if history is None:
                new[key] = name
            else:
                results[name] = history
        refused = self._subscribe([key for key in new if key not in self._channels])
        for key, error in refused.items():
            results[new.pop(key)] = error
        newest = self._streams.newest_of(list(new.values()))
        for (key, name), position in zip(new.items(), newest, strict=True):
            if isinstance(position, Exception):
                results[name] = position
                self._unused.append(key)
                continue
            history = ChannelHistory(position, self._settings.history)
            results[name] = history
            self._channels[key] = _Channel(key, name, history, self._unused)
        return results

    def _subscribe(self, keys: list[bytes]) -> dict[bytes, Exception]:
        """Subscribe to channels.

        :returns: the channels that the server refuses, with the error.
        """
        refused: dict[bytes, Exception] = {}
        parts = [keys[at : at + MAX_NAMES] for at in range(0, len(keys), MAX_NAMES)]
        while parts:
            part = parts.pop()
            try:
                self._command("SUBSCRIBE", part)
            except redis.ResponseError as error:
                if is_outage(error):
                    raise
                # The server has refused all of them because of one of them.
                if len(part) == 1:
                    refused[part[0]] = error
                else:
                    half = len(part) // 2
                    parts += part[:half], part[half:]
        return refused

    def _command(self, command: str, keys: Sequence[bytes]) -> None:
        """Subscribe or unsubscribe, and wait until the server has done it."""
        if self._streams.names.is_cluster:
            command = f"S{command}"
        # A health check fails on a connection that has subscriptions.
        self._connection.send_command(command, *keys, check_health=False)
        kind, answers = command.lower().encode(), 0
        while answers < len(keys):
            response = self._connection.read_response()
            if response[0] == kind:
                answers += 1
            else:
                self._receive(response)

    def _pop_unused(self) -> list[bytes]:
        """Forget the channels that have no listeners, and return their keys."""
        keys = []
        while self._unused:
            key = self._unused.popleft()
            channel = self._channels.get(key)
            if channel is None or channel.history() is None:
                self._channels.pop(key, None)
                keys.append(key)
        return keys

    def _refuse(self, channel: _Channel, error: Exception) -> None:
        """End the listeners of a channel that the server refuses."""
        if channel.history() is not None:
            log.error(
                "Redis refuses Channel(%r): %s. Its listeners end",
                channel.name,
                explain_refusal(error, self._streams.names.key(channel.name)),
            )
        self._end(channel)

    def _refuse_all(self, error: Exception) -> None:
        """End all listeners, because the server refuses a command without a channel."""
        channels = list(self._channels.values())
        if channels:
            log.error(
                "Redis refuses a command for all channels: %s. The listeners of %d "
                "channels end",
                explain_refusal(error, KEY_PREFIX),
                len(channels),
            )
        for channel in channels:
            self._end(channel)
        while self._requests:
            request = self._requests.popleft()
            request.finish(self.refusal(request.channel, error))

    def _end(self, channel: _Channel) -> None:
        self._channels.pop(channel.key, None)
        self._unused.append(channel.key)
        history = channel.history()
        if history is not None:
            history.end()


def _append_all(history: ChannelHistory, entries: Iterable[Entry]) -> None:
    for position, event in entries:
        history.append(position, event)


def _report_loss(channel: _Channel, history: ChannelHistory, newest: Position) -> None:
    history.restart(newest, reset_event(format_id(newest), channel.name))
