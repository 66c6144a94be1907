"""Reads the streams of the channels.

The position of an event is the id that the server gave it. The server removes the
oldest events of a stream first. So if the event at a position is still in the stream,
no event after it is missing. A stream begins with an entry that marks its beginning if
a listener created it. So a listener always has a position whose absence proves a loss.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from random import choice
from typing import Any

import redis
from redis.exceptions import NoScriptError

from ...formats.sse import Event, Message
from ..history import Position, reset_event
from ..protocols import ChannelSettings
from .redis_connection import create_pool, is_outage
from .redis_script import (
    CHECK,
    OPEN,
    Names,
    milliseconds,
    run_script,
    script_digest,
)

TIMEOUT_SECONDS = 5.0
"""Seconds without an answer after which a connection is given up."""
MAX_CONNECTIONS = 8
"""Connections for reading. If all are in use, others wait."""
MAX_PAGE = 20
"""Maximum events of one read for a single listener."""
MAX_COMMANDS = 500
"""Maximum commands that are sent together."""

Entry = tuple[Position, Event]

START: Position = (0, 0)
"""The position before the first event of a stream."""


class RedisStreams:
    """Reads the streams of the channels.

    :param url: the URL of the server.
    :param settings: the options of the application.
    """

    def __init__(self, url: str, settings: ChannelSettings) -> None:
        self._pool = create_pool(url, TIMEOUT_SECONDS)
        self.names = Names.of(self._pool)
        # A lock for each client. A finaliser that interrupts a thread which has a
        # client finds another one, or waits for it only for a time.
        self._clients = [
            (
                threading.Lock(),
                redis.Redis(connection_pool=create_pool(url, TIMEOUT_SECONDS)),
            )
            for _ in range(MAX_CONNECTIONS)
        ]
        self._milliseconds = milliseconds(settings)

    def create_connection(self) -> Any:
        """Create a connection to the same server."""
        return self._pool.connection_class(**self._pool.connection_kwargs)

    @contextmanager
    def _client(self) -> Iterator[Any]:
        """A client that no other thread uses."""
        lock, client = self._acquire_client()
        try:
            yield client
        finally:
            lock.release()

    def _acquire_client(self) -> tuple[threading.Lock, Any]:
        for pair in self._clients:
            if pair[0].acquire(blocking=False):
                return pair
        pair = choice(self._clients)
        if pair[0].acquire(timeout=TIMEOUT_SECONDS):
            return pair
        raise redis.ConnectionError("all connections are in use")

    def close(self) -> None:
        """Close the connections that are not in use. The next command opens them."""
        for lock, client in self._clients:
            if lock.acquire(blocking=False):
                try:
                    client.connection_pool.disconnect()
                finally:
                    lock.release()

    def close_after(self, error: Exception) -> None:
        """Close the connections if the server has answered that it is unusable.

        It may be a replica now. A new connection may lead to the new primary.
        """
        if isinstance(error, redis.ResponseError):
            self.close()

    def ping(self) -> None:
        """Check that the server answers."""
        with self._client() as client:
            client.ping()

    def check(self, own_channel: str) -> float:
        """Send a message to this process, and check that the server is the primary.

        :returns: the time of the server, in seconds.
        """
        with self._client() as client:
            seconds, microseconds = run_script(
                client, CHECK, [own_channel, self.names.publish_command]
            )
        return int(seconds) + int(microseconds) / 1e6

    def newest(self, channel: str) -> Position:
        """The position of the newest event. Create the stream if there is none."""
        arguments = [self.names.key(channel), self._milliseconds]
        with self._client() as client:
            return to_position(run_script(client, OPEN, arguments))

    def newest_of(self, channels: Sequence[str]) -> list[Position | Exception]:
        """The newest position of each channel, or the error that the server returned.

        :raises Exception: if the server cannot be reached.
        """
        digest = script_digest(OPEN)
        commands = [
            ("EVALSHA", digest, 1, self.names.key(channel), self._milliseconds)
            for channel in channels
        ]
        answers = self._execute(commands)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            with suppress(redis.ResponseError):
                self.newest(channels[0])  # it sends the text of the script
            answers = self._execute(commands)
        newest: list[Position | Exception] = []
        for channel, answer in zip(channels, answers, strict=True):
            try:
                if isinstance(answer, NoScriptError):
                    newest.append(self.newest(channel))
                else:
                    newest.append(to_position(_raise_error(answer)))
            except redis.ResponseError as error:
                if is_outage(error):
                    raise
                newest.append(error)
        return newest

    def after_each(
        self, positions: Sequence[tuple[str, Position]]
    ) -> list[list[Entry] | Exception | None]:
        """The events after the position of each channel.

        :returns: for each channel None if an event after the position may be missing,
            or the error that the server returned.
        """
        commands = [
            ("XRANGE", self.names.key(channel), format_id(position), "+")
            for channel, position in positions
        ]
        return [
            answer
            if isinstance(answer, Exception)
            else _entries_after(channel, position, answer)
            for (channel, position), answer in zip(
                positions, self._execute(commands), strict=True
            )
        ]

    def _execute(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Execute commands together. Return the answer of each, or its error."""
        answers: list[Any] = []
        with self._client() as client:
            for at in range(0, len(commands), MAX_COMMANDS):
                with client.pipeline(transaction=False) as pipeline:
                    for command in commands[at : at + MAX_COMMANDS]:
                        pipeline.execute_command(*command)
                    answers += pipeline.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, Exception):
                # Older versions of redis leave a circle of the error and its frames.
                # It would keep histories that have no listeners.
                answer.__traceback__ = None
                if is_outage(answer):
                    raise answer
        return answers

    def _range(
        self,
        channel: str,
        first: str = "-",
        last: str = "+",
        count: int | None = None,
    ) -> Any:
        with self._client() as client:
            return client.xrange(self.names.key(channel), first, last, count)

    def after(self, channel: str, position: Position) -> list[Entry] | None:
        """The events after a position. None if one of them may be missing."""
        answer = self._range(channel, format_id(position))
        return _entries_after(channel, position, answer)

    def all(self, channel: str) -> tuple[Position, list[Entry]]:
        """The position where a stream begins, and all its events."""
        answer = self._range(channel)
        first = to_position(answer[0][0]) if answer else START
        return first, _entries(channel, answer)

    def has_all_after(self, channel: str, position: Position) -> bool:
        """True if it is certain that no event after a position is missing."""
        if position == START:
            return self._is_complete(channel)
        id = format_id(position)
        return bool(self._range(channel, id, id))

    def _is_complete(self, channel: str) -> bool:
        """True if it is certain that no event was ever removed."""
        try:
            with self._client() as client:
                info = client.xinfo_stream(self.names.key(channel))
        except redis.ResponseError as error:
            if str(error) == "no such key":
                return False
            raise
        # Only Redis 7 and Valkey count the added events. Without it there is no proof.
        return bool(info.get("entries-added") == info["length"])

    def has_event_between(self, channel: str, after: Position, until: int) -> bool:
        """True if there is an event between a position and a time in milliseconds."""
        answer = self._range(channel, f"({format_id(after)}", f"({until}-0", 2)
        return bool(_entries(channel, answer))

    def newest_between(
        self, channel: str, after: Position, until: Position, count: int
    ) -> list[Entry]:
        """The newest events after one position, up to and including another."""
        first, last = f"({format_id(after)}", format_id(until)
        with self._client() as client:
            answer = client.xrevrange(self.names.key(channel), last, first, count)
        return _entries(channel, reversed(answer))

    def page(self, channel: str, after: Position) -> list[Entry]:
        """The next few events after a position."""
        answer = self._range(channel, f"({format_id(after)}", count=MAX_PAGE)
        return _entries(channel, answer)


def format_id(position: Position) -> str:
    """The id of a position, as the server writes it."""
    return f"{position[0]}-{position[1]}"


def to_position(id: bytes) -> Position:
    """The position of an id that the server wrote.

    :raises ValueError: if the id has another form.
    """
    milliseconds, number = id.split(b"-")
    return int(milliseconds), int(number)


def parse_id(id: str) -> Position | None:
    """The position of an id. None if no server can have written the id."""
    match = re.fullmatch(r"(0|[1-9][0-9]{0,19})-(0|[1-9][0-9]{0,19})", id, re.ASCII)
    if match is None:
        return None
    position = int(match[1]), int(match[2])
    return position if max(position) < 2**64 else None


def parse_message(channel: str, payload: bytes) -> tuple[Position, Position, Event]:
    """The position before an event, its own, and the event, from a message.

    :raises ValueError: if another program sent it.
    """
    line, _, data = payload.partition(b"\n")
    before, id, flags, type = line.split(b" ", 3)
    event = _create_event(
        channel, id, data, type if b"e" in flags else None, b"j" in flags
    )
    return to_position(before), to_position(id), event


def _create_event(
    channel: str, id: bytes, data: bytes, type: bytes | None, is_json: bool
) -> Event:
    if type == b"reset":  # a publisher could not send all events
        return reset_event(id.decode(), channel)
    event = None if type is None else type.decode()
    return Message(channel, data.decode(), event, is_json, data).with_id(id.decode())


def _entries_after(channel: str, position: Position, answer: Any) -> list[Entry] | None:
    """The events of an answer that begins at a position. None if it does not."""
    if not answer or to_position(answer[0][0]) != position:
        return None
    return _entries(channel, answer[1:])


def _entries(channel: str, answer: Any) -> list[Entry]:
    return [
        _entry(channel, id, fields) for id, fields in answer if b"opened" not in fields
    ]


def _entry(channel: str, id: bytes, fields: Mapping[bytes, bytes]) -> Entry:
    """An event. If another program wrote an invalid one, it is a reset."""
    try:
        event = _create_event(
            channel, id, fields[b"data"], fields.get(b"event"), b"json" in fields
        )
    except (KeyError, ValueError):
        event = reset_event(id.decode(), channel)
    return to_position(id), event


def _raise_error(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer
