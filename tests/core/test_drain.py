"""``drain()``: every running stream of a process ends, for its server is told to."""

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


def test_nothing_runs_nothing_to_drain() -> None:
    """It comes back at once."""
    assert drain(timeout=0)


def root(model: Model, **options: Any) -> TGController:
    """An endless stream that adds a user for each item."""

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


def test_events_are_drained_well(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """A browser comes back, to another process; what it has seen is stored."""
    app = make_app(root(model, format=SSE), model)
    calls = [Call(app, "/words") for _ in range(5)]
    assert [next(call) for call in calls[1:]] == [b"data: 1\ndata: \n\n"] * 4
    assert drain()
    assert [report.reason for report in reports] == ["drained"] * 5
    assert calls[0].read() == b"data: 1\ndata: \n\n"  # was made in time
    assert [call.read() for call in calls[1:]] == [b""] * 4
    assert model.texts() == ["note 1"] * 5
    assert_clean(model)


def test_other_streams_are_drained_broken(
    make_app: MakeApp,
    model: Model,
    reports: list[Report],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No client takes half of it for the whole, nothing is stored, a line says so."""
    call = Call(make_app(root(model), model), "/words")
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
def test_drained_stream_sends_the_committed_events_that_it_buffers(
    make_app: MakeApp, model: Model, reports: list[Report], last: int
) -> None:
    """The response is complete, so that no client would notice their absence."""

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


def test_generator_that_works_sees_that_it_is_to_end(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """It may end before its next item, and is then complete."""
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


def test_listeners_are_woken_at_once(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """They do not wait for their next heartbeat, and no event of theirs is lost."""
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


def test_drain_does_not_wait_for_ever(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """It says that a generator is still at work, which ends when it comes to yield."""
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


def test_stream_that_makes_its_first_item_is_drained_after_it(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """Nothing of it runs yet that could be ended; but it is not to live on."""
    begun, go = threading.Event(), threading.Event()

    class Root(TGController):
        @expose()
        @stream(SSE)
        def words(self) -> Iterator[str]:
            begun.set()
            assert go.wait(10)
            while True:
                yield "one"

    app = make_app(Root(), sqlite_model)
    with ThreadPoolExecutor(1) as thread:
        body = thread.submit(lambda: Call(app, "/words").read())
        assert begun.wait(10)
        drain(timeout=0)
        go.set()
        assert body.result() == b"data: one\n\n"
    assert [report.reason for report in reports] == ["drained"]
    assert_clean(sqlite_model)


@pytest.mark.parametrize(
    ("server", "count"),
    [("gunicorn-gevent", 100), ("gunicorn-gthread", 5), ("waitress", 5)],
)
def test_worker_with_open_streams_ends_soon(
    live_server: Callable[..., LiveServer],
    postgresql: str,
    server: str,
    count: int,
) -> None:
    """Within 2 s of SIGTERM, and each client has a proper end of its events."""

    def start() -> LiveServer:
        return live_server(
            server, "stream_app", "drains=yes", f"postgresql={postgresql}"
        )

    # More than once where the machine is busy with other things.
    assert any(seconds_to_end(start(), count) < 2 for _ in range(3))


def seconds_to_end(live: LiveServer, count: int) -> float:
    """How long a server lives with so many streams open when it is told to end."""
    connections = []
    for _ in range(count):
        connection = http.client.HTTPConnection("127.0.0.1", live.port, 20)
        connection.request("GET", "/postgresql/clock")
        connections.append((connection, connection.getresponse()))
    assert all(response.read(5) == b"data:" for _, response in connections)
    begun = time.monotonic()
    live.process.terminate()
    for connection, response in connections:
        assert response.read().endswith(b"\n\n")
        connection.close()
    live.process.wait(10)
    return time.monotonic() - begun
