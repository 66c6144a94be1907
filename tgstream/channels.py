"""Named channels of events: the import path of :class:`Channel`."""

from .live.channel import Channel, listen, position

__all__ = ["Channel", "listen", "position"]
