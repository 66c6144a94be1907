"""The code of ``docs/operating.rst`` that makes spans of streams runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tg
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tg import TGController, expose

from tests.conftest import MakeApp
from tests.core.support import run_on_another_thread
from tests.live_apps.metrics_app import run_block
from tests.wsgi import Call, get
from tgstream import SSE, Event, stream

TRACER = trace.get_tracer("tests")


class Root(TGController):
    """Streams that complete, fail, wait and open spans of their own."""

    def __init__(self) -> None:
        for method in (Root.words, Root.fails, Root.whole, Root.waits):
            expose(content_type="text/plain")(method)  # fixtures reset TG

    @stream
    def words(self) -> Iterator[str]:
        yield "one"
        with TRACER.start_as_current_span("query"):
            pass
        yield "two"

    @stream
    def fails(self, first: str = "one") -> Iterator[str]:
        if first:
            yield first
        raise LookupError("no more")

    @stream
    def whole(self) -> Iterator[str]:
        return
        yield ""

    @stream(SSE(heartbeat=20))
    def waits(self) -> Iterator[Event]:
        yield Event(comment="open")
        with TRACER.start_as_current_span("query"):
            yield Event("one")


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """The exporter of the process, which has one provider of tracers."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(make_app: MakeApp, exporter: InMemorySpanExporter) -> Iterator[Any]:
    """A function that returns the spans that have ended.

    The hooks of the page are registered meanwhile.
    """
    shown = run_block("tracer.start_span")
    hooks = ("tgstream.started", "begin_span"), ("tgstream.finished", "end_span")

    yield exporter.get_finished_spans
    for hook, name in hooks:
        tg.hooks.disconnect(hook, shown[name])
    exporter.clear()


def by_name(spans: Sequence[ReadableSpan]) -> dict[str, Any]:
    return {span.name: span for span in spans}


def test_span_begins_in_the_request_and_ends_with_the_stream(
    make_app: MakeApp, spans: Any
) -> None:
    """Its parent is the span of the request, which ends before it."""
    app = make_app(Root())
    began = time.time_ns()
    with TRACER.start_as_current_span("request"):
        call = Call(app, "/words")
    assert by_name(spans()).keys() == {"request"}
    assert run_on_another_thread(call.read) == b"onetwo"
    ended = by_name(spans())
    request, span, query = ended["request"], ended["Root.words"], ended["query"]
    assert span.parent == request.context
    assert query.parent == span.context
    second = 10**9  # this thread may lose its turn between the two clocks
    assert began - second < span.start_time < request.end_time < span.end_time
    assert span.status.is_ok
    assert dict(span.attributes) == {
        "url.path": "/words",
        "tgstream.reason": "completed",
        "tgstream.items": 2,
        "tgstream.bytes": 6,
    }
    assert trace.get_current_span() is trace.INVALID_SPAN


@pytest.mark.parametrize("first", ["one", ""])
def test_span_of_a_failed_stream_is_an_error(
    make_app: MakeApp, spans: Any, first: str
) -> None:
    """The exception is an event of the span, also before the first chunk."""
    app = make_app(Root(), trace_errors__enable=False)
    with pytest.raises(LookupError):
        get(app, f"/fails?first={first}")
    span = by_name(spans())["Root.fails"]
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.status.description == "LookupError"
    [event] = span.events
    assert event.attributes["exception.message"] == "no more"
    assert span.attributes["tgstream.reason"] == "failed"


def test_streams_that_alternate_on_a_thread_have_spans_of_their_own(
    make_app: MakeApp, spans: Any
) -> None:
    """One has a heartbeat, and its generator runs on a thread of its own."""
    app = make_app(Root())
    first, second = Call(app, "/waits"), Call(app, "/words")
    for call in first, second, first, second:
        next(call)
    assert (first.read(), second.read()) == (b"", b"")
    ended = by_name(spans())
    assert ended["Root.waits"].context.trace_id != ended["Root.words"].context.trace_id
    parents = {
        span.parent.span_id
        for span in spans()
        if span.name == "query" and span.parent is not None
    }
    streams = ended["Root.waits"], ended["Root.words"]
    assert parents == {span.context.span_id for span in streams}
    for thread in threading.enumerate():
        if thread.name == "tgstream-heartbeat":
            thread.join(10)


def test_span_of_a_stream_of_one_pull_ends(make_app: MakeApp, spans: Any) -> None:
    """It begins and ends in the request."""
    get(make_app(Root()), "/whole")
    assert by_name(spans())["Root.whole"].attributes["tgstream.items"] == 0
