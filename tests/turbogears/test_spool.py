"""``spool=True``: the whole body is made in the request, and then sent as a file."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import tg
import transaction
from tg import TGController, abort, expose, redirect

from tests.conftest import MakeApp, Root, assert_clean, stop_draining
from tests.core.test_downloads import read_until_error
from tests.live_apps.spooled import count_files
from tests.model import Model, Note, User
from tests.turbogears.support import (
    ERROR_PAGES,
    SESSION,
    WIRINGS,
    Words,
    make_error_controller,
)
from tests.wsgi import Call, get
from tgstream import (
    CSV,
    NDJSON,
    SSE,
    XLSX,
    ZIP,
    Arrow,
    JSONArray,
    Parquet,
    Report,
    Stream,
    StreamError,
    commit,
    copy,
    current_stream,
    drain,
    flush,
    rows,
    stream,
)

LARGE = 3 << 20
"""Bytes of a body that does not stay in memory."""

Items = Callable[[], Any]


def make_blocks(size: int = LARGE) -> Iterator[bytes]:
    """Yield blocks of a body, each of which is different."""
    for number in range(size >> 12):
        yield f"{number:4096}".encode()


BLOCKS = b"".join(make_blocks())


def spooled(
    make_app: MakeApp,
    items: Items,
    *args: Any,
    spool: bool = True,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Return an application whose root streams items, spooled."""

    class RootController(TGController):
        error = make_error_controller()

        @expose(content_type="text/plain")
        def index(self) -> Stream:
            return Stream(items(), *args, spool=spool, **options)

    return make_app(RootController(), **(config or {}))


def get_raw(app: Any, **environ: Any) -> Call:
    """Make a request as ``get`` does, for a response that may have no text."""
    call = Call(app, **environ)
    call.text = call.read().decode("latin-1")
    return call


def fail() -> None:
    raise LookupError("at the end")


# The response.


@pytest.mark.parametrize("format", [CSV(header=["n"]), NDJSON, JSONArray, Words])
@pytest.mark.parametrize("make", [list, iter])
def test_spooled_response_has_the_bytes_of_a_stream_and_its_length(
    make_app: MakeApp, format: Any, make: Any
) -> None:
    """A format that is spooled writes the same as one that is not."""
    items = [[number] for number in range(3000)]
    plain = get(spooled(make_app, lambda: make(items), format, spool=False))
    call = get(spooled(make_app, lambda: make(items), format))
    assert call.status == "200 OK"
    assert call.text == plain.text
    assert call.headers["Content-Length"] == str(len(call.text))
    assert call.headers["Content-Type"] == plain.headers["Content-Type"]
    assert call.headers["Accept-Ranges"] == "bytes"


@pytest.mark.parametrize("size", [4096, LARGE])
def test_range_of_equal_bytes_is_sent_alone(
    make_app: MakeApp, reports: list[Report], size: int
) -> None:
    """A resumed request runs the controller again, and gets the rest."""
    app = spooled(make_app, lambda: make_blocks(size))
    etag = get_raw(app).headers["ETag"]
    call = get_raw(app, HTTP_RANGE="bytes=1000-", HTTP_IF_RANGE=etag)
    assert call.status == "206 Partial Content"
    assert call.headers["Content-Range"] == f"bytes 1000-{size - 1}/{size}"
    assert call.headers["Content-Length"] == str(size - 1000)
    assert call.text.encode() == BLOCKS[1000:size]
    assert [report.reason for report in reports] == ["completed"] * 2
    assert [report.bytes for report in reports] == [size, size - 1000]


@pytest.mark.parametrize("wiring", WIRINGS)
def test_middlewares_pass_on_a_file_and_a_range(
    make_app: MakeApp, wiring: dict[str, Any]
) -> None:
    """The length and the range are right with all middlewares of TurboGears."""
    app = spooled(make_app, make_blocks, config=wiring)
    call = get_raw(app)
    assert call.headers["Content-Length"] == str(LARGE)
    assert call.text.encode() == BLOCKS
    call = get_raw(app, HTTP_RANGE="bytes=-2000000")
    assert call.status_int == 206
    assert call.headers["Content-Length"] == "2000000"
    assert call.text.encode() == BLOCKS[-2000000:]


def test_range_of_other_bytes_is_answered_with_the_whole_new_file(
    make_app: MakeApp,
) -> None:
    """``If-Range`` has the ``ETag`` of the file that the client has begun."""
    texts = iter(["the old text", "the new text", "the new text"])
    app = spooled(make_app, lambda: [next(texts)])
    etag = get(app).headers["ETag"]
    call = get(app, HTTP_RANGE="bytes=4-", HTTP_IF_RANGE=etag)
    assert call.status == "200 OK"
    assert call.text == "the new text"
    assert call.headers["ETag"] != etag
    call = get(app, HTTP_RANGE="bytes=4-", HTTP_IF_RANGE=call.headers["ETag"])
    assert (call.status_int, call.text) == (206, "new text")


@pytest.mark.parametrize(
    ("format", "items"),
    [
        (XLSX, [{"n": number} for number in range(1000)]),
        (Parquet, [{"n": number} for number in range(1000)]),
        (Arrow, [{"n": number} for number in range(1000)]),
        (ZIP, [("a.txt", b"a" * 5000), ("b.txt", b"b")]),
    ],
)
def test_archives_can_be_resumed(make_app: MakeApp, format: Any, items: Any) -> None:
    """Equal items are equal bytes, so that the second request gets a range."""
    app = spooled(make_app, lambda: items, format)
    first = Call(app)
    body = first.read()
    call = Call(app, HTTP_RANGE="bytes=100-", HTTP_IF_RANGE=first.headers["ETag"])
    assert call.status_int == 206
    assert body[:100] + call.read() == body


def test_etag_depends_on_the_content_type(make_app: MakeApp) -> None:
    """Equal bytes of another charset are another text."""
    etags = [
        get(spooled(make_app, lambda: ["ASCII"], charset=charset)).headers["ETag"]
        for charset in ("utf-8", "latin-1", "utf-8")
    ]
    assert etags[0] == etags[2] != etags[1]
    assert etags[0][0] == etags[0][-1] == '"'


def test_unchanged_response_is_not_sent_again(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """``If-None-Match`` is answered with 304."""
    app = spooled(make_app, make_blocks)
    etag = get_raw(app).headers["ETag"]
    call = Call(app, HTTP_IF_NONE_MATCH=etag)
    assert call.read() == b""
    assert call.status == "304 Not Modified"
    assert call.headers["ETag"] == etag
    assert reports[-1][5:7] == (0, 0)  # chunks and bytes


def test_range_beyond_the_end_is_answered_with_416(make_app: MakeApp) -> None:
    """The response has the size."""
    call = get_raw(spooled(make_app, make_blocks), HTTP_RANGE=f"bytes={LARGE}-")
    assert call.status_int == 416
    assert call.headers["Content-Range"] == f"bytes */{LARGE}"


def test_several_ranges_are_sent_as_parts(make_app: MakeApp) -> None:
    """They come from the file in their order."""
    app = spooled(make_app, make_blocks, charset="utf-8")
    call = get_raw(app, HTTP_RANGE="bytes=0-9,4090-4099")
    assert call.status_int == 206
    assert call.headers["Content-Type"].startswith("multipart/byteranges; boundary=")
    assert "charset" not in call.headers["Content-Type"]
    assert call.text.encode().count(BLOCKS[4090:4100]) == 1
    assert int(call.headers["Content-Length"]) == len(call.text)


def test_empty_stream_has_the_length_0(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """No items are a complete response, too."""
    call = get(spooled(make_app, lambda: []))
    assert (call.status, call.text) == ("200 OK", "")
    assert call.headers["Content-Length"] == "0"
    assert [report.reason for report in reports] == ["completed"]


def test_head_runs_nothing_and_has_no_length(make_app: MakeApp) -> None:
    """Only a run of the generator can know it."""

    def items() -> Iterator[str]:
        fail()
        yield "never"

    call = get(spooled(make_app, items, filename="a.txt"), method="HEAD")
    assert call.status == "200 OK"
    assert "Content-Length" not in call.headers
    assert "a.txt" in call.headers["Content-Disposition"]


# The request, until the last row.


def test_changes_of_the_response_after_the_first_yield_are_sent(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """Status, headers, cookies and the session can change until the last item."""

    class RootController(TGController):
        @expose(content_type="text/plain")
        @stream(spool=True)
        def index(self) -> Iterator[bytes]:
            yield from make_blocks()
            tg.response.status = 203
            tg.response.headers["X-Rows"] = "768"
            tg.response.set_cookie("late", "yes")
            tg.session["seen"] = 1
            tg.session.save()

        @expose(content_type="text/plain")
        def seen(self) -> str:
            return str(tg.session["seen"])

    app = make_app(RootController(), **SESSION)
    call = get_raw(app, HTTP_RANGE="bytes=0-9")
    assert call.status_int == 203  # RFC 9110 has ranges of a 200 only
    assert call.text.encode() == BLOCKS
    assert call.headers["X-Rows"] == "768"
    assert any("late=yes" in cookie for cookie in call.cookies)
    cookie = "; ".join(each.partition(";")[0] for each in call.cookies)
    assert get(app, "/seen", HTTP_COOKIE=cookie).text == "1"
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("wiring", WIRINGS)
def test_error_at_the_last_row_is_an_ordinary_error(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any]
) -> None:
    """No byte of the data is sent, and there is one report."""

    def items() -> Iterator[bytes]:
        yield from make_blocks()
        fail()

    app = spooled(make_app, items, config=wiring)
    if wiring.get("trace_errors__enable") is False:
        with pytest.raises(LookupError):
            Call(app, checked=False)
    else:
        call = get_raw(app)
        assert call.status == "500 INTERNAL SERVER ERROR"
        assert BLOCKS[:100].decode() not in call.text
    [report] = reports
    assert report.reason == "failed"
    assert isinstance(report.error, LookupError)
    assert report.bytes == LARGE
    # TG's debug mode keeps the context of a failed request until the next request.
    get(app, "/error/document")


def test_error_at_the_last_row_has_the_error_page_of_the_application(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """The page can use objects that the controller has loaded."""
    sqlite_model.seed("ada")
    loaded: list[User] = []

    class ErrorController(TGController):
        @expose()
        def document(self) -> str:
            return f"sorry, {loaded[0].name}"

    class RootController(TGController):
        error = ErrorController()

        @expose(content_type="text/plain")
        @stream(spool=True, max_seconds=20)
        def index(self, way: str = "raise") -> Iterator[bytes]:
            loaded[:] = [sqlite_model.DBSession.query(User).one()]
            yield from make_blocks()
            if way == "expire":
                drain(0)
                yield b"."
            raise LookupError("at the end")

    options = {
        **ERROR_PAGES,
        "errorpage__status_codes": [500],
        "errorpage__handle_exceptions": True,
    }
    app = make_app(RootController(), sqlite_model, **options)
    for path in ("/", "/?way=expire"):
        call = get_raw(app, path=path)
        assert (call.status_int, call.text) == (500, "sorry, ada")
    assert_clean(sqlite_model)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_abort_and_redirect_work_at_any_row(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any]
) -> None:
    """They are ordinary responses, and there is no report of a stream."""

    class RootController(TGController):
        error = make_error_controller()

        @expose(content_type="text/plain")
        @stream(spool=True)
        def index(self, way: str) -> Iterator[bytes]:
            yield from make_blocks()
            if way == "abort":
                abort(404)
            redirect("/elsewhere")

    app = make_app(RootController(), **{**wiring, **ERROR_PAGES})
    call = get(app, "/?way=abort")
    assert (call.status_int, call.text) == (404, "page 404")
    call = get(app, "/?way=redirect")
    assert call.status == "302 Found"
    assert call.headers["Location"].endswith("/elsewhere")
    assert reports == []


@pytest.mark.parametrize(("length", "status"), [(LARGE, 200), (LARGE - 1, 500)])
def test_declared_length_is_checked_before_the_response(
    make_app: MakeApp, length: int, status: int
) -> None:
    """A wrong ``length=`` is an error page."""
    app = spooled(make_app, make_blocks, length=length)
    call = get_raw(app)
    assert call.status_int == status
    if status == 500:
        assert f"length={length} was declared" in call.errors.getvalue()


def test_generator_can_read_its_progress(make_app: MakeApp) -> None:
    """``current_stream()`` counts what was spooled."""
    counts: list[tuple[int, int, int]] = []

    def items() -> Iterator[bytes]:
        yield b"one"
        yield b"two"
        running = current_stream()
        counts.append((running.items, running.chunks, running.bytes))

    get(spooled(make_app, items))
    assert counts == [(2, 2, 6)]


def test_status_without_a_body_is_an_error_page_if_there_are_items(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The temporary file is closed."""

    def items() -> Iterator[str]:
        tg.response.status = 204
        yield "never"

    call = get(spooled(make_app, items))
    assert call.status_int == 500
    assert "status 204" in call.errors.getvalue()
    assert len(reports) == 1


# The database.


def test_connection_is_free_while_the_response_is_sent(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """The changes are committed before the first byte, and the session is closed."""
    model.seed("ada", "bob")

    def items() -> Iterator[bytes]:
        model.DBSession.add(User(name="eve"))
        flush()
        for name in model.DBSession.scalars(sa.select(User.name)):
            yield name.encode() * (1 << 20)

    app = make_app(Root(items, spool=True), model)
    call = Call(app)
    first = next(call)
    assert model.names() == ["ada", "bob", "eve"]
    assert_clean(model)
    assert first + call.read() == b"".join(
        name * (1 << 20) for name in (b"ada", b"bob", b"eve")
    )
    [report] = reports
    assert (report.items, report.commits, report.bytes) == (3, 1, 9 << 20)
    assert_clean(model)


def test_statement_is_spooled(make_app: MakeApp, model: Model) -> None:
    """It is read to its end in the request, however it is read."""
    model.seed(*[f"user{number}" for number in range(2000)])
    statement = sa.select(User.name)
    sources = [
        statement,
        rows(statement),
        rows(statement, key=User.id),
        copy(statement),
    ]

    class RootController(TGController):
        @expose()
        @stream(CSV, spool=True)
        def index(self) -> Any:
            return sources.pop()

    app = make_app(RootController(), model)
    for _ in range(4):
        call = get(app)
        assert sorted(call.text.split()[1:]) == sorted(model.names())
        assert "Content-Length" in call.headers
        assert_clean(model)


@pytest.mark.parametrize("how", ["each", "manual", 2, "end"])
def test_commit_option_has_its_meaning(
    make_app: MakeApp, sqlite_model: Model, how: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """An error after three items leaves what was committed."""

    def items() -> Iterator[str]:
        for name in ("a", "b", "c"):
            sqlite_model.DBSession.add(User(name=name))
            if how == "manual" and name == "a":
                commit()
            yield name
        fail()

    app = make_app(Root(items, spool=True, commit=how), sqlite_model)
    assert get(app).status_int == 500
    expected = {"each": ["a", "b", "c"], "manual": ["a"], 2: ["a", "b"], "end": []}
    assert sqlite_model.names() == expected[how]
    assert_clean(sqlite_model)


def test_uncommitted_changes_are_reported(
    make_app: MakeApp, sqlite_model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """With ``commit='manual'`` there is a warning, as without a spool."""

    def items() -> Iterator[str]:
        sqlite_model.DBSession.add(User(name="a"))
        yield "a"

    app = make_app(Root(items, spool=True, commit="manual"), sqlite_model)
    assert get(app).text == "a"
    assert "1 new User" in caplog.text
    assert sqlite_model.names() == []


@pytest.mark.parametrize("format", [None, CSV(header=["n"]), NDJSON, JSONArray])
def test_failing_last_commit_is_an_error_page(
    make_app: MakeApp, reports: list[Report], format: Any
) -> None:
    """No byte is sent."""

    def items() -> Iterator[Any]:
        transaction.get().addBeforeCommitHook(fail)
        yield from make_blocks() if format is None else [[n] for n in range(99999)]

    app = spooled(make_app, items, format, config={"tm__enabled": True})
    call = get_raw(app)
    assert call.status_int == 500
    assert "LookupError" in call.errors.getvalue()
    assert [report.reason for report in reports] == ["failed"]


def test_commit_comes_after_all_that_can_fail(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """A format that fails at its end leaves nothing in the database."""

    class Broken(Words):
        def encode(self, items: Any) -> Iterator[str]:
            yield from super().encode(items)
            fail()

    def items() -> Iterator[str]:
        sqlite_model.DBSession.add(User(name="a"))
        yield "a"

    app = make_app(Root(items, format=Broken, spool=True), sqlite_model)
    assert get(app).status_int == 500
    assert sqlite_model.names() == []
    assert_clean(sqlite_model)


def test_attempts_of_the_transaction_manager_run_the_controller_once(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """A spooled stream is not retried, as no stream is."""
    runs: list[int] = []

    def items() -> Iterator[str]:
        runs.append(1)
        yield "a"
        raise transaction.interfaces.TransientError("again")

    options: dict[str, Any] = {"tm__attempts": 3}
    app = make_app(Root(items, spool=True), sqlite_model, **options)
    assert get(app).status_int == 500
    assert runs == [1]


def test_hook_of_the_end_can_use_the_session(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """Its connection is returned afterwards."""
    sqlite_model.seed("ada")
    counts: list[int] = []

    def count(report: Report) -> None:
        counts.append(sqlite_model.DBSession.query(User).count())

    app = make_app(Root(make_blocks, spool=True), sqlite_model)
    tg.hooks.register("tgstream.finished", count)
    try:
        get_raw(app)
    finally:
        tg.hooks.disconnect("tgstream.finished", count)
    assert counts == [1]
    assert_clean(sqlite_model)


# The end.


def test_disconnect_while_it_is_sent_has_one_report(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """It counts the bytes that were sent. The committed changes stay."""

    def items() -> Iterator[bytes]:
        sqlite_model.DBSession.add(Note(text="exported"))
        yield from make_blocks()

    app = make_app(Root(items, spool=True), sqlite_model)
    call = Call(app)
    sent = len(next(call)) + len(next(call))
    call.close()
    [report] = reports
    assert (report.reason, report.bytes, report.chunks) == ("disconnected", sent, 2)
    assert report.items == LARGE >> 12
    assert sqlite_model.texts() == ["exported"]
    assert_clean(sqlite_model)


def test_dropped_response_closes_the_file(
    make_app: MakeApp, reports: list[Report], tmp_path: Path
) -> None:
    """Some servers do not call ``close()``."""
    opened = count_files(tmp_path)
    app = spooled(make_app, make_blocks, config=directory(tmp_path))
    call = Call(app, checked=False)
    next(call)
    assert count_files(tmp_path) == opened + 1
    call.drop()
    assert count_files(tmp_path) == opened
    assert [report.reason for report in reports] == ["disconnected"]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_response_that_the_garbage_collector_drops_has_no_error(
    make_app: MakeApp, next_report: Callable[[], Report]
) -> None:
    """Python may close the file before the stream does."""
    app = spooled(make_app, make_blocks)
    for _ in range(20):
        call = Call(app, checked=False)
        next(call)
        cycle: list[Any] = [call]
        cycle.append(cycle)
        del call, cycle
        gc.collect()
        report = next_report()
        assert (report.reason, report.error) == ("disconnected", None)


def test_maximum_duration_while_spooling_is_an_error_page(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The error names the option."""

    def items() -> Iterator[str]:
        pause = threading.Event()
        while True:
            pause.wait(0.01)
            yield "x"

    call = get(spooled(make_app, items, max_seconds=0.05))
    assert call.status_int == 500
    assert "was ended by max_seconds=0.05" in call.errors.getvalue()
    assert [report.reason for report in reports] == ["expired"]


def test_maximum_duration_includes_the_sending(
    make_app: MakeApp, next_report: Callable[[], Report]
) -> None:
    """The client gets an incomplete response."""
    call = Call(spooled(make_app, make_blocks, max_seconds=0.2))
    next(call)
    assert next_report().reason == "expired"
    _, error = read_until_error(call)
    assert "was ended by max_seconds=0.2" in str(error)


def test_drained_stream_is_an_error_page_while_it_is_spooled(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """The generator ends at its next item, and its changes are rolled back."""
    begun, drained = threading.Event(), threading.Event()

    def items() -> Iterator[str]:
        sqlite_model.DBSession.add(User(name="a"))
        flush()
        yield "a"
        begun.set()
        assert drained.wait(10)
        yield "b"
        raise AssertionError("it must not go on")

    app = make_app(Root(items, spool=True), sqlite_model)
    with ThreadPoolExecutor() as threads:
        call = threads.submit(get, app)
        assert begun.wait(10)
        assert not drain(timeout=0)
        drained.set()
        assert call.result().status_int == 500
    assert "was drained before its end" in call.result().errors.getvalue()
    assert [report.reason for report in reports] == ["drained"]
    assert sqlite_model.names() == []


def test_drained_stream_is_aborted_while_it_is_sent(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The client can resume it, maybe from the next process."""
    app = spooled(make_app, make_blocks)
    call = Call(app)
    begun = next(call)
    assert drain()
    rest, error = read_until_error(call)
    assert rest == b""
    assert "was drained before its end" in str(error)
    assert [report.reason for report in reports] == ["drained"]
    stop_draining()
    call = get_raw(app, HTTP_RANGE=f"bytes={len(begun)}-")
    assert begun + call.text.encode() == BLOCKS


@pytest.mark.parametrize("wiring", WIRINGS)
def test_disconnect_while_it_is_spooled_ends_the_stream_quietly(
    make_app: MakeApp,
    reports: list[Report],
    wiring: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The generator is closed. There is no error for a log or an administrator."""
    ended: list[bool] = []
    gone = threading.Event()

    def items() -> Iterator[str]:
        pause = threading.Event()
        try:
            for _ in range(1000):
                yield "x"
                gone.set()
                pause.wait(0.01)
        finally:
            ended.append(True)

    options: dict[str, Any] = {"tgstream__disconnect_check_seconds": 0.05}
    app = spooled(make_app, items, config={**wiring, **options})
    environ: dict[str, Any] = {"waitress.client_disconnected": gone.is_set}
    call = get(app, **environ)
    assert call.status == "499 Client Closed Request"
    assert call.errors.getvalue() == ""
    assert ended == [True]
    assert [report.reason for report in reports] == ["disconnected"]
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_generator_that_closes_its_stream_is_an_error_page(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """Its client waits for a complete file."""

    def items() -> Iterator[str]:
        yield "a"
        current_stream().close()
        yield "b"

    call = get(spooled(make_app, items))
    assert call.status_int == 500
    assert "was closed before its end" in call.errors.getvalue()
    assert [report.reason for report in reports] == ["disconnected"]


def test_slot_is_free_while_the_response_is_sent(make_app: MakeApp) -> None:
    """``limit=`` counts the streams that are made, not the files that are sent."""
    inner: list[int] = []

    class RootController(TGController):
        @expose(content_type="text/plain")
        @stream(spool=True, limit=1)
        def index(self, nested: str = "") -> Iterator[bytes]:
            yield from make_blocks()
            if nested:
                inner.append(get(app).status_int)

    app = make_app(RootController())
    calls = [Call(app) for _ in range(3)]
    assert [call.status_int for call in calls] == [200] * 3
    assert get_raw(app, path="/?nested=yes").status_int == 200
    assert inner == [503]
    assert {call.read() for call in calls} == {BLOCKS}


# The file.


def directory(path: Path) -> dict[str, Any]:
    """Return the option for the directory of temporary files."""
    return {"tgstream__spool_directory": str(path)}


def test_file_has_no_name(make_app: MakeApp, tmp_path: Path) -> None:
    """It goes with its process, and is closed at the end of the response."""
    opened = count_files(tmp_path)
    app = spooled(make_app, make_blocks, config=directory(tmp_path))
    call = Call(app)
    next(call)
    assert count_files(tmp_path) == opened + 1
    assert list(tmp_path.iterdir()) == []
    call.read()
    assert count_files(tmp_path) == opened


def test_small_body_needs_no_file(make_app: MakeApp, tmp_path: Path) -> None:
    """Up to 1 MiB it is in memory."""
    counts: list[int] = []

    def items() -> Iterator[bytes]:
        yield from make_blocks(1 << 20)
        counts.append(count_files(tmp_path))

    app = spooled(make_app, items, config=directory(tmp_path))
    assert get_raw(app).text.encode() == BLOCKS[: 1 << 20]
    assert counts == [0]


def test_large_chunk_is_written_to_the_file(make_app: MakeApp, tmp_path: Path) -> None:
    """It may be the first one."""
    app = spooled(make_app, lambda: [BLOCKS, b"end"], config=directory(tmp_path))
    assert get_raw(app).text.encode() == BLOCKS + b"end"


@pytest.mark.parametrize("way", ["raise", "abort", "large"])
def test_failed_stream_leaves_no_file(
    make_app: MakeApp, tmp_path: Path, way: str
) -> None:
    """It is closed before the error page is made."""
    opened, during = count_files(tmp_path), 0

    def items() -> Iterator[bytes]:
        nonlocal during
        yield from make_blocks()
        during = count_files(tmp_path)
        if way == "large":
            yield b"x" * LARGE
        elif way == "raise":
            fail()
        abort(404)

    limit: dict[str, Any] = {"tgstream__spool_max_bytes": str(LARGE + 1)}
    app = spooled(make_app, items, config={**directory(tmp_path), **limit})
    assert get_raw(app).status_int in (404, 500)
    assert during == opened + 1
    assert count_files(tmp_path) == opened


def test_missing_directory_is_an_error_when_the_application_starts(
    make_app: MakeApp, tmp_path: Path
) -> None:
    """The message names the option."""
    with pytest.raises(ValueError, match=r"tgstream\.spool_directory .* existing dir"):
        spooled(make_app, make_blocks, config=directory(tmp_path / "missing"))


def test_directory_that_cannot_be_written_is_an_error_page(
    make_app: MakeApp,
) -> None:
    """The error names the option, and the generator is closed."""
    closed: list[bool] = []

    def items() -> Iterator[bytes]:
        try:
            yield from make_blocks()
        finally:
            closed.append(True)

    call = get_raw(spooled(make_app, items, config=directory(Path("/proc"))))
    assert call.status_int == 500
    assert "cannot spool its response to /proc, after 1048576 bytes" in (
        call.errors.getvalue()
    )
    assert "set tgstream.spool_directory" in call.errors.getvalue()
    assert closed == [True]


def test_body_above_the_maximum_is_an_error_page(
    make_app: MakeApp, reports: list[Report], caplog: pytest.LogCaptureFixture
) -> None:
    """The report and the log name the controller, the maximum and the option."""
    config: dict[str, Any] = {"tgstream__spool_max_bytes": 100_000}
    assert get_raw(spooled(make_app, make_blocks, config=config)).status_int == 500
    [report] = reports
    assert report.reason == "failed"
    assert isinstance(report.error, StreamError)
    assert "RootController.index yielded more than 100000 bytes" in str(report.error)
    assert "Raise tgstream.spool_max_bytes" in str(report.error)
    assert str(report.error) in caplog.text


@pytest.mark.parametrize("maximum", [0, "0", str(1 << 40)])
def test_maximum_0_allows_any_size(make_app: MakeApp, maximum: Any) -> None:
    """Only the disk limits it then. A maximum can be larger than most numbers."""
    config: dict[str, Any] = {"tgstream__spool_max_bytes": maximum}
    call = get_raw(spooled(make_app, make_blocks, config=config))
    assert call.text.encode() == BLOCKS


def test_open_file_is_sent_as_it_is(
    make_app: MakeApp, tmp_path: Path, reports: list[Report]
) -> None:
    """It is a file already, so it is not copied."""
    (tmp_path / "blocks").write_bytes(BLOCKS)

    def open_blocks() -> Any:
        return (tmp_path / "blocks").open("rb")

    config = {**directory(tmp_path), "tgstream__spool_max_bytes": 1}
    for spool in (True, False):
        app = spooled(make_app, open_blocks, spool=spool, config=config)
        call = get_raw(app, HTTP_RANGE="bytes=10-")
        assert (call.status_int, call.text.encode()) == (206, BLOCKS[10:])
    assert [report.bytes for report in reports] == [LARGE - 10] * 2


# Formats that cannot be spooled.


class Pings:
    """A custom format with a heartbeat, whose body ends."""

    content_type = "text/x-pings"
    heartbeat = 5.0

    def encode(self, items: Any) -> Iterator[str]:
        yield from items


@pytest.mark.parametrize("format", [SSE, SSE(heartbeat=5), Pings(), [CSV, SSE]])
def test_format_of_events_cannot_be_spooled(format: Any) -> None:
    """It is an error where the controller is decorated."""
    with pytest.raises(ValueError, match=r"cannot be spooled.*Omit spool=True"):

        @stream(format, spool=True)
        def events() -> None:
            pass

    if not isinstance(format, list):
        with pytest.raises(ValueError, match=r"Stream: .* cannot be spooled"):
            Stream([], format, spool=True)


def test_format_of_events_in_a_spooled_controller_is_an_error(
    make_app: MakeApp,
) -> None:
    """The stream that it returns gets the decorator's option."""

    class RootController(TGController):
        @expose()
        @stream(spool=True)
        def index(self) -> Stream:
            return Stream(["never"], SSE)

    call = get(make_app(RootController()))
    assert call.status_int == 500
    assert "SSE cannot be spooled" in call.errors.getvalue()


def test_stream_in_a_stream_cannot_be_spooled(make_app: MakeApp) -> None:
    """Only the whole response can."""

    def items() -> Iterator[bytes]:
        yield from Stream(["a"], spool=True).encode_member()

    call = get(spooled(make_app, items))
    assert "cannot have spool" in call.errors.getvalue()
