"""Channels as streams of a Redis or a Valkey: what is asked, and what is answered.

Rule: an event's place is the id that the server gave it. It trims from the oldest on,
so while a place is still there, nothing after it is missing; else it must be proven.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...formats.sse import Event, encoded_event
from ..history import Key, reset

Entry = tuple[Key, Event]

START: Key = (0, 0)
"""Where a stream is that has had no event yet."""

AT_ONCE = 1000
"""Entries that are read at once, at the most."""
PAGE = 20
"""Entries that are read at once for one listener alone."""


class Streams:
    """The channels of one server.

    :param client: of the package redis, for RESP2, which does not decode.
    """

    def __init__(self, client: Any) -> None:
        self.client = client

    def add(
        self, channel: str, text: str | bytes, event: str | None, history: int
    ) -> None:
        """Append an event, and let the server trim what is older than history."""
        fields = {"data": text} if event is None else {"data": text, "event": event}
        # One more: the place before the oldest, which proves that it is the next.
        self.client.xadd(_name(channel), fields, maxlen=history + 1, approximate=True)

    def newest(self, channel: str) -> Key:
        """The place of the newest event, also if it was trimmed or deleted."""
        return self._ends(channel)[0]

    def _ends(self, channel: str) -> tuple[Key, bool]:
        """The newest place, and whether all that the stream ever had is still there."""
        if not self.client.exists(_name(channel)):
            return START, True
        info = self.client.xinfo_stream(_name(channel))
        newest = key_of(_text(info["last-generated-id"]))
        # Redis 7 and Valkey count what was added; without it, nothing is proven.
        return newest or START, info.get("entries-added") == info["length"]

    def has_all_after(self, channel: str, place: Key) -> bool:
        """True if no event after a place is missing."""
        id = id_of(place)
        if self.client.xrange(_name(channel), id, id):
            return True
        newest, whole = self._ends(channel)
        return place == newest or (place == START and whole)

    def between(self, channel: str, after: Key, until: Key | None) -> list[Entry]:
        """The events after one place, up to and with another."""
        last = "+" if until is None else id_of(until)
        return _entries(self.client.xrange(_name(channel), f"({id_of(after)}", last))

    def newest_between(
        self, channel: str, after: Key, until: Key, count: int
    ) -> list[Entry]:
        """So many of the events after one place, the last of them at another."""
        first, last = f"({id_of(after)}", id_of(until)
        found = self.client.xrevrange(_name(channel), last, first, count)
        return _entries(reversed(found))

    def page(self, channel: str, after: Key) -> list[Entry]:
        """The next few events after a place."""
        start = f"({id_of(after)}"
        return _entries(self.client.xrange(_name(channel), start, "+", PAGE))

    def wait(self, places: Mapping[str, Key], seconds: float) -> dict[str, list[Entry]]:
        """The next events of each channel after its place, once one has some."""
        asked = {_name(channel): id_of(place) for channel, place in places.items()}
        answer = self.client.xread(asked, AT_ONCE, int(seconds * 1000))
        return {
            _text(name).removeprefix(PREFIX): _entries(entries)
            for name, entries in answer
        }


PREFIX = "tgstream:"


def _name(channel: str) -> str:
    return f"{PREFIX}{channel}"


def id_of(place: Key) -> str:
    """The id as the server writes it."""
    return f"{place[0]}-{place[1]}"


def key_of(id: str) -> Key | None:
    """The place that an id names; None where no server has written it."""
    found = re.fullmatch(r"(0|[1-9][0-9]{0,19})-(0|[1-9][0-9]{0,19})", id, re.ASCII)
    if found is None:
        return None
    place = int(found[1]), int(found[2])
    return place if max(place) < 2**64 else None


def _entries(answer: Any) -> list[Entry]:
    return [_entry(_text(id), fields) for id, fields in answer]


def _entry(id: str, fields: Mapping[bytes, bytes]) -> Entry:
    """An event; where somebody else has put there what can be none, a gap."""
    place, event = key_of(id), fields.get(b"event")
    assert place is not None
    try:
        type = None if event is None else _text(event)
        return place, encoded_event(_text(fields[b"data"]), type, id)
    except (KeyError, ValueError):
        return place, reset(id)


def _text(said: Any) -> str:
    text: str = said.decode()
    return text
