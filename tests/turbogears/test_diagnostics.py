"""What a developer is told, once for each controller, and what to do about it."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import subprocess
import sys
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
from tests.model import Model, User
from tests.wsgi import Call, get
from tgstream import stream
from tgstream.core import monitor
from tgstream.turbogears import diagnostics
from tgstream.turbogears.diagnostics import look, next_look

ROOT = Path(__file__).parents[2]


class Words(TGController):
    """A stream of three chunks, and a page."""

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
        for name in "words", "more", "single":  # TG forgets it between tests
            expose(content_type="text/plain")(getattr(Words, name))


@pytest.fixture
def advice(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings of tgstream so far."""

    def advice() -> list[str]:
        return [
            record.getMessage()
            for record in caplog.records
            if record.name == "tgstream" and record.levelname == "WARNING"
        ]

    return advice


@pytest.fixture
def warnings() -> Iterator[queue.Queue[str]]:
    """Those of the watch as well, whose thread is another, to be waited for."""
    lines: queue.Queue[str] = queue.Queue()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelname == "WARNING":
                lines.put(record.getMessage())

    handler = Handler()
    logging.getLogger("tgstream").addHandler(handler)
    yield lines
    logging.getLogger("tgstream").removeHandler(handler)


# What reads the stream before the server.


class Collecting:
    """A middleware that collects the body, as those that compress or sign it do."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        body = self.app(environ, start_response)
        with contextlib.closing(body):
            return [b"".join(body)]


@webob.dec.wsgify.middleware
def reading(request: webob.Request, app: Any) -> webob.Response:
    """A middleware of WebOb's making that reads the body."""
    response = request.get_response(app)
    assert response.body
    return response


def passing(app: Any) -> Any:
    """A middleware that is a generator, and hands on each chunk."""

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
    make_app: MakeApp, advice: Callable[[], list[str]], middleware: Any, name: str
) -> None:
    """Nothing is streamed then, and the developer knows by whom."""
    app = middleware(make_app(Words()))
    get(app, "/words", checked=False)
    [line] = advice()
    assert line.startswith("Words.words is read by tests.turbogears.test_diagnostics.")
    assert line.split()[4].removeprefix(
        "tests.turbogears.test_diagnostics."
    ) in name.split("|")
    get(app, "/words", checked=False)
    get(app, "/single", checked=False)
    assert len(advice()) == 1
    get(app, "/more", checked=False)
    assert advice()[1].startswith(
        "Words.more is read by tests.turbogears.test_diagnostics."
    )


class Signing(ApplicationWrapper):
    """An application wrapper that reads the body of each response."""

    def __call__(self, controller: Any, environ: Any, context: Any) -> Any:
        response = self.next_handler(controller, environ, context)
        assert response.body == b"onetwothree"
        return response


def test_application_wrapper_that_reads_the_stream_is_named(
    make_app: MakeApp, advice: Callable[[], list[str]]
) -> None:
    """Inside of TG as well."""

    def signed() -> FullStackApplicationConfigurator:
        base_config = FullStackApplicationConfigurator()
        base_config.register_application_wrapper(Signing)
        return base_config

    app = make_app(Words(), configurator=signed)
    assert get(app, "/words").text == "onetwothree"
    [line] = advice()
    assert line.startswith(
        "Words.words is read by tests.turbogears.test_diagnostics.Signing.__call__ "
    )


@pytest.mark.parametrize("wrap", [passing, lambda app: app])
@pytest.mark.parametrize("debug", [False, True])
def test_stream_that_the_server_pulls_is_not_told_of(
    make_app: MakeApp, advice: Callable[[], list[str]], wrap: Any, debug: bool
) -> None:
    """Neither what TG puts around it nor a middleware that hands on is in the way."""
    app = wrap(make_app(Words(), debug=debug))
    assert get(app, "/words").text == "onetwothree"
    assert advice() == []


# What is set.


def test_slow_request_tracing_is_told_of(
    make_app: MakeApp, advice: Callable[[], list[str]]
) -> None:
    """With the very setting that spares the stream."""
    options = {"trace_slowreqs__enable": True, "trace_slowreqs__interval": 7}
    app = make_app(Words(), **options)
    get(app, "/words")
    get(app, "/words")
    [line] = advice()
    assert "Words.words streams, and trace_slowreqs is on" in line
    assert "longer than 7 s" in line
    assert line.endswith("Add its path to trace_slowreqs.exclude, here /words")


def test_line_end_in_a_path_begins_no_line_of_the_log(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """A client may put one into a URL, as ``%0D%0A``; each record stays one line."""
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
    assert any("trace_slowreqs.exclude, here '/a\\r\\nERROR" in line for line in lines)
    assert any("at /a%0D%0AERROR%20forged" in line for line in lines)
    assert all(len(line.splitlines()) == 1 for line in lines)


def test_stream_that_is_spared_by_slow_request_tracing_is_not_told_of(
    make_app: MakeApp, advice: Callable[[], list[str]]
) -> None:
    """By the very setting that the advice names; nor a page, nor under debug."""
    options = {"trace_slowreqs__enable": True, "trace_slowreqs__exclude": "/words"}
    get(make_app(Words(), **options), "/words")
    get(make_app(Words(), **options), "/single")
    get(make_app(Words(), trace_slowreqs__enable=True, debug=True), "/more")
    assert advice() == []


def test_debugbar_is_told_of(tmp_path: Path) -> None:
    """It keeps the stream's queries, as the advice says."""
    command = [sys.executable, "-m", "tests.live_apps.debugbar", f"{tmp_path}/test.db"]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    kept, [line] = json.loads(ran.stdout)
    assert kept == [1, 2, 3]
    assert "RootController.words streams, and tgext.debugbar is on" in line
    assert "debug = false" in line


# What is seen while it runs.


@pytest.mark.parametrize("check", [0.01, 3600])
def test_transaction_that_is_open_while_the_client_waits_is_told_of(
    make_app: MakeApp,
    model: Model,
    warnings: queue.Queue[str],
    check: float,
) -> None:
    """A connection is pinned, however often the server is asked about its client."""

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
    line = warnings.get(timeout=10)
    assert "Root.names has not been asked for more for 0.05 s with a tran" in line
    call.close()
    assert warnings.empty()


def test_transaction_that_is_open_while_the_generator_waits_is_told_of(
    make_app: MakeApp, model: Model, warnings: queue.Queue[str]
) -> None:
    """While it is inside a pull."""
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
    assert "Root.names has yielded nothing for 0.05 s with a tran" in warnings.get(
        timeout=10
    )
    go.set()
    puller.join()


def running_body(idle_transaction_seconds: float) -> Any:
    """A body of which :func:`look` sees what a body has."""
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
    advice: Callable[[], list[str]],
) -> None:
    """The time counts from the last progress, and the warning is given once."""
    body = running_body(idle_transaction_seconds=10)
    seen = None
    for second in range(100, 160):
        body.chunks = min(second, 125)  # it makes progress until then
        seen = look(body, second, seen)
        assert len(advice()) == (second >= 135)
    assert "Root.names has not been asked for more for 10 s with" in advice()[0]


def test_idle_transaction_is_timed_anew_after_its_end(
    advice: Callable[[], list[str]],
) -> None:
    """A stream that ends its transaction between two checks is not idle in it."""
    body = running_body(idle_transaction_seconds=10)
    seen = None
    for second in range(100, 200):
        body.transaction.idle = second % 8 == 0
        seen = look(body, second, seen)
    assert advice() == []


def test_next_look_is_when_a_warning_may_be_due() -> None:
    """For the only worker ten seconds after the start, then for the transaction."""
    body = running_body(idle_transaction_seconds=7)
    assert next_look(body, 1, None) == 8
    assert next_look(body, 4, None) == 10
    seen = look(body, 10, None)
    assert next_look(body, 10, seen) == 17
    assert next_look(body, 13, look(body, 13, seen)) == 17
    assert next_look(body, 17, look(body, 17, seen)) == 24
    body.plan.idle_transaction_seconds = 0
    assert next_look(body, 17, look(body, 17, None)) == float("inf")
    body.plan.idle_transaction_seconds, body.transaction = 7, None
    assert next_look(body, 17, look(body, 17, None)) == float("inf")


def test_stream_that_waits_without_a_transaction_is_not_told_of(
    make_app: MakeApp,
    model: Model,
    warnings: queue.Queue[str],
) -> None:
    """Nor one that goes on, nor one that was asked not to be."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(commit="each")
        def free(self) -> Iterator[str]:
            yield str(model.DBSession.query(User).count())
            yield "more"

        @expose(content_type="text/plain")
        @stream
        def held(self) -> Iterator[str]:
            yield str(model.DBSession.query(User).count())
            yield "more"

    app = make_app(Root(), model, tgstream__idle_transaction_seconds=0.05)
    free, held = Call(app, "/free"), Call(app, "/held")
    assert "Root.held" in warnings.get(timeout=10)
    for call in free, held:
        call.close()
    assert warnings.empty()


def test_worker_for_one_request_at_a_time_is_told_of(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, warnings: queue.Queue[str]
) -> None:
    """When a stream has held it for long; that is ten seconds, here less."""
    monkeypatch.setattr(monitor, "FIRST_LOOK", 0.05)
    monkeypatch.setattr(diagnostics, "LONG", 0.05)
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
        in warnings.get(timeout=10)
    )
    call.close()
    several.close()
