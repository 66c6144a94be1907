"""The error guard: the failure of a stream reaches the server."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import itertools
import sys
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import tg
import webob
from tg import TGController, expose

import tgstream
from tests.conftest import MakeApp, assert_clean, assert_thread_clean, stop_draining
from tests.model import Model
from tests.turbogears.support import (
    BUFFERED,
    DEBUGGED,
    HOOKS,
    TRACED,
    UNTRACED,
    WIRINGS,
    Middleware,
    install_middleware,
    make_root,
    plug_with_wrapper,
    serve,
    without_guard,
)
from tests.wsgi import Call, get
from tgstream import Report, StreamError, drain, stream
from tgstream.turbogears.guard import Guard, Outcome


def assert_failure_reaches_the_server(app: Any, **options: Any) -> None:
    """Check that the failing stream of ``make_root`` is aborted."""
    call = Call(app, "/fail", **options)
    assert [next(call), next(call)] == [b"one", b"two"]
    with pytest.raises(LookupError, match="no third"):
        next(call)
    call.close()
    assert call.starts == 1


# A failure after the first chunk.


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
def test_failed_stream_is_aborted(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
    guarded: bool,
) -> None:
    """The server gets the generator's error, and only the generator's output."""
    app = make_app(make_root(), sqlite_model, **wiring)
    assert_failure_reaches_the_server(app if guarded else without_guard(app))
    assert [report.reason for report in reports] == ["failed"]
    assert_clean(sqlite_model)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_failed_stream_is_aborted_without_a_database(
    make_app: MakeApp, wiring: dict[str, Any]
) -> None:
    """Without a database, TG puts no generator for its session around the body."""
    app = make_app(make_root(), tm__enabled=False, **wiring)
    for application in app, without_guard(app):
        assert_failure_reaches_the_server(application)
        assert_thread_clean()


@pytest.mark.parametrize("wiring", WIRINGS)
def test_failed_stream_is_aborted_on_a_lenient_server(
    make_app: MakeApp, wiring: dict[str, Any]
) -> None:
    """A server that accepts a second ``start_response`` gets neither it nor HTML."""
    assert_failure_reaches_the_server(make_app(make_root(), **wiring), lenient=True)


@pytest.mark.parametrize(
    ("wiring", "appended", "aborted"),
    [
        pytest.param(TRACED, b"Internal Server Error", True, id="traced"),
        pytest.param(TRACED | BUFFERED, b"Internal Server Error", False, id="buffered"),
        pytest.param(DEBUGGED, b"<!DOCTYPE", False, id="debugged"),
        pytest.param(UNTRACED, b"", True, id="untraced"),
    ],
)
def test_failed_stream_needs_the_guard_on_a_lenient_server(
    make_app: MakeApp, wiring: dict[str, Any], appended: bytes, aborted: bool
) -> None:
    """Without the guard, backlash appends its error page to the data. If ``debug`` is
    on or ``registry_streaming`` is off, the response even looks complete."""
    call = Call(without_guard(make_app(make_root(), **wiring)), "/fail", lenient=True)
    received = [next(call), next(call)]
    error: BaseException | None = None
    try:
        received += call
    except LookupError as raised:
        error = raised
    call.close()
    assert appended in b"".join(received[2:])
    assert bool(appended) == bool(received[2:])
    assert (error is not None) is aborted


def test_failed_stream_is_reported_by_backlash(make_app: MakeApp) -> None:
    """An error reporter of TG gets the error together with the request."""
    errors = []

    class Reporter:
        def report(self, traceback: Any) -> None:
            errors.append((traceback.exception, traceback.context["request"].path))

    app = make_app(make_root(), trace_errors__reporters=[Reporter()])
    for application in app, without_guard(app):
        call = Call(application, "/fail")
        with pytest.raises(LookupError):
            call.read()
    assert errors == [("LookupError: no third", "/fail")] * 2


def test_missing_guard_is_logged_once(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """One line for each application contains the line of code that adds the guard."""
    app = make_app(make_root())
    assert get(app, "/words").text == "onetwo"
    assert caplog.messages == []
    for _ in range(2):
        assert get(without_guard(app), "/words").text == "onetwo"
    (line,) = caplog.messages
    assert "tgstream.plugme(base_config)" in line


def test_stream_without_the_guard_can_write_to_wsgi_errors(make_app: MakeApp) -> None:
    """tgstream watches ``wsgi.errors``, and passes everything on to the server's."""
    call = get(without_guard(make_app(make_root())), "/log")
    assert call.text == "onetwo"
    assert call.errors.getvalue() == "a line"


# Responses that are not streams.


@pytest.mark.parametrize("wiring", WIRINGS)
def test_guard_does_not_change_other_responses(
    make_app: MakeApp, wiring: dict[str, Any]
) -> None:
    """A page, a missing page and a failing page are the same as without the guard."""
    app = make_app(make_root(), **wiring)
    assert get(app, "/plain").text == "plain"
    assert get(app, "/missing").status == "404 Not Found"
    if wiring.get("trace_errors__enable") is False:
        with pytest.raises(LookupError):
            Call(app, "/crash", checked=False)
    else:
        assert get(app, "/crash").status == "500 INTERNAL SERVER ERROR"
    # TG's debug mode keeps the context of a failed request until the next request.
    assert get(app, "/plain").text == "plain"


@pytest.mark.parametrize("path", ["/missing", "/crash", "/fail", "/abort"])
def test_dropped_error_page_leaves_the_thread_clean(
    make_app: MakeApp, path: str
) -> None:
    """Some servers drop a body as soon as they have ``Content-Length`` bytes of it."""

    class Root(TGController):
        @expose()
        def missing(self) -> None:
            tg.abort(404)

        @expose()
        def crash(self) -> None:
            raise LookupError("no page")

        @expose()
        @stream
        def fail(self) -> Iterator[str]:
            raise LookupError("no first")
            yield ""

        @expose()
        @stream
        def abort(self) -> Iterator[str]:
            tg.abort(404)
            yield ""

    call = Call(make_app(Root()), path, checked=False)
    assert call.status[:3] in ("404", "500")
    next(call)
    call.drop()
    assert_thread_clean()


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
def test_not_modified_response_is_not_an_error(
    make_app: MakeApp, guarded: bool
) -> None:
    """A 304 has no body, so the server reads no chunk, and the stream is closed."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def tagged(self) -> Iterator[str]:
            tg.response.etag = "one"
            tg.response.conditional_response = True
            yield "a"
            yield "b"

    app = make_app(Root())
    call = get(
        app if guarded else without_guard(app), "/tagged", HTTP_IF_NONE_MATCH='"one"'
    )
    assert (call.status, call.text) == ("304 Not Modified", "")
    assert get(app, "/tagged", HTTP_IF_NONE_MATCH='"two"').text == "ab"


# The end of a body.


def test_closed_stream_does_not_look_complete(make_app: MakeApp) -> None:
    """A pull after ``close()`` raises an error instead of ending the body."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def endless(self) -> Iterator[str]:
            while True:
                yield "x"

    call = Call(make_app(Root()), "/endless", checked=False)
    assert next(call) == b"x"
    call.close()
    with pytest.raises(StreamError, match="was closed before its end"):
        next(call)


def test_close_during_a_pull_of_a_middleware_ends_the_stream(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """TG's generators refuse ``close()`` while they run. The guard does not raise."""
    working, go_on = threading.Event(), threading.Event()

    class SlowMiddleware(Middleware):
        def __call__(self, environ: Any, start_response: Any) -> Iterator[bytes]:
            body = self.app(environ, start_response)
            return self.relay(body)

        def relay(self, body: Any) -> Iterator[bytes]:
            try:
                for number, chunk in enumerate(body):
                    if number == 1:
                        working.set()
                        go_on.wait(10)
                    yield chunk
            finally:
                body.close()

    with install_middleware(SlowMiddleware):
        app = make_app(make_root())
    call = Call(app, "/words", checked=False)
    assert next(call) == b"one"
    puller = threading.Thread(target=lambda: next(call, None))
    puller.start()
    assert working.wait(10)
    call.close()
    go_on.set()
    puller.join()
    assert [report.reason for report in reports] == ["disconnected"]


def test_error_in_close_reaches_the_server(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The guard does not swallow the error of a body that fails in ``close()``."""

    def fail_in_close(response: Any) -> None:
        response.app_iter = failing(response.app_iter)

    def failing(app_iter: Iterable[bytes]) -> Iterator[bytes]:
        try:
            yield from app_iter
        finally:
            raise ValueError("no close")

    app = make_app(make_root(), plug=plug_with_wrapper(fail_in_close), **UNTRACED)
    call = Call(app, "/words", checked=False)
    next(call)
    with pytest.raises(ValueError, match="no close"):
        call.close()
    call.drop()
    assert [report.reason for report in reports] == ["disconnected"]


# Middlewares inside the guard.


class ErrorPageMiddleware(Middleware):
    """A WSGI middleware that reports an error with ``exc_info``, as in PEP 3333."""

    def __call__(self, environ: Any, start_response: Any) -> Iterator[bytes]:
        try:
            yield from self.app(environ, start_response)
        except LookupError:
            start_response("500 Oh", [], sys.exc_info())
            yield b"an error page"


def test_second_start_response_with_exc_info_reaches_the_server(
    make_app: MakeApp,
) -> None:
    """The server sends the error page if it has sent nothing, and aborts otherwise."""
    with install_middleware(ErrorPageMiddleware):
        app = make_app(make_root(), **UNTRACED)
    call = Call(app, "/crash", checked=False)
    assert list(call) == [b"an error page"]
    assert call.status == "500 Oh"
    assert_failure_reaches_the_server(app, checked=False)


class BufferingMiddleware(Middleware):
    """A middleware that reads the whole response before it sends any of it."""

    def __call__(self, environ: Any, start_response: Any) -> Any:
        response = webob.Request(environ).get_response(self.app)
        response.body = response.body.upper()
        return response(environ, start_response)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("hook", HOOKS)
def test_response_of_a_buffering_middleware_is_complete_or_an_error(
    make_app: MakeApp, sqlite_model: Model, wiring: dict[str, Any], hook: str
) -> None:
    """It does not stream, and a failed stream does not become a 200."""
    with install_middleware(BufferingMiddleware, hook):
        app = make_app(make_root(), sqlite_model, **wiring)
    call = Call(app, "/words", checked=False)
    assert (call.read(), call.status, call.starts) == (b"ONETWO", "200 OK", 1)
    call.close()
    try:
        failed = Call(app, "/fail", checked=False)
        failed.read()
        assert failed.status.startswith("500")
        failed.close()
    except LookupError as error:
        assert str(error) == "no third"
    assert_clean(sqlite_model)


class ReadingMiddleware(Middleware):
    """A middleware that reads a body within its own call, in several ways."""

    def __init__(self, app: Any, how: str) -> None:
        super().__init__(app)
        self.how = how

    def __call__(self, environ: Any, start_response: Any) -> Any:
        if self.how == "write":
            return self.write(environ, start_response)
        body = self.app(environ, start_response)
        try:
            if self.how == "all":
                return [b"".join(body)]
            chunks = iter(body)
            return itertools.chain([next(chunks)], list(chunks))
        finally:
            if hasattr(body, "close"):
                body.close()

    def write(self, environ: Any, start_response: Any) -> list[bytes]:
        writes: list[Any] = []

        def start(*args: Any) -> Any:
            writes.append(start_response(*args))
            return writes[-1]

        body = self.app(environ, start)
        try:
            for chunk in body:
                writes[-1](chunk)
        finally:
            if hasattr(body, "close"):
                body.close()
        return []


def make_interrupted_root(end: str, drainers: list[threading.Thread]) -> TGController:
    """Return a controller whose stream is interrupted.

    :param end: the number of the item that fails, or ``end``, ``expired``, ``drained``.
    :param drainers: gets the threads that drain the stream.
    """

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(max_seconds=0.1 if end == "expired" else None)
        def index(self) -> Iterator[str]:
            for number in range(3):
                if end == str(number):
                    raise LookupError("no more")
                yield "x"
            while end == "expired":
                yield "x"
            if end == "drained":
                drainers.append(threading.Thread(target=tgstream.drain))
                drainers[-1].start()
            while end == "drained":
                yield "x"
            if end == "end":
                raise LookupError("no end")

        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            yield "one"
            yield "two"

    return Root()


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    "wiring",
    [
        pytest.param(TRACED, id="traced"),
        pytest.param(UNTRACED, id="untraced"),
        pytest.param(DEBUGGED, id="debugged"),
    ],
)
@pytest.mark.parametrize("how", ["all", "list", "write"])
@pytest.mark.parametrize("end", ["0", "1", "2", "end", "expired", "drained"])
def test_failure_reaches_the_server_after_a_middleware_has_read_the_body(
    make_app: MakeApp, wiring: dict[str, Any], how: str, end: str, hook: str
) -> None:
    """The response is a 500, or is aborted if a part of it was sent."""
    drainers: list[threading.Thread] = []
    with install_middleware(partial(ReadingMiddleware, how=how), hook):
        app = make_app(make_interrupted_root(end, drainers), **wiring)
    status, _, errors = serve(app, "/")
    if how == "write" and end != "0":
        assert status == "200 OK"
        assert "Traceback" in errors
    else:
        assert status.upper() == "500 INTERNAL SERVER ERROR"
    stop_draining()
    if how != "write":
        with contextlib.suppress(LookupError, StreamError):
            call = Call(app, checked=False, lenient=True)
            call.read()
            assert call.status.upper() == "500 INTERNAL SERVER ERROR"
    for drainer in drainers:
        drainer.join()
    stop_draining()
    assert serve(app, "/words")[1].endswith("onetwo")


class DrainingMiddleware(Middleware):
    """A middleware during whose call the process begins to drain."""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        body = self.app(environ, start_response)
        assert drain(timeout=10)
        return body


@pytest.mark.parametrize("wiring", WIRINGS)
def test_stream_that_is_drained_before_its_first_pull_is_aborted(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any]
) -> None:
    """The first chunk alone does not look like a complete response."""
    with install_middleware(DrainingMiddleware):
        app = make_app(make_root(), **wiring)
    call = Call(app, "/words")
    with pytest.raises(StreamError, match="was drained before its end"):
        call.read()
    assert call.starts == 1
    assert [report.reason for report in reports] == ["drained"]


def test_error_page_of_a_buffering_middleware_is_sent(make_app: MakeApp) -> None:
    """The guard does not replace the error page that a middleware has made."""

    class ReadingErrorPageMiddleware(Middleware):
        def __call__(self, environ: Any, start_response: Any) -> list[bytes]:
            try:
                return [b"".join(self.app(environ, start_response))]
            except LookupError:
                start_response("502 Oh", [], sys.exc_info())
                return [b"an error page"]

    with install_middleware(ReadingErrorPageMiddleware):
        app = make_app(make_interrupted_root("1", []), **UNTRACED)
    status, rest, _ = serve(app, "/")
    assert status == "502 Oh"
    assert rest.endswith("an error page")


class ConnectionCloseMiddleware(Middleware):
    """A middleware that adds a header which a WSGI server refuses."""

    def __call__(self, environ: Any, start_response: Any) -> Any:
        def start(status: str, headers: Any, exc_info: Any = None) -> Any:
            return start_response(
                status, [*headers, ("Connection", "close")], *filter(None, [exc_info])
            )

        return self.app(environ, start)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
def test_response_that_the_server_refuses_is_a_server_error(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any], guarded: bool
) -> None:
    """backlash swallows the server's exception, and tgstream raises it again."""
    with install_middleware(ConnectionCloseMiddleware):
        app = make_app(make_root(), **wiring)
    app = app if guarded else without_guard(app)
    status, _, _ = serve(app, "/words")
    assert status == "500 Internal Server Error"
    assert [report.reason for report in reports] == ["failed"]
    assert isinstance(reports[0].error, AssertionError)
    if guarded:
        assert serve(app, "/plain")[0] == "500 Internal Server Error"
    # TG's debug mode keeps the context of a failed request until the next request.
    get(make_app(make_root()), "/plain")


class GzipMiddleware(Middleware):
    """A middleware that compresses every body, whatever the method is."""

    def __init__(self, app: Any, lazy: bool) -> None:
        super().__init__(app)
        self.lazy = lazy

    def __call__(self, environ: Any, start_response: Any) -> Any:
        if self.lazy:
            return self.compress(environ, start_response)
        return list(self.compress(environ, start_response))

    def compress(self, environ: Any, start_response: Any) -> Iterator[bytes]:
        started: list[Any] = []
        body = self.app(environ, lambda *args: started.append(args))
        data = gzip.compress(b"".join(body))
        if hasattr(body, "close"):
            body.close()
        status, headers = started[-1][:2]
        headers = [header for header in headers if header[0] != "Content-Length"]
        headers += [("Content-Encoding", "gzip"), ("Content-Length", str(len(data)))]
        start_response(status, headers)
        yield data[:10]
        yield data[10:]


@pytest.mark.parametrize(
    ("hook", "lazy"),
    [(HOOKS[0], False), (HOOKS[1], False), (HOOKS[1], True)],
    ids=["inner", "outer", "lazy"],
)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_response_without_a_body_has_none_after_compression(
    make_app: MakeApp, wiring: dict[str, Any], hook: str, lazy: bool
) -> None:
    """The guard removes the output of a compressor, and its ``Content-Length``."""
    with install_middleware(partial(GzipMiddleware, lazy=lazy), hook):
        app = make_app(make_root(), **wiring)
    for path in "/words", "/measured":
        call = get(app, path, method="HEAD", checked=False)
        assert (call.status, call.text) == ("200 OK", "")
        assert "Content-Length" not in call.headers
    call = get(app, "/empty", checked=False)
    assert (call.status, call.text) == ("204 No Content", "")
    assert "Content-Length" not in call.headers
    call = Call(app, "/measured", checked=False)
    assert gzip.decompress(call.read()) == b"12345"


def test_guard_has_the_attributes_of_the_wrapped_application(make_app: MakeApp) -> None:
    """Code that follows the chain of middlewares can pass through the guard."""
    app = make_app(make_root())
    assert app.application is app.app.application
    assert not hasattr(app, "no_such")
    assert copy.copy(app).app is app.app
    assert not hasattr(Guard.__new__(Guard), "app")


def test_stream_that_ends_while_the_guard_closes_it_raises_no_error() -> None:
    """Another thread may end it between any two byte codes."""

    class Ending(Outcome):
        """An outcome whose stream ends when the guard looks for it."""

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name == "_body":
                self._body = None
            return value

    outcome, body = Ending(), io.BytesIO()
    outcome.__dict__["_body"] = body
    outcome.close()
    assert body.closed
    outcome.close()
