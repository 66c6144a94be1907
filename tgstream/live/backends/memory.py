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
from collections.abc import Sequence
from functools import partial
from weakref import WeakValueDictionary

from ...formats.sse import Message
from ..history import (
    ChannelHistory,
    Position,
    Subscription,
    apply_change,
)
from ..protocols import ChannelSettings

MAX_CHANNELS = 10_000
"""Channels to keep although nobody listens. Their names may come from users."""


class MemoryBackend:
    """The channels of this process.

    :param settings: the other options of the application.
    """

    def __init__(self, settings: ChannelSettings) -> None:
        self._max_events = settings.history
        self._process = secrets.token_hex(4)
        self._last_number = 0
        # The channels with a listener, and those used last.
        self._histories: WeakValueDictionary[str, ChannelHistory] = (
            WeakValueDictionary()
        )
        self._used_last: OrderedDict[str, ChannelHistory] = OrderedDict()

    def publish(self, messages: Sequence[Message]) -> None:
        """Send events to all listeners of this process."""
        for message in messages:
            apply_change(partial(self._append, message))

    publish_committed = publish

    def _append(self, message: Message) -> None:
        history, number = self._history(message.channel), self._last_number + 1
        history.append_directly((number, 0), message.with_id(self._format_id(number)))
        self._last_number = number

    def subscribe(
        self, channel: str, after: str | None, since: float | None = None
    ) -> Subscription:
        """Start a listener of a channel."""
        subscription = Subscription()
        apply_change(lambda: self._subscribe(subscription, channel, after))
        return subscription

    def _subscribe(
        self, subscription: Subscription, channel: str, after: str | None
    ) -> None:
        subscription.history = history = self._history(channel)
        subscription.next_number = history.next_number
        subscription.id = self._format_id(self._last_number)
        if after is None:
            return
        position = self._parse_id(after)
        # The last event of this channel may be older than events of other channels.
        number = position and history.number_after(min(position, history.last_position))
        if number is None:
            subscription.has_gap = True
        else:
            subscription.next_number, subscription.id = number, after

    def position(self, channel: str) -> str:
        """The id of the newest event."""
        return self._format_id(self._last_number)

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
