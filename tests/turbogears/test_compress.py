"""``compress=True`` and the option ``tgstream.compress``, in real applications."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tg
import transaction
from tg import TGController, expose

from tests.compressed import CODINGS, Decompressor, decompress
from tests.conftest import MakeApp, Root, assert_clean
from tests.model import Model, User
from tests.turbogears.support import (
    DEBUGGED,
    HOOKS,
    TRACED,
    UNTRACED,
    WIRINGS,
    install_middleware,
    plug_with_wrapper,
    use_upper_case,
    without_guard,
)
from tests.wsgi import Call, get
from tgstream import (
    CSV,
    NDJSON,
    SSE,
    Event,
    Report,
    Stream,
    StreamError,
    current_stream,
    drain,
    stream,
)
from tgstream.core import compression
from tgstream.core.heartbeat import HEARTBEAT

ROWS = [[number, f"name {number}"] for number in range(300)]
TEXT = "n,name\r\n" + "".join(f"{number},name {number}\r\n" for number in range(300))
ALL = "gzip, deflate, br, zstd"


def make_lines() -> Iterator[str]:
    """Yield two chunks, both shorter than what is worth compressing."""
    yield "one\n"
    yield "two\n"


def set_up(
    prepare: Callable[[], Any], items: Callable[[], Any] = make_lines
) -> Callable[[], Any]:
    """Return a body that sets something in the controller, and then has the items."""

    def body() -> Any:
        prepare()
        return items()

    return body


def fetch(app: Any, path: str = "/", accepted: str = ALL, **environ: Any) -> Call:
    """Make a request, and decompress its body into ``text``."""
    call = Call(app, path, HTTP_ACCEPT_ENCODING=accepted, **environ)
    data = call.read()  # TG's debugger starts the response only now
    coding = call.headers.get("Content-Encoding")
    if coding is not None and data:
        data, finished = decompress(coding, [data])
        assert finished
    call.text = data.decode()
    return call


def header(call: Call, name: str) -> Any:
    return call.headers.get(name)


def is_compressed(app: Any, **environ: Any) -> bool:
    """Whether the response has a coding, with ``Vary`` and no ``Content-Length``."""
    call = fetch(app, **environ)
    if header(call, "Content-Encoding") is None:
        return False
    assert "Accept-Encoding" in call.headers["Vary"]
    assert "Content-Length" not in call.headers
    return True


# The response.


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("coding", CODINGS)
def test_stream_is_compressed_as_the_client_accepts(
    make_app: MakeApp, reports: list[Report], coding: str, wiring: dict[str, Any]
) -> None:
    """The report counts the uncompressed bytes."""
    root = Root(lambda: ROWS, format=CSV(header=["n", "name"]), compress=True)
    app = make_app(root, **wiring)
    call = fetch(app, accepted=coding)
    assert call.text == TEXT
    assert call.headers["Content-Encoding"] == coding
    assert call.headers["Vary"] == "Accept-Encoding"
    assert "Content-Length" not in call.headers
    assert reports[0].bytes == len(TEXT)
    plain = fetch(app, accepted="identity")
    assert plain.text == TEXT
    assert plain.headers["Vary"] == "Accept-Encoding"
    assert "Content-Encoding" not in plain.headers


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("coding", CODINGS)
def test_each_chunk_is_readable_before_the_next_one_is_made(
    make_app: MakeApp, coding: str, wiring: dict[str, Any]
) -> None:
    """The end of the coding is a chunk of its own, after the end of the stream."""
    made: list[str] = []

    def items() -> Iterator[str]:
        for word in "one", "two":
            made.append(word)
            yield word
        made.append("end")

    app = make_app(Root(items, compress=True), **wiring)
    call, decompressor = Call(app, HTTP_ACCEPT_ENCODING=coding), Decompressor(coding)
    assert decompressor.decompress(next(call)) == b"one"
    assert made == ["one"]
    assert decompressor.decompress(next(call)) == b"two"
    assert made == ["one", "two"]
    assert not decompressor.finished
    assert decompressor.decompress(next(call)) == b""
    assert decompressor.finished
    assert made == ["one", "two", "end"]
    assert call.read() == b""


@pytest.mark.parametrize("protocol", ["HTTP/1.0", "HTTP/1.1"])
def test_protocol_of_the_client_does_not_matter(
    make_app: MakeApp, protocol: str
) -> None:
    """An HTTP/1.0 client may accept codings, too."""
    app = make_app(Root(make_lines, compress=True))
    assert is_compressed(app, SERVER_PROTOCOL=protocol)


@pytest.mark.parametrize(
    ("option", "setting", "content_type", "compressed"),
    [
        (None, None, "text/plain", False),
        (None, "false", "text/plain", False),
        (None, "true", "text/plain", True),
        (None, "true", "Text/Plain; charset=utf-8", True),
        (None, "true", "application/json", True),
        (None, "true", "application/octet-stream", False),
        (None, "true", "application/zip", False),
        (False, "true", "text/plain", False),
        (True, None, "text/plain", True),
        (True, None, "application/octet-stream", True),
        (True, "false", "application/vnd.apache.arrow.stream", True),
        (True, None, "application/zip", False),
        (True, "true", "image/png", False),
    ],
)
def test_option_setting_and_content_type_decide(
    make_app: MakeApp,
    option: bool | None,
    setting: str | None,
    content_type: str,
    compressed: bool,
) -> None:
    """The setting is for text. The option is for all that is not compressed yet."""

    def prepare() -> None:
        tg.response.headers["Content-Type"] = content_type

    settings = {} if setting is None else {"tgstream__compress": setting}
    app = make_app(Root(set_up(prepare), compress=option), **settings)
    assert is_compressed(app) is compressed
    assert ("Vary" in fetch(app, accepted="").headers) is compressed


def test_decorator_compresses_the_format_of_text(make_app: MakeApp) -> None:
    """A returned Stream keeps its own option."""

    class Decorated(TGController):
        @expose()
        @stream(NDJSON, compress=True)
        def rows(self) -> Any:
            return [{"n": number} for number in range(1000)]

        @expose()
        @stream(NDJSON, compress=True)
        def plain(self) -> Any:
            return Stream([{"n": 1}] * 1000, compress=False)

    app = make_app(Decorated())
    assert header(fetch(app, "/rows"), "Content-Encoding") == "zstd"
    assert header(fetch(app, "/plain"), "Content-Encoding") is None


@pytest.mark.parametrize(
    ("size", "compressed"), [(0, False), (1023, False), (1024, True)]
)
def test_body_that_is_short_and_complete_is_not_compressed(
    make_app: MakeApp, size: int, compressed: bool
) -> None:
    """It has a ``Content-Length``, and a ``Vary``, because the next may be longer."""
    items = ["x" * size] if size else []
    app = make_app(Root(lambda: items, chunk_size=4000, compress=True))
    call = fetch(app)
    assert call.text == "x" * size
    assert call.headers["Vary"] == "Accept-Encoding"
    assert (header(call, "Content-Encoding") is not None) is compressed
    assert header(call, "Content-Length") == (None if compressed else str(size))


def test_declared_length_counts_the_uncompressed_bytes(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """A stream with another length fails, and has no end of the coding."""
    lines = ["x" * 999 + "\n"] * 3
    call = fetch(make_app(Root(lambda: lines, length=3000, compress=True)))
    assert call.text == "".join(lines)
    assert "Content-Length" not in call.headers
    app = make_app(Root(lambda: lines, length=3001, compress=True), **UNTRACED)
    call, received = Call(app, HTTP_ACCEPT_ENCODING="gzip"), []
    with pytest.raises(StreamError, match="sent 3000 bytes"):
        for chunk in call:
            received.append(chunk)
    call.close()
    assert decompress("gzip", received) == ("".join(lines).encode(), False)
    assert [report.reason for report in reports] == ["completed", "failed"]


@pytest.mark.parametrize("accepted", [ALL, "identity"])
def test_head_request_gets_the_headers_of_the_stream(
    make_app: MakeApp, accepted: str
) -> None:
    """The generator does not run, so that nothing is compressed."""

    def fail() -> Iterator[str]:
        raise AssertionError
        yield ""

    app = make_app(Root(fail, format=CSV, compress=True))
    head = fetch(app, accepted=accepted, method="HEAD")
    app = make_app(Root(lambda: ROWS, format=CSV, compress=True))
    call = fetch(app, accepted=accepted)
    call.headers.pop("Content-Length", None)
    assert head.text == ""
    assert sorted(head.headers.items()) == sorted(call.headers.items())


def test_options_request_has_no_coding(make_app: MakeApp) -> None:
    """Its response has no content."""
    call = fetch(make_app(Root(make_lines, compress=True)), method="OPTIONS")
    assert header(call, "Content-Encoding") is None
    assert header(call, "Content-Length") == "0"


@pytest.mark.parametrize("status", [204, 304])
def test_status_without_a_body_has_no_coding(make_app: MakeApp, status: int) -> None:
    """There is nothing to compress."""

    def prepare() -> None:
        tg.response.status = status

    app = make_app(Root(set_up(prepare, lambda: []), compress=True))
    call = Call(app, HTTP_ACCEPT_ENCODING=ALL, checked=False)
    assert call.read() == b""
    assert header(call, "Content-Encoding") is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Content-Encoding", "gzip"),
        ("Content-Encoding", "identity"),
        ("Content-Range", "bytes 0-7/100"),
        ("Cache-Control", "max-age=1, No-Transform"),
    ],
)
def test_header_forbids_compression(make_app: MakeApp, name: str, value: str) -> None:
    """The body is sent unchanged."""

    def prepare() -> None:
        tg.response.headers[name] = value

    app = make_app(Root(set_up(prepare), compress=True))
    call = get(app, HTTP_ACCEPT_ENCODING=ALL)
    assert call.text == "one\ntwo\n"
    assert call.headers[name] == value
    assert "Vary" not in call.headers


def test_partial_content_is_not_compressed(make_app: MakeApp) -> None:
    """A range is a range of the uncompressed bytes."""

    def prepare() -> None:
        tg.response.status = 206

    assert not is_compressed(make_app(Root(set_up(prepare), compress=True)))


@pytest.mark.parametrize(
    ("vary", "merged"),
    [
        (["Accept"], "Accept, Accept-Encoding"),
        (["accept-encoding"], "accept-encoding"),
        (["Accept", "Cookie,Accept-Encoding"], "Accept,Cookie,Accept-Encoding"),
        (["Accept", "Cookie"], "Accept, Cookie, Accept-Encoding"),
        (["*"], "*"),
        ([""], "Accept-Encoding"),
    ],
)
def test_vary_is_extended(make_app: MakeApp, vary: list[str], merged: str) -> None:
    """Each name is in it once."""

    def prepare() -> None:
        for value in vary:
            tg.response.headers.add("Vary", value)

    call = fetch(make_app(Root(set_up(prepare), compress=True)))
    assert ",".join(call.headers.getall("Vary")) == merged


# Validators and ranges.


@pytest.mark.parametrize("etag", ["v1", ("v1", False)], ids=["strong", "weak"])
def test_etag_of_a_compressed_response_is_weak(make_app: MakeApp, etag: Any) -> None:
    """A strong one would be the same for different bytes."""

    def prepare() -> None:
        tg.response.etag = etag

    app = make_app(Root(set_up(prepare), compress=True))
    assert fetch(app).headers["ETag"] == 'W/"v1"'
    plain = fetch(app, accepted="").headers["ETag"]
    assert plain == ('"v1"' if etag == "v1" else 'W/"v1"')


@pytest.mark.parametrize("validator", ['W/"v1"', '"v1"', '"v0", W/"v1"'])
@pytest.mark.parametrize("conditional", [True, False], ids=["webob", "etag_cache"])
def test_if_none_match_still_gets_304(
    make_app: MakeApp, reports: list[Report], conditional: bool, validator: str
) -> None:
    """``If-None-Match`` compares weakly, so that either ETag is the current one."""

    def prepare() -> None:
        if conditional:
            tg.response.conditional_response = True
            tg.response.etag = "v1"
        else:
            tg.etag_cache("v1")

    app = make_app(Root(set_up(prepare), compress=True))
    call = Call(
        app, HTTP_ACCEPT_ENCODING=ALL, HTTP_IF_NONE_MATCH=validator, checked=False
    )
    text = call.read()
    assert (call.status_int, text) == (304, b"")
    assert [report.reason for report in reports] == ["disconnected"] * conditional


@pytest.mark.parametrize("accepted", [ALL, "identity"])
def test_range_of_a_compressed_response_is_never_sent(
    make_app: MakeApp, accepted: str
) -> None:
    """WebOb sends a range only of a length that is known: that of no coding."""

    def prepare() -> None:
        tg.response.conditional_response = True
        tg.response.accept_ranges = "bytes"

    body = set_up(prepare, lambda: ["x" * 2000])
    app = make_app(Root(body, chunk_size=4000, compress=True))
    call = fetch(app, accepted=accepted, HTTP_RANGE="bytes=0-9")
    if accepted == ALL:
        assert (call.status_int, call.text) == (200, "x" * 2000)
        assert "Accept-Ranges" not in call.headers
    else:
        assert (call.status_int, call.text) == (206, "x" * 10)


# How a stream ends.


@pytest.mark.parametrize("wiring", [TRACED, UNTRACED, DEBUGGED], ids=str)
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("coding", CODINGS)
def test_failed_stream_has_no_end_of_the_coding(
    make_app: MakeApp, wiring: dict[str, Any], guarded: bool, coding: str
) -> None:
    """The error reaches the server, and no middleware makes the body look complete."""

    def fail() -> Iterator[str]:
        yield "one"
        raise LookupError("no second")

    app = make_app(Root(fail, compress=True), **wiring)
    call = Call(app if guarded else without_guard(app), HTTP_ACCEPT_ENCODING=coding)
    received = []
    with pytest.raises((LookupError, AssertionError)):
        for chunk in call:
            received.append(chunk)
    call.close()
    assert decompress(coding, received) == (b"one", False)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "chunk"])
def test_failed_compressor_aborts_the_response(
    make_app: MakeApp,
    reports: list[Report],
    monkeypatch: pytest.MonkeyPatch,
    wiring: dict[str, Any],
    guarded: bool,
    at_end: bool,
) -> None:
    """TG's debugger swallows an error that the stream does not know."""

    class Failing:
        def __init__(self, small: bool) -> None:
            pass

        def compress(self, chunk: bytes) -> bytes:
            if chunk == b"two\n" and not at_end:
                raise MemoryError
            return chunk

        def finish(self) -> bytes:
            raise MemoryError

    monkeypatch.setitem(compression._CODINGS, "gzip", ("zlib", Failing))
    app = make_app(Root(make_lines, compress=True), **wiring)
    app = app if guarded else without_guard(app)
    call = Call(app, HTTP_ACCEPT_ENCODING="gzip", checked=False)
    with pytest.raises((MemoryError, AssertionError)):
        call.read()
    reasons = [report.reason for report in reports]
    assert reasons == ["completed" if at_end else "failed"]


@pytest.mark.parametrize("coding", CODINGS)
def test_failed_final_commit_has_no_end_of_the_coding(
    make_app: MakeApp, sqlite_model: Model, coding: str
) -> None:
    """The end is sent only after the commit."""

    def fail() -> None:
        raise LookupError("at the end")

    def items() -> Iterator[str]:
        transaction.get().addBeforeCommitHook(fail)
        sqlite_model.DBSession.add(User(name="ada"))
        yield "one"
        yield "two"

    app = make_app(Root(items, compress=True), sqlite_model, **UNTRACED)
    call, received = Call(app, HTTP_ACCEPT_ENCODING=coding), []
    with pytest.raises(LookupError):
        for chunk in call:
            received.append(chunk)
    call.close()
    assert decompress(coding, received) == (b"onetwo", False)
    assert_clean(sqlite_model)


def test_end_of_the_coding_follows_the_commit(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """When a client has the whole body, another request finds its rows."""

    def items() -> Iterator[str]:
        sqlite_model.DBSession.add(User(name="ada"))
        yield "one"

    app = make_app(Root(items, compress=True), sqlite_model)
    call, decompressor = Call(app, HTTP_ACCEPT_ENCODING="gzip"), Decompressor("gzip")
    decompressor.decompress(next(call))
    assert sqlite_model.names() == []
    decompressor.decompress(next(call))
    assert decompressor.finished
    assert sqlite_model.names() == ["ada"]
    call.close()


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
def test_stream_that_was_closed_has_no_end_of_the_coding(
    make_app: MakeApp, reports: list[Report], guarded: bool
) -> None:
    """The same holds if it raises after its client has disconnected."""

    def items() -> Iterator[str]:
        yield "one"
        current_stream().close()
        raise ConnectionResetError

    app = make_app(Root(items, compress=True), **UNTRACED)
    app = app if guarded else without_guard(app)
    call, received = Call(app, HTTP_ACCEPT_ENCODING="gzip", checked=False), []
    try:
        for chunk in call:
            received.append(chunk)
    except OSError:
        pass
    call.close()
    assert decompress("gzip", received) == (b"one", False)
    assert [report.reason for report in reports] == ["disconnected"]


def test_application_wrapper_that_stops_early_sends_no_end(make_app: MakeApp) -> None:
    """A body looks complete only if its changes are committed."""

    def take_first(response: Any) -> None:
        chunks = iter(response.app_iter)
        response.app_iter = (next(chunks) for _ in range(1))

    app = make_app(
        Root(make_lines, compress=True), plug=plug_with_wrapper(take_first), **UNTRACED
    )
    call, received = Call(app, HTTP_ACCEPT_ENCODING="gzip", checked=False), []
    for chunk in call:
        received.append(chunk)
    call.close()
    assert decompress("gzip", received) == (b"one\n", False)


@pytest.mark.parametrize("kind", ["expired", "drained"])
@pytest.mark.parametrize("heartbeat", [None, 0.02])
def test_events_that_end_normally_have_the_end_of_the_coding(
    make_app: MakeApp,
    next_report: Callable[[], Report],
    kind: str,
    heartbeat: float | None,
) -> None:
    """``max_seconds`` and ``drain()`` end events like the generator itself."""
    go = threading.Event()

    def events() -> Iterator[str]:
        yield "one"
        if kind == "drained":
            drain(0)
        go.wait(0.15)
        yield "two"
        raise AssertionError

    seconds = 0.1 if kind == "expired" else None
    app = make_app(
        Root(events, format=SSE(heartbeat=heartbeat), max_seconds=seconds),
        tgstream__compress="true",
    )
    call = fetch(app, accepted="gzip")
    assert call.text.startswith("data: one\n\n")
    assert next_report().reason == kind


# Heartbeats, and every way to close.


@pytest.mark.parametrize("coding", CODINGS)
def test_heartbeat_is_compressed_and_flushed(make_app: MakeApp, coding: str) -> None:
    """A client reads it while the generator waits."""
    go = threading.Event()

    def events() -> Iterator[Event]:
        yield Event(comment="open")
        assert go.wait(10)
        yield Event("one")

    app = make_app(Root(events, format=SSE(heartbeat=0.02), compress=True))
    call, decompressor = Call(app, HTTP_ACCEPT_ENCODING=coding), Decompressor(coding)
    decompressed = [decompressor.decompress(next(call)) for _ in range(3)]
    assert decompressed == [b": open\n\n", HEARTBEAT, HEARTBEAT]
    go.set()
    rest = b"".join(map(decompressor.decompress, call))
    assert rest.replace(HEARTBEAT, b"") == b"data: one\n\n"
    assert decompressor.finished
    call.close()


@pytest.mark.parametrize(
    ("wiring", "pulls"),  # TG's debugger begins when its body is iterated
    [(TRACED, 0), (TRACED, 1), (TRACED, 2), (UNTRACED, 0), (DEBUGGED, 1)],
    ids=str,
)
@pytest.mark.parametrize("heartbeat", [None, 10], ids=["plain", "heartbeat"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "bare"])
@pytest.mark.parametrize("way", ["close", "drop"])
def test_stream_that_is_closed_or_dropped_ends(
    make_app: MakeApp,
    next_report: Callable[[], Report],
    wiring: dict[str, Any],
    heartbeat: float | None,
    wrapped: bool,
    pulls: int,
    way: str,
) -> None:
    """It ends at once, also if its body was never iterated."""
    closed = []

    def events() -> Iterator[str]:
        try:
            while True:
                yield "one"
        finally:
            closed.append(True)

    plug = plug_with_wrapper(use_upper_case if wrapped else lambda response: None)
    root = Root(events, format=SSE(heartbeat=heartbeat), compress=True)
    call = Call(make_app(root, plug=plug, **wiring), checked=False)
    for _ in range(pulls):
        next(call)
    if way == "close":
        call.close()
    else:
        call.drop()
    assert next_report().reason == "disconnected"
    assert closed == [True]


# Other compression.


@pytest.mark.parametrize("lazy", [True, False])
def test_response_that_webob_has_compressed_is_not_compressed_again(
    make_app: MakeApp, lazy: bool
) -> None:
    """An application wrapper may use ``encode_content()``, lazily or not."""
    app = make_app(
        Root(make_lines, compress=True),
        plug=plug_with_wrapper(lambda response: response.encode_content(lazy=lazy)),
    )
    call = fetch(app)
    assert call.text == "one\ntwo\n"
    assert call.headers["Content-Encoding"] == "gzip"


def test_body_of_an_application_wrapper_is_compressed(make_app: MakeApp) -> None:
    """The wrapper reads and changes the uncompressed chunks."""
    app = make_app(
        Root(make_lines, compress=True), plug=plug_with_wrapper(use_upper_case)
    )
    call = fetch(app)
    assert call.text == "ONE\nTWO\n"
    assert header(call, "Content-Encoding") == "zstd"


@pytest.mark.parametrize("hook", HOOKS)
def test_middleware_finds_the_coding_in_the_headers(
    make_app: MakeApp, hook: str
) -> None:
    """A middleware that compresses, like Paste's, then leaves the response alone."""
    found = []

    def watch(app: Any) -> Any:
        def watched(environ: dict[str, Any], start_response: Any) -> Any:
            def start(status: str, headers: Any, *error: Any) -> Any:
                found.append(dict(headers).get("Content-Encoding"))
                return start_response(status, headers, *error)

            return app(environ, start)

        return watched

    with install_middleware(watch, hook):
        app = make_app(Root(make_lines, compress=True))
    assert fetch(app).text == "one\ntwo\n"
    assert found == ["zstd"]


def test_stream_that_is_not_compressed_has_the_same_headers(make_app: MakeApp) -> None:
    """Neither ``Vary`` nor a coding is added, whatever the client accepts."""
    call = fetch(make_app(Root(lambda: ROWS, format=CSV)))
    assert {"Vary", "Content-Encoding"} & {*call.headers} == set()
    assert call.headers["Content-Length"] == str(len(call.text))


@pytest.mark.parametrize("option", [1, "yes", "gzip"])
def test_option_that_is_not_a_switch_is_rejected(option: Any) -> None:
    """The message names the type and the value."""
    with pytest.raises(TypeError, match="Stream: compress must be True, False or None"):
        Stream([], compress=option)
