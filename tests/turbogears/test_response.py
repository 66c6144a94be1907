"""The response of a stream: its body, late changes, and headers that cannot be sent."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tg
import transaction
from tg import TGController, expose, flash
from transaction.interfaces import TransientError

from tests.conftest import MakeApp, assert_clean, assert_thread_clean
from tests.model import Model, User
from tests.turbogears.support import (
    DEBUGGED,
    ERROR_PAGES,
    SESSION,
    TRACED,
    UNTRACED,
    WIRINGS,
    make_error_controller,
    make_root,
    plug_with_wrapper,
    serve,
    use_upper_case,
    without_guard,
)
from tests.wsgi import Call, get
from tgstream import Report, Stream, StreamError, stream

# Application wrappers that change the body.


@pytest.mark.parametrize("wiring", WIRINGS)
def test_body_inside_a_generator_of_an_application_wrapper_streams(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any]
) -> None:
    """The generator sends each chunk when it is made, and passes on an error."""
    app = make_app(make_root(), plug=plug_with_wrapper(use_upper_case), **wiring)
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
def test_stream_whose_body_is_replaced_is_closed(
    make_app: MakeApp, reports: list[Report], kept: bool
) -> None:
    """It is closed with the request, even if an application wrapper keeps it."""
    streams = []

    def replace(response: Any) -> None:
        if kept:
            streams.append(response.app_iter)
        response.text = "another"

    call = get(make_app(make_root(), plug=plug_with_wrapper(replace)), "/words")
    assert call.text == "another"
    assert call.headers["Content-Length"] == "7"
    assert [report.reason for report in reports] == ["disconnected"]


def test_body_that_an_application_wrapper_reads_is_complete_or_an_error(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """A wrapper that reads ``response.body`` cannot mistake a part for the body."""

    def append(response: Any) -> None:
        response.body = response.body + b"!"

    app = make_app(
        make_root(), sqlite_model, plug=plug_with_wrapper(append), **UNTRACED
    )
    call = get(app, "/words")
    assert (call.text, call.headers["Content-Length"]) == ("onetwo!", "7")
    for path, error in ("/fail", LookupError), ("/stop", StreamError):
        with pytest.raises(error):
            Call(app, path, checked=False)
    ends = [report.reason for report in reports]
    assert ends == ["completed", "failed", "disconnected"]
    assert_clean(sqlite_model)


@pytest.mark.parametrize("in_controller", [True, False], ids=["after", "wrapper"])
@pytest.mark.parametrize("decorated", [True, False])
def test_retried_request_sends_its_second_stream(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    in_controller: bool,
    decorated: bool,
) -> None:
    """``tm.attempts`` first ends the first stream, with its slot and its session."""
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
            if in_controller:
                retry_once()

    def items() -> Iterator[str]:
        runs.append(sqlite_model.DBSession.query(User).count())
        yield "one"
        yield f"two {len(runs)}"

    if decorated:
        stream(limit=1)(Root.index)

    def retry_outside(response: Any) -> None:
        if not in_controller:
            retry_once()

    plug = plug_with_wrapper(retry_outside, after=False)
    app = make_app(Root(), sqlite_model, plug=plug, tm__attempts=2)
    call = Call(app)
    assert [report.reason for report in reports] == ["disconnected"]
    assert call.read() == b"onetwo 2"
    assert runs == [0, 0]
    assert [report.reason for report in reports] == ["disconnected", "completed"]
    assert_clean(sqlite_model)
    assert get(app).text == "onetwo 3"


# Changes before and after the first chunk.


def make_changing_root(after_first_chunk: bool = False) -> TGController:
    """Return a controller whose streams change the response, or the session."""

    class Root(TGController):
        error = make_error_controller()

        @expose()
        @stream
        def change(self, *parts: str) -> Iterator[str]:
            if after_first_chunk:
                yield "first"
            if "header" in parts:
                tg.response.headers["X-Answer"] = "42"
            if "cookie" in parts:
                tg.response.set_cookie("taste", "sweet")
            if "status" in parts:
                tg.response.status = 202
            if "session" in parts:
                tg.session["name"] = "ada"
                tg.session.save()
            if "flash" in parts:
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


def test_change_before_the_first_chunk_reaches_the_client(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """The response has the header, cookie, status, session and flash of a generator."""
    app = make_app(make_changing_root(), **SESSION)
    call = get(app, "/change/header/cookie/status/session/flash")
    assert (call.status, call.text) == ("202 Accepted", "last")
    assert call.headers["X-Answer"] == "42"
    cookies = [cookie.partition(";")[0].strip() for cookie in call.cookies]
    assert "taste=sweet" in cookies
    assert any(c.startswith("webflash=") and "well" in c for c in cookies)
    (session,) = [c for c in cookies if c.startswith("beaker.session.id=")]
    assert get(app, "/name", HTTP_COOKIE=session).text == "ada"
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ("header", "header X-Answer"),
        ("cookie", "header Set-Cookie"),
        ("status", "status"),
        ("session", "tg.session"),
        ("flash", "header Set-Cookie"),
        ("header/status/session", "header X-Answer, status, tg.session"),
    ],
)
def test_change_after_the_first_chunk_is_logged_once(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture, parts: str, names: str
) -> None:
    """One warning at the end names everything that the client cannot see."""
    app = make_app(make_changing_root(after_first_chunk=True), **SESSION)
    assert get(app, f"/change/{parts}").text == "firstlast"
    (line,) = caplog.messages
    assert f"after the response had started: {names}. The client" in line


def test_session_that_is_saved_before_the_first_chunk_is_not_logged(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """The stream can still read the session after its first chunk."""

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


def test_error_page_for_the_status_of_a_stream_closes_it(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """The client gets the page in place of the stream."""
    app = make_app(make_changing_root(), sqlite_model, **ERROR_PAGES)
    call = get(app, "/missing")
    assert (call.status, call.text) == ("404 Not Found", "page 404")
    assert [report.reason for report in reports] == ["disconnected"]
    assert_clean(sqlite_model)


# Headers and statuses that cannot be sent.


def make_header_root(header: tuple[Any, Any] = ("X-Answer", "42")) -> Any:
    """Return a controller whose streams set a header, or a status.

    Its ``runs`` is the number of its generators that have started, and ``returned``
    are the generators that the controller has returned.

    :param header: is set in the controller, or in the generator.
    """

    class Root(TGController):
        error = make_error_controller()

        def __init__(self) -> None:
            self.runs = 0
            self.returned: list[Any] = []

        def set(self) -> None:
            tg.response.headerlist.append(header)

        def items(self, count: int) -> Iterator[str]:
            self.runs += 1
            for number in range(count):
                yield str(number)

        @expose()
        @stream(limit=1)
        def controller(self) -> Any:
            self.set()
            self.returned.append(self.items(2))
            return self.returned[-1]

        @expose()
        @stream
        def generator(self) -> Iterator[str]:
            self.set()
            yield from self.items(2)

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
        @stream
        def valid(self) -> Iterator[str]:
            yield from self.items(1)

    return Root()


HEADER_PATHS = ["/controller", "/generator", "/small"]


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
def test_hop_by_hop_header_is_dropped_and_logged_once(
    make_app: MakeApp,
    caplog: pytest.LogCaptureFixture,
    wiring: dict[str, Any],
    guarded: bool,
) -> None:
    """The stream is sent, and one warning for each controller names the header."""
    app = make_app(make_header_root(("Connection", "keep-alive")), **wiring)
    app = app if guarded else without_guard(app)
    for path in HEADER_PATHS * 2:
        status, rest, _ = serve(app, path)
        assert status == "200 OK"
        assert rest.endswith("\r\n\r\n01")
        assert "Connection" not in rest
    lines = [line for line in caplog.messages if "Connection" in line]
    assert [line.partition(" ")[0] for line in lines] == [
        f"Root.{path[1:]}" for path in HEADER_PATHS
    ]


INVALID_HEADERS: list[tuple[Any, Any]] = [
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


@pytest.mark.parametrize("header", INVALID_HEADERS, ids=ascii)
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
def test_invalid_header_is_a_server_error(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    header: Any,
    guarded: bool,
) -> None:
    """The response is a 500, and a stream that has not completed has failed."""
    root = make_header_root(header)
    for wiring in TRACED, UNTRACED, DEBUGGED:
        app = make_app(root, sqlite_model, **wiring)
        app = app if guarded else without_guard(app)
        for path in HEADER_PATHS:
            status, rest, _ = serve(app, path)
            assert status.upper() == "500 INTERNAL SERVER ERROR"
            assert "X-Evil" not in rest.partition("\r\n\r\n")[0]
        # TG's debug mode keeps the context of a failed request until the next request.
        assert get(app, "/valid").text == "0"
    assert [(report.controller, report.reason) for report in reports] == [
        ("Root.generator", "failed"),
        ("Root.small", "completed"),
        ("Root.valid", "completed"),
    ] * 3
    assert_clean(sqlite_model)


def test_invalid_header_shows_the_error_page(make_app: MakeApp) -> None:
    """The client gets the application's page, and the log names the header."""
    root = make_header_root(("X-Answer", "a\nb"))
    app = make_app(root, **ERROR_PAGES, errorpage__handle_exceptions=True)
    for path in HEADER_PATHS:
        call = get(app, path)
        assert (call.status, call.text) == ("500 Internal Server Error", "page 500")
        name = f"Root.{path[1:]}"
        errors = call.errors.getvalue()
        assert f"{name}: the value of the header X-Answer must be Latin-1" in errors
        assert "got '\\n' at position 1. Remove" in errors


def test_invalid_header_of_the_controller_closes_the_generator(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The generator does not start, and the slot is free for the next request."""
    root = make_header_root(("X-Answer", 42))
    app = make_app(root, **UNTRACED)
    for _ in range(2):
        with pytest.raises(StreamError, match="X-Answer must be a str, got int: 42"):
            Call(app, "/controller", checked=False)
    assert root.runs == 0
    states = [inspect.getgeneratorstate(generator) for generator in root.returned]
    assert states == [inspect.GEN_CLOSED] * 2
    assert reports == []


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
def test_invalid_header_of_an_application_wrapper_is_a_server_error(
    make_app: MakeApp, reports: list[Report], guarded: bool
) -> None:
    """The stream has started by then, and fails. Its body may be in a generator."""

    def set_header(response: Any) -> None:
        use_upper_case(response)
        response.headers["X-Answer"] = 42

    app = make_app(make_root(), plug=plug_with_wrapper(set_header), **TRACED)
    status, _, _ = serve(app if guarded else without_guard(app), "/words")
    assert status == "500 INTERNAL SERVER ERROR"
    assert [report.reason for report in reports] == ["failed"]
    assert isinstance(reports[0].error, StreamError)


@pytest.mark.parametrize("status", ["204 No Content", "205 Reset Content", "304 No"])
@pytest.mark.parametrize("count", [1, 2])
def test_items_with_a_status_without_a_body_are_an_error(
    make_app: MakeApp, sqlite_model: Model, status: str, count: int
) -> None:
    """The error is raised before anything is sent, and names the status."""
    app = make_app(make_header_root(), sqlite_model, **UNTRACED)
    with pytest.raises(StreamError, match=f"{status[:3]}.*has no body"):
        Call(app, f"/status?status={status}&count={count}", checked=False)
    assert_clean(sqlite_model)


def test_items_with_a_bodiless_status_of_an_application_wrapper_are_an_error(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The stream has started by then, and fails."""

    def set_status(response: Any) -> None:
        response.status = 101

    app = make_app(make_root(), plug=plug_with_wrapper(set_status), **UNTRACED)
    with pytest.raises(StreamError, match="101"):
        Call(app, "/words", checked=False)
    assert [report.reason for report in reports] == ["failed"]


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_status_without_a_body_is_sent_without_items(
    make_app: MakeApp, wiring: dict[str, Any], status: str
) -> None:
    """The response has neither a body nor a ``Content-Length``."""
    app = make_app(make_header_root(), **wiring)
    call = get(app, f"/status?status={status}", checked=False)
    assert (call.status, call.text) == (status, "")
    assert "Content-Length" not in call.headers


def test_reset_content_has_a_content_length_of_zero(make_app: MakeApp) -> None:
    """A 205 has an empty body, and its ``Content-Length`` must show it."""
    app = make_app(make_header_root())
    call = get(app, "/status?status=205 Reset Content", checked=False)
    assert (call.text, call.headers["Content-Length"]) == ("", "0")


@pytest.mark.parametrize("wiring", WIRINGS)
def test_change_that_cannot_be_compared_changes_nothing(
    make_app: MakeApp, wiring: dict[str, Any], next_report: Callable[[], Report]
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
    report = next_report()
    assert (report.reason, report.error) == ("completed", None)
