"""``drain()``, which ends all streams of a process before its server stops."""

from __future__ import annotations

import http.client
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tg import TGController, expose

from tests.conftest import LiveServer, MakeApp, assert_clean, stop_draining
from tests.core.support import fork
from tests.model import Model, Note, User
from tests.returning import measure_stop, returning
from tests.wsgi import Call, get
from tgstream import (
    NDJSON,
    SSE,
    Channel,
    Event,
    Report,
    Stream,
    StreamError,
    current_stream,
    drain,
    flush,
    health,
    send_file,
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


# Streams that start later.


def make_late_root(ran: list[str]) -> TGController:
    """A root of streams of all kinds, which note in ``ran`` that they have run."""

    def items() -> Iterator[str]:
        ran.append("generator")
        yield "one"

    class Root(TGController):
        @expose()
        @stream(SSE, limit=1)
        def events(self) -> Iterator[str]:
            yield from items()

        @expose()
        @stream(SSE)
        def listening(self) -> Iterator[str]:
            ran.append("controller")
            return items()

        @expose()
        @stream([NDJSON, SSE])
        def either(self) -> Iterator[str]:
            yield from items()

        @expose(content_type="text/event-stream")
        @stream
        def written(self) -> Iterator[str]:
            yield from items()

        @expose(content_type="text/plain")
        @stream(limit=1)
        def words(self) -> Iterator[str]:
            yield from items()

        @expose(content_type="text/plain")
        @stream(limit=1)
        def perhaps(self, page: str = "") -> Any:
            return "a page" if page else items()

        @expose()
        def returned(self) -> Stream:
            return Stream(items(), SSE, limit=1)

        @expose(content_type="text/plain")
        @stream(spool=True)
        def spooled(self) -> Iterator[str]:
            return items()

        @expose()
        def file(self) -> Stream:
            return send_file(__file__)

        @expose(content_type="text/plain")
        def page(self) -> str:
            return "a page"

    return Root()


EVENTS = {"HTTP_ACCEPT": "text/event-stream"}


@pytest.mark.parametrize(
    ("path", "environ"),
    [
        ("/events", {}),
        ("/listening", {}),
        ("/either", EVENTS),
        ("/written", EVENTS),
        ("/returned", {}),
    ],
)
def test_event_stream_that_starts_after_drain_is_empty(
    make_app: MakeApp,
    model: Model,
    reports: list[Report],
    path: str,
    environ: dict[str, str],
) -> None:
    """Browsers reconnect after it. No generator runs, and no slot is kept."""
    ran: list[str] = []
    app = make_app(make_late_root(ran), model)
    assert drain()
    for _ in range(2):
        answer = get(app, path, **environ)
        assert (answer.status_int, answer.text) == (200, "retry: 5000\n\n")
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert "Content-Length" not in answer.headers  # some servers close after it
    assert ran == []
    assert reports == []
    assert_clean(model)
    stop_draining()
    assert get(app, path, **environ).text == "data: one\n\n" or path == "/written"


@pytest.mark.parametrize("path", ["/words", "/perhaps", "/either", "/spooled", "/file"])
def test_other_stream_that_starts_after_drain_is_answered_with_503(
    make_app: MakeApp,
    model: Model,
    reports: list[Report],
    path: str,
) -> None:
    """The response has ``Retry-After``. No generator runs, and no slot is kept."""
    ran: list[str] = []
    app = make_app(make_late_root(ran), model)
    assert drain()
    for _ in range(2):
        answer = get(app, path)
        assert answer.status_int == 503
        assert answer.headers["Retry-After"] == "5"
        assert not {"Content-Length", "ETag", "Accept-Ranges"} & {*answer.headers}
        assert answer.text == "The server restarts. Please try again in 5 seconds.\n"
    assert ran == []
    assert reports == []
    assert_clean(model)
    stop_draining()
    assert get(app, path).status_int == 200


@pytest.mark.parametrize("path", ["/page", "/perhaps?page=1"])
def test_page_is_served_after_drain(
    make_app: MakeApp, sqlite_model: Model, path: str
) -> None:
    """``@stream`` refuses a controller that is not a generator only for a stream."""
    app = make_app(make_late_root([]), sqlite_model)
    assert drain()
    assert get(app, path).text == "a page"
    assert_clean(sqlite_model)


@pytest.mark.parametrize("heartbeat", [None, 5])
def test_generator_does_not_run_if_the_process_drains_in_its_controller(
    make_app: MakeApp, model: Model, reports: list[Report], heartbeat: float | None
) -> None:
    """The changes of the controller are committed, like before a redirect."""
    ran: list[str] = []

    def items() -> Iterator[str]:
        ran.append("generator")
        yield "one"

    class Root(TGController):
        @expose()
        @stream(SSE(heartbeat=heartbeat))
        def index(self) -> Iterator[str]:
            model.DBSession.add(Note(text="of the controller"))
            assert drain()
            return items()

    assert get(make_app(Root(), model)).text == "retry: 5000\n\n"
    assert ran == []
    assert reports == []
    assert model.texts() == ["of the controller"]
    assert_clean(model)


def test_forked_process_is_not_draining() -> None:
    """A server may fork new workers after it has drained."""
    assert drain()
    child = fork()
    if not child:
        os._exit(health()["draining"])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert health()["draining"]


def test_health_has_the_state_of_the_process(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """It counts the streams that have started and not ended."""
    app = make_app(make_root(sqlite_model, format=SSE), sqlite_model)
    assert health() == {"draining": False, "open_streams": 0}
    calls = [Call(app, "/words") for _ in range(3)]
    assert [next(call) for call in calls] == [b"data: 1\ndata: \n\n"] * 3
    calls.pop().close()
    assert health() == {"draining": False, "open_streams": 2}
    assert drain()
    assert health() == {"draining": True, "open_streams": 0}
    for call in calls:
        assert call.read() == b""


# Servers that stop.


SERVERS = ["gunicorn-gthread", "gunicorn-gevent", "waitress"]


@pytest.mark.parametrize("server", SERVERS)
def test_connection_is_closed_after_a_refused_stream(
    live_server: Callable[..., LiveServer], server: str
) -> None:
    """The client reconnects, and can reach another process."""
    live = live_server(server, "stream_app")
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=20)
    for path, body in ("drain", b"True"), ("clock", b"retry: 5000\n\n"):
        connection.request("GET", f"/untraced/{path}")
        sock = connection.sock
        with connection.getresponse() as response:
            assert response.read() == body
    assert response.will_close or sock.recv(1) == b""
    connection.close()


@pytest.mark.parametrize(
    ("server", "count", "pause"),
    [
        ("gunicorn-gthread", 5, 1),
        ("gunicorn-gevent", 10, 1),
        ("waitress", 5, 0.01),
    ],
)
def test_server_stops_soon_although_its_clients_reconnect(
    live_server: Callable[..., LiveServer], server: str, count: int, pause: float
) -> None:
    """It stops within 2 s of SIGTERM. The next server can bind the address at once."""

    def stop(count: int) -> float:
        words = "stream_app", "drains=yes", f"threads={count + 1}"
        live = live_server(server, *words)
        get_page(live)
        with returning(live, count, "/untraced/clock", pause) as clients:
            seconds = measure_stop(live)
            socket.create_server(("127.0.0.1", live.port)).close()
        for client in clients:
            status, text = client.answers[0]
            assert status == 200 and text.endswith(b"\n\n")
        return seconds

    # On a busy machine a server without clients may need longer, too.
    assert any((seconds := stop(count)) < 2 or seconds < stop(0) + 1 for _ in range(3))


def get_page(live: LiveServer) -> bytes:
    """Request an ordinary page, on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=40)
    try:
        connection.request("GET", "/untraced/page")
        return connection.getresponse().read()
    finally:
        connection.close()


@pytest.mark.parametrize("server", SERVERS[:2])
def test_gunicorn_replaces_a_worker_soon_after_its_last_request(
    live_server: Callable[..., LiveServer], server: str
) -> None:
    """With ``max_requests`` an open feed does not keep pages waiting for 30 s."""
    live = live_server(server, "stream_app", "drains=yes", "max_requests=4")
    workers: set[bytes] = set()
    longest = 0.0
    with returning(live, 2, "/untraced/clock", 1):
        while len(workers) < 2:
            started = time.monotonic()
            workers.add(get_page(live))
            longest = max(longest, time.monotonic() - started)
    assert longest < 15
