"""The start of a stream inside the request, up to its first chunk."""

from __future__ import annotations

import gc
import io
import json
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import tg
from tg import TGController, abort, expose, flash, redirect
from tg.decorators import Decoration

from tests.conftest import MakeApp, assert_clean
from tests.model import Model, User
from tests.turbogears.support import (
    ERROR_PAGES,
    SESSION,
    WIRINGS,
    Words,
    make_error_controller,
    make_root,
)
from tests.wsgi import Call, get, get_chunks
from tgstream import Report, Stream, StreamError, copy, rows, stream

# Errors and redirects before the first chunk.


def make_early_root() -> TGController:
    """Return a controller whose generators end before their first yield."""

    class Root(TGController):
        error = make_error_controller()

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
        def plain(self) -> str:
            return "plain"

    return Root()


@pytest.mark.parametrize("wiring", WIRINGS)
def test_abort_and_redirect_work_before_the_first_chunk(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any]
) -> None:
    """The response is an ordinary response, and there is no report of a stream."""
    app = make_app(make_early_root(), **wiring)
    assert get(app, "/abort").status == "404 Not Found"
    call = get(app, "/redirect")
    assert call.status == "302 Found"
    assert call.headers["Location"].endswith("/elsewhere")
    assert any("moved" in cookie for cookie in call.cookies)
    assert reports == []


@pytest.mark.parametrize("wiring", WIRINGS)
def test_error_page_is_sent_for_an_error_before_the_first_chunk(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any]
) -> None:
    """The application's own page is the response to ``abort`` and to an exception."""
    app = make_app(
        make_early_root(),
        **ERROR_PAGES,
        **wiring,
        errorpage__handle_exceptions=True,
        **SESSION,
    )
    call = get(app, "/abort")
    assert (call.status, call.text) == ("404 Not Found", "page 404")
    assert reports == []
    call = get(app, "/fail")
    assert (call.status, call.text) == ("500 Internal Server Error", "page 500")
    assert [report.reason for report in reports] == ["failed"]


@pytest.mark.parametrize("wiring", WIRINGS)
def test_exception_before_the_first_chunk_is_a_server_error(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any]
) -> None:
    """Without an error page the response is TG's 500, or the server's."""
    app = make_app(make_early_root(), **wiring)
    if wiring.get("trace_errors__enable") is False:
        with pytest.raises(LookupError):
            Call(app, "/fail", checked=False)
    else:
        assert get(app, "/fail").status == "500 INTERNAL SERVER ERROR"
    assert [report.reason for report in reports] == ["failed"]
    # TG's debug mode keeps the context of a failed request until the next request.
    get(app, "/plain")


@pytest.mark.parametrize("returned", ["select", "Query", "rows", "copy"])
def test_forgotten_decorator_is_an_error(
    make_app: MakeApp, sqlite_model: Model, returned: str
) -> None:
    """Otherwise a statement would run after the request, and its transaction would
    stay open."""
    statement = sa.select(User.name)
    outputs: dict[str, Callable[[], Any]] = {
        "select": lambda: statement,
        "Query": lambda: sqlite_model.DBSession.query(User),
        "rows": lambda: rows(statement),
        "copy": lambda: copy(statement),
    }

    class Root(TGController):
        @expose()
        def plain(self) -> Any:
            return outputs[returned]()

    app = make_app(Root(), sqlite_model, trace_errors__enable=False)
    with pytest.raises(StreamError, match=r"^Root.plain returned a .*with @stream, or"):
        get(app, "/plain")
    assert_clean(sqlite_model)


def test_controller_without_a_stream_is_unchanged(make_app: MakeApp) -> None:
    """tgstream adds no hook to a controller that is not decorated."""

    class Root(TGController):
        @expose("json")
        def plain(self) -> Any:
            return {"a": 1}

    call = get(make_app(Root()), "/plain")
    assert json.loads(call.text) == {"a": 1}
    assert Decoration.get_decoration(Root.plain).hooks["before_render"] == []


# Methods without content.


def test_head_sends_the_headers_and_runs_no_generator(
    make_app: MakeApp, reports: list[Report], caplog: pytest.LogCaptureFixture
) -> None:
    """A HEAD request is neither logged nor reported as a stream."""
    ran = []

    class Root(TGController):
        @expose()
        @stream(Words)
        def generator(self) -> Iterator[str]:
            ran.append(1)
            abort(404)
            yield "x"

    caplog.set_level(logging.DEBUG, "tgstream")
    call = get(make_app(Root()), "/generator", method="HEAD")
    assert (call.status, call.text) == ("200 OK", "")
    assert call.headers["Content-Type"] == "text/x-words; charset=utf-8"
    assert (ran, reports) == ([], [])
    assert [r for r in caplog.records if r.name == "tgstream"] == []


def test_head_closes_the_file_of_the_controller(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The file is closed for HEAD without being read, and for GET after the stream."""
    files = []

    class Root(TGController):
        @expose(content_type="application/octet-stream")
        @stream(filename="data.bin")
        def file(self) -> Any:
            files.append(io.BytesIO(b"data"))
            return files[-1]

    app = make_app(Root())
    call = get(app, "/file", method="HEAD")
    assert call.text == ""
    assert call.headers["Content-Disposition"] == 'attachment; filename="data.bin"'
    assert reports == []
    assert get(app, "/file").text == "data"
    assert [file.closed for file in files] == [True, True]


def test_head_accepts_items_without_a_close_method(make_app: MakeApp) -> None:
    """A list has no ``close()``."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def list(self) -> Any:
            return ["x"]

    assert get(make_app(Root()), "/list", method="HEAD").text == ""


def test_head_sends_a_declared_length(make_app: MakeApp) -> None:
    """The ``Content-Length`` is the same as for GET."""
    call = get(make_app(make_root()), "/measured", method="HEAD")
    assert (call.text, call.headers["Content-Length"]) == ("", "5")


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE", "CONNECT"])
@pytest.mark.parametrize("path", ["/generator", "/returned", "/helped"])
def test_method_without_content_runs_no_generator(
    make_app: MakeApp, reports: list[Report], method: str, path: str
) -> None:
    """The response has the controller's own headers and status, and no body."""
    ran = []

    def items() -> Iterator[str]:
        ran.append(1)
        yield "x"

    class Root(TGController):
        @expose()
        @stream(Words, length=3, limit=1)
        def generator(self) -> Iterator[str]:
            yield from items()

        @expose()
        @stream(Words, limit=1)
        def returned(self) -> Any:
            tg.response.headers["Access-Control-Allow-Origin"] = "*"
            return items()

        @expose()
        def helped(self) -> Any:
            tg.response.status = 202
            tg.response.headers["Access-Control-Allow-Origin"] = "*"
            return Stream(items(), Words, length=3, limit=1)

    app = make_app(Root())
    for _ in range(2):  # the first request has released its slot
        call = Call(app, path, method=method, checked=False)
        assert call.read() == b""
        assert call.headers["Content-Length"] == "0"
        assert call.status_int == (202 if path == "/helped" else 200)
        allowed = call.headers.get("Access-Control-Allow-Origin")
        assert allowed == (None if path == "/generator" else "*")
    assert (ran, reports) == ([], [])


# Content types and charsets.


CONTENT_TYPES = {
    "format": (Words, "text/x-words; charset=utf-8"),
    "exposed": (Words, "application/x-own"),
    "rendered": (Words, "text/x-words; charset=utf-8"),
    "set": (Words, "text/x-mine; charset=UTF-8"),
    "set_late": (Words, "text/x-late; charset=UTF-8"),
    "set_charset": (Words, "text/x-words; charset=latin-1"),
    "raw": (None, "text/html; charset=utf-8"),
    "raw_charset": (None, "text/html; charset=latin-1"),
    "raw_exposed_charset": (None, "text/plain; charset=utf-16"),
}


def make_content_types() -> TGController:
    """Return a controller that sets its content type in every way."""

    class Root(TGController):
        @expose()
        @stream(Words)
        def format(self) -> Iterator[str]:
            yield "é"

        @expose(content_type="application/x-own")
        @stream(Words)
        def exposed(self) -> Iterator[str]:
            yield "é"

        @expose("json")
        @stream(Words)
        def rendered(self) -> Iterator[str]:
            yield "é"

        @expose(content_type="application/x-own")
        @stream(Words)
        def set(self) -> Iterator[str]:
            tg.response.content_type = "text/x-mine"
            return iter("é")

        @expose(content_type="application/x-own")
        @stream(Words)
        def set_late(self) -> Iterator[str]:
            tg.response.content_type = "text/x-late"
            yield "é"

        @expose()
        @stream(Words)
        def set_charset(self) -> Iterator[str]:
            tg.response.content_type = "text/x-words"
            tg.response.charset = "latin-1"
            return iter("é")

        @expose()
        @stream
        def raw(self) -> Iterator[str]:
            yield "é"

        @expose()
        @stream(charset="latin-1")
        def raw_charset(self) -> Iterator[str]:
            yield "é"

        @expose(content_type="text/plain; charset=utf-16")
        @stream
        def raw_exposed_charset(self) -> Iterator[str]:
            yield "é"
            yield "ß"

    return Root()


@pytest.mark.parametrize("name", CONTENT_TYPES)
def test_content_type_is_chosen_by_precedence(make_app: MakeApp, name: str) -> None:
    """The response's own type comes first, then ``@expose``'s, then the format's."""
    format, content_type = CONTENT_TYPES[name]
    call = Call(make_app(make_content_types()), f"/{name}")
    body = call.read()
    assert call.headers["Content-Type"] == content_type
    charset = content_type.partition("charset=")[2] or "utf-8"
    text = {"raw_exposed_charset": "éß"}.get(name, "é" if format is None else "#\né\n.")
    assert body.decode(charset) == text


def test_stateful_charset_is_closed_at_the_end(make_app: MakeApp) -> None:
    """A format may yield an empty text, which is not sent as a chunk."""

    class Kanji(Words):
        def encode(self, items: Iterable[Any]) -> Iterator[str]:
            for item in items:
                yield ""
                yield item

    class Root(TGController):
        @expose()
        @stream(Kanji, chunk_size=0, charset="iso2022_jp")
        def kanji(self) -> Any:
            return ["日", "本"]

    text = b"".join(get_chunks(make_app(Root()), "/kanji"))
    assert text == "日本".encode("iso2022_jp")


# Buffering.


def test_header_line_of_a_format_is_sent_with_the_first_item(make_app: MakeApp) -> None:
    """An error before the first item still changes the status of the response."""

    class Root(TGController):
        @expose()
        @stream(Words, chunk_size=0)
        def late(self) -> Iterator[str]:
            abort(404)
            yield "x"

        @expose()
        @stream(Words, chunk_size=0)
        def two(self) -> Iterator[str]:
            yield "x"
            yield "y"

        @expose()
        @stream(Words, chunk_size=0)
        def empty(self) -> Any:
            return []

    app = make_app(Root())
    assert get(app, "/late").status == "404 Not Found"
    assert get_chunks(app, "/two") == [b"#\nx\n", b"y\n", b"."]
    assert get(app, "/empty").text == "#\n."


def test_fast_items_are_buffered_up_to_the_chunk_size(make_app: MakeApp) -> None:
    """The size is that of the decorator, or of the application."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(chunk_size=10)
        def option(self) -> Any:
            return ["abc"] * 9

        @expose()
        @stream(Words)
        def configured(self) -> Any:
            return ["abc"] * 9

    app = make_app(Root(), tgstream__chunk_size=12, tgstream__flush_seconds=60)
    assert get_chunks(app, "/option") == [b"abcabcabcabc"] * 2 + [b"abc"]
    chunks = get_chunks(app, "/configured")
    assert [len(chunk) for chunk in chunks] == [14, 12, 12, 1]


def test_slow_items_are_sent_one_by_one(make_app: MakeApp) -> None:
    """An item is sent at once if it arrives after ``tgstream.flush_seconds``."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(chunk_size=1000)
        def slow(self) -> Any:
            return ["a", "b", "c"]

    app = make_app(Root(), tgstream__flush_seconds=0)
    assert get_chunks(app, "/slow") == [b"a", b"b", b"c"]


# Formats.


class Greeting(Words):
    """A format with a header that depends on the request."""

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Name": tg.request.params["name"]}


class Short(tuple[int]):
    """A format that is equal to others, with another output."""

    content_type = "text/plain"

    def encode(self, items: Iterable[Any]) -> Iterator[str]:
        yield "short"


class Long(Short):
    """A format that is equal to ``Short``."""

    def encode(self, items: Iterable[Any]) -> Iterator[str]:
        yield "long"


def test_attributes_of_a_format_are_read_for_each_stream(make_app: MakeApp) -> None:
    """A client never gets a header that was made for the client before."""

    class Root(TGController):
        @expose()
        @stream(Greeting())
        def index(self, name: str) -> Iterator[str]:
            yield name

    app = make_app(Root())
    calls = [get(app, f"/?name={name}") for name in ("ada", "bob")]
    assert [call.headers["X-Name"] for call in calls] == ["ada", "bob"]


def test_formats_that_are_equal_are_not_exchanged(make_app: MakeApp) -> None:
    """Each stream uses its own format, although both have the same hash."""

    class Root(TGController):
        @expose()
        def index(self, long: str = "") -> Stream:
            return Stream(iter([1, 2]), Long([1]) if long else Short([1]))

    app = make_app(Root())
    assert get(app).text == "short"
    assert get(app, "/?long=yes").text == "long"


def test_format_of_a_request_is_freed_with_its_stream(make_app: MakeApp) -> None:
    """A format may hold objects of its request, such as a session."""
    formats: list[weakref.ref[Words]] = []

    class Root(TGController):
        @expose()
        def index(self) -> Stream:
            format = Words()
            formats.append(weakref.ref(format))
            return Stream(iter([1, 2]), format)

    call = Call(make_app(Root()))
    call.read()
    del call
    gc.collect()
    assert formats[0]() is None
