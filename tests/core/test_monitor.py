"""``max_seconds=`` and the monitor, which ends streams that no server pulls."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
import tg
from tg import TGController, expose

from tests.conftest import MakeApp, Root, assert_clean
from tests.core.support import SHORT, Words
from tests.model import MakeModel, Model, User
from tests.wsgi import Call
from tgstream import (
    CSV,
    SSE,
    JSONArray,
    Report,
    Stream,
    StreamError,
    current_stream,
    drain,
    flush,
    stream,
)
from tgstream.core import body as body_module
from tgstream.core import monitor as monitor_module
from tgstream.core.monitor import has_disconnected
from tgstream.core.options import Options, clock
from tgstream.core.settings import read_option
from tgstream.turbogears import diagnostics
from tgstream.turbogears.hooks import _make_plan


def make_root(model: Model, **options: Any) -> TGController:
    """A root whose endless stream adds a user for each item."""

    class Root(TGController):
        @expose(content_type="text/plain")
        def words(self, seconds: str = str(SHORT)) -> Stream:
            return Stream(self.items(), max_seconds=float(seconds), **options)

        def items(self) -> Iterator[Any]:
            number = 0
            while True:
                number += 1
                model.DBSession.add(User(name=f"user {number}"))
                flush()
                yield [number] if "format" in options else f"{number}\n"

    return Root()


def test_stream_that_is_not_pulled_again_expires(
    make_app: MakeApp, model: Model, next_report: Callable[[], Report]
) -> None:
    """The connection is released, and nothing is committed, without another pull."""
    call = Call(make_app(make_root(model), model), "/words")
    assert next(call) == b"1\n"
    report = next_report()
    assert (report.reason, report.error, report.items) == ("expired", None, 1)
    assert report.seconds >= SHORT
    assert model.names() == []
    assert_clean(model)
    call.close()


def test_stream_that_is_not_pulled_at_all_expires(
    make_app: MakeApp, model: Model, next_report: Callable[[], Report]
) -> None:
    """Servers may keep the body if the client disconnected before the first chunk."""
    call = Call(make_app(make_root(model), model), "/words")
    assert next_report().reason == "expired"
    assert_clean(model)
    assert next(call) == b"1\n"  # made before the stream expired
    with pytest.raises(StreamError, match=r"max_seconds=0\.1"):
        next(call)
    call.close()


@pytest.mark.parametrize("format", [None, CSV, JSONArray])
def test_expired_stream_is_aborted(
    make_app: MakeApp, model: Model, next_report: Callable[[], Report], format: Any
) -> None:
    """Clients detect that the response is incomplete."""
    options = {} if format is None else {"format": format, "chunk_size": 0}
    call = Call(make_app(make_root(model, **options), model), "/words")
    next(call)
    assert next_report().reason == "expired"
    with pytest.raises(StreamError, match=r"Root.* was ended by max_seconds=0\.1"):
        next(call)
    call.close()
    assert_clean(model)


@pytest.mark.parametrize("debug", [True, False])
def test_expired_event_stream_ends_normally(
    make_app: MakeApp, model: Model, next_report: Callable[[], Report], debug: bool
) -> None:
    """Browsers reconnect, and sent events are committed."""
    call = Call(make_app(make_root(model, format=SSE), model, debug=debug), "/words")
    assert next(call) == b"data: [1]\n\n"
    assert next_report().reason == "expired"
    assert call.read() == b""
    assert model.names() == ["user 1"]
    assert_clean(model)


def test_stream_that_expires_during_a_pull_ends_when_the_pull_returns(
    make_app: MakeApp, model: Model, next_report: Callable[[], Report]
) -> None:
    """The chunk of this pull is sent, and the next pull raises."""
    go = threading.Event()

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(max_seconds=SHORT, commit="each")
        def words(self) -> Iterator[str]:
            model.DBSession.add(User(name="ada"))
            yield "one"
            model.DBSession.add(User(name="bob"))
            flush()
            body = current_stream()._body
            assert body is not None
            while body.closing is None:
                assert not go.wait(0.01)
            yield "two"

    call = Call(make_app(Root(), model), "/words")
    assert next(call) == b"one"
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(next, call).result() == b"two"
    report = next_report()
    assert (report.reason, report.chunks, report.commits) == ("expired", 2, 2)
    with pytest.raises(StreamError, match="max_seconds"):
        next(call)
    call.close()
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


def test_drain_waits_for_an_expired_stream_until_its_pull_returns(
    make_app: MakeApp, model: Model, next_report: Callable[[], Report]
) -> None:
    """``drain()`` returns ``False`` while the generator runs."""
    expired, go = threading.Event(), threading.Event()

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(max_seconds=SHORT)
        def words(self) -> Iterator[str]:
            yield "one"
            while not current_stream().ending:
                assert not go.wait(0.01)
            expired.set()
            assert go.wait(10)

    call = Call(make_app(Root(), model), "/words")
    assert next(call) == b"one"
    with ThreadPoolExecutor(1) as thread:
        rest = thread.submit(call.read)
        assert expired.wait(10)
        assert not drain(timeout=0.2)
        go.set()
        assert rest.result() == b""
    assert drain(timeout=10)
    call.close()
    assert next_report().reason == "completed"


@pytest.mark.parametrize("expires", [True, False])
def test_drain_waits_for_a_stream_that_ends_slowly(
    make_app: MakeApp,
    sqlite_model: Model,
    next_report: Callable[[], Report],
    expires: bool,
) -> None:
    """``drain()`` returns ``False``, although the monitor checks the stream again."""
    ending, go = threading.Event(), threading.Event()

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(max_seconds=SHORT if expires else 600)
        def words(self) -> Iterator[str]:
            try:
                yield "one"
                yield "two"
            finally:
                ending.set()
                assert go.wait(10)

    options = {"tgstream__disconnect_check_seconds": str(SHORT)}
    app = make_app(Root(), sqlite_model, **options)
    call = Call(app, "/words")
    assert next(call) == b"one"
    with ThreadPoolExecutor(1) as thread:
        closed = thread.submit(call.close)
        assert ending.wait(10)
        assert not drain(timeout=4 * SHORT)
        go.set()
        closed.result()
    assert drain(timeout=10)
    assert next_report().reason in ("disconnected", "expired")


def test_expired_stream_closes_its_generator_with_its_context(
    make_app: MakeApp, model: Model, next_report: Callable[[], Report]
) -> None:
    """Its ``finally`` runs on another thread, with the request and the session."""
    seen: list[Any] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(max_seconds=SHORT, commit="manual")
        def words(self) -> Iterator[str]:
            try:
                yield "one"
                yield "two"
            finally:
                seen.append(threading.current_thread().name)
                seen.append(tg.request.path)
                seen.append(model.DBSession.query(User).count())

    call = Call(make_app(Root(), model), "/words")
    assert next(call) == b"one"
    assert next_report().reason == "expired"
    assert seen == ["tgstream-end", "/words", 0]
    assert_clean(model)
    call.close()


@pytest.mark.parametrize("error_class", [LookupError, SystemExit, KeyboardInterrupt])
def test_error_at_the_end_of_an_expired_stream_does_not_stop_the_monitor(
    make_app: MakeApp, model: Model, next_report: Callable[[], Report], error_class: Any
) -> None:
    """The error is reported, and the next stream expires as usual."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(max_seconds=SHORT)
        def words(self) -> Iterator[str]:
            try:
                model.DBSession.add(User(name="lost"))
                flush()
                yield "one"
                yield "two"
            finally:
                raise error_class

    app = make_app(Root(), model)
    for _ in range(2):
        call = Call(app, "/words")
        report = next_report()
        assert (report.reason, type(report.error)) == ("expired", error_class)
        call.close()
    assert model.names() == []
    assert_clean(model)


def test_closed_stream_does_not_expire(
    make_app: MakeApp,
    model: Model,
    reports: list[Report],
    next_report: Callable[[], Report],
) -> None:
    """Only the second stream is reported as expired."""
    app = make_app(make_root(model), model)
    first = Call(app, "/words?seconds=3600")
    first.close()
    assert next_report().reason == "disconnected"
    second = Call(app, "/words")
    assert next_report().reason == "expired"
    assert reports == []
    second.close()
    assert_clean(model)


def test_dropped_stream_does_not_wait_for_max_seconds(
    make_app: MakeApp, model: Model, next_report: Callable[[], Report]
) -> None:
    """The stream ends at once."""
    call = Call(make_app(make_root(model), model), "/words?seconds=3600", checked=False)
    call.drop()
    assert next_report().reason == "disconnected"
    assert_clean(model)


def test_many_streams_have_one_monitor_thread(
    make_app: MakeApp, sqlite_model: Model, next_report: Callable[[], Report]
) -> None:
    """Ten streams start one thread."""

    app = make_app(Words(), sqlite_model)
    calls = [Call(app, "/words") for _ in range(10)]
    threads = [t for t in threading.enumerate() if t.name == "tgstream-watch"]
    assert len(threads) == 1
    assert [next_report().reason for _ in calls] == ["expired"] * 10
    for call in calls:
        call.close()


@pytest.fixture
def no_more_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """No thread can be started, because stacks are too large.

    The value is a function that sets the usual size. The monitor has no thread yet.
    """
    fresh = monitor_module.Monitor()
    monkeypatch.setattr(monitor_module, "monitor", fresh)
    monkeypatch.setattr(body_module, "monitor", fresh)
    threading.stack_size(1 << 46)
    yield lambda: threading.stack_size(0)
    threading.stack_size(0)


def test_stream_without_a_monitor_thread_is_sent(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    no_more_threads: Callable[[], int],
) -> None:
    """Without ``max_seconds``, a stream can do without the monitor."""
    call = Call(make_app(Root(lambda: iter(["one", "two"])), sqlite_model))
    assert call.read() == b"onetwo"
    assert [report.reason for report in reports] == ["completed"]
    assert_clean(sqlite_model)


def test_max_seconds_without_a_monitor_thread_is_an_ordinary_error(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    next_report: Callable[[], Report],
    no_more_threads: Callable[[], int],
) -> None:
    """Streams expire as usual as soon as threads can be started."""
    app = make_app(make_root(sqlite_model), sqlite_model)
    call = Call(app, "/words")
    assert call.status.startswith("500 ")
    call.read()
    assert next_report().reason == "failed"
    assert_clean(sqlite_model)
    no_more_threads()
    call = Call(app, "/words")
    assert next_report().reason == "expired"
    call.close()
    assert_clean(sqlite_model)


@pytest.mark.parametrize("seconds", [0, -1, "9", True, float("inf"), float("nan")])
def test_invalid_max_seconds_is_rejected(seconds: Any) -> None:
    """The error is raised at decoration."""
    with pytest.raises(
        ValueError, match="max_seconds must be a number of seconds > 0 or"
    ):
        stream(max_seconds=seconds)(lambda: None)


def test_expired_stream_is_logged_once(
    make_app: MakeApp,
    model: Model,
    next_report: Callable[[], Report],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The line is a warning, because the response is incomplete."""
    caplog.set_level("DEBUG", "tgstream")
    call = Call(make_app(make_root(model), model), "/words")
    next_report()
    call.close()
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "words at /words expired: 1 items, 1 chunks, 2 bytes" in record.getMessage()


# Slow and failing streams, next to other streams.


class SlowController(TGController):
    """Streams of two words. The end of ``slow`` waits until the test goes on."""

    def __init__(self) -> None:
        self.go, self.ending = threading.Event(), threading.Event()
        # Not at import: the fixture make_app resets the milestones of TG.
        for name in ("slow", "quick"):
            expose(content_type="text/plain")(getattr(SlowController, name))

    @stream(max_seconds=SHORT)
    def slow(self) -> Iterator[str]:
        try:
            yield "one"
            yield "two"
        finally:
            self.ending.set()
            assert self.go.wait(20)

    @stream(max_seconds=SHORT)
    def quick(self) -> Iterator[str]:
        yield "one"
        yield "two"


def test_stream_that_ends_slowly_does_not_delay_others(
    make_app: MakeApp, sqlite_model: Model, next_report: Callable[[], Report]
) -> None:
    """Five streams wait in their ``finally``, and five other streams expire in time."""
    root = SlowController()
    app = make_app(root, sqlite_model)
    slow = [Call(app, "/slow") for _ in range(5)]
    assert root.ending.wait(10)
    quick = [Call(app, "/quick") for _ in range(5)]
    try:
        assert [next_report().controller for _ in quick] == ["SlowController.quick"] * 5
    finally:
        root.go.set()
    assert [next_report().controller for _ in slow] == ["SlowController.slow"] * 5
    for call in slow + quick:
        call.close()


def test_report_hook_that_waits_does_not_delay_others(
    make_app: MakeApp, sqlite_model: Model, next_report: Callable[[], Report]
) -> None:
    """The hook of the first stream waits until the second stream has ended."""
    others = threading.Semaphore(0)

    def wait(report: Report) -> None:
        if tg.request.params.get("waits"):
            assert others.acquire(timeout=10)
        else:
            others.release()

    app = make_app(SlowController(), sqlite_model)
    tg.hooks.register("tgstream.finished", wait)
    calls = [Call(app, "/quick?waits=yes"), Call(app, "/quick")]
    assert [next_report().reason for _ in calls] == ["expired"] * 2
    tg.hooks.disconnect("tgstream.finished", wait)
    for call in calls:
        call.close()


def test_rollback_on_a_frozen_database_does_not_delay_others(
    make_app: MakeApp,
    make_model: MakeModel,
    postgresql: str,
    next_report: Callable[[], Report],
) -> None:
    """A stopped PostgreSQL backend delays only its own stream."""
    model = make_model(postgresql)

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(max_seconds=SHORT)
        def backend(self) -> Iterator[str]:
            yield str(model.DBSession.scalar(sa.text("SELECT pg_backend_pid()")))
            yield "more"

    app = make_app(Root(), model)
    frozen = Call(app, "/backend")
    pid = int(next(frozen))
    os.kill(pid, signal.SIGSTOP)
    try:
        call = Call(app, "/backend")
        assert next_report().reason == "expired"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert next_report().reason == "expired"
    call.close()
    frozen.close()
    assert_clean(model)


def test_drain_returns_after_its_timeout_while_a_stream_ends_slowly(
    make_app: MakeApp, sqlite_model: Model, next_report: Callable[[], Report]
) -> None:
    """The generator's ``finally`` does not run on the thread that calls ``drain()``."""
    root = SlowController()
    call = Call(make_app(root, sqlite_model), "/slow")
    assert next(call) == b"one"
    try:
        assert not drain(timeout=0.05)
        assert not root.go.is_set()
    finally:
        root.go.set()
    assert next_report().error is None
    call.close()


@pytest.mark.parametrize(
    "name",
    [
        "idle_transaction_seconds",
        "disconnect_check_seconds",
        "flush_seconds",
        "heartbeat_seconds",
        "channel_history",
    ],
)
@pytest.mark.parametrize("value", ["inf", "nan", "1e12"])
def test_option_that_is_not_a_possible_time_is_rejected(name: str, value: str) -> None:
    """The error is raised when the option is read, and not later on another thread."""
    with pytest.raises(ValueError, match=rf"tgstream\.{name} has an .*'{value}'"):
        read_option({f"tgstream.{name}": value}, f"tgstream.{name}")


@pytest.mark.parametrize("heartbeat", [float("inf"), 1e12])
def test_heartbeat_longer_than_a_thread_can_wait_is_rejected(heartbeat: float) -> None:
    """The error is raised when the format is made."""
    with pytest.raises(ValueError, match="heartbeat must be"):
        SSE(heartbeat=heartbeat)


def test_very_long_duration_does_not_stop_the_monitor(
    make_app: MakeApp,
    sqlite_model: Model,
    next_report: Callable[[], Report],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The monitor's wait does not overflow, so that the next stream expires."""
    monkeypatch.setattr(diagnostics, "ONLY_WORKER_SECONDS", 0.0)
    options = {
        "tgstream__idle_transaction_seconds": "9e9",
        "tgstream__disconnect_check_seconds": "9e9",
    }
    app = make_app(Words(), sqlite_model, **options)
    long = Call(app, "/words?seconds=1e300")
    short = Call(app, "/words")
    assert next_report().reason == "expired"
    long.close()
    short.close()


def test_monitor_continues_after_an_error(
    make_app: MakeApp,
    sqlite_model: Model,
    next_report: Callable[[], Report],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The error is logged, and the next stream expires as usual."""
    looks = iter([ZeroDivisionError])

    def fail_once(environ: Any) -> bool:
        for error in looks:
            raise error
        return has_disconnected(environ)

    monkeypatch.setattr(monitor_module, "has_disconnected", fail_once)
    app = make_app(Words(), sqlite_model, tgstream__disconnect_check_seconds="0.01")
    first = Call(app, "/words?seconds=3600")
    second = Call(app, "/words")
    assert next_report().reason == "expired"
    assert "monitor" in next(r for r in caplog.records if r.exc_info).getMessage()
    first.close()
    second.close()


class Registering:
    """A running stream, in whose registration another thread takes a turn.

    :param turn: the other thread's code, which runs once.
    """

    expires = float("inf")
    ended = False

    def __init__(self, turn: Callable[[], Any]) -> None:
        self.turns = [turn]

    @property
    def plan(self) -> Any:
        self.turns.pop()()
        return _make_plan("Root.words", Options(), {})


def test_monitor_may_look_while_a_stream_registers() -> None:
    """Its thread runs between any two byte codes, and finds no incomplete entry."""
    monitor = monitor_module.Monitor()
    registering: Any = Registering(monitor._look_at_all)
    monitor.register(registering, clock())
    assert registering.turns == []
    assert monitor.running() == [registering]
    assert 9 < monitor._look_at_all() <= 10


def test_stream_that_ends_while_it_is_handed_over_is_forgotten() -> None:
    """Middlewares in the same garbage hand it over once more when it has ended."""

    def end() -> None:
        registering.ended = True
        monitor.forget(registering)

    monitor = monitor_module.Monitor()
    monitor._running = True  # without a thread, which would be another turn
    registering: Any = Registering(end)
    assert monitor.hand_over(registering)
    assert registering.turns == []
    assert monitor._list() == []


# Items without output.


class Empty:
    """A format that encodes each item as empty text."""

    content_type = "text/plain"

    def encode(self, items: Any) -> Iterator[str]:
        for _ in items:
            yield ""


class Filter:
    """A format that skips empty items."""

    content_type = "text/plain"

    def encode(self, items: Any) -> Iterator[str]:
        for item in items:
            if item:
                yield item


class EmptyBatches(list[str]):
    """A source that puts an empty item into an empty batch."""

    fields = ()

    def __init__(self, items: Iterator[Any]) -> None:
        super().__init__([""])
        self.items = items

    def batches(self) -> Iterator[list[Any]]:
        return ([item] if item else [] for item in self.items)

    def __iter__(self) -> Iterator[str]:
        return self.items


class Batches(EmptyBatches):
    """A source that puts each item into a batch."""

    def batches(self) -> Iterator[list[Any]]:
        return ([item] for item in self.items)


class BatchFilter(Filter):
    """A format that skips the empty items of batches."""

    def encode_batches(self, source: Any) -> Iterator[str]:
        return self.encode(item for batch in source.batches() for item in batch)


SOURCES: dict[str, Any] = {"batches": EmptyBatches, "batch-filter": Batches}
OPTIONS: dict[str, dict[str, Any]] = {
    "raw": {},
    "buffered": {"chunk_size": 1000},
    "empty": {"format": Empty()},
    "empty-each": {"format": Empty(), "commit": "each"},
    "filter": {"format": Filter()},
    "batches": {"format": CSV()},
    "batch-filter": {"format": BatchFilter()},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("end", ["expired", "drained", "stopped"])
def test_stream_of_items_without_output_can_be_ended(
    make_app: MakeApp,
    sqlite_model: Model,
    next_report: Callable[[], Report],
    name: str,
    first: bool,
    end: str,
) -> None:
    """The stream ends at its next item, in the first pull or in a later pull."""
    making, stop = threading.Event(), threading.Event()
    streams: list[Stream] = []

    def items() -> Iterator[Any]:
        if not first:
            yield ["one"] if name == "batches" else "one"
        streams.append(current_stream())
        while not stop.wait(0.001):
            making.set()
            yield ""
        raise AssertionError("the stream was not ended")

    class Root(TGController):
        @expose(content_type="text/plain")
        def words(self) -> Stream:
            source = SOURCES.get(name, iter)(items())
            seconds = 0.2 if end == "expired" else None
            return Stream(source, max_seconds=seconds, **OPTIONS[name])

    app = make_app(Root(), sqlite_model, trace_errors__enable=False)
    with ThreadPoolExecutor(1) as thread:
        body = thread.submit(lambda: Call(app, "/words", checked=False).read())
        try:
            assert making.wait(10)
            if end == "drained":
                assert drain(timeout=10)
            elif end == "stopped":
                streams[0].close()
            report = next_report()
        finally:
            stop.set()
        assert (report.reason, report.error) == (end, None)
        with pytest.raises(StreamError, match="before its end"):
            body.result()
    streams.clear()
    assert_clean(sqlite_model)
