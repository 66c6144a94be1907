"""The way out of the application: errors, late changes, and the guard around TG."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import itertools
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.handlers import SimpleHandler
from wsgiref.util import setup_testing_defaults

import pytest
import tg
import transaction
import webob
from tg import TGController, abort, expose, flash, redirect
from tg.appwrappers.base import ApplicationWrapper
from transaction.interfaces import TransientError

import tgstream
from tests.conftest import MakeApp, assert_clean, assert_thread_clean
from tests.model import Model, User
from tests.wsgi import Call, get
from tgstream import Report, Stream, StreamError, current_stream, drain, stream
from tgstream.turbogears.guard import Guard, Outcome

TRACED = {"debug": False, "trace_errors__enable": True}
UNTRACED = {"debug": False, "trace_errors__enable": False}
DEBUGGED = {"debug": True}
WIRINGS = [
    pytest.param({**around, "registry_streaming": streaming}, id=f"{name}-{kind}")
    for (name, around), (kind, streaming) in itertools.product(
        [("traced", TRACED), ("untraced", UNTRACED), ("debugged", DEBUGGED)],
        [("streaming", True), ("buffered", False)],
    )
]
WIRINGS.append(pytest.param({**TRACED, "make_body_seekable": True}, id="seekable"))


def root() -> TGController:
    """Made in a test: what waits for TG's milestones is lost when they are reset."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def fail(self) -> Iterator[str]:
            yield "one"
            yield "two"
            raise LookupError("no third")

        @expose(content_type="text/plain")
        @stream
        def fail_at_once(self) -> Iterator[str]:
            raise LookupError("no first")
            yield

        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            yield "one"
            yield "two"

        @expose(content_type="text/plain")
        @stream
        def stop(self) -> Iterator[str]:
            yield "one"
            current_stream().close()
            yield "two"
            yield "three"

        @expose(content_type="text/plain")
        @stream
        def log(self) -> Iterator[str]:
            yield "one"
            tg.request.environ["wsgi.errors"].write("a line")
            tg.request.environ["wsgi.errors"].flush()
            yield "two"

        @expose()
        def plain(self) -> str:
            return "plain"

        @expose()
        def crash(self) -> str:
            raise LookupError("no page")

    return Root()


def unplugged(app: Any) -> Any:
    """The application as it is when it was made before tgstream was imported."""
    return app.app


# A failure after the first chunk.


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("plugged", [True, False], ids=["plugged", "unplugged"])
def test_failure_breaks_the_transfer(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
    plugged: bool,
) -> None:
    """What the generator raises reaches the server, and no text but its own."""
    app = make_app(root(), sqlite_model, **wiring)
    call = Call(app if plugged else unplugged(app), "/fail")
    assert [next(call), next(call)] == [b"one", b"two"]
    with pytest.raises(LookupError, match="no third"):
        next(call)
    call.close()
    assert call.starts == 1
    assert [report.reason for report in reports] == ["failed"]
    assert_clean(sqlite_model)


@pytest.mark.parametrize("path", ["/missing", "/crash", "/early", "/nothing"])
def test_error_page_that_is_dropped_leaves_nothing(
    make_app: MakeApp, path: str
) -> None:
    """Some servers drop a body once they have its ``Content-Length``."""
    app = make_app(Early())
    call = Call(app, path, checked=False)
    assert call.status[:3] in ("404", "500")
    next(call)
    call.drop()
    assert_thread_clean()


class Early(TGController):
    """Pages and streams that answer with an error."""

    @expose()
    def missing(self) -> None:
        tg.abort(404)

    @expose()
    def crash(self) -> None:
        raise LookupError("no page")

    @expose()
    @stream
    def early(self) -> Iterator[str]:
        raise LookupError("no first")
        yield ""

    @expose()
    @stream
    def nothing(self) -> Iterator[str]:
        tg.abort(404)
        yield ""


@pytest.mark.parametrize("wiring", WIRINGS)
def test_failure_breaks_without_a_database(
    make_app: MakeApp, wiring: dict[str, Any]
) -> None:
    """Without TG's generator for the database session it is the same."""
    app = make_app(root(), tm__enabled=False, **wiring)
    for each in app, unplugged(app):
        call = Call(each, "/fail")
        assert [next(call), next(call)] == [b"one", b"two"]
        with pytest.raises(LookupError, match="no third"):
            next(call)
        call.close()
        assert_thread_clean()


@pytest.mark.parametrize("wiring", WIRINGS)
def test_guard_holds_on_a_lenient_server(
    make_app: MakeApp, wiring: dict[str, Any]
) -> None:
    """A server that takes a second ``start_response`` gets none, and no HTML."""
    call = Call(make_app(root(), **wiring), "/fail", lenient=True)
    assert [next(call), next(call)] == [b"one", b"two"]
    with pytest.raises(LookupError, match="no third"):
        next(call)
    call.close()
    assert call.starts == 1


BUFFERED = {"registry_streaming": False}


@pytest.mark.parametrize(
    ("wiring", "appended", "broken"),
    [
        pytest.param(TRACED, b"Internal Server Error", True, id="traced"),
        pytest.param(TRACED | BUFFERED, b"Internal Server Error", False, id="buffered"),
        pytest.param(DEBUGGED, b"<!DOCTYPE", False, id="debugged"),
        pytest.param(UNTRACED, b"", True, id="untraced"),
    ],
)
def test_unplugged_on_a_lenient_server_has_foreign_text(
    make_app: MakeApp, wiring: dict[str, Any], appended: bytes, broken: bool
) -> None:
    """Left open without the plug: backlash's text, and with it even a whole transfer
    where ``debug`` is on or ``registry_streaming`` is off; the plug closes both."""
    call = Call(unplugged(make_app(root(), **wiring)), "/fail", lenient=True)
    received = [next(call), next(call)]
    error: BaseException | None = None
    try:
        received += call
    except LookupError as raised:
        error = raised
    call.close()
    assert appended in b"".join(received[2:])
    assert bool(appended) == bool(received[2:])
    assert (error is not None) is broken


def test_failure_is_told_to_backlash(make_app: MakeApp) -> None:
    """Who asked TG for error reports gets one, with the request it belongs to."""
    told = []

    class Reporter:
        def report(self, traceback: Any) -> None:
            told.append((traceback.exception, traceback.context["request"].path))

    app = make_app(root(), trace_errors__reporters=[Reporter()])
    for each in app, unplugged(app):
        call = Call(each, "/fail")
        with pytest.raises(LookupError):
            call.read()
    assert told == [("LookupError: no third", "/fail")] * 2


def test_unplugged_application_is_told_so_once(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """One line in the log says what is missing and how to mend it."""
    app = make_app(root())
    assert get(app, "/words").text == "onetwo"
    assert caplog.messages == []
    for _ in range(2):
        assert get(unplugged(app), "/words").text == "onetwo"
    (line,) = caplog.messages
    assert "tgstream.plugme(base_config)" in line


@pytest.mark.parametrize("wiring", WIRINGS)
def test_guard_lets_ordinary_responses_be(
    make_app: MakeApp, wiring: dict[str, Any]
) -> None:
    """A page, a missing page and a failing one are what they are without the guard."""
    app = make_app(root(), **wiring)
    assert get(app, "/plain").text == "plain"
    assert get(app, "/missing").status == "404 Not Found"
    if wiring.get("trace_errors__enable") is False:
        with pytest.raises(LookupError):
            Call(app, "/crash", checked=False)
    else:
        assert get(app, "/crash").status == "500 INTERNAL SERVER ERROR"
    assert get(app, "/plain").text == "plain"  # TG's debug mode keeps a context so long


class Shouting(ApplicationWrapper):
    """Takes a response's body into one of its own, as compression does."""

    def __call__(self, controller: Any, environ: Any, context: Any) -> Any:
        response = self.next_handler(controller, environ, context)
        response.app_iter = shout(response.app_iter)
        return response


def shout(app_iter: Iterable[bytes]) -> Iterator[bytes]:
    try:
        for chunk in app_iter:
            yield chunk.upper()
    finally:
        if hasattr(app_iter, "close"):
            app_iter.close()


def wrapping(wrapper: Any) -> Any:
    """What plugs tgstream, and ``wrapper`` beside it."""

    def plug(base_config: Any) -> None:
        tgstream.plugme(base_config)
        base_config.register_application_wrapper(wrapper)

    return plug


@pytest.mark.parametrize("wiring", WIRINGS)
def test_wrapped_body_is_a_stream_all_the_same(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any]
) -> None:
    """An application wrapper that takes the body into its own changes nothing else."""
    app = make_app(root(), plug=wrapping(Shouting), **wiring)
    call = Call(app, "/words")
    assert "Content-Length" not in call.headers
    assert next(call) == b"ONE"
    assert_thread_clean()
    assert next(call) == b"TWO"
    assert_thread_clean()
    assert call.read() == b""
    call = Call(app, "/fail")
    assert [next(call), next(call)] == [b"ONE", b"TWO"]
    with pytest.raises(LookupError):
        next(call)
    call.close()
    assert [report.reason for report in reports] == ["completed", "failed"]


@pytest.mark.parametrize("kept", [True, False])
def test_replaced_body_ends_the_stream(
    make_app: MakeApp, reports: list[Report], kept: bool
) -> None:
    """An application wrapper that answers something else leaves no stream open, not
    even one that somebody still holds."""
    held = []

    class Replacing(ApplicationWrapper):
        def __call__(self, controller: Any, environ: Any, context: Any) -> Any:
            response = self.next_handler(controller, environ, context)
            if kept:
                held.append(response.app_iter)
            response.text = "another"
            return response

    call = get(make_app(root(), plug=wrapping(Replacing)), "/words")
    assert call.text == "another"
    assert call.headers["Content-Length"] == "7"
    assert [report.reason for report in reports] == ["disconnected"]


class Joining(ApplicationWrapper):
    """Reads the whole body inside the application, as one that minifies would."""

    def __call__(self, controller: Any, environ: Any, context: Any) -> Any:
        response = self.next_handler(controller, environ, context)
        response.body = response.body + b"!"
        return response


def test_body_read_inside_the_application_is_whole(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """What an application wrapper reads is the whole of it, or an error."""
    app = make_app(
        root(), sqlite_model, plug=wrapping(Joining), trace_errors__enable=False
    )
    call = get(app, "/words")
    assert (call.text, call.headers["Content-Length"]) == ("onetwo!", "7")
    for path, error in ("/fail", LookupError), ("/stop", StreamError):
        with pytest.raises(error):
            Call(app, path, checked=False)
    ends = [report.reason for report in reports]
    assert ends == ["completed", "failed", "disconnected"]
    assert_clean(sqlite_model)


class Forwarding:
    """A WSGI middleware that reports an error as PEP 3333 says: with ``exc_info``."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, environ: Any, start_response: Any) -> Iterator[bytes]:
        try:
            yield from self.app(environ, start_response)
        except LookupError:
            start_response("500 Oh", [], sys.exc_info())
            yield b"an error page"


def test_guard_lets_a_correct_middleware_be(make_app: MakeApp) -> None:
    """A second ``start_response`` with ``exc_info`` is for the server to decide."""

    def plug(base_config: Any) -> None:
        tgstream.plugme(base_config)
        tg.hooks.register("before_wsgi_middlewares", Forwarding)

    app = make_app(root(), plug=plug, trace_errors__enable=False)
    try:
        call = Call(app, "/crash", checked=False)
        assert list(call) == [b"an error page"]
        assert call.status == "500 Oh"
        call = Call(app, "/fail", checked=False)
        assert [next(call), next(call)] == [b"one", b"two"]
        with pytest.raises(LookupError, match="no third"):
            next(call)
    finally:
        tg.hooks.disconnect("before_wsgi_middlewares", Forwarding)


class Collecting:
    """A middleware that has all of a response before it sends any of it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, environ: Any, start_response: Any) -> Any:
        response = webob.Request(environ).get_response(self.app)
        response.body = response.body.upper()
        return response(environ, start_response)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("hook", ["before_wsgi_middlewares", "after_wsgi_middlewares"])
def test_guard_lets_a_middleware_that_collects_be(
    make_app: MakeApp, sqlite_model: Model, wiring: dict[str, Any], hook: str
) -> None:
    """It is no stream then, and its response whole; one that failed is no 200."""
    tg.hooks.register(hook, Collecting)
    try:
        app = make_app(root(), sqlite_model, **wiring)
    finally:
        tg.hooks.disconnect(hook, Collecting)
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


def test_guard_lets_an_error_in_close_be(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """What a foreign body raises when it is closed is the server's to see."""

    class Failing(ApplicationWrapper):
        def __call__(self, controller: Any, environ: Any, context: Any) -> Any:
            response = self.next_handler(controller, environ, context)
            response.app_iter = failing(response.app_iter)
            return response

    def failing(app_iter: Iterable[bytes]) -> Iterator[bytes]:
        try:
            yield from app_iter
        finally:
            raise ValueError("no close")

    app = make_app(root(), plug=wrapping(Failing), trace_errors__enable=False)
    call = Call(app, "/words", checked=False)
    next(call)
    with pytest.raises(ValueError, match="no close"):
        call.close()
    call.drop()
    assert [report.reason for report in reports] == ["disconnected"]


def test_unplugged_stream_may_use_the_error_log(make_app: MakeApp) -> None:
    """``wsgi.errors`` is what it was, whatever tgstream listens for."""
    call = get(unplugged(make_app(root())), "/log")
    assert call.text == "onetwo"
    assert call.errors.getvalue() == "a line"


# Before the first chunk.


def early(late: bool = False) -> TGController:
    """Streams that do things before their first yield, or right after it."""

    class ErrorController(TGController):
        @expose()
        def document(self) -> str:
            return f"page {tg.response.status_int}"

    class Root(TGController):
        error = ErrorController()

        @expose()
        @stream
        def abort(self) -> Iterator[str]:
            abort(404)
            yield "never"

        @expose()
        @stream
        def redirect(self) -> Iterator[str]:
            flash("moved")
            redirect("/elsewhere")
            yield "never"

        @expose()
        @stream
        def fail(self) -> Iterator[str]:
            raise LookupError("no first")
            yield

        @expose()
        @stream
        def set(self, *what: str) -> Iterator[str]:
            if late:
                yield "first"
            if "header" in what:
                tg.response.headers["X-Answer"] = "42"
            if "cookie" in what:
                tg.response.set_cookie("taste", "sweet")
            if "status" in what:
                tg.response.status = 202
            if "session" in what:
                tg.session["name"] = "ada"
                tg.session.save()
            if "flash" in what:
                flash("well done")
            yield "last"

        @expose()
        @stream
        def missing(self) -> Iterator[str]:
            tg.response.status = 404
            yield "not"
            yield "shown"

        @expose()
        def name(self) -> str:
            return str(tg.session.get("name"))

    return Root()


SESSION = {"session__enabled": True, "session__type": "memory"}
PAGES = {"errorpage__enabled": True, "errorpage__status_codes": [403, 404]}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_response_before_the_first_chunk_is_an_ordinary_one(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any]
) -> None:
    """``abort`` and ``redirect`` work before the first yield, and report nothing."""
    app = make_app(early(), **wiring)
    assert get(app, "/abort").status == "404 Not Found"
    call = get(app, "/redirect")
    assert call.status == "302 Found"
    assert call.headers["Location"].endswith("/elsewhere")
    assert any("moved" in cookie for cookie in call.cookies)
    assert reports == []


@pytest.mark.parametrize("wiring", WIRINGS)
def test_error_page_shows_before_the_first_chunk(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any]
) -> None:
    """The application's own page stands for ``abort``, and for an error."""
    app = make_app(
        early(), **PAGES, **wiring, errorpage__handle_exceptions=True, **SESSION
    )
    call = get(app, "/abort")
    assert (call.status, call.text) == ("404 Not Found", "page 404")
    assert reports == []
    call = get(app, "/fail")
    assert (call.status, call.text) == ("500 Internal Server Error", "page 500")
    assert [report.reason for report in reports] == ["failed"]


@pytest.mark.parametrize("wiring", WIRINGS)
def test_error_before_the_first_chunk_is_a_server_error(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any]
) -> None:
    """Without a page of its own, an error is TG's 500, or the server's."""
    app = make_app(early(), **wiring)
    if wiring.get("trace_errors__enable") is False:
        with pytest.raises(LookupError):
            Call(app, "/fail", checked=False)
    else:
        assert get(app, "/fail").status == "500 INTERNAL SERVER ERROR"
    assert [report.reason for report in reports] == ["failed"]
    get(app, "/set")  # TG's debug mode keeps a context until the next request


def test_error_page_for_a_status_ends_the_stream(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """When the page for the status that the generator set leaves, it is closed."""
    call = get(make_app(early(), sqlite_model, **PAGES), "/missing")
    assert (call.status, call.text) == ("404 Not Found", "page 404")
    assert [report.reason for report in reports] == ["disconnected"]
    assert_clean(sqlite_model)


def test_change_before_the_first_chunk_arrives(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """A header, a cookie, a status, the session and a flash set in time are there."""
    app = make_app(early(), **SESSION)
    call = get(app, "/set/header/cookie/status/session/flash")
    assert (call.status, call.text) == ("202 Accepted", "last")
    assert call.headers["X-Answer"] == "42"
    cookies = [cookie.partition(";")[0].strip() for cookie in call.cookies]
    assert "taste=sweet" in cookies
    assert any(c.startswith("webflash=") and "well" in c for c in cookies)
    (session,) = [c for c in cookies if c.startswith("beaker.session.id=")]
    assert get(app, "/name", HTTP_COOKIE=session).text == "ada"
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("header", "header X-Answer"),
        ("cookie", "header Set-Cookie"),
        ("status", "status"),
        ("session", "tg.session"),
        ("flash", "header Set-Cookie"),
        ("header/status/session", "header X-Answer, status, tg.session"),
    ],
)
def test_change_after_the_first_chunk_is_warned_of_once(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture, what: str, named: str
) -> None:
    """What cannot reach the client any more is named in one warning, at the end."""
    app = make_app(early(late=True), **SESSION)
    assert get(app, f"/set/{what}").text == "firstlast"
    (line,) = caplog.messages
    assert f"after the response had started: {named}. The client" in line


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


@pytest.mark.parametrize("wiring", WIRINGS)
def test_change_that_cannot_be_compared_changes_nothing(
    make_app: MakeApp, wiring: dict[str, Any], ended: Callable[[], Report]
) -> None:
    """A header that no server could send comes too late to make the stream fail."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def index(self) -> Iterator[str]:
            yield "one"
            tg.response.headerlist.append(("X-Names", ["ada"]))
            yield "two"

    assert get(make_app(Root(), **wiring)).text == "onetwo"
    report = ended()
    assert (report.reason, report.error) == ("completed", None)


def test_session_in_use_is_not_warned_of(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """A session that the stream only reads, or that was saved in time, is no change."""

    class Root(TGController):
        @expose()
        @stream
        def read(self) -> Iterator[str]:
            tg.session["visits"] = 1
            tg.session.save()
            yield "one"
            yield str(tg.session["visits"])

    assert get(make_app(Root(), **SESSION), "/read").text == "one1"
    assert caplog.messages == []


# HEAD.


def test_head_runs_nothing(
    make_app: MakeApp, reports: list[Report], caplog: pytest.LogCaptureFixture
) -> None:
    """A HEAD request runs nothing of the generator, and neither logs nor reports."""
    caplog.set_level(logging.DEBUG, "tgstream")
    call = get(make_app(early()), "/abort", method="HEAD")
    assert (call.status, call.text) == ("200 OK", "")
    assert reports == []
    assert [r for r in caplog.records if r.name == "tgstream"] == []


def test_head_closes_an_open_file(make_app: MakeApp) -> None:
    """A file that the controller has opened is closed, unread."""
    files = []

    class Root(TGController):
        @expose(content_type="application/octet-stream")
        @stream
        def file(self) -> Any:
            files.append(io.BytesIO(b"data"))
            return files[-1]

    app = make_app(Root())
    assert get(app, "/file", method="HEAD").text == ""
    assert get(app, "/file").text == "data"
    assert [file.closed for file in files] == [True, True]


def test_close_between_pulls_leaves_no_whole_body(make_app: MakeApp) -> None:
    """Who pulls a stream that somebody has closed learns that it is not all."""

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


def test_close_while_a_middleware_works_on_a_chunk_does_not_raise(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """TG's generators are busy then, and refuse; the guard does not, and it ends."""
    working, go_on = threading.Event(), threading.Event()

    class Working:
        def __init__(self, app: Any) -> None:
            self.app = app

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

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def two(self) -> Iterator[str]:
            yield "a"
            yield "b"

    tg.hooks.register("before_wsgi_middlewares", Working)
    try:
        app = make_app(Root())
    finally:
        tg.hooks.disconnect("before_wsgi_middlewares", Working)
    call = Call(app, "/two", checked=False)
    assert next(call) == b"a"
    puller = threading.Thread(target=lambda: next(call, None))
    puller.start()
    assert working.wait(10)
    call.close()
    go_on.set()
    puller.join()
    assert [report.reason for report in reports] == ["disconnected"]


@pytest.mark.parametrize("plugged", [True, False])
def test_not_modified_stream_ends_as_it_should(
    make_app: MakeApp, plugged: bool
) -> None:
    """A 304 has no body: nobody pulls the stream, and nothing of it was cut."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def tagged(self) -> Iterator[str]:
            tg.response.etag = "one"
            tg.response.conditional_response = True
            yield "a"
            yield "b"

    app = make_app(Root())
    call = get(app if plugged else app.app, "/tagged", HTTP_IF_NONE_MATCH='"one"')
    assert (call.status, call.text) == ("304 Not Modified", "")
    assert get(app, "/tagged", HTTP_IF_NONE_MATCH='"two"').text == "ab"


# Headers and statuses that cannot be sent.


def served(app: Any, path: str) -> tuple[str, str, str]:
    """What wsgiref, which is strict, makes of a GET: status, the rest, and its log."""
    out, errors = io.BytesIO(), io.StringIO()
    environ: dict[str, Any] = {"PATH_INFO": path, "SCRIPT_NAME": ""}
    setup_testing_defaults(environ)
    SimpleHandler(io.BytesIO(), out, errors, environ).run(app)
    status, _, rest = out.getvalue().decode("latin-1").partition("\r\n")
    return status.partition(" ")[2], rest, errors.getvalue()


def headed() -> TGController:
    """Streams that set a header or a status, in the controller or the generator."""

    class ErrorController(TGController):
        @expose()
        def document(self) -> str:
            return f"page {tg.response.status_int}"

    class Root(TGController):
        error = ErrorController()
        header: tuple[Any, Any] = ("X-Answer", "42")
        ran = 0

        def set(self) -> None:
            tg.response.headerlist.append(self.header)

        def items(self, count: int) -> Iterator[str]:
            type(self).ran += 1
            for number in range(count):
                yield str(number)

        @expose()
        @stream
        def controller(self, count: str = "2") -> Iterator[str]:
            self.set()
            return self.items(int(count))

        @expose()
        @stream
        def generator(self, count: str = "2") -> Iterator[str]:
            self.set()
            yield from self.items(int(count))

        @expose()
        @stream(chunk_size=1000)
        def small(self) -> Iterator[str]:
            self.set()
            yield from self.items(2)

        @expose()
        @stream
        def status(self, status: str, count: str = "0") -> Iterator[str]:
            tg.response.status = status
            yield from self.items(int(count))

        @expose()
        @stream(length=5)
        def measured(self) -> Iterator[str]:
            yield "12345"

    return Root()


HEADED = ["/controller", "/generator", "/small"]


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("plugged", [True, False], ids=["plugged", "unplugged"])
def test_hop_by_hop_header_of_a_stream_is_dropped_with_one_warning(
    make_app: MakeApp,
    caplog: pytest.LogCaptureFixture,
    wiring: dict[str, Any],
    plugged: bool,
) -> None:
    """The stream is sent without it, and the log names it once for each controller."""
    root = headed()
    type(root).header = ("Connection", "keep-alive")
    app = make_app(root, **wiring)
    app = app if plugged else unplugged(app)
    for path in HEADED * 2:
        status, rest, _ = served(app, path)
        assert status == "200 OK"
        assert rest.endswith("\r\n\r\n01")
        assert "Connection" not in rest
    lines = [line for line in caplog.messages if "Connection" in line]
    assert [line.partition(" ")[0] for line in lines] == [
        f"Root.{path[1:]}" for path in HEADED
    ]


UNSENDABLE: list[tuple[Any, Any]] = [
    ("X-Answer", "a\nX-Evil: 1"),
    ("X-Answer", "a\0"),
    ("X-Answer", "\u20ac"),
    ("X-Answer", 42),
    ("X-Answer", b"42"),
    ("X-Answer", None),
    ("X Answer\r\n", "42"),
    ("X-\u20ac", "42"),
    (b"X-Answer", "42"),
]


@pytest.mark.parametrize("header", UNSENDABLE, ids=ascii)
@pytest.mark.parametrize("plugged", [True, False], ids=["plugged", "unplugged"])
def test_header_that_cannot_be_sent_is_a_server_error(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    header: Any,
    plugged: bool,
) -> None:
    """In every wiring; a stream that was not complete ends as failed."""
    root = headed()
    type(root).header = header
    for wiring in TRACED, UNTRACED, DEBUGGED:
        app = make_app(root, sqlite_model, **wiring)
        app = app if plugged else unplugged(app)
        for path in HEADED:
            status, rest, _ = served(app, path)
            assert status.upper() == "500 INTERNAL SERVER ERROR"
            assert "X-Evil" not in rest.partition("\r\n\r\n")[0]
        get(app, "/measured")  # TG's debug mode keeps a context until the next request
    assert [(each.controller, each.reason) for each in reports] == [
        ("Root.generator", "failed"),
        ("Root.small", "completed"),
        ("Root.measured", "completed"),
    ] * 3
    assert_clean(sqlite_model)


def test_header_that_cannot_be_sent_shows_the_error_page(make_app: MakeApp) -> None:
    """The error has the application's own page, and says which header it is."""
    root = headed()
    type(root).header = ("X-Answer", "a\nb")
    app = make_app(root, **PAGES, errorpage__handle_exceptions=True)
    for path in HEADED:
        call = get(app, path)
        assert (call.status, call.text) == ("500 Internal Server Error", "page 500")
        name = f"Root.{path[1:]}"
        errors = call.errors.getvalue()
        assert f"{name}: the value of the header X-Answer must be Latin-1" in errors
        assert "got '\\n' at position 1. Remove" in errors


def test_header_that_cannot_be_sent_fails_before_the_generator_runs(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """What the controller set is looked at first; a slot is free again."""
    root = headed()
    type(root).header = ("X-Answer", 42)
    app = make_app(root, **UNTRACED)
    for _ in range(2):
        with pytest.raises(StreamError, match="X-Answer must be a str, got int: 42"):
            Call(app, "/controller", checked=False)
    assert type(root).ran == 0
    assert reports == []


@pytest.mark.parametrize("plugged", [True, False], ids=["plugged", "unplugged"])
def test_header_of_an_application_wrapper_that_cannot_be_sent_is_a_server_error(
    make_app: MakeApp, reports: list[Report], plugged: bool
) -> None:
    """It is set when the stream has begun, which then fails, also when wrapped."""

    class Heading(Shouting):
        def __call__(self, controller: Any, environ: Any, context: Any) -> Any:
            response = super().__call__(controller, environ, context)
            response.headers["X-Answer"] = 42
            return response

    app = make_app(root(), plug=wrapping(Heading), **TRACED)
    status, _, _ = served(app if plugged else unplugged(app), "/words")
    assert status == "500 INTERNAL SERVER ERROR"
    assert [report.reason for report in reports] == ["failed"]
    assert isinstance(reports[0].error, StreamError)


class Keeping:
    """A middleware that adds a header which a WSGI server refuses."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, environ: Any, start_response: Any) -> Any:
        def start(status: str, headers: Any, exc_info: Any = None) -> Any:
            return start_response(
                status, [*headers, ("Connection", "close")], *filter(None, [exc_info])
            )

        return self.app(environ, start)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("plugged", [True, False], ids=["plugged", "unplugged"])
def test_response_that_the_server_refuses_is_a_server_error(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any], plugged: bool
) -> None:
    """backlash swallows the server's exception, which is raised all the same."""
    tg.hooks.register("before_wsgi_middlewares", Keeping)
    try:
        app = make_app(root(), **wiring)
    finally:
        tg.hooks.disconnect("before_wsgi_middlewares", Keeping)
    app = app if plugged else unplugged(app)
    status, _, _ = served(app, "/words")
    assert status == "500 Internal Server Error"
    assert [report.reason for report in reports] == ["failed"]
    assert isinstance(reports[0].error, AssertionError)
    if plugged:
        assert served(app, "/plain")[0] == "500 Internal Server Error"
    get(make_app(root()), "/plain")  # TG's debug mode keeps a context until then


@pytest.mark.parametrize("status", ["204 No Content", "205 Reset Content", "304 No"])
@pytest.mark.parametrize("count", [1, 2])
def test_status_without_a_body_refuses_items(
    make_app: MakeApp, sqlite_model: Model, status: str, count: int
) -> None:
    """An error before anything is sent, which says what to do."""
    app = make_app(headed(), sqlite_model, **UNTRACED)
    with pytest.raises(StreamError, match=f"{status[:3]}.*has no body"):
        Call(app, f"/status?status={status}&count={count}", checked=False)
    assert_clean(sqlite_model)


def test_status_of_an_application_wrapper_without_a_body_refuses_items(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """Whoever sets it: items of a response without a body are an error."""

    class Emptying(ApplicationWrapper):
        def __call__(self, controller: Any, environ: Any, context: Any) -> Any:
            response = self.next_handler(controller, environ, context)
            response.status = 101
            return response

    app = make_app(root(), plug=wrapping(Emptying), **UNTRACED)
    with pytest.raises(StreamError, match="101"):
        Call(app, "/words", checked=False)
    assert [report.reason for report in reports] == ["failed"]


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_status_without_a_body_is_sent_without_items(
    make_app: MakeApp, wiring: dict[str, Any], status: str
) -> None:
    """Neither a byte nor a Content-Length comes with it."""
    app = make_app(headed(), **wiring)
    call = get(app, f"/status?status={status}", checked=False)
    assert (call.status, call.text) == (status, "")
    assert "Content-Length" not in call.headers


def test_reset_content_has_a_length_of_zero(make_app: MakeApp) -> None:
    """A 205 is a response whose body is empty, which its length says."""
    call = get(make_app(headed()), "/status?status=205 Reset Content", checked=False)
    assert (call.text, call.headers["Content-Length"]) == ("", "0")


# Middlewares inside the guard.


class Reading:
    """Reads a body within its own call, in several ways."""

    how = "all"

    def __init__(self, app: Any) -> None:
        self.app = app

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


def ending_at(where: str, drainers: list[threading.Thread]) -> TGController:
    """A stream that ends early at a certain place.

    :param drainers: gets the threads that drain it.
    """

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(max_seconds=0.2 if where == "expired" else None)
        def index(self) -> Iterator[str]:
            for number in range(3):
                if where == str(number):
                    raise LookupError("no more")
                yield "x"
            while where == "expired":
                yield "x"
            if where == "drained":
                drainers.append(threading.Thread(target=tgstream.drain))
                drainers[-1].start()
            while where == "drained":
                yield "x"
            if where == "end":
                raise LookupError("no end")

        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            yield "one"
            yield "two"

    return Root()


@contextlib.contextmanager
def inside(middleware: Any, hook: str) -> Iterator[None]:
    """Applications that are made here have the middleware inside the guard."""
    tg.hooks.register(hook, middleware)
    try:
        yield
    finally:
        tg.hooks.disconnect(hook, middleware)


PLACES = ["before_wsgi_middlewares", "after_wsgi_middlewares"]


@pytest.mark.parametrize("hook", PLACES)
@pytest.mark.parametrize(
    "wiring",
    [
        pytest.param(TRACED, id="traced"),
        pytest.param(UNTRACED, id="untraced"),
        pytest.param(DEBUGGED, id="debugged"),
    ],
)
@pytest.mark.parametrize("how", ["all", "list", "write"])
@pytest.mark.parametrize("where", ["0", "1", "2", "end", "expired", "drained"])
def test_failure_reaches_the_server_though_a_middleware_has_read_the_body(
    make_app: MakeApp, wiring: dict[str, Any], how: str, where: str, hook: str
) -> None:
    """A 500 if nothing was sent, else an exception, which aborts the transfer."""
    drainers: list[threading.Thread] = []
    with inside(type("", (Reading,), {"how": how}), hook):
        app = make_app(ending_at(where, drainers), **wiring)
    status, _, errors = served(app, "/")
    if how == "write" and where != "0":
        assert status == "200 OK"
        assert "Traceback" in errors
    else:
        assert status.upper() == "500 INTERNAL SERVER ERROR"
    if how != "write":
        with contextlib.suppress(LookupError, StreamError):
            call = Call(app, checked=False, lenient=True)
            call.read()
            assert call.status.upper() == "500 INTERNAL SERVER ERROR"
    for drainer in drainers:
        drainer.join()
    assert served(app, "/words")[1].endswith("onetwo")


class Draining:
    """A middleware during whose call the process begins to drain."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        body = self.app(environ, start_response)
        assert drain(timeout=10)
        return body


@pytest.mark.parametrize("wiring", WIRINGS)
def test_stream_that_is_drained_before_the_server_has_it_is_aborted(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any]
) -> None:
    """Its one chunk is sent, and is not taken for a complete response."""
    with inside(Draining, "before_wsgi_middlewares"):
        app = make_app(root(), **wiring)
    call = Call(app, "/words")
    with pytest.raises(StreamError, match="was drained before its end"):
        call.read()
    assert call.starts == 1
    assert [report.reason for report in reports] == ["drained"]


def test_error_page_of_a_middleware_that_has_read_the_body_is_sent(
    make_app: MakeApp,
) -> None:
    """A middleware that tells of the failure itself is let be."""

    class Telling:
        def __init__(self, app: Any) -> None:
            self.app = app

        def __call__(self, environ: Any, start_response: Any) -> list[bytes]:
            try:
                return [b"".join(self.app(environ, start_response))]
            except LookupError:
                start_response("502 Oh", [], sys.exc_info())
                return [b"an error page"]

    with inside(Telling, "before_wsgi_middlewares"):
        app = make_app(ending_at("1", []), **UNTRACED)
    status, rest, _ = served(app, "/")
    assert status == "502 Oh"
    assert rest.endswith("an error page")


# The wrapped application, and HEAD.


def test_guard_has_the_attributes_of_what_it_wraps(make_app: MakeApp) -> None:
    """Code that walks from one middleware to the next finds its way."""
    app = make_app(root())
    assert app.application is app.app.application
    assert not hasattr(app, "no_such")
    assert copy.copy(app).app is app.app
    assert not hasattr(Guard.__new__(Guard), "app")


class Gzip:
    """Compresses what comes, as middlewares do that do not look at the method."""

    lazy = False

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, environ: Any, start_response: Any) -> Any:
        if self.lazy:
            return self.packed(environ, start_response)
        return list(self.packed(environ, start_response))

    def packed(self, environ: Any, start_response: Any) -> Iterator[bytes]:
        started: list[Any] = []
        body = self.app(environ, lambda *args: started.append(args))
        data = gzip.compress(b"".join(body))
        if hasattr(body, "close"):
            body.close()
        status, headers = started[-1][:2]
        headers = [each for each in headers if each[0] != "Content-Length"]
        headers += [("Content-Encoding", "gzip"), ("Content-Length", str(len(data)))]
        start_response(status, headers)
        yield data[:10]
        yield data[10:]


@pytest.mark.parametrize(
    ("hook", "lazy"),
    [(PLACES[0], False), (PLACES[1], False), (PLACES[1], True)],
    ids=["inner", "outer", "lazy"],
)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_head_has_no_body_whatever_a_middleware_makes_of_it(
    make_app: MakeApp, wiring: dict[str, Any], hook: str, lazy: bool
) -> None:
    """Neither the bytes of a compressor, nor their number as Content-Length."""
    with inside(type("", (Gzip,), {"lazy": lazy}), hook):
        app = make_app(headed(), **wiring)
    for path in "/controller", "/measured":
        call = get(app, path, method="HEAD", checked=False)
        assert (call.status, call.text) == ("200 OK", "")
        assert "Content-Length" not in call.headers
    call = get(app, "/status?status=204 No Content", checked=False)
    assert (call.status, call.text) == ("204 No Content", "")
    assert "Content-Length" not in call.headers
    call = Call(app, "/measured", checked=False)
    assert gzip.decompress(call.read()) == b"12345"


def test_head_keeps_a_declared_length(make_app: MakeApp) -> None:
    """HEAD tells the length that GET has."""
    call = get(make_app(headed()), "/measured", method="HEAD")
    assert (call.text, call.headers["Content-Length"]) == ("", "5")


# A request that runs again.


@pytest.mark.parametrize("inner", [True, False], ids=["after", "wrapper"])
@pytest.mark.parametrize("decorated", [True, False])
def test_request_that_is_retried_sends_its_second_stream_whole(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    inner: bool,
    decorated: bool,
) -> None:
    """The first attempt's stream has ended by then, with its slot and its session."""
    runs: list[int] = []

    def retry_once() -> None:
        if len(runs) == 1:
            transaction.abort()
            raise TransientError("again")

    class Root(TGController):
        @expose(content_type="text/plain")
        def index(self) -> Any:
            return items() if decorated else Stream(items(), limit=1)

        def _after(self, *args: Any, **params: Any) -> None:
            if inner:
                retry_once()

    def items() -> Iterator[str]:
        runs.append(sqlite_model.DBSession.query(User).count())
        yield "one"
        yield f"two {len(runs)}"

    if decorated:
        stream(limit=1)(Root.index)

    class Retrying(ApplicationWrapper):
        def __call__(self, controller: Any, environ: Any, context: Any) -> Any:
            response = self.next_handler(controller, environ, context)
            if not inner:
                retry_once()
            return response

    def plug(base_config: Any) -> None:
        tgstream.plugme(base_config)
        base_config.register_application_wrapper(Retrying, after=False)

    app = make_app(Root(), sqlite_model, plug=plug, tm__attempts=2)
    call = Call(app)
    assert [report.reason for report in reports] == ["disconnected"]
    assert call.read() == b"onetwo 2"
    assert runs == [0, 0]
    assert [report.reason for report in reports] == ["disconnected", "completed"]
    assert_clean(sqlite_model)
    assert get(app).text == "onetwo 3"
