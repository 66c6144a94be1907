"""One connection to Redis that sends events, each by one call of a script.

All events of a call are sent before the first answer is read. The server runs the
scripts in their order. If it refuses an event only for a moment, it may have appended
later events of the channel. The listeners then receive a reset. A server that is
starting does this, and a server that has forgotten the script. So the first event of a
connection is sent alone, and the first of several events has the text of the script.

If the connection fails before an answer is read, the server may have run the script, or
not, or it will run the script when it reads its buffers. So the next connection first
closes the lost one on the server. Then it sends the events by the script ``_RETRY``.
Each event has a name, which its entry in the stream has too, and the script looks for
the name first. If the server has removed so many events since then that the search
proves nothing, the listeners of the channel receive a reset instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoScriptError,
    ResponseError,
    TimeoutError,
)

from ...core.options import clock
from ...formats.sse import Message
from ..protocols import ChannelSettings
from .redis_connection import is_outage
from .redis_script import PUBLISH, Names, publish_arguments, script_digest

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
    :param lost: the connection before, which has failed.
    :raises Exception: if the server cannot be reached.
    """

    def __init__(
        self,
        pool: Any,
        settings: ChannelSettings,
        known_ids: dict[str, bytes],
        send_reset: Callable[[str], None],
        lost: EventSender | None = None,
    ) -> None:
        self._settings = settings
        self._names = Names.of(pool)
        self._known_ids = known_ids
        self._send_reset = send_reset
        self._has_sent = False
        self._has_script = False
        name = pool.connection_kwargs.get("client_name") or "tgstream"
        self._name = f"{name}-{os.urandom(6).hex()}"
        self._connection = pool.connection_class(**pool.connection_kwargs)
        self._connection.connect()
        try:
            self._execute("CLIENT", "SETNAME", self._name)
            id = self._execute("CLIENT", "ID")
            self._id = id if isinstance(id, int) else 0  # the user lacks a permission
            if lost is not None:
                self._close_on_server(lost)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()

    def _close_on_server(self, lost: EventSender) -> None:
        """Close a lost connection, so that its server runs no more scripts of it.

        Another server has another connection of this number, with another name. If the
        user lacks a permission, the connection remains.
        """
        clients = self._execute("CLIENT", "LIST", "ID", lost._id)
        if isinstance(clients, bytes) and f"name={lost._name} ".encode() in clients:
            self._execute("CLIENT", "KILL", "ID", lost._id)

    def _execute(self, *command: Any) -> Any:
        self._connection.send_command(*command, check_health=False)
        return self._read_answer()

    def send(self, events: Sequence[OutgoingEvent], deadline: float) -> None:
        """Send some of the first events, and set their results.

        :param deadline: the time by which all answers must have been read.
        :raises Exception: if the connection must be closed.
        """
        if not self._has_sent:
            events = events[:1]
        try:
            self._limit_wait(deadline)
            commands = self._connection.pack_commands(self._commands(events))
            self._connection.send_packed_command(commands, check_health=False)
            self._read_answers(events, deadline)
            self._has_sent = True
        except BaseException:
            for event in events:
                event.is_uncertain = not event.is_done
            raise

    def _read_answers(self, events: Sequence[OutgoingEvent], deadline: float) -> None:
        outage = None
        unsent = set()  # the channels of the events that were not appended
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
            arguments = publish_arguments(event.message, self._settings, self._names)
            if event.is_uncertain:
                known = self._known_ids.get(event.message.channel, b"")
                commands.append(("EVAL", _RETRY, 1, *arguments, event.name, known))
            elif self._has_script and (commands or len(events) == 1):
                commands.append(("EVALSHA", _DIGEST, 1, *arguments, event.name))
            else:
                commands.append(("EVAL", PUBLISH, 1, *arguments, event.name))
                self._has_script = True
        return commands

    def _read_answer(self) -> Any:
        try:
            return self._connection.read_response(disconnect_on_error=False)
        except (ResponseError, BusyLoadingError, AuthenticationError) as error:
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
