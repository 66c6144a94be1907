"""TurboGears2 by hand: a generator and a queue for each client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import Any

import tg
from tg import TGController, expose

from ..apps import NO_DATABASE, App, configure
from ..collector import set_collector


class RootController(TGController):
    """A stream for listeners, and a page that publishes to them."""

    def __init__(self) -> None:
        super().__init__()
        self._queues: set[SimpleQueue[bytes]] = set()

    @expose(content_type="text/event-stream")
    def listen(self) -> Any:
        tg.response.headers["Cache-Control"] = "no-cache"

        def generate() -> Iterator[bytes]:
            queue: SimpleQueue[bytes] = SimpleQueue()
            self._queues.add(queue)
            try:
                yield b": open\n\n"
                while True:
                    try:
                        yield queue.get(timeout=15)
                    except Empty:
                        yield b":\n\n"
            finally:
                self._queues.discard(queue)

        return generate()

    @expose(content_type="text/plain")
    def publish(self) -> str:
        piece = f"data: {time.monotonic()}\n\n".encode()
        for queue in list(self._queues):
            queue.put(piece)
        return "published"

    @expose(content_type="text/plain")
    def collector(self, how: str) -> str:
        set_collector(how)
        return how


def make_app(where: str) -> App:
    return configure(RootController(), NO_DATABASE)
