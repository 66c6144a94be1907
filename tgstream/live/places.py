"""The place of a listener in several channels, as one event id.

An id has at most 256 letters, digits and ``-_.~``, so it can be sent in a header, in a
query and in an event. It begins with a checksum of the names of the channels. So the
ids of other channels are recognised, and all of these channels then send a reset. Each
place is an id of the back end, or empty if the channel must send a reset::

    m{checksum}.{place}.{place}...

If this would be too long, the places are stored in the back end, as an event of a
channel whose name no user can choose, because it begins with a line feed. The id then
consists of the stored places and of those that have changed since. ``position`` is the
id of an earlier event of that channel, and ``nonce`` is the beginning of the event::

    s{checksum}.{position}.{nonce}.{index}~{place}.{index}~{place}...

The newest stored places of a process are shared by its listeners of the same channels.
"""

from __future__ import annotations

import re
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

from ..core.options import clock
from ..core.report import log
from ..formats.sse import Message
from .history import HEARTBEAT
from .listener import iter_events
from .protocols import Backend, ConnectionLost

MAX_LENGTH = 256
"""Maximum characters of an id."""
UNKNOWN = ""
"""A place that is not known. Its channel sends a reset."""
LOAD_SECONDS = 1.0
"""Maximum seconds to wait for places that another process has just stored."""
MAX_STORED = 1000
"""Lists of channels whose newest stored places are kept in this process."""


class _Stored(NamedTuple):
    """Places that are stored in the back end."""

    id: str
    places: tuple[str, ...]


_newest: dict[tuple[Backend, str], _Stored] = {}


class Places:
    """The place of a listener in each of several channels.

    :param backend: the back end of the channels.
    :param channels: their names, in any order.
    """

    def __init__(self, backend: Backend, channels: Iterable[str]) -> None:
        self.channels = tuple(sorted(set(channels)))
        self._backend = backend
        digest = sha256("\n".join(self.channels).encode()).digest()
        text = urlsafe_b64encode(digest).decode().rstrip("=")
        self._checksum, self._storage = text[:8], f"\n{text}"
        self._places = [UNKNOWN] * len(self.channels)
        self._stored: _Stored | None = None

    # From places to an id.

    def move_all(self, places: Sequence[str]) -> str:
        """Set the place in each channel. Returns the id."""
        self._places[:] = places
        return self._format_id()

    def move(self, index: int, place: str) -> str:
        """Set the place in one channel. Returns the id."""
        self._places[index] = place
        return self._format_id()

    @property
    def unknown_id(self) -> str:
        """The id with which all channels send a reset."""
        return f"m{self._checksum}"

    def _format_id(self) -> str:
        if self._stored is None:
            id = ".".join([self.unknown_id, *self._places])
            if len(id) <= MAX_LENGTH:
                return id
        for stored in self._stored, _newest.get((self._backend, self._storage)):
            if stored is not None:
                id = stored.id + self._format_changes(stored)
                if len(id) <= MAX_LENGTH:
                    self._stored = stored
                    return id
        try:
            self._stored = stored = self._store()
        except ConnectionLost:
            return self.unknown_id
        except Exception as error:
            _warn_of_reset(len(self.channels), str(error).rstrip("."))
            return self.unknown_id
        return stored.id

    def _format_changes(self, stored: _Stored) -> str:
        pairs = zip(self._places, stored.places, strict=True)
        return "".join(
            [f".{index}~{now}" for index, (now, old) in enumerate(pairs) if now != old]
        )

    def _store(self) -> _Stored:
        position = self._backend.position(self._storage)
        nonce = secrets.token_urlsafe(6)
        text = ".".join([nonce, *self._places])
        self._backend.publish([Message(self._storage, text)])
        if len(_newest) >= MAX_STORED:
            _newest.clear()
        stored = _Stored(f"s{self._checksum}.{position}.{nonce}", tuple(self._places))
        _newest[self._backend, self._storage] = stored
        return stored

    # From an id to places.

    def parse(self, id: str) -> list[str]:
        """The place of an id in each channel. It is ``UNKNOWN`` if the id is not valid.

        :raises ConnectionLost: if the server cannot be reached.
        """
        start, *parts = id.split(".")
        places: list[str] | None = None
        if start == f"m{self._checksum}":
            places = parts
        elif start == f"s{self._checksum}" and len(parts) >= 2:
            places = self._load(*parts[:2])
            if places is not None:
                self._stored = _Stored(".".join([start, *parts[:2]]), tuple(places))
                places = _apply_changes(places, parts[2:])
        if places is None or len(places) != len(self.channels):
            return [UNKNOWN] * len(self.channels)
        return places

    def _load(self, position: str, nonce: str) -> list[str] | None:
        """Read stored places, None if there are none with this nonce."""
        subscription = self._backend.subscribe(self._storage, position)
        if subscription.has_gap:
            return None
        give_up_at = clock() + LOAD_SECONDS
        for event in iter_events(subscription, LOAD_SECONDS, has_opening=False):
            stored_nonce, *places = str(event.data).split(".")
            if stored_nonce == nonce and len(places) == len(self.channels):
                return places
            # Also if there are more events: a forged nonce is never found.
            if event is HEARTBEAT or clock() > give_up_at:
                break
        return None


def _apply_changes(places: list[str], changes: list[str]) -> list[str] | None:
    """The places with the changes of an id, None if a change is not valid."""
    for change in changes:
        match = re.fullmatch(r"([0-9]{1,5})~(.*)", change)
        if match is None or int(match[1]) >= len(places):
            return None
        places[int(match[1])] = match[2]
    return places


@lru_cache(16)
def _warn_of_reset(count: int, error: str) -> None:
    """Warn, once for each error, that reconnects receive a reset."""
    log.warning(
        "Cannot store the place of a stream of %d channels: %s. Its client receives a "
        "reset when it reconnects",
        count,
        error,
    )


def read_position(backend: Backend, channels: Iterable[str]) -> str:
    """The id of the newest events of several channels.

    While the server is lost it is an id with which all channels send a reset.
    """
    places = Places(backend, channels)
    try:
        return places.move_all(
            [backend.position(channel) for channel in places.channels]
        )
    except ConnectionLost:
        return places.unknown_id
