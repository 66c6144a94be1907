"""The protocol of a back end, which stores the events of channels and sends them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..formats.sse import Message

if TYPE_CHECKING:
    from .history import Subscription


class ChannelSettings(NamedTuple):
    """The options of an application for its channels."""

    history: int = 1000
    """Maximum events of a channel that are kept."""
    seconds: float = 604_800.0
    """Seconds after its last event at which a channel is removed."""
    backlog: int = 10_000
    """Maximum events to keep in this process while they cannot be sent."""
    publish_timeout: float = 1.0
    """Maximum seconds that all events of a transaction wait for the server."""
    poll_seconds: float = 0.25
    """Seconds between two looks for new events, where nothing reports them."""
    listen_url: str | None = None
    """The URL of a direct connection for LISTEN, if the engine's has a pooler."""


class ConnectionLost(Exception):
    """The server of a back end cannot be reached. The back end has logged it."""


class UnknownUrlOption(ValueError):
    """The URL of a back end has an option that its package does not have."""


class Backend(Protocol):
    """The channels of one application, in this process.

    Its ids consist of letters, digits, ``-`` and ``_``, because the id of a listener of
    several channels is made of them. Any other text is accepted as an id from a client,
    and causes a reset.
    """

    def publish(self, messages: Sequence[Message]) -> None:
        """Send events to all listeners at once, in order.

        :raises Exception: if the events cannot be sent.
        """

    def publish_committed(self, messages: Sequence[Message]) -> None:
        """Send the events of a transaction that has committed, in order.

        It does not raise if the server cannot be reached.
        """

    def subscribe(
        self, channel: str, after: str | None, since: float | None = None
    ) -> Subscription:
        """Start a listener of a channel.

        :param after: the id of the last event that the client received. The listener
            starts with the event after it. None to start with the next new event.
        :param since: seconds. Older events are not sent, and count as missing.
        :raises ConnectionLost: if the server cannot be reached.
        """

    def position(self, channel: str) -> str:
        """The id of the newest event of a channel, to start a listener after it.

        :raises ConnectionLost: if the server cannot be reached.
        """
