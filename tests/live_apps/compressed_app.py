"""An application whose streams are compressed, and wait for their client or fail."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import tg
from tg import TGController, expose

import tgstream
from tests.application import make_wsgi_app
from tgstream import CSV, NDJSON, SSE, stream

PAGE = """<!doctype html><meta charset="utf-8"><title>Compressed</title><script>
const received = [], texts = {}, codings = {};
function listen(name) {
  const source = new EventSource("events?name=" + name);
  source.onmessage = event => received.push(event.data);
  source.onerror = () => source.close();
}
async function read(path) {
  const response = await fetch(path);
  codings[path] = response.headers.get("Content-Encoding");
  try {
    texts[path] = await response.text();
  } catch (error) {
    texts[path] = error.name;
  }
}
</script>"""


def make_app() -> Any:
    """Return the application, whose option compresses all text."""
    return make_wsgi_app(
        {"root_controller": make_root()},
        lambda config: tgstream.plugme(config, {"compress": True}),
    )


def make_root() -> TGController:
    """Return the controllers. Their locks are made after gevent's worker patches."""
    seen: dict[str, threading.Semaphore] = defaultdict(lambda: threading.Semaphore(0))

    class RootController(TGController):
        @expose()
        def index(self) -> str:
            return PAGE

        @expose()
        @stream(SSE)
        def events(self, name: str) -> Iterator[str]:
            """Send the second event when the client has the first one."""
            yield "one"
            yield f"two, {seen[name].acquire(timeout=20)}"

        @expose()
        @stream(NDJSON, chunk_size=0)
        def lines(self, name: str) -> Iterator[Any]:
            """Send the second line when the client has the first one."""
            yield {"line": 1}
            yield {"line": 2, "seen": seen[name].acquire(timeout=20)}

        @expose()
        def see(self, name: str) -> str:
            seen[name].release()
            return name

        @expose()
        @stream(CSV(header=["n", "text"]))
        def export(self, fail: str = "") -> Iterator[Any]:
            """Send 3,000 rows in several chunks."""
            for number in range(3000):
                if fail and number == 2500:
                    raise LookupError(fail)
                yield number, "x" * (number % 70)

        @expose("json")
        def accepted(self) -> dict[str, str]:
            return {"accepted": tg.request.headers.get("Accept-Encoding", "")}

    return RootController()
