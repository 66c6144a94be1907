"""The back end of ``memory://``: channels of one process.

The events of a channel are numbered. An event id consists of a random id of the channel
and the number. So the ids of other channels and of other processes are recognised, and
an id does not show how many events other channels have.

Every change goes through ``apply_change()``, as ``tgstream.live.history`` explains. So
nothing here needs a lock.
"""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict, deque
from collections.abc import Sequence
from functools import partial
from weakref import WeakValueDictionary

from ...core.options import clock
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


class _MemoryHistory(ChannelHistory):
    """The newest events of one channel, and when they were published."""

    def __init__(self, max_events: int) -> None:
        super().__init__((0, 0), max_events)
        self.token = secrets.token_hex(4)
        self.used = self.published = clock()
        # Of the newest events. The last one is that of the event before next_number.
        self._times: deque[float] = deque(maxlen=max_events)

    def publish(self, message: Message, now: float) -> None:
        """Store an event, within a change."""
        number = self.last_position[0] + 1
        self._times.append(now)
        self.published = now
        self.append_directly((number, 0), message.with_id(self.format_id(number)))

    def is_older(self, number: int, time: float) -> bool:
        """Whether a stored event was published before ``time``."""
        behind = self.next_number - number
        return behind > 0 and self._times[-behind] < time

    @property
    def newest_id(self) -> str:
        """The id of the newest event."""
        return self.format_id(self.last_position[0])

    def format_id(self, number: int) -> str:
        return f"{self.token}-{number}"

    def parse_id(self, id: str) -> Position | None:
        """The position of an event id. None if this channel has not sent the id."""
        match = re.fullmatch(r"([0-9a-f]{8})-(0|[1-9][0-9]{0,18})", id, re.ASCII)
        if match is None or match[1] != self.token:
            return None
        return int(match[2]), 0


class MemoryBackend:
    """The channels of this process.

    :param settings: the other options of the application.
    """

    def __init__(self, settings: ChannelSettings) -> None:
        self._settings = settings
        # The channels with a listener, and those used last.
        self._histories: WeakValueDictionary[str, _MemoryHistory] = (
            WeakValueDictionary()
        )
        self._used_last: OrderedDict[str, _MemoryHistory] = OrderedDict()

    backlog = 0

    def publish(self, messages: Sequence[Message]) -> None:
        """Send events to all listeners of this process."""
        for message in messages:
            apply_change(partial(self._append, message))

    publish_committed = publish

    def _append(self, message: Message) -> None:
        now = clock()
        self._history(message.channel, now).publish(message, now)

    def subscribe(
        self, channel: str, after: str | None, since: float | None = None
    ) -> Subscription:
        """Start a listener of a channel."""
        subscription = Subscription()
        apply_change(lambda: self._subscribe(subscription, channel, after, since))
        return subscription

    def _subscribe(
        self,
        subscription: Subscription,
        channel: str,
        after: str | None,
        since: float | None,
    ) -> None:
        now = clock()
        subscription.history = history = self._history(channel, now)
        subscription.next_number = history.next_number
        subscription.id = history.newest_id
        if after is None:
            return
        position = history.parse_id(after)
        number = None if position is None else history.number_after(position)
        if number is None or (
            since is not None and history.is_older(number, now - since)
        ):
            subscription.has_gap = True
        else:
            subscription.next_number, subscription.id = number, after

    def position(self, channel: str) -> str:
        """The id of the newest event."""
        return self.subscribe(channel, None).id

    def _history(self, channel: str, now: float) -> _MemoryHistory:
        history = self._histories.get(channel)
        if history is None:
            history = _MemoryHistory(self._settings.history)
            self._histories[channel] = history
        elif now - history.published > self._settings.seconds:
            history.forget_directly()
        history.used = now
        self._used_last[channel] = history
        self._used_last.move_to_end(channel)
        self._remove_idle(now)
        return history

    def _remove_idle(self, now: float) -> None:
        """Remove the channels that nobody has used for a time, or that are too many."""
        while len(self._used_last) > MAX_CHANNELS or (
            now - next(iter(self._used_last.values())).used > self._settings.seconds
        ):
            self._used_last.popitem(last=False)
