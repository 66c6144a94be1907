"""An application whose controllers have one open stream at once, for each user."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import tg
from tg import TGController, expose

import tgstream
from tests.application import make_wsgi_app
from tgstream import SSE, Channel, Event, stream

ended: list[list[str]] = []
"""The path and the reason of each stream that has ended."""

PAGE = """<!doctype html>
<title>limited</title>
<script>
  const kind = location.search.slice(1).split("&")[0], state = {events: [], opened: 0};
  const source = new EventSource(kind + location.search);
  source.onopen = () => { ++state.opened; };
  source.onmessage = (event) => { state.events.push(event.data); };
  source.addEventListener("replaced", () => { state.replaced = true; });
</script>
"""


def user_of(request: Any) -> str:
    """The user whom the request names."""
    return str(request.params.get("user"))


class RootController(TGController):
    def __init__(self) -> None:
        self.going_on: set[str] = set()
        """The users whose downloads go on."""

    @expose("json")
    def state(self) -> dict[str, Any]:
        """Return the path and the reason of each stream that has ended."""
        return {"ended": ended}

    @expose(content_type="text/html")
    def index(self, **_: str) -> str:
        """The page of a feed: ``/?replacing&user=ada``."""
        return PAGE

    @expose()
    def publish(self, data: str) -> str:
        Channel("feed").publish(data)
        return ""

    def _events(self) -> Iterator[Event]:
        return Channel("feed").listen()

    @expose()
    @stream(SSE(retry=20), limit=1, limit_by=user_of)
    def refusing(self, **_: str) -> Any:
        return self._events()

    @expose()
    @stream(SSE(retry=20), limit=1, limit_by=user_of, limit_action="replace")
    def replacing(self, **_: str) -> Any:
        return self._events()

    @expose()
    @stream(SSE(retry=20), limit=1, limit_by=user_of, busy="retry")
    def retrying(self, **_: str) -> Any:
        return self._events()

    @expose(content_type="application/octet-stream")
    @stream(limit=1, limit_by=user_of)
    def download(self, user: str) -> Iterator[bytes]:
        """Send a megabyte, wait until the user goes on, and send another one."""
        yield b"a" * (1 << 20)
        while user not in self.going_on:  # a named pipe would block all greenlets
            time.sleep(0.01)
        yield b"z" * (1 << 20)

    @expose()
    def go_on(self, user: str) -> str:
        self.going_on.add(user)
        return ""


def make_app(looks: str = "0", **options: str) -> Any:
    """Return the application. Heartbeats and checks of the monitor are rare."""
    logging.basicConfig(stream=sys.stdout, level="WARNING")
    tg.hooks.register(
        "tgstream.finished",
        lambda report: ended.append([report.path, report.reason]),
    )
    return make_wsgi_app(
        {
            "root_controller": RootController(),
            "tgstream.heartbeat_seconds": options.get("heartbeat", "600"),
            "tgstream.disconnect_check_seconds": "600",
        },
        tgstream.plugme,
    )
