"""One connection to Redis that sends events, each by one call of a script.

All events of a call are sent before the first answer is read. The server runs the
scripts in their order.

If the connection fails before an answer is read, the server may have run the script, or
not. So each event has a name, which its entry in the stream has too. The event is sent
again by the script ``_RETRY``, which looks for the name first. If the server has
removed so many events since then that the search proves nothing, the listeners of the
channel receive a reset instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from redis.exceptions import NoScriptError, ResponseError, TimeoutError

from ...core.options import clock
from ...formats.sse import Message
from ..protocols import ChannelSettings
from .redis_connection import is_outage
from .redis_script import PUBLISH, publish_arguments, script_digest

MAX_KNOWN_CHANNELS = 1000
"""Channels whose newest known event is remembered."""

_RETRY = (
    """
local by, known, first, last = ARGV[8], ARGV[9], '-', '+'
-- An event that came later has a larger id. Without proof, search the whole stream.
if known ~= '' and #redis.call('XRANGE', KEYS[1], known, known) > 0 then
  first = '(' .. known
end
repeat
  local page = redis.call('XREVRANGE', KEYS[1], last, first, 'COUNT', 100)
  for _, entry in ipairs(page) do
    local id, fields = unpack(entry)
    for i = 1, #fields, 2 do
      if fields[i] == 'by' and fields[i + 1] == by then
        return id
      end
    end
    last = '(' .. id
  end
until #page < 100
if first == '-' and redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[3]) then
  return false
end
"""
    + PUBLISH
)
"""Do the same as ``PUBLISH``, unless the stream has the event.

:returns: the id of the event. Nil if it is not known whether the stream had the event.
"""
_DIGEST = script_digest(PUBLISH)

_process = os.urandom(6).hex()
_numbers = count()


def _rename_process() -> None:
    global _process
    _process = os.urandom(6).hex()


os.register_at_fork(after_in_child=_rename_process)


class OutgoingEvent:
    """An event that is sent to the server.

    :param message: the event.
    :param is_kept: whether the event is kept while it cannot be sent.
    """

    __slots__ = ("error", "is_done", "is_kept", "is_uncertain", "message", "name")

    def __init__(self, message: Message, is_kept: bool) -> None:
        self.message = message
        self.is_kept = is_kept
        self.name = f"{_process}-{next(_numbers)}"
        self.is_done = False
        """It was sent, refused or dropped."""
        self.is_uncertain = False
        """It was sent, but the answer is missing."""
        self.error: Exception | None = None
        """The answer of a server that has refused it."""


class EventSender:
    """A connection that sends events.

    :param pool: the options of the connection.
    :param settings: the options of the application.
    :param known_ids: the id of the newest known event of a channel. It is updated.
    :param send_reset: called with a channel that must receive a reset.
    :raises Exception: if the server cannot be reached.
    """

    def __init__(
        self,
        pool: Any,
        settings: ChannelSettings,
        known_ids: dict[str, bytes],
        send_reset: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._database = int(pool.connection_kwargs.get("db") or 0)
        self._known_ids = known_ids
        self._send_reset = send_reset
        self._has_script = False
        self._connection = pool.connection_class(**pool.connection_kwargs)
        self._connection.connect()

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()

    def send(self, events: Sequence[OutgoingEvent], deadline: float) -> None:
        """Send events, and set their results.

        An event may remain, and must then be sent by another call.

        :param deadline: the time by which all answers must have been read.
        :raises Exception: if the connection must be closed.
        """
        connection, outage = self._connection, None
        unsent = set()  # the channels of the events that were not appended
        try:
            self._limit_wait(deadline)
            commands = connection.pack_commands(self._commands(events))
            connection.send_packed_command(commands, check_health=False)
            for event in events:
                self._limit_wait(deadline)
                channel, answer = event.message.channel, self._read_answer()
                if isinstance(answer, NoScriptError):
                    self._has_script = False
                    unsent.add(channel)
                elif isinstance(answer, Exception) and is_outage(answer):
                    outage = answer
                    unsent.add(channel)
                else:
                    self._finish(event, answer)
                    if channel in unsent:  # an earlier event was overtaken
                        self._send_reset(channel)
        except BaseException:
            for event in events:
                event.is_uncertain = not event.is_done
            raise
        if outage is not None:
            raise outage

    def _limit_wait(self, deadline: float) -> None:
        seconds = deadline - clock()
        if seconds <= 0:
            raise TimeoutError("Timeout reading from the server")
        self._connection._sock.settimeout(seconds)

    def _commands(self, events: Sequence[OutgoingEvent]) -> list[tuple[Any, ...]]:
        commands: list[tuple[Any, ...]] = []
        for event in events:
            arguments = publish_arguments(
                event.message, self._settings, self._database, is_cluster=False
            )
            if event.is_uncertain:
                known = self._known_ids.get(event.message.channel, b"")
                commands.append(("EVAL", _RETRY, 1, *arguments, event.name, known))
            elif self._has_script:
                commands.append(("EVALSHA", _DIGEST, 1, *arguments, event.name))
            else:
                commands.append(("EVAL", PUBLISH, 1, *arguments, event.name))
                self._has_script = True
        return commands

    def _read_answer(self) -> Any:
        try:
            return self._connection.read_response()
        except ResponseError as error:
            return error

    def _finish(self, event: OutgoingEvent, answer: Any) -> None:
        event.is_done = True
        channel = event.message.channel
        if isinstance(answer, Exception):
            event.error = answer
        elif answer is None:
            self._send_reset(channel)
        else:
            self._known_ids.pop(channel, None)  # so that it becomes the newest one
            self._known_ids[channel] = answer
            if len(self._known_ids) > MAX_KNOWN_CHANNELS:
                del self._known_ids[next(iter(self._known_ids))]
