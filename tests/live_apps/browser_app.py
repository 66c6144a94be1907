"""The page that the browser tests open, and the streams that it reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import tg
from tg import TGController, expose

import tgstream
from tests.application import make_wsgi_app
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
    """Return the application.

    :param seconds: the ``max_seconds`` of its event stream, or 0 for no limit.
    """
    root = make_root(float(seconds) or None)
    # A disconnected browser may miss more events than the default history keeps.
    history = {"channel_history": 100_000}
    return make_wsgi_app(
        {"root_controller": root}, lambda config: tgstream.plugme(config, history)
    )


def make_root(seconds: float | None) -> TGController:
    """Return the controllers. Their locks are made after gevent's worker patches."""
    channel, seen = Channel("numbers"), threading.Semaphore(0)
    last_ids: list[str] = []
    visits: list[str] = []

    class LiveController(TGController):
        @expose()
        @stream(SSE(retry=50, done="done", failed="failed"))
        def names(self, fail: str = "") -> Iterator[str]:
            visits.append(fail)
            yield from ["ada", "bob"]
            if fail:
                raise LookupError("a secret")

        @expose()
        @stream(SSE(retry=50))
        def endless(self) -> Iterator[str]:
            yield "eve"

        @expose("json")
        def visits(self) -> dict[str, list[str]]:
            return {"visits": visits}

    class RootController(TGController):
        live = LiveController()

        @expose()
        def index(self) -> str:
            return PAGE

        @expose()
        @stream(SSE(retry=50), max_seconds=seconds)
        def feed(self) -> Iterator[Event]:
            after = last_event_id()
            last_ids.append(after or "")
            return channel.listen(after=after)

        @expose("json")
        def last_ids(self) -> dict[str, list[str]]:
            return {"last_ids": last_ids}

        @expose()
        def publish(self, number: str) -> str:
            channel.publish(number)
            return number

        @expose()
        @stream(NDJSON, chunk_size=0)
        def pieces(self) -> Iterator[Any]:
            yield {"piece": 1}
            for number in 2, 3:  # each waits until the page has the last one
                yield {"piece": number, "seen": seen.acquire(timeout=20)}

        @expose()
        def seen(self) -> str:
            tg.response.status = 204
            seen.release()
            return ""

    return RootController()
