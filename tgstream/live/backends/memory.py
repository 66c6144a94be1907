"""Channels of one process: the back end of ``memory://``.

Every event of the process has one number, whatever its channel, and an id names the run
of the process as well. So an id is known, or it is known to be foreign; no clock takes
part. Nothing here has a lock: all of it is done in turn, as ``_feed`` explains.
"""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict
from collections.abc import Iterator
from weakref import WeakValueDictionary

from ...formats.sse import Event, EventTemplate
from ..history import Feed, Key, Start, follow, in_turn, opened, reset

KEPT = 10_000
"""Channels whose history is kept while nobody listens; the names may be users'."""


class Memory:
    """The channels of this process.

    :param history: how many events of a channel are kept.
    """

    def __init__(self, history: int) -> None:
        self._history = history
        self._run = secrets.token_hex(4)
        self._last = 0
        self._feeds: WeakValueDictionary[str, Feed] = WeakValueDictionary()
        self._kept: OrderedDict[str, Feed] = OrderedDict()

    def publish(
        self, channel: str, text: str, event: str | None, data: bytes | None = None
    ) -> None:
        """Hand an event to all who listen."""
        message = EventTemplate(text, event, data)
        in_turn(lambda: self._append(channel, message))

    def _append(self, channel: str, message: EventTemplate) -> None:
        feed, number = self._feed(channel), self._last + 1
        feed.append_now((number, 0), message.with_id(self._id(number)))
        self._last = number

    def listen(self, channel: str, after: str | None, beat: float) -> Iterator[Event]:
        """What a listener is sent."""
        start = Start()
        in_turn(lambda: self._begin(start, channel, after))
        return follow(start, beat)

    def _begin(self, start: Start, channel: str, after: str | None) -> None:
        start.feed = feed = self._feed(channel)
        newest, start.number = self._id(self._last), feed.end
        if after is None:
            start.opening = [opened(newest)]
            return
        key = self._key(after)
        # The feed's last may be older: there were events in other channels.
        number = key and feed.number_after(min(key, feed.last))
        if number is None:
            start.opening = [opened(None), reset(newest)]
        else:
            start.number, start.opening = number, [opened(after)]

    def _feed(self, channel: str) -> Feed:
        feed = self._feeds.get(channel)
        if feed is None:
            feed = self._feeds[channel] = Feed((self._last, 0), self._history)
        self._kept[channel] = feed
        self._kept.move_to_end(channel)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return feed

    def _id(self, number: int) -> str:
        return f"{self._run}-{number}"

    def _key(self, id: str) -> Key | None:
        """The place that an id names; None for one that this process has not made."""
        found = re.fullmatch(r"([0-9a-f]{8})-(0|[1-9][0-9]{0,18})", id, re.ASCII)
        if found is None or found[1] != self._run or int(found[2]) > self._last:
            return None
        return int(found[2]), 0
