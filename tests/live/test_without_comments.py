"""``listen(comments=False)``, for a generator that chooses among the events."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tg
from tg import TGController, abort, expose, redirect

from tests.conftest import LiveServer, MakeApp, assert_clean
from tests.faults.test_listeners import Listener, count_ended, publish
from tests.live.listeners import id_of
from tests.model import Model, Note, User
from tests.wsgi import Call, get
from tgstream import (
    NDJSON,
    SSE,
    Channel,
    Event,
    Report,
    StreamError,
    drain,
    last_event_id,
    listen,
    stream,
)
from tgstream.core.heartbeat import HEARTBEAT

SHORT = 0.02


class Filters(TGController):
    """Streams that send the even numbers of a channel."""

    def __init__(self, name: str, model: Model | None = None) -> None:
        self.name, self.model = name, model
        self.seen: list[Any] = []
        for method in (
            *(Filters.even, Filters.plain, Filters.lines),
            *(Filters.fail, Filters.checked, Filters.expression),
        ):
            expose()(method)
        stream(SSE(heartbeat=SHORT, retry=3000), max_seconds=10)(Filters.even)
        stream(SSE(heartbeat=SHORT))(Filters.fail)
        stream(SSE(heartbeat=SHORT))(Filters.checked)
        stream(SSE(heartbeat=SHORT))(Filters.expression)
        stream(SSE)(Filters.plain)
        stream(NDJSON, commit="each", chunk_size=0)(Filters.lines)

    def even(self) -> Iterator[Event]:
        try:
            for event in listen(self.name, after=last_event_id(), comments=False):
                self.seen.append((tg.request.path, event.data))
                if self.model is not None:
                    self.model.DBSession.add(Note(text=event.data))
                if event.event == "reset" or event.json() % 2 == 0:
                    yield event
        finally:
            self.seen.append("closed")

    def plain(self) -> Iterator[Event]:
        yield from listen(self.name, comments=False)

    def lines(self) -> Iterator[Event]:
        yield from listen(self.name, comments=False)

    def expression(self) -> Iterator[Event]:
        events = listen(self.name, f"{self.name} 2", comments=False)
        return (event for event in events if event.json() % 2 == 0)

    def checked(self, how: str) -> Iterator[Event]:
        tg.response.headers["X-Checked"] = how
        if how == "abort":
            abort(404)
        if how == "redirect":
            redirect("/elsewhere")
        if how == "fail":
            raise LookupError("before the first event")
        if how == "none":
            return
        if how == "item":
            yield Event("first")
        yield from listen(self.name, comments=False)

    def fail(self, how: str) -> Iterator[Event]:
        assert self.model is not None
        self.model.DBSession.add(User(name="ada"))
        for event in listen(self.name, comments=False):
            if how == "abort":
                abort(404)
            yield event.json() / 0


@pytest.fixture
def filters(make_app: MakeApp, name: str) -> Iterator[Filters]:
    """The controller. Its streams have ended after the test."""
    yield Filters(name)
    assert drain(timeout=10)


def next_chunk(call: Any) -> bytes:
    """The next chunk that is not a heartbeat."""
    chunk: bytes = next(call)
    while chunk == HEARTBEAT:
        chunk = next(call)
    return chunk


def test_filter_receives_no_comments_and_its_stream_opens(
    make_app: MakeApp, filters: Filters, next_report: Callable[[], Report]
) -> None:
    """The opening comment has the id of the place, so a reconnect misses nothing."""
    app, channel = make_app(filters), Channel(filters.name)
    call = Call(app, "/even")
    position = channel.position()
    assert next(call) == f": open\nid: {position}\n\n".encode()
    assert [next(call), next(call)] == [HEARTBEAT, HEARTBEAT]
    for number in range(5):
        channel.publish(number)
    chunks = [next_chunk(call) for _ in range(3)]
    assert [chunk.split(b"data: ")[1] for chunk in chunks] == [
        b"0\n\n",
        b"2\n\n",
        b"4\n\n",
    ]
    assert chunks[0].startswith(b"retry: 3000\n\n")
    call.close()
    report = next_report()
    assert (report.reason, report.items) == ("disconnected", 3)
    taken = [("/even", str(number)) for number in range(5)]
    assert filters.seen == [*taken, "closed"]
    resumed = Call(app, f"/even?lastEventId={position}")
    assert next(resumed) == f": open\nid: {position}\n\n".encode()
    assert next_chunk(resumed) == chunks[0]
    resumed.close()


def test_filter_that_drops_all_events_ends_with_its_stream(
    make_app: MakeApp, filters: Filters, next_report: Callable[[], Report]
) -> None:
    """It ends when it takes the next event, whether it passes it on or not."""
    app, channel = make_app(filters), Channel(filters.name)
    call = Call(app, "/even")
    assert next(call).startswith(b": open\nid: ")
    channel.publish(1)
    call.close()
    channel.publish(3)
    assert next_report().reason == "disconnected"
    assert filters.seen[-1] == "closed"


def test_filter_that_waits_ends_within_a_heartbeat_of_its_stream(
    make_app: MakeApp, filters: Filters, next_report: Callable[[], Report]
) -> None:
    """The option ``tgstream.heartbeat_seconds`` may be much longer."""
    call = Call(make_app(filters, tgstream__heartbeat_seconds=3600), "/even")
    assert next(call).startswith(b": open\nid: ")
    call.close()
    assert next_report().reason == "disconnected"


def test_filter_of_several_channels_may_be_a_generator_expression(
    make_app: MakeApp, filters: Filters
) -> None:
    """The controller may return any iterable."""
    call = Call(make_app(filters), "/expression")
    assert next(call).startswith(b": open\nid: m")
    Channel(filters.name).publish(1)
    Channel(f"{filters.name} 2").publish(2)
    assert next_chunk(call).endswith(b"data: 2\n\n")
    call.close()


def test_reset_is_passed_to_a_filter(make_app: MakeApp, filters: Filters) -> None:
    """The opening comment has no id, so the client keeps its own."""
    call = Call(make_app(filters), "/even?lastEventId=forged")
    assert next(call) == b": open\n\n"
    assert b"event: reset" in next_chunk(call)
    call.close()


@pytest.mark.parametrize(
    ("how", "status"), [("abort", 404), ("redirect", 302), ("none", 200)]
)
def test_response_before_the_first_event_is_an_ordinary_one(
    make_app: MakeApp, filters: Filters, how: str, status: int
) -> None:
    """The generator has not begun to wait."""
    response = get(make_app(filters), f"/checked?how={how}")
    assert response.status_int == status
    assert "Content-Length" in response.headers
    if how == "none":
        assert (response.text, response.headers["X-Checked"]) == ("", "none")


def test_error_before_the_first_event_is_an_error_page(
    make_app: MakeApp, filters: Filters
) -> None:
    """A generator that waits has headers that were set before."""
    app = make_app(filters)
    assert get(app, "/checked?how=fail").status_int == 500
    for how, first in ("wait", b": open\nid: "), ("item", b"data: first\n\n"):
        call = Call(app, f"/checked?how={how}")
        assert next(call).startswith(first)
        assert call.headers["X-Checked"] == how
        call.close()


@pytest.mark.parametrize(
    ("how", "error"), [("abort", "could not be found"), ("divide", "division by zero")]
)
def test_error_after_the_first_event_aborts_the_transfer(
    make_app: MakeApp,
    model: Model,
    name: str,
    how: str,
    error: str,
    reports: list[Report],
) -> None:
    """The changes are rolled back, and the report has the error."""
    call = Call(make_app(Filters(name, model), model), f"/fail?how={how}")
    assert next(call).startswith(b": open\nid: ")
    Channel(name).publish(1)
    with pytest.raises(Exception, match=error):
        next_chunk(call)
    call.close()
    assert [report.reason for report in reports] == ["failed"]
    assert model.names() == []
    assert_clean(model)


def test_changes_of_a_filter_are_committed_with_its_events(
    make_app: MakeApp, model: Model, name: str, next_report: Callable[[], Report]
) -> None:
    """The session is bound on the thread of the generator from its first step on."""
    call = Call(make_app(Filters(name, model), model), "/even")
    assert next(call).startswith(b": open\nid: ")
    for number in range(3):
        Channel(name).publish(number)
    assert next_chunk(call).endswith(b"data: 0\n\n")
    assert next_chunk(call).endswith(b"data: 2\n\n")
    assert model.texts() == ["0", "1", "2"]
    call.close()
    assert next_report().reason == "disconnected"
    assert_clean(model)


@pytest.mark.parametrize("path", ["/plain", "/lines"])
def test_filter_without_a_heartbeat_is_refused(
    make_app: MakeApp, filters: Filters, path: str, reports: list[Report]
) -> None:
    """The stream could neither open nor send a heartbeat. The error names the fix."""
    assert get(make_app(filters), path).status_int == 500
    [report] = reports
    assert isinstance(report.error, StreamError)
    assert "Use @stream(SSE(heartbeat=15))" in str(report.error)


def test_filter_outside_of_a_stream_waits(make_app: MakeApp, name: str) -> None:
    """A script may use it, too."""
    events = listen(name, comments=False)
    received: list[Event] = []
    reader = threading.Thread(target=lambda: received.append(next(events)))
    reader.start()
    Channel(name).publish("x")
    reader.join(10)
    assert [event.data for event in received] == ["x"]
    assert id_of(received[0]) == Channel(name).position()


@pytest.mark.parametrize("end", [Call.close, Call.drop])
@pytest.mark.parametrize("pulls", [0, 1, 2])
def test_filter_ends_when_its_client_disconnects(
    make_app: MakeApp,
    model: Model,
    name: str,
    next_report: Callable[[], Report],
    end: Callable[[Call], None],
    pulls: int,
) -> None:
    """It ends at the next heartbeat of listen(), although no event comes."""
    root = Filters(name, model)
    app = make_app(root, model, tgstream__heartbeat_seconds="0.02")
    before = {*threading.enumerate()}
    call = Call(app, "/even", checked=False)
    for _ in range(pulls):
        next(call)
    end(call)
    del call
    gc.collect()
    assert (next_report().reason, root.seen) == ("disconnected", ["closed"])
    for thread in {*threading.enumerate()} - before:
        if thread.name == "tgstream-heartbeat":
            thread.join(10)
            assert not thread.is_alive()
    assert_clean(model)


def test_drain_ends_a_filter_that_waits(
    make_app: MakeApp, filters: Filters, next_report: Callable[[], Report]
) -> None:
    """It wakes the listener, and the response ends normally."""
    call = Call(make_app(filters), "/even")
    assert next(call).startswith(b": open\nid: ")
    assert drain(timeout=10)
    assert call.read().replace(HEARTBEAT, b"") == b""
    assert (next_report().reason, filters.seen) == ("drained", ["closed"])


@pytest.mark.parametrize("server", ["waitress", "gunicorn-gthread", "gunicorn-gevent"])
def test_filter_opens_and_ends_on_real_servers(
    live_server: Callable[..., LiveServer], server: str
) -> None:
    """The client receives comments before any event. The stream ends when it leaves."""
    live = live_server(server, "listening", "heartbeat=0.2")
    listener = Listener(live, "/memory/long?name=x")
    listener.wait_for_heartbeat()
    publish(live, "x", 0)
    publish(live, "x", 1, size=20)
    assert listener.next()["data"] == "1 " + "x" * 20
    listener.close()
    while not count_ended(live, "x", "disconnected"):
        time.sleep(0.05)
