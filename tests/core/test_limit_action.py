"""Streams that are replaced or refused when a limit is reached."""

from __future__ import annotations

import asyncio
import gzip
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tg
import transaction
from tg import TGController, abort, expose

from tests.conftest import MakeApp
from tests.conftest import Root as Page
from tests.core.test_disconnect import connected
from tests.model import Model
from tests.wsgi import Call, get
from tgstream import SSE, Event, Report, Stream, StreamError, stream

REPLACED = b"event: replaced\nretry: 3600000\ndata: \n\n"

NextReport = Callable[[], Report]


def count_up() -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield str(number)


def page(limit: int = 1, **options: Any) -> TGController:
    """A page that streams numbers, and replaces the oldest stream."""
    return Page(count_up, limit=limit, limit_action="replace", **options)


def test_replaced_event_stream_ends_normally(
    make_app: MakeApp, next_report: NextReport
) -> None:
    """It ends with an event that keeps its browser from reconnecting at once."""
    app = make_app(page(format=SSE))
    old = Call(app)
    assert next(old) == b"data: 1\n\n"
    new = Call(app)
    report = next_report()  # no pull was needed
    assert (report.reason, report.error, report.items) == ("replaced", None, 1)
    assert old.read() == REPLACED
    assert [next(new), next(new)] == [b"data: 1\n\n", b"data: 2\n\n"]
    new.close()


def test_replaced_stream_of_text_is_aborted(
    make_app: MakeApp, next_report: NextReport, caplog: pytest.LogCaptureFixture
) -> None:
    """Its client detects the abort, and a warning is logged."""
    app = make_app(page())
    old = Call(app)
    assert next(old) == b"1"
    new = Call(app)
    assert next_report().reason == "replaced"
    with pytest.raises(StreamError, match=r"index was replaced before its end"):
        next(old)
    old.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert next(new) == b"1"
    new.close()


def test_oldest_stream_is_replaced(make_app: MakeApp, next_report: NextReport) -> None:
    """The others of the key go on, and a slot that is free is used first."""
    app = make_app(page(limit=2, format=SSE))
    first, second = Call(app), Call(app)
    third = Call(app)
    assert next_report().reason == "replaced"
    assert first.read() == b"data: 1\n\n" + REPLACED
    third.close()
    assert next_report().reason == "disconnected"
    fourth = Call(app)
    assert [next(second), next(fourth)] == [b"data: 1\n\n"] * 2
    second.close()
    fourth.close()
    assert [next_report().reason for _ in range(2)] == ["disconnected"] * 2


def test_replaced_stream_that_still_runs_has_no_slot(
    make_app: MakeApp, next_report: NextReport
) -> None:
    """The new streams start at once. The end of the old one frees no other slot."""
    go, running = threading.Event(), threading.Semaphore(0)

    def compute() -> Iterator[str]:
        yield "one"
        running.release()
        assert go.wait(10)
        yield "two"
        yield "three"

    app = make_app(Page(compute, format=SSE, limit=1, limit_action="replace"))
    calls, rests = [], []
    with ThreadPoolExecutor(3) as threads:
        for _ in range(3):
            calls.append(Call(app))
            assert next(calls[-1]) == b"data: one\n\n"
            rests.append(threads.submit(calls[-1].read))
            assert running.acquire(timeout=10)
        go.set()
        results = [rest.result() for rest in rests]
    assert results[:2] == [b"data: two\n\n" + REPLACED] * 2
    assert results[2] == b"data: two\n\ndata: three\n\n"
    ended = sorted(next_report().reason for _ in calls)
    assert ended == ["completed", "replaced", "replaced"]


def test_stream_is_replaced_while_it_makes_its_first_chunk(
    make_app: MakeApp, next_report: NextReport
) -> None:
    """It ends after that chunk."""
    go, started = threading.Event(), threading.Event()

    def slow() -> Iterator[str]:
        if not started.is_set():
            started.set()
            assert go.wait(10)
        yield from count_up()

    app = make_app(Page(slow, format=SSE, limit=1, limit_action="replace"))
    with ThreadPoolExecutor(1) as thread:
        old = thread.submit(lambda: Call(app).read())
        assert started.wait(10)
        new = Call(app)
        assert next(new) == b"data: 1\n\n"
        go.set()
        assert old.result() == b"data: 1\n\n" + REPLACED
    assert next_report().reason == "replaced"
    assert next(new) == b"data: 2\n\n"
    new.close()


def test_stream_that_is_replaced_before_it_starts_does_not_run(
    make_app: MakeApp, sqlite_model: Model, next_report: NextReport
) -> None:
    """The request commits meanwhile. A callback has closed what the generator reads."""
    ran: list[str] = []
    committing, go, closed = threading.Event(), threading.Event(), threading.Event()

    def wait_in_commit(*_: Any) -> None:
        committing.set()
        assert go.wait(10)

    def read(name: str) -> Iterator[str]:
        ran.append(name)
        yield from count_up()

    class Root(TGController):
        @expose()
        @stream(SSE, limit=1, limit_action="replace")
        def events(self, name: str) -> Stream:
            made = Stream(read(name))
            if name == "old":
                made.on_end(closed.set)
                transaction.get().addAfterCommitHook(wait_in_commit)
            return made

    app = make_app(Root(), sqlite_model)
    with ThreadPoolExecutor(1) as thread:
        old = thread.submit(lambda: Call(app, "/events?name=old").read())
        assert committing.wait(10)
        new = Call(app, "/events?name=new")
        assert next(new) == b"data: 1\n\n"
        go.set()
        assert old.result() == REPLACED
    report = next_report()
    assert (report.reason, report.error, report.items) == ("replaced", None, 0)
    assert ran == ["new"]
    assert closed.is_set()
    new.close()


def test_request_without_a_stream_replaces_nothing(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """``HEAD``, ``OPTIONS``, ``abort()`` in the controller and invalid headers."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(limit=1, limit_action="replace")
        def words(self, mode: str = "") -> Any:
            if mode == "abort":
                abort(404)
            if mode == "header":
                tg.response.headers["X-Broken"] = "a\nb"
            if mode == "page":
                return "no stream"
            return iter(["one", "two"])

    app = make_app(Root())
    call = Call(app, "/words")
    assert next(call) == b"one"
    for method in "HEAD", "OPTIONS":
        other = Call(app, "/words", method)
        other.read()
        assert other.status_int == 200
    statuses = [
        get(app, f"/words?mode={m}").status_int for m in ("abort", "header", "page")
    ]
    assert statuses == [404, 500, 200]
    assert reports == []
    assert call.read() == b"two"


def test_replaced_stream_with_a_heartbeat_ends_normally(
    make_app: MakeApp, next_report: NextReport
) -> None:
    """Its event is sent at the next heartbeat, while the generator still waits."""
    go = threading.Event()

    def wait() -> Iterator[Event]:
        yield Event(comment="open")
        assert go.wait(10)
        yield Event("late")

    options: dict[str, Any] = {"limit": 1, "limit_action": "replace"}
    app = make_app(Page(wait, format=SSE(heartbeat=0.05), **options))
    old = Call(app)
    assert next(old) == b": open\n\n"
    assert next(old) == b":\n\n"
    new = Call(app)
    rest = old.read()
    assert rest.removesuffix(REPLACED).replace(b":\n\n", b"") == b""
    assert rest.endswith(REPLACED)
    go.set()
    assert next_report().reason == "replaced"
    new.close()


def test_replaced_async_generator_is_cancelled(
    make_app: MakeApp, next_report: NextReport
) -> None:
    """It waits for something that does not come."""

    async def wait() -> AsyncIterator[Event]:
        yield Event(comment="open")
        await asyncio.sleep(3600)

    app = make_app(Page(wait, format=SSE, limit=1, limit_action="replace"))
    old = Call(app)
    assert next(old) == b": open\n\n"
    with ThreadPoolExecutor(1) as thread:
        rest = thread.submit(old.read)
        new = Call(app)
        assert rest.result() == REPLACED
    assert next_report().reason == "replaced"
    new.close()


def test_replaced_stream_that_is_spooled_is_an_error_page(
    make_app: MakeApp, next_report: NextReport
) -> None:
    """Its client has received nothing yet."""
    go, started = threading.Event(), threading.Event()

    def slow() -> Iterator[str]:
        yield "one"
        if not started.is_set():
            started.set()
            assert go.wait(10)
            yield "two"
            yield "three"

    app = make_app(Page(slow, spool=True, limit=1, limit_action="replace"))
    with ThreadPoolExecutor(1) as thread:
        old = thread.submit(get, app)
        assert started.wait(10)
        assert get(app).text == "one"
        go.set()
        call = old.result()
    assert call.status_int == 500
    assert "was replaced before its end" in call.errors.getvalue()
    assert {next_report().reason for _ in range(2)} == {"completed", "replaced"}


def test_last_event_of_a_replaced_stream_is_compressed(make_app: MakeApp) -> None:
    """The compressed body is complete."""
    app = make_app(page(format=SSE, compress=True))
    old = Call(app, HTTP_ACCEPT_ENCODING="gzip")
    new = Call(app)
    assert old.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(old.read()) == b"data: 1\n\n" + REPLACED
    new.close()


class Lines:
    """A custom format, whose body may end anywhere."""

    content_type = "text/plain"
    endless = True
    chunk_size = 0

    def encode(self, items: Any) -> Iterator[str]:
        for item in items:
            yield f"{item}\n"


class Told(Lines):
    def encode_replaced(self) -> str:
        return "replaced\n"


class Failing(Lines):
    def encode_replaced(self) -> str:
        raise LookupError("no end")


@pytest.mark.parametrize(
    ("format", "end"),
    [
        (Lines(), b"1\n"),
        (Told(), b"1\nreplaced\n"),
        (Failing(), b"1\n"),
        (SSE(done="[DONE]"), b"data: 1\n\n"),
        (SSE(done="done"), b"data: 1\n\n" + REPLACED),
    ],
)
def test_format_ends_a_replaced_stream(
    make_app: MakeApp, format: Any, end: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients of OpenAI do not know the event. An error of the format is logged."""
    app = make_app(page(format=format))
    old, new = Call(app), Call(app)
    assert old.read() == end
    new.close()
    lines = [record.getMessage().partition(": ")[2] for record in caplog.records]
    failed = ["Failing.encode_replaced() failed"]
    assert lines == (failed if isinstance(format, Failing) else [])


def test_stream_of_another_key_is_not_replaced(make_app: MakeApp) -> None:
    """Nor is a stream of another controller."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(limit=1, limit_by="remote_addr", limit_action="replace")
        def words(self) -> Iterator[str]:
            yield "one"
            yield "two"

        @expose(content_type="text/plain")
        def other(self) -> Stream:
            return Stream(self.words(), limit=1, limit_action="replace")

    app = make_app(Root())
    one = Call(app, "/words", REMOTE_ADDR="10.0.0.1")
    calls = [Call(app, "/words", REMOTE_ADDR="10.0.0.2"), Call(app, "/other")]
    assert [call.read() for call in [one, *calls]] == [b"onetwo"] * 3


# Refusals.


@pytest.mark.parametrize("decorated", [True, False])
def test_refused_event_stream_has_no_event(make_app: MakeApp, decorated: bool) -> None:
    """With ``busy='retry'`` it is a response after which browsers reconnect."""
    ran: list[str] = []

    class Root(TGController):
        @expose()
        def returned(self) -> Stream:
            return Stream(count_up(), SSE, limit=1, busy="retry")

        @expose()
        @stream(SSE, limit=1, busy="retry")
        def decorated(self) -> Iterator[str]:
            ran.append("decorated")
            return count_up()

    path = "/decorated" if decorated else "/returned"
    app = make_app(Root())
    call = Call(app, path)
    ran.clear()
    for method, body in ("GET", b"retry: 5000\n\n"), ("HEAD", b""):
        refused = Call(app, path, method)
        assert refused.read() == body
        assert refused.status == "200 OK"
        assert refused.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert refused.headers["Cache-Control"] == "no-store"
    assert ran == []
    call.close()
    accepted = Call(app, path)
    assert next(accepted) == b"data: 1\n\n"
    accepted.close()


# Clients that have disconnected.


@pytest.mark.parametrize("action", ["refuse", "replace"])
def test_client_that_has_disconnected_has_no_slot(
    make_app: MakeApp, next_report: NextReport, action: str
) -> None:
    """The server is checked when the limit is reached, before a stream is refused.

    Its stream is not the oldest one. A client that is connected keeps its stream.
    """
    left = threading.Event()
    environ: dict[str, Any] = {"waitress.client_disconnected": left.is_set}
    app = make_app(Page(count_up, format=SSE, limit=2, limit_action=action))
    stays = Call(app)
    leaves = Call(app, **environ)
    if action == "refuse":
        assert get(app).status_int == 503
    left.set()
    new = Call(app)
    assert next_report().reason == "disconnected"
    assert [next(stays), next(new)] == [b"data: 1\n\n"] * 2
    leaves.close()
    stays.close()
    new.close()
    assert [next_report().reason for _ in range(2)] == ["disconnected"] * 2


@pytest.mark.parametrize("format", [SSE, None])
def test_half_closed_client_of_events_has_disconnected(
    make_app: MakeApp, next_report: NextReport, format: Any
) -> None:
    """A client of a download may have ended only its own sending, and reads on."""
    app = make_app(Page(count_up, format=format, limit=1))
    client, server = connected()
    with client, server:
        environ: dict[str, Any] = {"gunicorn.socket": server}
        old = Call(app, **environ)
        assert get(app).status_int == 503
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        if format is None:
            assert get(app).status_int == 503
            assert [next(old), next(old)] == [b"1", b"2"]
        else:
            Call(app).close()
            assert [next_report().reason for _ in range(2)] == ["disconnected"] * 2
        old.close()


def test_stream_that_is_ending_has_no_slot(
    make_app: MakeApp, next_report: NextReport
) -> None:
    """Its generator still runs, and its client has disconnected."""
    go, waits = threading.Event(), threading.Event()

    def stuck() -> Iterator[str]:
        yield "one"
        if not waits.is_set():
            waits.set()
            assert go.wait(10)
            yield "two"

    app = make_app(Page(stuck, limit=1))
    old = Call(app)
    with ThreadPoolExecutor(1) as thread:
        assert next(old) == b"one"
        rest = thread.submit(next, old)
        assert waits.wait(10)
        assert get(app).status_int == 503
        old.close()  # its client has disconnected, but the generator runs
        assert get(app).text == "one"
        go.set()
        assert rest.result() == b"two"
    assert {next_report().reason for _ in range(2)} == {"completed", "disconnected"}
