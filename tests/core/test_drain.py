"""``drain()``, which ends all streams of a process before its server stops."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tg import TGController, expose

from tests.conftest import LiveServer, MakeApp, assert_clean
from tests.model import Model, Note, User
from tests.wsgi import Call, get
from tgstream import (
    SSE,
    Channel,
    Event,
    Report,
    StreamError,
    current_stream,
    drain,
    flush,
    stream,
)


def test_drain_without_streams_returns_at_once() -> None:
    """``drain()`` returns ``True``."""
    assert drain(timeout=0)


def make_root(model: Model, **options: Any) -> TGController:
    """A root whose endless stream adds a note for each item."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(**options)
        def words(self) -> Iterator[str]:
            number = 0
            while True:
                number += 1
                model.DBSession.add(Note(text=f"note {number}"))
                flush()
                yield f"{number}\n"

    return Root()


def test_drained_event_stream_ends_normally(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """Browsers reconnect to another process, and sent events are committed."""
    app = make_app(make_root(model, format=SSE), model)
    calls = [Call(app, "/words") for _ in range(5)]
    assert [next(call) for call in calls[1:]] == [b"data: 1\ndata: \n\n"] * 4
    assert drain()
    assert [report.reason for report in reports] == ["drained"] * 5
    assert calls[0].read() == b"data: 1\ndata: \n\n"  # made before the drain
    assert [call.read() for call in calls[1:]] == [b""] * 4
    assert model.texts() == ["note 1"] * 5
    assert_clean(model)


def test_drained_stream_of_text_is_aborted(
    make_app: MakeApp,
    model: Model,
    reports: list[Report],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client detects the abort, nothing is committed, and a warning is logged."""
    call = Call(make_app(make_root(model), model), "/words")
    assert next(call) == b"1\n"
    assert drain()
    assert [report.reason for report in reports] == ["drained"]
    with pytest.raises(StreamError, match=r"Root.words was drained before its end"):
        next(call)
    call.close()
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert model.texts() == []
    assert_clean(model)


@pytest.mark.parametrize("last", [0, 2])
def test_drained_stream_sends_buffered_events(
    make_app: MakeApp, model: Model, reports: list[Report], last: int
) -> None:
    """The events are committed, and a complete response must have all of them."""

    class Root(TGController):
        @expose()
        @stream(SSE, chunk_size=20)
        def events(self) -> Iterator[str]:
            for number in range(6):
                model.DBSession.add(Note(text=f"note {number}"))
                if number == last:
                    drain(timeout=0)
                yield f"note {number}"

    body = get(make_app(Root(), model), "/events").text
    stored = model.texts()
    assert stored == [f"note {number}" for number in range(last + 1)]
    assert body == "".join(f"data: {text}\n\n" for text in stored)
    assert [report.reason for report in reports] == ["drained"]
    assert_clean(model)


def test_generator_can_check_whether_its_stream_is_ending(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """The response is complete if the generator returns before its next item."""
    waiting = threading.Event()

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            model.DBSession.add(User(name="ada"))
            yield "one"
            assert not current_stream().ending
            waiting.set()
            while not current_stream().ending:
                pass

    call = Call(make_app(Root(), model), "/words")
    assert next(call) == b"one"
    with ThreadPoolExecutor(1) as thread:
        rest = thread.submit(call.read)
        assert waiting.wait(10)
        assert drain()
        assert rest.result() == b""
    assert [report.reason for report in reports] == ["completed"]
    assert model.names() == ["ada"]
    assert_clean(model)


def test_drain_wakes_listeners_at_once(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """Listeners do not wait for their next heartbeat."""
    channel = Channel("drained")

    class Root(TGController):
        @expose()
        @stream(SSE)
        def events(self) -> Iterator[Event]:
            return channel.listen()

    app = make_app(Root(), sqlite_model, tgstream__heartbeat_seconds=3600)
    calls = [Call(app, "/events") for _ in range(20)]
    assert all(next(call).startswith(b": open\n") for call in calls)
    with ThreadPoolExecutor(len(calls)) as threads:
        rests = [threads.submit(call.read) for call in calls]
        assert drain()
        assert {rest.result() for rest in rests} <= {b"", b":\n\n"}
    assert [report.reason for report in reports] == ["drained"] * len(calls)
    assert_clean(sqlite_model)


def test_drain_returns_after_its_timeout(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """The result is ``False``. The generator that still runs ends at its next yield."""
    waiting, go = threading.Event(), threading.Event()

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(format=SSE)
        def words(self) -> Iterator[str]:
            yield "one"
            waiting.set()
            assert go.wait(10)
            yield "two"
            yield "three"

    call = Call(make_app(Root(), sqlite_model), "/words")
    next(call)
    with ThreadPoolExecutor(1) as thread:
        rest = thread.submit(call.read)
        assert waiting.wait(10)
        assert not drain(timeout=0.05)
        go.set()
        assert rest.result() == b"data: two\n\n"
    assert drain()
    assert [report.reason for report in reports] == ["drained"]
    assert_clean(sqlite_model)


def test_stream_is_drained_after_its_first_item(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """The generator makes its first item while ``drain()`` is called."""
    started, go = threading.Event(), threading.Event()

    class Root(TGController):
        @expose()
        @stream(SSE)
        def words(self) -> Iterator[str]:
            started.set()
            assert go.wait(10)
            while True:
                yield "one"

    app = make_app(Root(), sqlite_model)
    with ThreadPoolExecutor(1) as thread:
        body = thread.submit(lambda: Call(app, "/words").read())
        assert started.wait(10)
        drain(timeout=0)
        go.set()
        assert body.result() == b"data: one\n\n"
    assert [report.reason for report in reports] == ["drained"]
    assert_clean(sqlite_model)


@pytest.mark.parametrize(
    ("server", "count"),
    [("gunicorn-gevent", 100), ("gunicorn-gthread", 5), ("waitress", 5)],
)
def test_worker_with_open_streams_stops_soon(
    live_server: Callable[..., LiveServer],
    postgresql: str,
    server: str,
    count: int,
) -> None:
    """The worker stops within 2 s of SIGTERM, and its event streams end normally."""

    def start() -> LiveServer:
        return live_server(
            server, "stream_app", "drains=yes", f"postgresql={postgresql}"
        )

    # A busy machine may need more than one attempt.
    assert any(measure_stop(start(), count) < 2 for _ in range(3))


def measure_stop(live: LiveServer, count: int) -> float:
    """Return the seconds that a server needs to stop while streams are open."""
    connections = []
    for _ in range(count):
        connection = http.client.HTTPConnection("127.0.0.1", live.port, 20)
        connection.request("GET", "/postgresql/clock")
        connections.append((connection, connection.getresponse()))
    assert all(response.read(5) == b"data:" for _, response in connections)
    started = time.monotonic()
    live.process.terminate()
    for connection, response in connections:
        assert response.read().endswith(b"\n\n")
        connection.close()
    live.process.wait(10)
    return time.monotonic() - started
