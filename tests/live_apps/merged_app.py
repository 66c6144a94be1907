"""Pages with one stream of five channels, which begins where the page was rendered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import tg
from tg import TGController, expose

import tgstream
from tests.application import make_wsgi_app
from tgstream import SSE, Channel, Event, last_event_id, listen, position, stream
from tgstream.core.monitor import monitor

NAMES = ["orders", "chat", "stock", "jobs", "user:1"]
PAGE = """<!doctype html><meta charset="utf-8"><title>Merged</title><script>
const names = NAMES, received = SHOWN, opened = [], sources = [];
function follow(path) {
  const source = new EventSource(path + "lastEventId=POSITION");
  source.onopen = () => opened.push(path);
  for (const name of names)
    source.addEventListener(name, event => received.push([name, event.data]));
  source.addEventListener("reset", event => received.push(["reset", event.data]));
  sources.push(source);
}
const merged = () => follow("feed?");
const separate = () => names.forEach(name => follow(`one?name=${name}&`));
</script>"""


def make_app() -> Any:
    """Return the application. Each event is shown by pages that are loaded later."""
    shown: list[tuple[str, str]] = []

    class RootController(TGController):
        @expose()
        def index(self) -> str:
            place = position(*NAMES)  # first: the events before it are in the page
            page = PAGE.replace("POSITION", place).replace("NAMES", json.dumps(NAMES))
            return page.replace("SHOWN", json.dumps(shown))

        @expose()
        @stream(SSE(retry=50))
        def feed(self, **_: str) -> Iterator[Event]:
            return listen(*NAMES, after=last_event_id())

        @expose()
        @stream(SSE(retry=50))
        def one(self, name: str, **_: str) -> Iterator[Event]:
            return Channel(name).listen()

        @expose()
        def publish(self, name: str, text: str) -> str:
            shown.append((name, text))
            Channel(name).publish(text, event=name)
            return text

        @expose("json")
        def streams(self) -> dict[str, int]:
            tg.response.headers["Cache-Control"] = "no-store"
            return {"streams": len(monitor.running())}

    return make_wsgi_app({"root_controller": RootController()}, tgstream.plugme)
