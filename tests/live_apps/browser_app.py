"""What a browser is shown: a page that keeps what it receives, and what it asks for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import tg
from tg import FullStackApplicationConfigurator, TGController, expose

import tgstream
from tgstream import NDJSON, SSE, Channel, Event, last_event_id, stream

PAGE = """<!doctype html><meta charset="utf-8"><title>Browser</title><script>
const opened = [], received = [], pieces = [];
function listen() {
  const source = new EventSource("feed");
  source.onopen = () => opened.push(received.length);
  source.onmessage = event => received.push([event.data, event.lastEventId]);
  source.addEventListener("reset", () => received.push(["reset", ""]));
}
async function read() {
  const reader = (await fetch("pieces")).body.getReader();
  for (let got; !(got = await reader.read()).done;) {
    pieces.push(new TextDecoder().decode(got.value));
    await fetch("seen", {method: "POST"});
  }
}
</script>"""


def make_app(seconds: str = "0") -> Any:
    """The application.

    :param seconds: that an event stream may live; 0 for no bound.
    """
    base_config = FullStackApplicationConfigurator()
    base_config.update_blueprint(
        {
            "root_controller": make_root(float(seconds) or None),
            "renderers": ["json"],
            "default_renderer": "json",
            "errorpage.enabled": False,
            "app_globals": SimpleNamespace,
            "helpers": SimpleNamespace,
            "i18n.enabled": False,
        }
    )
    # A browser that is away may miss more than is kept by default.
    tgstream.plugme(base_config, {"channel_history": 100_000})
    return base_config.make_wsgi_app({}, {})


def make_root(seconds: float | None) -> TGController:
    """The controllers; made here, where gevent's worker has patched the library."""
    channel, asked, seen = Channel("numbers"), list[str](), threading.Semaphore(0)

    class RootController(TGController):
        @expose()
        def index(self) -> str:
            return PAGE

        @expose()
        @stream(SSE(retry=50), max_seconds=seconds)
        def feed(self) -> Iterator[Event]:
            after = last_event_id()
            asked.append(after or "")
            return channel.listen(after=after)

        @expose("json")
        def asked(self) -> dict[str, list[str]]:
            return {"asked": asked}  # the last ids that clients came with

        @expose()
        def publish(self, number: str) -> str:
            channel.publish(number)
            return number

        @expose()
        @stream(NDJSON, chunk_size=0)
        def pieces(self) -> Iterator[Any]:
            yield {"piece": 1}
            for number in 2, 3:  # made when the page has told of the one before
                yield {"piece": number, "seen": seen.acquire(timeout=20)}

        @expose()
        def seen(self) -> str:
            tg.response.status = 204
            seen.release()
            return ""

    return RootController()
