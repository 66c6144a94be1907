"""``on_end()``: callbacks that are called once, when the stream ends."""

from __future__ import annotations

import gc
import http.client
import os
import socket
import threading
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest
import requests
from tg import TGController, abort, expose

import tgstream
from tests.conftest import MakeApp, assert_clean
from tests.core.support import reasons, run_on_another_thread
from tests.forks import run_python
from tests.model import Model, Note
from tests.wsgi import Call, get
from tgstream import SSE, Event, Report, Stream, current_stream, drain, stream

SHORT = 0.02


class Upstream:
    """A server that sends one line of an event stream, and then nothing.

    Its client is known to have closed the connection when :attr:`closed` is set.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        self.closed = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n6\r\nfirst\n\r\n"
            )
            if connection.recv(1) == b"":
                self.closed.set()

    def close(self) -> None:
        self._thread.join(10)
        self._listener.close()


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with closing(Upstream()) as upstream:
        yield upstream


Read = tuple[Any, Iterator[bytes]]


def read_by_urllib(url: str, stack: ExitStack) -> Read:
    answer = urllib.request.urlopen(url, timeout=60)
    return answer, iter(answer)


def read_by_http_client(url: str, stack: ExitStack) -> Read:
    connection = http.client.HTTPConnection(httpx.URL(url).netloc.decode(), timeout=60)
    stack.callback(connection.close)
    connection.request("GET", "/")
    answer = connection.getresponse()
    return answer, iter(answer.readline, b"")


def read_by_requests(url: str, stack: ExitStack) -> Read:
    session = stack.enter_context(requests.Session())
    answer = session.get(url, stream=True, timeout=60)
    return answer, answer.iter_lines(chunk_size=1)


def read_by_httpx(url: str, stack: ExitStack) -> Read:
    client = stack.enter_context(httpx.Client(timeout=60))
    answer = client.send(client.build_request("GET", url), stream=True)
    return answer, answer.iter_raw()


def read_by_socket(url: str, stack: ExitStack) -> Read:
    host, port = httpx.URL(url).netloc.decode().split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    return connection, iter(lambda: connection.recv(65536), b"")


READERS = [
    read_by_urllib,
    read_by_http_client,
    read_by_requests,
    read_by_httpx,
    read_by_socket,
]


class Waiting(TGController):
    """Streams that wait before their second item until a callback lets them go on."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.go = threading.Event()
        self.waits = threading.Event()
        self.calls: list[str] = []
        for page in (Waiting.lines, Waiting.events):
            expose()(page)  # each test resets TG, which forgets it

    def _make(self, then: str) -> Iterator[Any]:
        current_stream().on_end(self.go.set)
        current_stream().on_end(lambda: self.calls.append("first"))
        current_stream().on_end(lambda: self.calls.append("second"))
        self.model.DBSession.add(Note(text="uncommitted"))
        yield "open"
        self.waits.set()
        assert self.go.wait(20)
        if then == "fail":
            raise LookupError("the upstream was closed")
        if then == "yield":
            yield "last"

    @stream(max_seconds=20)
    def lines(self, then: str = "return") -> Iterator[str]:
        return self._make(then)

    @stream(SSE(heartbeat=SHORT), commit="manual")
    def events(self, then: str = "return") -> Iterator[Event]:
        return map(Event, self._make(then))


@pytest.fixture
def waiting(sqlite_model: Model) -> Waiting:
    return Waiting(sqlite_model)


@pytest.mark.parametrize("then", ["return", "fail", "yield"])
def test_callbacks_are_called_while_the_generator_waits(
    make_app: MakeApp,
    sqlite_model: Model,
    waiting: Waiting,
    next_report: Callable[[], Report],
    then: str,
) -> None:
    """The stream ends as disconnected, however the generator ends then."""
    call = Call(make_app(waiting, sqlite_model), f"/events?then={then}")
    assert next(call).startswith(b"data: open")
    next(call)
    assert waiting.waits.wait(10)
    call.close()
    report = next_report()
    assert (report.reason, report.error) == ("disconnected", None)
    assert waiting.calls == ["second", "first"]
    assert sqlite_model.texts() == []
    assert_clean(sqlite_model)


@pytest.mark.parametrize("then", ["return", "fail", "yield"])
@pytest.mark.parametrize("path", ["/lines", "/events"])
def test_drain_calls_the_callbacks_of_a_stream_that_waits(
    make_app: MakeApp,
    sqlite_model: Model,
    waiting: Waiting,
    reports: list[Report],
    path: str,
    then: str,
) -> None:
    """An error that follows is not a failure, and nothing is committed."""
    call = Call(make_app(waiting, sqlite_model), f"{path}?then={then}", checked=False)
    next(call)
    errors: list[BaseException] = []

    def read() -> None:
        try:
            list(call)
        except tgstream.StreamError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert waiting.waits.wait(10)
    assert drain()
    reader.join(10)
    call.close()
    assert [(r.reason, r.error) for r in reports] == [("drained", None)]
    assert len(errors) == (path == "/lines")  # an event stream may end anywhere
    assert waiting.calls == ["second", "first"]
    assert sqlite_model.texts() == []
    assert_clean(sqlite_model)


@pytest.mark.parametrize("path", ["/lines", "/events", "/worker", "/spooled"])
def test_first_item_that_a_callback_interrupts_is_not_a_failure(
    make_app: MakeApp, next_report: Callable[[], Report], path: str
) -> None:
    """The generator fails because the callback has closed what it reads."""
    waits, go = threading.Event(), threading.Event()

    def read() -> Iterator[str]:
        current_stream().on_end(go.set)
        waits.set()
        assert go.wait(10)
        raise LookupError("the upstream was closed")
        yield ""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def lines(self) -> Iterator[str]:
            return read()

        @expose()
        @stream(SSE)
        def events(self) -> Iterator[str]:
            return read()

        @expose()
        @stream(SSE(heartbeat=20))
        def worker(self) -> Iterator[str]:
            return read()

        @expose(content_type="text/plain")
        @stream(spool=True)
        def spooled(self) -> Iterator[str]:
            return read()

    app = make_app(Root(), trace_errors__enable=False)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(get, app, path)
        assert waits.wait(10)
        drain(timeout=0)
        if path in ("/events", "/worker"):
            assert answer.result().text == ""
        else:
            with pytest.raises(tgstream.StreamError, match="was drained before"):
                answer.result()
    report = next_report()
    assert (report.reason, report.error) == ("drained", None)


def test_max_seconds_call_the_callbacks(
    make_app: MakeApp, sqlite_model: Model, next_report: Callable[[], Report]
) -> None:
    """The generator that waits ends without a next item."""
    go = threading.Event()

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(max_seconds=0.1)
        def lines(self) -> Iterator[str]:
            current_stream().on_end(go.set)
            yield "first"
            assert go.wait(20)
            raise LookupError("no more")

    call = Call(make_app(Root(), sqlite_model), "/lines")
    with pytest.raises(tgstream.StreamError, match="was ended by max_seconds"):
        call.read()
    assert next_report().reason == "expired"


@pytest.mark.parametrize("heartbeat", [True, False])
@pytest.mark.parametrize("read_by", READERS)
def test_close_ends_the_read_of_an_upstream(
    make_app: MakeApp,
    upstream: Upstream,
    next_report: Callable[[], Report],
    read_by: Callable[[str, ExitStack], Read],
    heartbeat: bool,
) -> None:
    """Without it, ``close()`` would wait for the read, or the read for its timeout."""
    answers: list[Any] = []
    stack = ExitStack()

    class Root(TGController):
        @expose()
        @stream(SSE(heartbeat=SHORT if heartbeat else None))
        def lines(self) -> Iterator[str]:
            answer, lines = read_by(upstream.url, stack)
            answers.append(answer)
            current_stream().on_end(answer.close)
            for line in lines:
                yield line.decode()

    call = Call(make_app(Root()), "/lines", checked=False)
    next(call)
    if heartbeat:
        next(call)
    else:
        threading.Thread(target=lambda: list(call), daemon=True).start()
    assert run_on_another_thread(lambda: drain(10))
    assert upstream.closed.wait(10)
    assert next_report().reason == "drained"
    call.close()
    stack.close()
    if read_by is not read_by_socket:
        assert getattr(answers[0], "closed", True) or answers[0].raw.closed


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/?end=completed", "completed"), ("/?end=fail", "failed"), ("/", "disconnected")],
)
def test_callbacks_are_called_at_each_end(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    path: str,
    reason: str,
) -> None:
    """They are called before the generator is closed, and after it has returned."""
    calls: list[str] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def index(self, end: str = "") -> Iterator[str]:
            current_stream().on_end(lambda: calls.append("callback"))
            try:
                yield "one"
                yield "two"
                if end == "fail":
                    raise LookupError("no more")
            finally:
                calls.append("finally")

    call = Call(make_app(Root(), sqlite_model), path)
    next(call)
    if reason == "failed":
        with pytest.raises(LookupError):
            list(call)
    elif reason == "completed":
        list(call)
    call.close()
    assert reasons(reports) == [reason]
    first, second = "finally", "callback"
    if reason == "disconnected":
        first, second = second, first
    assert calls == [first, second]
    assert_clean(sqlite_model)


def test_callbacks_are_called_if_the_first_item_fails(make_app: MakeApp) -> None:
    """The error page is that of any controller."""
    calls: list[int] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def index(self) -> Iterator[str]:
            current_stream().on_end(lambda: calls.append(1))
            abort(404)
            yield ""

    assert get(make_app(Root())).status.startswith("404")
    assert calls == [1]


def test_errors_of_callbacks_are_logged(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The other callbacks are called, and the stream commits and completes."""
    calls: list[str] = []

    def fail() -> None:
        raise SystemExit("a callback must not stop the server")

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def index(self) -> Iterator[str]:
            for callback in (lambda: calls.append("last"), fail, lambda: 1 / 0):
                current_stream().on_end(callback)
            sqlite_model.DBSession.add(Note(text="kept"))
            yield "one"

    assert get(make_app(Root(), sqlite_model)).text == "one"
    assert calls == ["last"]
    assert [(r.reason, r.error) for r in reports] == [("completed", None)]
    assert sqlite_model.texts() == ["kept"]
    assert caplog.text.count("a callback of on_end() failed") == 2


def test_callback_is_called_at_once_if_the_end_has_begun(make_app: MakeApp) -> None:
    """Also in another callback, and after the end. A callback may close its stream."""
    calls: list[str] = []
    streams: list[Stream] = []

    def close_and_register() -> None:
        streams[0].close()
        streams[0].on_end(lambda: calls.append("in a callback"))
        assert calls == ["in the finally", "in a callback"]

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def index(self) -> Iterator[str]:
            streams.append(current_stream())
            yield "one"
            streams[0].close()
            streams[0].on_end(lambda: calls.append("in the finally"))
            assert calls == ["in the finally"]
            streams[0].on_end(close_and_register)

    call = Call(make_app(Root()), checked=False)
    next(call)
    with pytest.raises(tgstream.StreamError, match="was closed before its end"):
        next(call)
    streams[0].on_end(lambda: calls.append("after the end"))
    assert calls == ["in the finally", "in a callback", "after the end"]
    call.close()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_callback_can_be_passed_before_the_stream_starts(
    make_app: MakeApp, method: str
) -> None:
    """HEAD runs nothing, and ends the stream at once."""
    calls: list[str] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            answer = Stream(iter(["one", "two"]))
            answer.on_end(lambda: calls.append("first"))
            answer.on_end(lambda: calls.append("second"))
            return answer

    call = Call(make_app(Root()), method=method)
    assert call.read() == (b"onetwo" if method == "GET" else b"")
    assert calls == ["second", "first"]


def test_callback_that_cannot_be_called_is_rejected() -> None:
    """The error names its type."""
    with pytest.raises(TypeError, match="callback must be callable, got NoneType"):
        Stream([]).on_end(None)  # type: ignore[arg-type]


def test_each_callback_is_called_once_by_threads_that_race(
    make_app: MakeApp, waiting: Waiting, sqlite_model: Model
) -> None:
    """Several threads close the stream, and others add callbacks."""
    app = make_app(waiting, sqlite_model)
    for _ in range(20):
        waiting.calls.clear()
        waiting.go.clear()
        call = Call(app, "/lines", checked=False)
        next(call)
        running: Any = call.body
        threads = 8
        barrier = threading.Barrier(threads)
        found = [each for each in tgstream.core.monitor.monitor.running()]
        body: Any = found[0]
        count: list[int] = []

        def race(number: int, body: Any, barrier: Any, count: list[int]) -> None:
            barrier.wait(10)
            if number % 2:
                body.on_end(lambda: count.append(number))
            else:
                body.close()

        racers = [
            threading.Thread(target=race, args=[number, body, barrier, count])
            for number in range(threads)
        ]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(10)
        assert sorted(count) == [1, 3, 5, 7]
        assert sorted(waiting.calls) == ["first", "second"]
        running.close()


def test_dropped_stream_calls_its_callbacks_at_once(
    make_app: MakeApp, no_garbage_collector: None
) -> None:
    """A callback that does not refer to the stream keeps nothing."""
    calls: list[int] = []
    dropped: list[weakref.ref[Any]] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def index(self) -> Iterator[str]:
            current_stream().on_end(lambda: calls.append(1))
            dropped.append(weakref.ref(current_stream()))
            yield "one"
            yield "two"

    call = Call(make_app(Root()), checked=False)
    next(call)
    call.drop()
    assert calls == [1]
    assert dropped[0]() is None


def test_collected_stream_calls_its_callbacks(
    make_app: MakeApp, next_report: Callable[[], Report]
) -> None:
    """A callback that refers to the stream is called after a garbage collection."""
    items: list[int] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def index(self) -> Iterator[str]:
            running = current_stream()
            running.on_end(lambda: items.append(running.items))
            yield "one"
            yield "two"

    call = Call(make_app(Root()), checked=False)
    next(call)
    call.drop()
    del call
    gc.collect()
    assert next_report().reason == "disconnected"
    assert items == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_forked_process_calls_no_callback_of_its_parent() -> None:
    """The resource belongs to the parent, which calls them."""
    script = """
import os, sys, tg
from tests.conftest import make_application
from tests.wsgi import Call
from tgstream import current_stream, stream

class Root(tg.TGController):
    @tg.expose(content_type="text/plain")
    @stream
    def index(self):
        current_stream().on_end(lambda: print("called", flush=True))
        yield "one"
        if os.fork() == 0:
            current_stream().on_end(lambda: print("of the child", flush=True))
            os._exit(0)
        os.wait()
        yield "two"

call = Call(make_application(Root()), checked=False)
next(call)
if os.fork() == 0:
    call.close()
    sys.exit()
os.wait()
print("parent", flush=True)
next(call)
call.close()
"""
    ran = run_python("-c", script)
    assert ran.stdout == "parent\nof the child\ncalled\n", ran.stderr


def test_stream_without_callbacks_has_no_list(make_app: MakeApp) -> None:
    """Only a stream that uses callbacks stores any."""
    bodies: list[Any] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def index(self) -> Iterator[str]:
            bodies.append(current_stream()._body)
            yield "one"

    get(make_app(Root()))
    assert "callbacks" not in vars(bodies[0])
