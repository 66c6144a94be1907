"""``running()``, ``RunningStream.end()``, and ``Stream.close()`` by another request."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import threading
import time
import urllib.request
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import tg
from tg import TGController, expose

import tgstream
from tests.conftest import LiveServer, MakeApp, assert_clean
from tests.core.support import run_on_another_thread
from tests.model import Model, Note
from tests.upstream import wait_until
from tests.valkey import Valkey
from tests.wsgi import Call, get
from tgstream import (
    CSV,
    SSE,
    Channel,
    Event,
    Report,
    RunningStream,
    Stream,
    StreamError,
    current_stream,
    last_event_id,
    listen,
    running,
    stream,
)
from tgstream.channels import metadata
from tgstream.core import monitor as monitor_module

WHY = "the disk is full"
LONG = 3600
"""Seconds of a heartbeat that is not sent during a test."""


@pytest.fixture
def pulls() -> Iterator[ThreadPoolExecutor]:
    """The threads of a server."""
    with ThreadPoolExecutor(4) as threads:
        yield threads


class Root(TGController):
    """Streams of each kind, and an event that is set while a generator waits."""

    def __init__(self, model: Model | None = None) -> None:
        self.model = model
        self.waits = threading.Event()
        self.go = threading.Event()
        self.streams: list[weakref.ref[Stream]] = []
        for page in Root.PAGES:
            expose(content_type="text/plain")(page)  # each test resets TG

    def _note(self) -> None:
        self.streams.append(weakref.ref(current_stream()))
        if self.model is not None:
            self.model.DBSession.add(Note(text="uncommitted"))

    @stream
    def lines(self) -> Iterator[str]:
        self._note()
        for number in range(100):
            yield f"{number}\n"

    @stream
    def busy(self) -> Iterator[str]:
        self._note()
        yield "one"
        self.waits.set()
        assert self.go.wait(10)
        yield "two"

    @stream
    def blocked(self) -> Iterator[str]:
        self._note()
        current_stream().on_end(self.go.set)
        yield "one"
        self.waits.set()
        assert self.go.wait(10)
        yield "two"

    @stream(SSE)
    def ticks(self) -> Iterator[int]:
        self._note()
        yield from range(100)

    @stream(SSE)
    def feed(self) -> Iterator[Event]:
        self.streams.append(weakref.ref(current_stream()))
        events = listen("running")
        yield next(events)
        self.waits.set()
        yield from events

    @stream(SSE(heartbeat=LONG))
    def kept(self) -> Iterator[Event]:
        self.streams.append(weakref.ref(current_stream()))
        events = listen("running", comments=False)
        self.waits.set()
        yield from events

    @stream(SSE)
    def merged(self) -> Iterator[Event]:
        self.streams.append(weakref.ref(current_stream()))
        events = listen("running", "more")
        yield next(events)
        self.waits.set()
        yield from events

    @stream(SSE(heartbeat=LONG))
    def worker(self) -> Iterator[str]:
        self._note()
        yield "one"
        self.waits.set()
        assert self.go.wait(10)
        yield "two"

    @stream(SSE)
    async def cancelled(self) -> AsyncIterator[str]:
        self._note()
        yield "one"
        self.waits.set()
        await asyncio.sleep(LONG)

    @stream(CSV, spool=True)
    def spooled(self) -> Iterator[list[int]]:
        self._note()
        number = 0
        while True:
            number += 1
            yield [number]
            self.waits.set()

    PAGES = (
        *(lines, busy, blocked, ticks, feed, kept, merged, worker),
        *(cancelled, spooled),
    )


def find_one() -> RunningStream:
    """The only open stream of this process."""
    [found] = running()
    return found


def pull_rest(pulls: ThreadPoolExecutor, call: Call) -> Future[bytes]:
    """Pull a stream on another thread, as its server does."""
    return pulls.submit(call.read)


# The list.


def test_open_streams_are_listed(make_app: MakeApp, sqlite_model: Model) -> None:
    """The oldest is the first. Each has the facts of its request and its counts."""
    app = make_app(Root(sqlite_model), sqlite_model)
    assert running() == []
    first = Call(app, "/lines", REMOTE_USER="ada", REMOTE_ADDR="192.0.2.7")
    second = Call(app, "/ticks")
    assert next(first) + next(first) == b"0\n1\n"
    one, two = running()
    assert one._asdict() == {
        "id": one.id,
        "controller": "Root.lines",
        "path": "/lines",
        "user": "ada",
        "remote_addr": "192.0.2.7",
        "started": one.started,
        "items": 2,
        "chunks": 2,
        "bytes": 4,
        "state": "waiting for client",
        "in_transaction": True,
    }
    assert 0 < two.started < one.started < 10
    assert (two.controller, two.user, two.items) == ("Root.ticks", None, 1)
    assert not two.in_transaction  # its first event is committed
    first.close()
    assert find_one().id == two.id != one.id
    second.close()
    assert running() == []
    assert_clean(sqlite_model)


def test_user_is_the_identity_of_the_request(make_app: MakeApp) -> None:
    """The id is that of repoze.who, which TurboGears uses."""
    identity: dict[str, Any] = {"repoze.who.identity": {"repoze.who.userid": 7}}
    app = make_app(Root())
    call = Call(app, "/lines", REMOTE_USER="", **identity)
    assert find_one().user == "7"
    call.close()


@pytest.mark.parametrize(
    ("path", "state"),
    [("/busy", "running"), ("/feed", "idle"), ("/worker", "idle"), ("/kept", "idle")],
)
def test_state_is_that_of_the_generator(
    make_app: MakeApp,
    pulls: ThreadPoolExecutor,
    next_report: Callable[[], Report],
    path: str,
    state: str,
) -> None:
    """A generator runs, or an event stream waits for its next event."""
    root = Root()
    call = Call(make_app(root), path)
    rest = pull_rest(pulls, call)
    assert root.waits.wait(10)
    while (found := find_one()).state == "waiting for client":
        pass
    assert found.state == state
    assert found.end()
    root.go.set()
    next_report()
    with suppress(StreamError):
        rest.result(10)


def test_listed_stream_cannot_be_changed_and_is_not_kept(make_app: MakeApp) -> None:
    """A stream that its server has dropped has ended, and ``end()`` does nothing."""
    call = Call(make_app(Root()), "/lines", checked=False)
    found, again = find_one(), find_one()
    assert found.id == again.id
    with pytest.raises(AttributeError):
        found.user = "eve"  # type: ignore[misc]
    call.drop()
    assert running() == []
    assert not found.end()
    assert not again.end()


def test_collected_streams_are_not_listed(make_app: MakeApp) -> None:
    """A stream in a cycle of garbage is listed until it is collected."""
    call: Any = Call(make_app(Root()), "/lines", checked=False)
    cycle = [call]
    cycle.append(cycle)
    found, body = find_one(), weakref.ref(call.body)
    del call, cycle
    gc.collect()
    assert body() is None
    deadline = time.monotonic() + 10
    while running():  # the monitor ends it
        assert time.monotonic() < deadline
    assert not found.end()


def test_list_can_be_read_while_streams_start_and_end(make_app: MakeApp) -> None:
    """Each list is complete: it has the stream that stays open."""
    app, done = make_app(Root()), threading.Event()
    stays = Call(app, "/ticks")
    id = find_one().id

    def start_and_end() -> None:
        while not done.is_set():
            call = Call(app, "/lines", checked=False)
            next(call)
            (call.close, call.drop)[id > "8"]()

    threads = [threading.Thread(target=start_and_end) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            found = running()
            assert found[0].id == id
            assert len({each.id for each in found}) == len(found)
    finally:
        done.set()
        for thread in threads:
            thread.join(10)
    stays.close()
    assert running() == []


# The end.


def test_stream_that_waits_for_its_client_is_aborted(
    make_app: MakeApp,
    sqlite_model: Model,
    next_report: Callable[[], Report],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The text is in the error, the log line and the report. Nothing is committed."""
    call = Call(make_app(Root(sqlite_model), sqlite_model), "/lines")
    next(call)
    assert find_one().end(WHY)
    report = next_report()
    assert (report.reason, report.error, report.detail) == ("stopped", None, WHY)
    with pytest.raises(StreamError, match=f"was stopped before its end: {WHY}$"):
        next(call)
    call.close()
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert f"Root.lines at /lines stopped ({WHY}): 1 items" in record.getMessage()
    assert sqlite_model.texts() == []
    assert_clean(sqlite_model)


def test_event_stream_that_waits_for_its_client_ends_normally(
    make_app: MakeApp, next_report: Callable[[], Report]
) -> None:
    """Its browser reconnects."""
    call = Call(make_app(Root()), "/ticks")
    next(call)
    assert find_one().end()
    assert next_report().detail == "stopped by operator"
    assert call.read() == b""


def test_text_of_several_lines_is_one_line_of_the_log(
    make_app: MakeApp,
    next_report: Callable[[], Report],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Only the report has it as it is."""
    caplog.set_level(logging.DEBUG, "tgstream")
    call = Call(make_app(Root()), "/ticks")
    assert find_one().end("one\ntwo")
    assert next_report().detail == "one\ntwo"
    assert "stopped ('one\\ntwo'): 1 items" in caplog.text
    call.close()


def test_end_is_refused_if_the_stream_is_ending(
    make_app: MakeApp, pulls: ThreadPoolExecutor, next_report: Callable[[], Report]
) -> None:
    """The first call decides. A later call returns ``False``."""
    root = Root()
    call = Call(make_app(root), "/busy")
    rest = pull_rest(pulls, call)
    assert root.waits.wait(10)
    found = find_one()
    assert [found.end(WHY), found.end(), found.end()] == [True, False, False]
    root.go.set()
    assert next_report().detail == WHY
    with pytest.raises(StreamError, match=WHY):
        rest.result(10)


def test_text_of_another_type_is_rejected(make_app: MakeApp) -> None:
    """The error names the type. The stream goes on."""
    call = Call(make_app(Root()), "/ticks")
    with pytest.raises(TypeError, match="reason must be a str, got NoneType: None"):
        find_one().end(None)  # type: ignore[arg-type]
    next(call)
    next(call)
    call.close()


# By whom a stream is ended: RunningStream.end() and Stream.close() do the same.


def end_by_operator(root: Root) -> None:
    assert find_one().end()


def close_in_another_request(root: Root) -> None:
    found = root.streams[0]()
    assert found is not None
    run_on_another_thread(found.close)


ENDS = [end_by_operator, close_in_another_request]
WAITING = ["/feed", "/kept", "/merged", "/worker", "/cancelled", "/blocked"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("path", WAITING)
def test_generator_that_waits_is_ended_within_a_second(
    make_app: MakeApp,
    pulls: ThreadPoolExecutor,
    next_report: Callable[[], Report],
    path: str,
    end: Callable[[Root], None],
) -> None:
    """The client of an event stream has a complete response by then."""
    root = Root()
    app = make_app(root, tgstream__heartbeat_seconds=LONG)
    rest = pull_rest(pulls, Call(app, path))
    assert root.waits.wait(10)
    started = time.monotonic()
    end(root)
    if path == "/blocked":
        with pytest.raises(StreamError, match="was stopped before its end: "):
            rest.result(10)
    else:
        body = rest.result(10)
        assert body.endswith(b"\n\n")
        assert b"two" not in body
    root.go.set()  # for the generator of /worker, whose response has ended
    assert next_report().reason == "stopped"
    assert time.monotonic() - started < 1
    assert running() == []


def test_generator_that_has_listened_twice_is_ended(
    make_app: MakeApp, pulls: ThreadPoolExecutor, next_report: Callable[[], Report]
) -> None:
    """It waits for the events of a channel that it has listened to for a while."""
    waits = threading.Event()

    class Twice(TGController):
        @expose()
        @stream(SSE)
        def events(self) -> Iterator[Event]:
            events = listen("running")
            yield next(events)
            yield next(events)
            for event in listen("running", after=last_event_id()):
                if event.data is not None:
                    break
            waits.set()
            yield from events

    app = make_app(Twice(), tgstream__heartbeat_seconds=LONG)
    first = Channel("running").position()
    call = Call(app, "/events", HTTP_LAST_EVENT_ID=first)
    next(call)
    Channel("running").publish("one", now=True)
    next(call)
    rest = pull_rest(pulls, call)
    assert waits.wait(10)
    while find_one().state != "idle":
        pass
    started = time.monotonic()
    assert find_one().end()
    assert rest.result(10).endswith(b":\n\n")
    assert time.monotonic() - started < 1
    assert next_report().reason == "stopped"


def test_generator_that_waits_only_then_is_ended(
    make_app: MakeApp, pulls: ThreadPoolExecutor, next_report: Callable[[], Report]
) -> None:
    """It computes while the stream is ended, and then listens."""
    waits, go = threading.Event(), threading.Event()

    class Late(TGController):
        @expose()
        @stream(SSE)
        def events(self) -> Iterator[Event]:
            events = listen("running")
            yield next(events)
            waits.set()
            assert go.wait(10)
            yield from events

    app = make_app(Late(), tgstream__heartbeat_seconds=LONG)
    rest = pull_rest(pulls, Call(app, "/events"))
    assert waits.wait(10)
    assert find_one().end()
    go.set()
    assert rest.result(10).endswith(b":\n\n")
    assert next_report().reason == "stopped"


@pytest.mark.parametrize("kind", ["redis", "sqlite", "postgresql"])
@pytest.mark.parametrize("path", ["/feed", "/merged"])
def test_listener_of_another_back_end_is_ended_within_a_second(
    make_app: MakeApp,
    make_model: Any,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    pulls: ThreadPoolExecutor,
    next_report: Callable[[], Report],
    kind: str,
    path: str,
) -> None:
    """The listener waits in this process, whichever server has the events."""
    url = f"sqlite:///{tmp_path}/test.db"
    if kind == "postgresql":
        url = request.getfixturevalue("postgresql")
    model = make_model(url)
    metadata.create_all(model.outside)
    with Valkey(tmp_path / "valkey") if kind == "redis" else nullcontext() as valkey:
        root = Root()
        app = make_app(
            root,
            model,
            tgstream__channels="database://" if valkey is None else valkey.url,
            tgstream__heartbeat_seconds=LONG,
        )
        rest = pull_rest(pulls, Call(app, path))
        assert root.waits.wait(10)
        started = time.monotonic()
        assert find_one().end()
        assert rest.result(10).endswith(b"\n\n")
        assert time.monotonic() - started < 1
        assert next_report().reason == "stopped"
    metadata.drop_all(model.outside)


def test_listener_whose_server_is_lost_is_ended_within_a_second(
    make_app: MakeApp, pulls: ThreadPoolExecutor, next_report: Callable[[], Report]
) -> None:
    """It waits between two attempts to connect."""
    root = Root()
    url, seconds = "redis://127.0.0.1:1/0", LONG
    app = make_app(root, tgstream__channels=url, tgstream__heartbeat_seconds=seconds)
    rest = pull_rest(pulls, Call(app, "/feed"))
    assert root.waits.wait(10)
    started = time.monotonic()
    assert find_one().end()
    assert rest.result(10).startswith(b": open")
    assert time.monotonic() - started < 1
    assert next_report().reason == "stopped"


@pytest.mark.parametrize("end", ENDS)
def test_spooled_stream_is_ended_between_two_items(
    make_app: MakeApp,
    sqlite_model: Model,
    pulls: ThreadPoolExecutor,
    next_report: Callable[[], Report],
    end: Callable[[Root], None],
) -> None:
    """Nothing is sent yet, so that the client gets an error page."""
    root = Root(sqlite_model)
    app = make_app(root, sqlite_model, trace_errors__enable=False)
    answer = pulls.submit(get, app, "/spooled")
    assert root.waits.wait(10)
    end(root)
    assert next_report().reason == "stopped"
    with pytest.raises(StreamError, match="was stopped before its end: "):
        answer.result(10)
    assert sqlite_model.texts() == []


def test_other_listeners_of_the_channel_are_not_disturbed(
    make_app: MakeApp, pulls: ThreadPoolExecutor, next_report: Callable[[], Report]
) -> None:
    """They receive no comment, and then the next event."""
    app = make_app(Root(), tgstream__heartbeat_seconds=LONG)
    ended, stays = Call(app, "/feed"), Call(app, "/feed")
    assert next(ended)[:6] == next(stays)[:6] == b": open"
    rest, chunk = pull_rest(pulls, ended), pulls.submit(next, stays)
    while [each.state for each in running()] != ["idle", "idle"]:
        pass
    assert running()[0].end()
    assert next_report().reason == "stopped"
    assert rest.result(10) == b":\n\n"
    assert not chunk.done()
    Channel("running").publish("hello", now=True)
    assert chunk.result(10).endswith(b"data: hello\n\n")
    stays.close()


def test_end_completes_the_event_streams_of_a_server(
    live_server: Callable[..., LiveServer],
) -> None:
    """Their clients receive the end of a complete response at once."""
    url = f"http://127.0.0.1:{live_server('gunicorn-gevent', 'stopping').port}"
    with (
        urllib.request.urlopen(f"{url}/feed", timeout=10) as feed,
        urllib.request.urlopen(f"{url}/blocked", timeout=10) as blocked,
    ):
        assert feed.readline().startswith(b": open")
        assert blocked.readline() == b"data: one\n"
        started = time.monotonic()
        with urllib.request.urlopen(f"{url}/end", timeout=10) as ended:
            assert json.load(ended) == [True, True]
        assert feed.read().endswith(b"\n\n")
        assert blocked.read() == b"\n"
        assert time.monotonic() - started < 2.5  # not when the generator goes on


def test_end_frees_a_server_whose_client_does_not_read(
    live_server: Callable[..., LiveServer],
) -> None:
    """Otherwise its thread would wait for as long as the client does."""
    live = live_server("gunicorn-gthread", "stopping")

    def read(path: str) -> tuple[Any, int]:
        url = f"http://127.0.0.1:{live.port}{path}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response), int(response.headers["Closes"])

    with socket.create_connection(("127.0.0.1", live.port)) as client:
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
        sizes = [-1]
        while sizes[-1] in (-1, 0) or sizes[-1] != sizes[-2]:  # until it is blocked
            sizes += [each["bytes"] for each in read("/streams")[0]] or [-1]
            time.sleep(0.05)
        assert read("/end") == ([True], 0)
        wait_until(lambda: read("/streams") == ([], 1))


def test_end_keeps_the_connection_of_a_stream_that_has_not_left_its_request(
    make_app: MakeApp,
    pulls: ThreadPoolExecutor,
    next_report: Callable[[], Report],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its client gets an error page, and may send its next request there."""
    monkeypatch.setattr(monitor_module, "SERVER_SECONDS", 0.0)
    root, threads = Root(), set(threading.enumerate())
    app = make_app(root, trace_errors__enable=False)
    client, server = socket.socketpair()
    with client, server:
        environ: dict[str, Any] = {"gunicorn.socket": server}
        answer = pulls.submit(get, app, "/spooled", **environ)
        assert root.waits.wait(10)
        end_by_operator(root)
        assert next_report().reason == "stopped"
        with pytest.raises(StreamError, match="was stopped before its end: "):
            answer.result(10)
        for thread in set(threading.enumerate()) - threads:
            if thread.name == "tgstream-end":
                thread.join(10)
        client.setblocking(False)
        with pytest.raises(BlockingIOError):  # open, and nothing was sent
            client.recv(1)


def test_stream_that_ends_after_its_response_has_its_path(
    make_app: MakeApp, next_report: Callable[[], Report]
) -> None:
    """uWSGI clears the environ when the response has ended."""
    closing, go = threading.Event(), threading.Event()

    class Slow(TGController):
        @expose(content_type="text/plain")
        @stream
        def lines(self) -> Iterator[str]:
            try:
                yield "one"
                yield "two"
            finally:
                closing.set()
                assert go.wait(10)

    call = Call(make_app(Slow()), "/lines")
    next(call)
    assert find_one().end()
    assert closing.wait(10)
    call.close()
    call.environ.clear()
    assert find_one().path == "/lines"
    go.set()
    assert next_report().path == "/lines"


# The callers of Stream.close().


class Wrapper:
    """A wrapper that an application puts around its stream, and that closes it."""

    def __init__(self, app_iter: Any) -> None:
        self._chunks = self._iterate(app_iter)

    def _iterate(self, app_iter: Any) -> Generator[bytes, None, None]:
        try:
            yield from app_iter
        finally:
            app_iter.close()

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def close(self) -> None:
        self._chunks.close()


def wrap_response(*args: Any) -> None:
    response = tg.response._current_obj()
    response.app_iter = Wrapper(response.app_iter)


@pytest.mark.parametrize("leave", [Call.close, Call.drop])
@pytest.mark.parametrize("kind", ["plain", "compressed", "wrapped"])
@pytest.mark.parametrize("plug", [tgstream.plugme, None])
@pytest.mark.parametrize("path", ["/lines", "/worker"])
def test_stream_that_its_server_closes_is_disconnected(
    make_app: MakeApp,
    next_report: Callable[[], Report],
    path: str,
    plug: Any,
    kind: str,
    leave: Callable[[Call], None],
) -> None:
    """Also in a wrapper of the application, and without the error guard."""
    root = Root()
    if kind == "wrapped":
        tg.hooks.register("after_render", wrap_response, controller=root.lines)
        tg.hooks.register("after_render", wrap_response, controller=root.worker)
    app = make_app(root, tgstream__compress=kind == "compressed")
    call = Call(app, path, checked=False, HTTP_ACCEPT_ENCODING="gzip")
    next(call)
    if path == "/lines":
        next(call)
    leave(call)
    del call
    root.go.set()
    report = next_report()
    assert (report.reason, report.detail) == ("disconnected", None)


def test_stream_that_is_closed_in_a_finaliser_is_disconnected(
    make_app: MakeApp, next_report: Callable[[], Report]
) -> None:
    """A server may drop it in a cycle of garbage."""
    root = Root()
    tg.hooks.register("after_render", wrap_response, controller=root.lines)
    call: Any = Call(make_app(root), "/lines", checked=False)
    next(call)
    cycle = [call.body]
    cycle.append(cycle)
    del call, cycle
    gc.collect()
    report = next_report()
    assert (report.reason, report.detail) == ("disconnected", None)


def test_async_generator_that_closes_its_own_stream_is_disconnected(
    make_app: MakeApp, next_report: Callable[[], Report]
) -> None:
    """It does so on the event loop, or in a thread that it waits for."""

    class Own(TGController):
        @expose(content_type="text/plain")
        @stream
        async def words(self, there: str = "") -> AsyncIterator[str]:
            yield "one"
            if there:
                await asyncio.to_thread(current_stream().close)
            else:
                current_stream().close()
            yield "two"

    app = make_app(Own())
    for path in "/words", "/words?there=1":
        with pytest.raises(StreamError, match=r"was closed before its end$"):
            get(app, path)
        assert next_report().reason == "disconnected"


def test_stream_is_closed_by_a_request_that_its_server_thread_serves_later(
    make_app: MakeApp, next_report: Callable[[], Report]
) -> None:
    """The thread is the same, but the request is another one."""
    streams: list[Stream] = []

    class Two(TGController):
        @expose(content_type="text/plain")
        def lines(self) -> Stream:
            streams.append(Stream(iter("abc"), SSE))
            return streams[0]

        @expose()
        def stop(self) -> str:
            streams.pop().close()
            return "stopped"

    app = make_app(Two())
    call = Call(app, "/lines")
    next(call)
    assert get(app, "/stop").text == "stopped"
    report = next_report()
    assert (report.reason, report.detail) == ("stopped", "closed by another request")
    assert call.read() == b""


def test_stream_is_closed_while_its_first_item_is_made(
    make_app: MakeApp, pulls: ThreadPoolExecutor, next_report: Callable[[], Report]
) -> None:
    """Another request closes it, and the first event is still sent."""
    root = Root()

    class Slow(TGController):
        @expose()
        @stream(SSE)
        def events(self) -> Iterator[str]:
            root.streams.append(weakref.ref(current_stream()))
            root.waits.set()
            assert root.go.wait(10)
            yield "one"
            yield "two"

    answer = pulls.submit(get, make_app(Slow()), "/events")
    assert root.waits.wait(10)
    close_in_another_request(root)
    root.go.set()
    assert answer.result(10).text == "data: one\n\n"
    assert next_report().reason == "stopped"
