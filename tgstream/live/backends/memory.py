"""The back end of ``memory://``: channels of one process.

All events of the process are numbered together, whatever their channel. An event id
consists of a random id of this process and the number. So the ids of other processes
are recognised, and no clock is needed.

Every change goes through ``apply_change()``, as ``tgstream.live.history`` explains. So
nothing here needs a lock.
"""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict
from collections.abc import Iterator
from weakref import WeakValueDictionary

from ...formats.sse import Event, EventTemplate
from ..history import (
    ChannelHistory,
    Position,
    Subscription,
    apply_change,
    iter_events,
    opening_event,
    reset_event,
)

MAX_CHANNELS = 10_000
"""Channels to keep although nobody listens. Their names may come from users."""


class MemoryBackend:
    """The channels of this process.

    :param max_events: how many events of a channel to store.
    """

    def __init__(self, max_events: int) -> None:
        self._max_events = max_events
        self._process = secrets.token_hex(4)
        self._last_number = 0
        # The channels with a listener, and those used last.
        self._histories: WeakValueDictionary[str, ChannelHistory] = (
            WeakValueDictionary()
        )
        self._used_last: OrderedDict[str, ChannelHistory] = OrderedDict()

    def publish(
        self,
        channel: str,
        text: str,
        event: str | None,
        encoded_text: bytes | None = None,
    ) -> None:
        """Send an event to all listeners of this process."""
        message = EventTemplate(text, event, encoded_text)
        apply_change(lambda: self._append(channel, message))

    def _append(self, channel: str, message: EventTemplate) -> None:
        history, number = self._history(channel), self._last_number + 1
        history.append_directly((number, 0), message.with_id(self._format_id(number)))
        self._last_number = number

    def listen(
        self, channel: str, after: str | None, heartbeat_seconds: float
    ) -> Iterator[Event]:
        """The events of a channel from now on, and before them the missed ones."""
        subscription = Subscription()
        apply_change(lambda: self._subscribe(subscription, channel, after))
        return iter_events(subscription, heartbeat_seconds)

    def _subscribe(
        self, subscription: Subscription, channel: str, after: str | None
    ) -> None:
        history = self._history(channel)
        subscription.history = history
        newest_id = self._format_id(self._last_number)
        if after is None:
            subscription.next_number = history.next_number
            subscription.opening_events = [opening_event(newest_id)]
            return
        position = self._parse_id(after)
        # The last event of this channel may be older than events of other channels.
        number = position and history.number_after(min(position, history.last_position))
        if number is None:
            subscription.next_number = history.next_number
            subscription.opening_events = [opening_event(None), reset_event(newest_id)]
        else:
            subscription.next_number = number
            subscription.opening_events = [opening_event(after)]

    def _history(self, channel: str) -> ChannelHistory:
        history = self._histories.get(channel)
        if history is None:
            history = ChannelHistory((self._last_number, 0), self._max_events)
            self._histories[channel] = history
        self._used_last[channel] = history
        self._used_last.move_to_end(channel)
        if len(self._used_last) > MAX_CHANNELS:
            self._used_last.popitem(last=False)
        return history

    def _format_id(self, number: int) -> str:
        return f"{self._process}-{number}"

    def _parse_id(self, id: str) -> Position | None:
        """The position of an event id. None if this process has not sent the id."""
        match = re.fullmatch(r"([0-9a-f]{8})-(0|[1-9][0-9]{0,18})", id, re.ASCII)
        if match is None or match[1] != self._process:
            return None
        number = int(match[2])
        return (number, 0) if number <= self._last_number else None
