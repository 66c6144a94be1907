"""Warnings about settings and code that get in the way of a stream."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import webob
import webob.dec
from tg import FullStackApplicationConfigurator, TGController, expose
from tg.appwrappers.base import ApplicationWrapper

from tests.conftest import MakeApp
from tests.forks import run_python
from tests.model import Model, User
from tests.wsgi import Call, get
from tgstream import stream
from tgstream.core import monitor
from tgstream.turbogears import diagnostics
from tgstream.turbogears.diagnostics import check_running, next_check

ROOT = Path(__file__).parents[2]


class Words(TGController):
    """Streams of three chunks, of two and of one."""

    @expose(content_type="text/plain")
    @stream
    def words(self) -> Iterator[str]:
        yield from ("one", "two", "three")

    @expose(content_type="text/plain")
    @stream
    def more(self) -> Iterator[str]:
        yield from ("four", "five")

    @expose(content_type="text/plain")
    @stream(chunk_size=100)
    def single(self) -> Iterator[str]:
        yield "one"

    def __init__(self) -> None:
        for name in "words", "more", "single":  # each test resets TG, which forgets it
            expose(content_type="text/plain")(getattr(Words, name))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Returns the warnings of tgstream so far."""

    def warnings() -> list[str]:
        return [
            record.getMessage()
            for record in caplog.records
            if record.name == "tgstream" and record.levelname == "WARNING"
        ]

    return warnings


@pytest.fixture
def warning_queue() -> Iterator[queue.Queue[str]]:
    """The warnings of tgstream, to wait for those of the monitor's thread."""
    lines: queue.Queue[str] = queue.Queue()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelname == "WARNING":
                lines.put(record.getMessage())

    handler = Handler()
    logging.getLogger("tgstream").addHandler(handler)
    yield lines
    logging.getLogger("tgstream").removeHandler(handler)


# Code that reads the whole body before the server.


class Collecting:
    """A middleware that reads the whole body, as those that compress or sign it do."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        body = self.app(environ, start_response)
        with contextlib.closing(body):
            return [b"".join(body)]


@webob.dec.wsgify.middleware
def reading(request: webob.Request, app: Any) -> webob.Response:
    """A middleware made by WebOb that reads the whole body."""
    response = request.get_response(app)
    assert response.body
    return response


def passing(app: Any) -> Any:
    """A middleware that is a generator, and passes each chunk through."""

    def pass_on(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        body = app(environ, start_response)
        with contextlib.closing(body):
            yield from body

    return pass_on


@pytest.mark.parametrize(
    ("middleware", "name"),
    [(Collecting, "Collecting.__call__|__call__"), (reading, "reading")],
)
def test_middleware_that_reads_the_stream_is_named(
    make_app: MakeApp, warnings: Callable[[], list[str]], middleware: Any, name: str
) -> None:
    """The warning is logged once for each controller, not for a single chunk."""
    app = middleware(make_app(Words()))
    get(app, "/words", checked=False)
    [line] = warnings()
    assert line.startswith(f"Words.words is not streaming: {__name__}.")
    assert line.split()[4].removeprefix(f"{__name__}.") in name.split("|")
    get(app, "/words", checked=False)
    get(app, "/single", checked=False)
    assert len(warnings()) == 1
    get(app, "/more", checked=False)
    assert warnings()[1].startswith(f"Words.more is not streaming: {__name__}.")


class Signing(ApplicationWrapper):
    """An application wrapper that reads the whole body of each response."""

    def __call__(self, controller: Any, environ: Any, context: Any) -> Any:
        response = self.next_handler(controller, environ, context)
        assert response.body == b"onetwothree"
        return response


def test_application_wrapper_that_reads_the_stream_is_named(
    make_app: MakeApp, warnings: Callable[[], list[str]]
) -> None:
    """It is in TurboGears, not around it."""

    def signed() -> FullStackApplicationConfigurator:
        base_config = FullStackApplicationConfigurator()
        base_config.register_application_wrapper(Signing)
        return base_config

    app = make_app(Words(), configurator=signed)
    assert get(app, "/words").text == "onetwothree"
    [line] = warnings()
    start = f"Words.words is not streaming: {__name__}.Signing.__call__ reads "
    assert line.startswith(start)


@pytest.mark.parametrize("wrap", [passing, lambda app: app])
@pytest.mark.parametrize("debug", [False, True])
def test_stream_that_the_server_pulls_has_no_warning(
    make_app: MakeApp, warnings: Callable[[], list[str]], wrap: Any, debug: bool
) -> None:
    """TG's middlewares and those that pass chunks through do not buffer."""
    app = wrap(make_app(Words(), debug=debug))
    assert get(app, "/words").text == "onetwothree"
    assert warnings() == []


# Settings.


def test_slow_request_tracing_is_warned_of(
    make_app: MakeApp, warnings: Callable[[], list[str]]
) -> None:
    """The warning has the setting that excludes the stream."""
    options = {"trace_slowreqs__enable": True, "trace_slowreqs__interval": 7}
    app = make_app(Words(), **options)
    get(app, "/words")
    get(app, "/words")
    [line] = warnings()
    assert "Words.words streams, and trace_slowreqs is on" in line
    assert "longer than 7 s" in line
    assert line.endswith("Add its path to trace_slowreqs.exclude: /words")


def test_line_break_in_a_path_does_not_forge_a_line_of_the_log(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """A client can send ``%0D%0A`` in a URL. Each record is still one line."""
    caplog.set_level(logging.DEBUG, "tgstream")

    class Any_(TGController):
        @expose(content_type="text/plain")
        @stream
        def _default(self, *args: Any) -> Iterator[str]:
            yield "one"
            yield "two"

    app = make_app(Any_(), trace_slowreqs__enable=True)
    assert get(app, "/a\r\nERROR forged").text == "onetwo"
    lines = [record.getMessage() for record in caplog.records]
    assert any("trace_slowreqs.exclude: '/a\\r\\nERROR" in line for line in lines)
    assert any("at /a%0D%0AERROR%20forged" in line for line in lines)
    assert all(len(line.splitlines()) == 1 for line in lines)


def test_stream_that_slow_request_tracing_excludes_has_no_warning(
    make_app: MakeApp, warnings: Callable[[], list[str]]
) -> None:
    """Pages have none either, and no stream has one while ``debug`` is on."""
    options = {"trace_slowreqs__enable": True, "trace_slowreqs__exclude": "/words"}
    get(make_app(Words(), **options), "/words")
    get(make_app(Words(), **options), "/single")
    get(make_app(Words(), trace_slowreqs__enable=True, debug=True), "/more")
    assert warnings() == []


def test_debugbar_is_warned_of(tmp_path: Path) -> None:
    """It really keeps the queries of the stream."""
    ran = run_python("-m", "tests.live_apps.debugbar", f"{tmp_path}/test.db")
    kept, [line] = json.loads(ran.stdout)
    assert kept == [1, 2, 3]
    assert "RootController.words streams, and tgext.debugbar is on" in line
    assert "debug = false" in line


# Running streams.


@pytest.mark.parametrize("check", [0.01, 3600])
def test_idle_transaction_of_a_slow_client_is_warned_of(
    make_app: MakeApp,
    model: Model,
    warning_queue: queue.Queue[str],
    check: float,
) -> None:
    """However often the monitor checks whether the client has disconnected."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def names(self) -> Iterator[str]:
            yield str(model.DBSession.query(User).count())
            yield "more"

    options = {
        "tgstream__idle_transaction_seconds": 0.05,
        "tgstream__disconnect_check_seconds": check,
    }
    call = Call(make_app(Root(), model, **options), "/names")
    assert next(call) == b"0"
    line = warning_queue.get(timeout=10)
    assert line.startswith(
        "Root.names has been idle in a transaction for 0.05 s, waiting for the client."
    )
    call.close()
    assert warning_queue.empty()


def test_idle_transaction_of_a_waiting_generator_is_warned_of(
    make_app: MakeApp, model: Model, warning_queue: queue.Queue[str]
) -> None:
    """It waits in a pull."""
    go = threading.Event()

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def names(self) -> Iterator[str]:
            yield "first"
            model.DBSession.query(User).count()
            assert go.wait(10)
            yield "second"

    call = Call(
        make_app(Root(), model, tgstream__idle_transaction_seconds=0.05), "/names"
    )
    assert next(call) == b"first"
    puller = threading.Thread(target=call.read)
    puller.start()
    line = warning_queue.get(timeout=10)
    assert "in a transaction for 0.05 s, waiting for the generator." in line
    go.set()
    puller.join()


def running_body(idle_transaction_seconds: float) -> Any:
    """A body with the attributes that :func:`check_running` reads."""
    return SimpleNamespace(
        started=0.0,
        idle=True,
        chunks=0,
        encoding=SimpleNamespace(items=0),
        context=SimpleNamespace(
            environ={"wsgi.multithread": True}, tg_locals=SimpleNamespace(config={})
        ),
        plan=SimpleNamespace(
            controller="Root.names", idle_transaction_seconds=idle_transaction_seconds
        ),
        transaction=SimpleNamespace(idle=False, commits=0),
    )


def test_idle_transaction_warning_is_not_early_with_frequent_checks(
    warnings: Callable[[], list[str]],
) -> None:
    """The time counts from the last progress, and the warning is given once."""
    body = running_body(idle_transaction_seconds=10)
    progress = None
    for second in range(100, 160):
        body.chunks = min(second, 125)  # it makes progress until then
        progress = check_running(body, second, progress)
        assert len(warnings()) == (second >= 135)
    assert "Root.names has been idle in a transaction for 10 s" in warnings()[0]


def test_idle_transaction_time_starts_again_with_each_transaction(
    warnings: Callable[[], list[str]],
) -> None:
    """A stream that ends its transaction between two checks is not idle in it."""
    body = running_body(idle_transaction_seconds=10)
    progress = None
    for second in range(100, 200):
        body.transaction.idle = second % 8 == 0
        progress = check_running(body, second, progress)
    assert warnings() == []


def test_next_check_is_when_a_warning_may_be_due() -> None:
    """Ten seconds after the start for the only worker, then for the transaction."""
    body = running_body(idle_transaction_seconds=7)
    assert next_check(body, 1, None) == 8
    assert next_check(body, 4, None) == 10
    progress = check_running(body, 10, None)
    assert next_check(body, 10, progress) == 17
    assert next_check(body, 13, check_running(body, 13, progress)) == 17
    assert next_check(body, 17, check_running(body, 17, progress)) == 24
    body.plan.idle_transaction_seconds = 0
    assert next_check(body, 17, check_running(body, 17, None)) == float("inf")
    body.plan.idle_transaction_seconds, body.transaction = 7, None
    assert next_check(body, 17, check_running(body, 17, None)) == float("inf")


def test_stream_that_waits_without_a_transaction_has_no_warning(
    make_app: MakeApp,
    model: Model,
    warning_queue: queue.Queue[str],
) -> None:
    """A stream with a transaction, which started at the same time, has it."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(commit="each")
        def committed(self) -> Iterator[str]:
            yield str(model.DBSession.query(User).count())
            yield "more"

        @expose(content_type="text/plain")
        @stream
        def idle(self) -> Iterator[str]:
            yield str(model.DBSession.query(User).count())
            yield "more"

    app = make_app(Root(), model, tgstream__idle_transaction_seconds=0.05)
    committed, idle = Call(app, "/committed"), Call(app, "/idle")
    assert "Root.idle" in warning_queue.get(timeout=10)
    for call in committed, idle:
        call.close()
    assert warning_queue.empty()


def test_stream_on_the_only_worker_is_warned_of(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, warning_queue: queue.Queue[str]
) -> None:
    """After ten seconds, in this test less."""
    monkeypatch.setattr(monitor, "FIRST_LOOK", 0.05)
    monkeypatch.setattr(diagnostics, "ONLY_WORKER_SECONDS", 0.05)
    environ: dict[str, Any] = {"wsgi.multithread": False, "wsgi.multiprocess": False}
    options: dict[str, Any] = {
        "tgstream__idle_transaction_seconds": 0,
        "tgstream__disconnect_check_seconds": 3600,
    }
    app = make_app(Words(), **options)
    several = Call(app, "/more", **{**environ, "wsgi.multiprocess": True})
    call = Call(app, "/words", **environ)
    assert (
        "Words.words has streamed for 0 s on a worker that serves one"
        in warning_queue.get(timeout=10)
    )
    call.close()
    several.close()
