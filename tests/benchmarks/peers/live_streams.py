"""tgstream: a channel, and a stream that listens to it."""

from __future__ import annotations

import time
from typing import Any

from tg import TGController, expose

import tgstream
from tgstream import SSE, stream
from tgstream.channels import Channel

from ..apps import NO_DATABASE, App, configure
from ..collector import set_collector

news = Channel("news")


class RootController(TGController):
    """A stream for listeners, and a page that publishes to them."""

    @expose()
    @stream(SSE)
    def listen(self) -> Any:
        return news.listen()

    @expose(content_type="text/plain")
    def publish(self) -> str:
        news.publish(str(time.monotonic()))
        return "published"

    @expose(content_type="text/plain")
    def collector(self, how: str) -> str:
        set_collector(how)
        return how


def make_app(where: str) -> App:
    return configure(RootController(), NO_DATABASE, tgstream.plugme)
