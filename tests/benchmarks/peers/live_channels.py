"""tgstream: streams that listen to the channels that their clients name."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from tg import TGController, expose

import tgstream
from tgstream import SSE, Channel, Event, stream

from .. import people
from ..apps import NO_DATABASE, App, configure


class RootController(TGController):
    """Streams that listen to one channel, or to several at once."""

    @expose()
    @stream(SSE)
    def listen(self, name: str) -> Iterator[Event]:
        return Channel(name).listen()

    @expose()
    @stream(SSE)
    def merged(self, names: str) -> Iterator[Event]:
        return tgstream.listen(*names.split(","))

    @expose(content_type="text/plain")
    def collect(self) -> str:
        gc.collect()
        return "collected"


def make_app(where: str) -> App:
    """Return the application.

    :param where: the option ``tgstream.channels``, a space, and the URL of a database
        or nothing.
    """
    channels, _, url = where.partition(" ")
    options: dict[str, Any] = people.database_options(url) if url else NO_DATABASE
    options = {
        **options,
        "tgstream.channels": channels,
        "tgstream.heartbeat_seconds": "3600",  # so that only events cost something
    }
    return configure(RootController(), options, tgstream.plugme)
