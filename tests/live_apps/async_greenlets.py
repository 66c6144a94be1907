"""Async streams with gevent: the event loop and all streams share one thread."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import sys  # noqa: E402  # gevent must patch first
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))

import asyncio  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import AsyncIterator, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402
import tg  # noqa: E402
from gevent.event import Event  # noqa: E402
from tg import TGController, expose  # noqa: E402

from tests.conftest import make_application  # noqa: E402
from tests.wsgi import Call, get  # noqa: E402
from tgstream import Report, current_stream, drain, stream  # noqa: E402

closed: list[str] = []
reports: list[str] = []
go = Event()


class Root(TGController):
    """Async streams, and one that waits for an event of gevent."""

    @expose(content_type="text/plain")
    @stream
    async def count(self, number: str) -> AsyncIterator[str]:
        for item in range(5):
            await asyncio.sleep(0.001)
            in_thread = await asyncio.to_thread(lambda: tg.request.params["number"])
            assert in_thread == tg.request.params["number"] == number
            yield f"{number}.{item} "

    @expose(content_type="text/plain")
    @stream
    async def wait(self) -> AsyncIterator[str]:
        try:
            yield "first"
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            closed.append("wait")

    @expose(content_type="text/plain")
    @stream
    async def block(self) -> AsyncIterator[str]:
        time.sleep(0.05)  # patched: only the loop waits
        yield "first"

    @expose(content_type="text/plain")
    @stream
    def silent(self) -> Iterator[str]:
        current_stream().on_end(go.set)
        yield "first"
        go.wait()
        closed.append("silent")
        raise LookupError("the upstream was closed")


def check_many(app: Any) -> None:
    """Many streams take turns, with a pool of threads, and an asyncio.run() beside."""

    async def sleep() -> str:
        for _ in range(20):
            await asyncio.sleep(0.001)
            assert asyncio.get_running_loop() is not None
        return "slept"

    greenlets = [gevent.spawn(get, app, f"/count?number={n}") for n in range(200)]
    assert asyncio.run(sleep()) == "slept"
    gevent.joinall(greenlets, timeout=60, raise_error=True)
    for number, greenlet in enumerate(greenlets):
        assert greenlet.value.text == "".join(f"{number}.{n} " for n in range(5))


def check_kill(app: Any) -> None:
    """A kill or a timeout reaches the greenlet that pulls, and ends the stream."""
    call = Call(app, "/wait", checked=False)
    next(call)
    killed = gevent.spawn(next, call)
    gevent.sleep(0.01)
    killed.kill(timeout=10)
    assert killed.ready()
    call.close()
    timeout = gevent.Timeout(0.01)
    call = Call(app, "/wait", checked=False)
    next(call)
    try:
        with timeout:
            next(call)
    except gevent.Timeout as error:
        assert error is timeout
    call.close()
    assert closed == ["wait", "wait"]


def check_drain(app: Any) -> None:
    """Streams that wait end at once, async or not. A dropped stream ends, too."""
    closed.clear()
    calls = [Call(app, path, checked=False) for path in ("/wait", "/silent", "/wait")]
    for call in calls:
        next(call)
    calls.pop().drop()
    for call in calls:
        gevent.spawn(lambda call=call: list(call)).link_exception(lambda _: None)
    gevent.sleep(0.01)
    assert drain(10)
    assert sorted(closed) == ["silent", "wait", "wait"]
    for call in calls:
        call.close()


def check_block(app: Any) -> None:
    """A patched call in an async stream does not stop other greenlets."""
    ticks: list[int] = []

    def tick() -> None:
        while True:
            ticks.append(1)
            gevent.sleep(0.001)

    ticker = gevent.spawn(tick)
    assert get(app, "/block").text == "first"
    ticker.kill()
    assert len(ticks) > 5


def main() -> None:
    """Run all checks, and print the names of the threads and the reasons."""
    tg.hooks.register("tgstream.finished", note_end)
    app = make_application(Root(), trace_errors__enable=False)
    check_many(app)
    assert set(reports) == {"completed"}
    check_kill(app)
    check_block(app)
    check_drain(app)
    assert threading.get_ident() == threading.main_thread().ident
    print(*reports[200:])


def note_end(report: Report) -> None:
    reports.append(report.reason)


if __name__ == "__main__":
    main()
