"""The script that appends an event to a channel and reports it to the listeners.

Redis runs a script without interruption. So the processes that subscribe to a channel
receive the events of its stream in the order of the stream. Each message has the id of
the event before it: a process that knows another id has missed an event.

An entry of the stream has the field ``data``, the field ``event`` if the event has a
type, the field ``json`` if the data is JSON, and the field ``by`` if the publisher gave
the event a name, by which it finds the event again. A message is one line and the data:
``{id before} {id} {flags} {type}\\n{data}``. The flags are ``j`` if the data is JSON,
and ``e`` if there is a type, or ``-``.
"""

from __future__ import annotations

from hashlib import sha1
from typing import Any, NamedTuple

from redis.exceptions import NoScriptError

from ...formats.sse import Message
from ..protocols import ChannelSettings

KEY_PREFIX = "tgstream:"
CLUSTER_PREFIX = "tgstream:{tgstream}:"
"""The beginning of keys in a cluster, with their hash tag."""

_FIND_NEWEST = """
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
"""

PUBLISH = (
    _FIND_NEWEST
    + """
local publish, channel, max_events, milliseconds = unpack(ARGV, 1, 4)
local flags, type, data, by = unpack(ARGV, 5, 8)
local fields = {'data', data}
if flags:find('e') then
  fields[#fields + 1] = 'event'
  fields[#fields + 1] = type
end
if flags:find('j') then
  fields[#fields + 1] = 'json'
  fields[#fields + 1] = '1'
end
if by then
  fields[#fields + 1] = 'by'
  fields[#fields + 1] = by
end
local id = redis.call('XADD', KEYS[1], 'MAXLEN', '~', max_events, '*', unpack(fields))
local before = newest and newest[1] or '0-0'
local line = before .. ' ' .. id .. ' ' .. flags .. ' ' .. type
local answer = redis.pcall('PEXPIRE', KEYS[1], milliseconds)
if tonumber(answer) then
  answer = redis.pcall(publish, channel, line .. '\\n' .. data)
end
if not tonumber(answer) then
  -- The publisher reports that the event was refused, so nobody may receive it.
  redis.call('XDEL', KEYS[1], id)
  return answer
end
return id
"""
)
"""Append an event, let the server remove the oldest ones, and report the event.

:returns: the id of the event.
"""

OPEN = (
    _FIND_NEWEST
    + """
if newest then
  return newest[1]
end
local id = redis.pcall('XADD', KEYS[1], '*', 'opened', '1')
if type(id) == 'table' then
  return id.err:find('READONLY') and id or '0-0'
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return id
"""
)
"""Create the stream of a channel if there is none, with an entry that is not an event.

:returns: the id of the newest entry. ``0-0`` if the server cannot add an entry now.
"""

CHECK = """
local answer = redis.pcall('PEXPIRE', KEYS[1], 1)
redis.call(ARGV[1], KEYS[1], '')
if type(answer) == 'table' and answer.err:find('READONLY') then
  return answer
end
return redis.call('TIME')
"""
"""Send a message to a process, and check that the server accepts changes.

:returns: the time of the server, in seconds and microseconds.
"""


class Names(NamedTuple):
    """The names of channels on a server.

    In a cluster all keys have the same hash tag. So they are in one slot, and one
    connection receives the messages of all channels.
    """

    database: int = 0
    is_cluster: bool = False

    @classmethod
    def of(cls, pool: Any) -> Names:
        """The names on the server of a pool of connections."""
        options = pool.connection_kwargs
        return cls(int(options.get("db") or 0), "cluster_nodes" in options)

    def key(self, channel: str) -> str:
        """The key of the stream of a channel."""
        return f"{CLUSTER_PREFIX if self.is_cluster else KEY_PREFIX}{channel}"

    def message_channel(self, channel: str) -> str:
        """The channel of Redis to which the messages of a channel are sent.

        It has the name of the key. The databases of a server share their channels of
        Redis. So its number is appended, after a character that no name contains.
        """
        key = self.key(channel)
        return f"{key}\n{self.database}" if self.database else key

    @property
    def publish_command(self) -> str:
        """The command that sends a message."""
        return "SPUBLISH" if self.is_cluster else "PUBLISH"


def publish_arguments(
    message: Message, settings: ChannelSettings, names: Names
) -> list[Any]:
    """The key and the arguments of the script ``PUBLISH`` for an event."""
    flags = "j" * message.is_json + "e" * (message.event is not None)
    return [
        names.key(message.channel),
        names.publish_command,
        names.message_channel(message.channel),
        # The server keeps one more: its position proves that the oldest is the next.
        settings.history + 1,
        milliseconds(settings),
        flags or "-",
        message.event or "",
        message.text if message.data is None else message.data,
    ]


def milliseconds(settings: ChannelSettings) -> int:
    """The time after which the server removes a channel without new events."""
    return max(1, int(settings.seconds * 1000))


def run_script(client: Any, script: str, arguments: list[Any]) -> Any:
    """Run a script with one key. The server receives its text only once.

    :param client: a client of the package redis.
    :param arguments: the key, and the arguments of the script.
    """
    try:
        return client.evalsha(script_digest(script), 1, *arguments)
    except NoScriptError:
        return client.eval(script, 1, *arguments)


def script_digest(script: str) -> str:
    """The name of a script for ``EVALSHA``."""
    return sha1(script.encode(), usedforsecurity=False).hexdigest()
