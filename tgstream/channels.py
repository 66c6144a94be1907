"""Named channels of events: the import path of :class:`Channel`."""

from .live.channel import Channel

__all__ = ["Channel"]
