"""A bound on a stream's life, which holds though nobody pulls or closes it."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
import tg
from tg import TGController, expose

from tests.conftest import MakeApp, assert_clean
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
from tgstream.core import body
from tgstream.core import monitor as _watch
from tgstream.core.monitor import has_disconnected
from tgstream.core.options import Options, clock
from tgstream.core.settings import read_option
from tgstream.turbogears import diagnostics
from tgstream.turbogears.hooks import _make_plan

SHORT = 0.1


def writer(model: Model, **options: Any) -> TGController:
    """An application whose stream adds a user for each item, for ever."""

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


def test_stream_that_nobody_pulls_expires(
    make_app: MakeApp, model: Model, ended: Callable[[], Report]
) -> None:
    """Its connection comes back and nothing is stored, though no server ever asks."""
    call = Call(make_app(writer(model), model), "/words")
    assert next(call) == b"1\n"
    report = ended()
    assert (report.reason, report.error, report.items) == ("expired", None, 1)
    assert report.seconds >= SHORT
    assert model.names() == []
    assert_clean(model)
    call.close()


def test_stream_that_was_never_pulled_at_all_expires(
    make_app: MakeApp, model: Model, ended: Callable[[], Report]
) -> None:
    """A server that loses its client before the first chunk may hold the body."""
    call = Call(make_app(writer(model), model), "/words")
    assert ended().reason == "expired"
    assert_clean(model)
    assert next(call) == b"1\n"  # it was made in time
    with pytest.raises(StreamError, match=r"max_seconds=0\.1"):
        next(call)
    call.close()


@pytest.mark.parametrize("format", [None, CSV, JSONArray])
def test_expired_stream_arrives_broken(
    make_app: MakeApp, model: Model, ended: Callable[[], Report], format: Any
) -> None:
    """No client takes what there was for the whole."""
    options = {} if format is None else {"format": format, "chunk_size": 0}
    call = Call(make_app(writer(model, **options), model), "/words")
    next(call)
    assert ended().reason == "expired"
    with pytest.raises(StreamError, match=r"Root.* was ended by max_seconds=0\.1"):
        next(call)
    call.close()
    assert_clean(model)


@pytest.mark.parametrize("debug", [True, False])
def test_expired_events_end_well(
    make_app: MakeApp, model: Model, ended: Callable[[], Report], debug: bool
) -> None:
    """A browser comes back for more; what was sent is stored."""
    call = Call(make_app(writer(model, format=SSE), model, debug=debug), "/words")
    assert next(call) == b"data: [1]\n\n"
    assert ended().reason == "expired"
    assert call.read() == b""
    assert model.names() == ["user 1"]
    assert_clean(model)


def test_stream_in_a_pull_expires_when_that_returns(
    make_app: MakeApp, model: Model, ended: Callable[[], Report]
) -> None:
    """What the pull has made leaves, and the pull after it fails."""
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
    report = ended()
    assert (report.reason, report.chunks, report.commits) == ("expired", 2, 2)
    with pytest.raises(StreamError, match="max_seconds"):
        next(call)
    call.close()
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


def test_expired_stream_is_waited_for_until_its_pull_returns(
    make_app: MakeApp, model: Model, ended: Callable[[], Report]
) -> None:
    """Who drains is not told that all have ended, while a generator works on."""
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
    assert ended().reason == "completed"


@pytest.mark.parametrize("expires", [True, False])
def test_stream_that_ends_slowly_is_waited_for(
    make_app: MakeApp, sqlite_model: Model, ended: Callable[[], Report], expires: bool
) -> None:
    """Who drains is not told that it has ended, though it was looked at meanwhile."""
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
    assert ended().reason in ("disconnected", "expired")


def test_expired_stream_closes_its_generator_with_its_request(
    make_app: MakeApp, model: Model, ended: Callable[[], Report]
) -> None:
    """On another thread, its ``finally`` has the context and the session as usual."""
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
    assert ended().reason == "expired"
    assert seen == ["tgstream-end", "/words", 0]
    assert_clean(model)
    call.close()


@pytest.mark.parametrize("kind", [LookupError, SystemExit, KeyboardInterrupt])
def test_expired_stream_whose_generator_will_not_close_ends_no_watch(
    make_app: MakeApp, model: Model, ended: Callable[[], Report], kind: Any
) -> None:
    """What its ``finally`` raises is told, and the next stream expires as well."""

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
                raise kind

    app = make_app(Root(), model)
    for _ in range(2):
        call = Call(app, "/words")
        report = ended()
        assert (report.reason, type(report.error)) == ("expired", kind)
        call.close()
    assert model.names() == []
    assert_clean(model)


def test_closed_stream_does_not_expire(
    make_app: MakeApp, model: Model, reports: list[Report], ended: Callable[[], Report]
) -> None:
    """A stream ends once: the next one to expire is told alone."""
    app = make_app(writer(model), model)
    first = Call(app, "/words?seconds=3600")
    first.close()
    assert ended().reason == "disconnected"
    second = Call(app, "/words")
    assert ended().reason == "expired"
    assert reports == []
    second.close()
    assert_clean(model)


def test_dropped_stream_is_not_held_by_its_bound(
    make_app: MakeApp, model: Model, ended: Callable[[], Report]
) -> None:
    """It ends at once, and does not wait for its time."""
    call = Call(make_app(writer(model), model), "/words?seconds=3600", checked=False)
    call.drop()
    assert ended().reason == "disconnected"
    assert_clean(model)


def test_many_streams_expire_on_one_thread(
    make_app: MakeApp, sqlite_model: Model, ended: Callable[[], Report]
) -> None:
    """Ten more streams are no thread more; after the last, the thread ends."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(max_seconds=SHORT)
        def words(self) -> Iterator[str]:
            yield "one"
            yield "two"

    app = make_app(Root(), sqlite_model)
    calls = [Call(app, "/words") for _ in range(10)]
    threads = [t for t in threading.enumerate() if t.name == "tgstream-watch"]
    assert len(threads) == 1
    assert [ended().reason for _ in calls] == ["expired"] * 10
    for call in calls:
        call.close()


def test_forked_process_has_a_watch_of_its_own(
    make_app: MakeApp, sqlite_model: Model, ended: Callable[[], Report]
) -> None:
    """Servers fork after streams have run; a child's streams expire as well."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(max_seconds=SHORT)
        def words(self) -> Iterator[str]:
            yield "one"
            yield "two"

    app = make_app(Root())
    call = Call(app, "/words")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: of the threads
        child = os.fork()
    if not child:
        try:
            forked = Call(app, "/words", checked=False)
            os._exit(0 if ended().reason == "expired" and forked else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert ended().reason == "expired"
    call.close()


@pytest.fixture
def no_more_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """No thread can be started until this is called, because no stack has this size.

    No monitor runs yet, either.
    """
    fresh = _watch.Monitor()
    monkeypatch.setattr(_watch, "monitor", fresh)
    monkeypatch.setattr(body, "monitor", fresh)
    threading.stack_size(1 << 46)
    yield lambda: threading.stack_size(0)
    threading.stack_size(0)


def test_stream_goes_on_though_no_thread_can_watch_it(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    no_more_threads: Callable[[], int],
) -> None:
    """What is only looked at for advice needs none."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            yield "one"
            yield "two"

    call = Call(make_app(Root(), sqlite_model), "/words")
    assert call.read() == b"onetwo"
    assert [report.reason for report in reports] == ["completed"]
    assert_clean(sqlite_model)


def test_bound_that_cannot_be_kept_is_an_ordinary_error(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    ended: Callable[[], Report],
    no_more_threads: Callable[[], int],
) -> None:
    """Before the first chunk; and the next one's is kept, when there are threads."""
    app = make_app(writer(sqlite_model), sqlite_model)
    call = Call(app, "/words")
    assert call.status.startswith("500 ")
    call.read()
    assert ended().reason == "failed"
    assert_clean(sqlite_model)
    no_more_threads()
    call = Call(app, "/words")
    assert ended().reason == "expired"
    call.close()
    assert_clean(sqlite_model)


@pytest.mark.parametrize("seconds", [0, -1, "9", True, float("inf"), float("nan")])
def test_invalid_max_seconds_is_rejected(seconds: Any) -> None:
    """At decoration."""
    with pytest.raises(
        ValueError, match="max_seconds must be a number of seconds > 0 or"
    ):
        stream(max_seconds=seconds)(lambda: None)


def test_expired_stream_is_one_line_of_the_log(
    make_app: MakeApp,
    model: Model,
    ended: Callable[[], Report],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A broken one is a warning."""
    caplog.set_level("DEBUG", "tgstream")
    call = Call(make_app(writer(model), model), "/words")
    ended()
    call.close()
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "words at /words expired: 1 items, 1 chunks, 2 bytes" in record.getMessage()


# What takes long, and what goes wrong, beside others.


class Slow(TGController):
    """Streams of which one does not come to its end before it is let go."""

    def __init__(self) -> None:
        self.go, self.ending = threading.Event(), threading.Event()
        for name in ("slow", "quick"):  # TG forgets it between tests
            expose(content_type="text/plain")(getattr(Slow, name))

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


def test_stream_that_ends_slowly_delays_no_other(
    make_app: MakeApp, sqlite_model: Model, ended: Callable[[], Report]
) -> None:
    """While the ``finally`` of five streams waits, five others expire in time."""
    root = Slow()
    app = make_app(root, sqlite_model)
    slow = [Call(app, "/slow") for _ in range(5)]
    assert root.ending.wait(10)
    quick = [Call(app, "/quick") for _ in range(5)]
    try:
        assert [ended().controller for _ in quick] == ["Slow.quick"] * 5
    finally:
        root.go.set()
    assert [ended().controller for _ in slow] == ["Slow.slow"] * 5
    for call in slow + quick:
        call.close()


def test_report_hook_that_waits_delays_no_other(
    make_app: MakeApp, sqlite_model: Model, ended: Callable[[], Report]
) -> None:
    """A hook of one stream waits until the other stream has ended."""
    others = threading.Semaphore(0)

    def wait(report: Report) -> None:
        if tg.request.params.get("waits"):
            assert others.acquire(timeout=10)
        else:
            others.release()

    app = make_app(Slow(), sqlite_model)
    tg.hooks.register("tgstream.finished", wait)
    calls = [Call(app, "/quick?waits=yes"), Call(app, "/quick")]
    assert [ended().reason for _ in calls] == ["expired"] * 2
    tg.hooks.disconnect("tgstream.finished", wait)
    for call in calls:
        call.close()


def test_rollback_on_a_frozen_database_delays_no_other(
    make_app: MakeApp,
    make_model: MakeModel,
    postgresql: str,
    ended: Callable[[], Report],
) -> None:
    """A stopped PostgreSQL backend holds up its own stream alone."""
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
        assert ended().reason == "expired"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert ended().reason == "expired"
    call.close()
    frozen.close()
    assert_clean(model)


def test_drain_returns_in_time_while_a_stream_ends_slowly(
    make_app: MakeApp, sqlite_model: Model, ended: Callable[[], Report]
) -> None:
    """``drain()`` runs no user code on the thread that calls it."""
    root = Slow()
    call = Call(make_app(root, sqlite_model), "/slow")
    assert next(call) == b"one"
    try:
        assert not drain(timeout=0.05)
        assert not root.go.is_set()
    finally:
        root.go.set()
    assert ended().error is None
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
    """It is an error where the option is read, and not later on some thread."""
    with pytest.raises(ValueError, match=rf"tgstream\.{name} has an .*'{value}'"):
        read_option({f"tgstream.{name}": value}, f"tgstream.{name}")


@pytest.mark.parametrize("heartbeat", [float("inf"), 1e12])
def test_heartbeat_longer_than_a_thread_can_wait_is_rejected(heartbeat: float) -> None:
    """It is an error where the format is made."""
    with pytest.raises(ValueError, match="heartbeat must be"):
        SSE(heartbeat=heartbeat)


class Words(TGController):
    """A stream of two words, which lives as long as it is asked to."""

    def __init__(self) -> None:
        expose(content_type="text/plain")(Words.words)  # TG forgets it between tests

    def words(self, seconds: str = str(SHORT)) -> Stream:
        return Stream(iter(["one", "two"]), max_seconds=float(seconds))


def test_very_long_duration_is_watched_like_any_other(
    make_app: MakeApp,
    sqlite_model: Model,
    ended: Callable[[], Report],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wait of the monitor never overflows, so that the next stream expires."""
    monkeypatch.setattr(diagnostics, "ONLY_WORKER_SECONDS", 0.0)
    options = {
        "tgstream__idle_transaction_seconds": "9e9",
        "tgstream__disconnect_check_seconds": "9e9",
    }
    app = make_app(Words(), sqlite_model, **options)
    long = Call(app, "/words?seconds=1e300")
    short = Call(app, "/words")
    assert ended().reason == "expired"
    long.close()
    short.close()


def test_monitor_that_fails_is_logged_and_goes_on(
    make_app: MakeApp,
    sqlite_model: Model,
    ended: Callable[[], Report],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The stream of the next look expires as usual."""
    looks = iter([ZeroDivisionError])

    def fail_once(environ: Any) -> bool:
        for error in looks:
            raise error
        return has_disconnected(environ)

    monkeypatch.setattr(_watch, "has_disconnected", fail_once)
    app = make_app(Words(), sqlite_model, tgstream__disconnect_check_seconds="0.01")
    first = Call(app, "/words?seconds=3600")
    second = Call(app, "/words")
    assert ended().reason == "expired"
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
    monitor = _watch.Monitor()
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

    monitor = _watch.Monitor()
    monitor._running = True  # without a thread, which would be another turn
    registering: Any = Registering(end)
    assert monitor.hand_over(registering)
    assert registering.turns == []
    assert monitor._list() == []


# Items of which no chunk comes.


class Empty:
    """A format that makes nothing of its items but empty pieces."""

    content_type = "text/plain"

    def encode(self, items: Any) -> Iterator[str]:
        for _ in items:
            yield ""


class Filter:
    """A format that makes nothing of its items, not even empty pieces."""

    content_type = "text/plain"

    def encode(self, items: Any) -> Iterator[str]:
        for item in items:
            if item:
                yield item


class EmptyBatches(list[str]):
    """A source whose batches are empty, forever."""

    fields = ()

    def __init__(self, items: Iterator[Any]) -> None:
        super().__init__([""])
        self.items = items

    def batches(self) -> Iterator[list[Any]]:
        return ([item] if item else [] for item in self.items)

    def __iter__(self) -> Iterator[str]:
        return self.items


class Batches(EmptyBatches):
    """A source of batches of one item, forever."""

    def batches(self) -> Iterator[list[Any]]:
        return ([item] for item in self.items)


class BatchFilter(Filter):
    """A format that makes nothing of whole batches."""

    def encode_batches(self, source: Any) -> Iterator[str]:
        return self.encode(item for batch in source.batches() for item in batch)


SOURCES: dict[str, Any] = {"batches": EmptyBatches, "batch-filter": Batches}
MUTE: dict[str, dict[str, Any]] = {
    "raw": {},
    "gathered": {"chunk_size": 1000},
    "empty": {"format": Empty()},
    "empty-each": {"format": Empty(), "commit": "each"},
    "filter": {"format": Filter()},
    "batches": {"format": CSV()},
    "batch-filter": {"format": BatchFilter()},
}


@pytest.mark.parametrize("kind", MUTE)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("how", ["expired", "drained", "disconnected"])
def test_stream_that_makes_items_but_no_bytes_can_be_ended(
    make_app: MakeApp,
    sqlite_model: Model,
    ended: Callable[[], Report],
    kind: str,
    first: bool,
    how: str,
) -> None:
    """In its first pull and in a later one, at the next item."""
    makes, stop = threading.Event(), threading.Event()
    streams: list[Stream] = []

    def items() -> Iterator[Any]:
        if not first:
            yield ["one"] if kind == "batches" else "one"
        streams.append(current_stream())
        while not stop.wait(0.001):
            makes.set()
            yield ""
        raise AssertionError("it was not ended")

    class Root(TGController):
        @expose(content_type="text/plain")
        def words(self) -> Stream:
            source = SOURCES.get(kind, iter)(items())
            seconds = 0.2 if how == "expired" else None
            return Stream(source, max_seconds=seconds, **MUTE[kind])

    app = make_app(Root(), sqlite_model, trace_errors__enable=False)
    with ThreadPoolExecutor(1) as thread:
        body = thread.submit(lambda: Call(app, "/words", checked=False).read())
        try:
            assert makes.wait(10)
            if how == "drained":
                assert drain(timeout=10)
            elif how == "disconnected":
                streams[0].close()
            report = ended()
        finally:
            stop.set()
        assert (report.reason, report.error) == (how, None)
        with pytest.raises(StreamError, match="before its end"):
            body.result()
    streams.clear()
    assert_clean(sqlite_model)
