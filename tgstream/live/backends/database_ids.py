"""The event ids of ``database://``.

- ``<channel id>-<number>``, the first in hexadecimal digits: an event.
- ``<signature>_<seconds>``, both in hexadecimal digits: the place before the first
  event of a channel that did not exist then. The database signs it with its secret, so
  that clients cannot make one, and ids from other databases are recognised.
"""

from __future__ import annotations

import re
from hashlib import blake2b

_parse_event = re.compile(r"([1-9a-f][0-9a-f]{0,15})-([1-9][0-9]{0,17})", re.A)
_parse_start = re.compile(r"([0-9a-f]{16})_([1-9a-f][0-9a-f]{0,11})", re.A)


def format_id(channel_id: int, number: int) -> str:
    """The id of an event of a channel."""
    return f"{channel_id:x}-{number}"


def parse_id(id: str) -> tuple[int, int] | None:
    """The channel's id and the number of an event id. None if it is another id."""
    match = _parse_event.fullmatch(id)
    return None if match is None else (int(match[1], 16), int(match[2]))


def format_start(secret: int, name: bytes, seconds: float) -> str:
    """The id of the place before the first event.

    :param seconds: the time of the database at which the channel did not exist.
    """
    time = f"{int(seconds):x}"
    return f"{_sign(secret, name, time)}_{time}"


def parse_start(id: str, secret: int, name: bytes) -> int | None:
    """The seconds of such an id. None if it is not from this database and channel."""
    match = _parse_start.fullmatch(id)
    if match is None or match[1] != _sign(secret, name, match[2]):
        return None
    return int(match[2], 16)


def _sign(secret: int, name: bytes, time: str) -> str:
    key = secret.to_bytes(8, "big")
    return blake2b(time.encode() + b":" + name, key=key, digest_size=8).hexdigest()
