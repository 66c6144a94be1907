"""Downloads: complete or aborted, of the declared length, in chunks of a good size."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tg
import transaction
from tg import TGController, expose

from tests.conftest import LiveServer, MakeApp, assert_clean
from tests.formats.support import Batches
from tests.live_apps import downloads
from tests.model import Model, User
from tests.test_servers import BROKEN, SERVERS, Client, curl
from tests.wsgi import Call, get
from tgstream import CSV, NDJSON, JSONArray, Report, Stream, StreamError, stream

FORMATS: list[Any] = [CSV(header=["n"]), NDJSON(end=True), JSONArray]
ENDINGS = {"csv": b"", "ndjson": b'{"end":true', "array": b"]]"}
SOURCES: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "iterator": iter,
    "batches": lambda items: Batches(items, (), 100),
}


def make_download_app(make_app: MakeApp, make: Callable[[], Any], **config: Any) -> Any:
    """An application whose root streams what ``make`` returns."""

    class RootController(TGController):
        @expose(content_type="text/plain")
        def index(self) -> Any:
            return make()

    return make_app(RootController(), **config)


def read_until_error(call: Call) -> tuple[bytes, BaseException]:
    """Read a body that fails. Return its bytes up to the error, and the error."""
    chunks = []
    with pytest.raises(Exception) as failure:
        for chunk in call:
            chunks.append(chunk)
    call.close()
    return b"".join(chunks), failure.value


def fail() -> None:
    raise LookupError("at the end")


# Completeness.


@pytest.mark.parametrize("format", FORMATS, ids=["csv", "ndjson", "array"])
def test_failed_stream_has_no_end_marker(
    make_app: MakeApp, reports: list[Report], format: Any
) -> None:
    """An array is not closed, and the last line of NDJSON reports the failure."""

    def items() -> Iterator[Any]:
        yield [1]
        yield [2]
        fail()

    app = make_download_app(make_app, lambda: Stream(items(), format, chunk_size=0))
    sent, error = read_until_error(Call(app))
    sent, _, _ = sent.partition(b'{"end":false,"incident":')
    assert sent in (b"n\r\n1\r\n2\r\n", b"[1]\n[2]\n", b"[[1],[2]")
    assert isinstance(error, LookupError)
    assert [report.reason for report in reports] == ["failed"]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("format", FORMATS, ids=["csv", "ndjson", "array"])
def test_item_that_fails_late_leaves_no_end_marker(
    make_app: MakeApp, format: Any, source: str
) -> None:
    """An item that cannot be encoded aborts any source, after a thousand items."""
    items = [[n] for n in range(1000)] + [object()]
    app = make_download_app(
        make_app, lambda: Stream(SOURCES[source](items), format, chunk_size=100)
    )
    sent, error = read_until_error(Call(app))
    assert isinstance(error, TypeError) and "item 1001" in str(error)
    assert b"500" in sent and b'"end":true' not in sent and not sent.endswith(b"]]")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("format", FORMATS, ids=["csv", "ndjson", "array"])
def test_commit_that_fails_leaves_no_end_marker(
    make_app: MakeApp, format: Any, source: str
) -> None:
    """The last commit comes before the end marker."""
    items = [[n] for n in range(5000)]

    def start() -> Stream:
        class Watched(Batches):
            def batches(self) -> Iterator[Any]:
                transaction.get().addBeforeCommitHook(fail)
                yield from super().batches()

        return Stream(Watched(items, (), 100), format, chunk_size=100)

    def start_iterator() -> Stream:
        def generate() -> Iterator[Any]:
            transaction.get().addBeforeCommitHook(fail)
            yield from items

        return Stream(generate(), format, chunk_size=100)

    make = start_iterator if source == "iterator" else start
    sent, error = read_until_error(
        Call(make_download_app(make_app, make, tm__enabled=True))
    )
    assert isinstance(error, LookupError)
    assert b"2500" in sent and b'"end":true' not in sent and not sent.endswith(b"]]")


def test_end_record_counts_the_items(make_app: MakeApp) -> None:
    """It does not depend on the source or on the number of chunks."""
    items = [[n] for n in range(3000)]
    for make in SOURCES.values():
        app = make_download_app(
            make_app, partial(Stream, make(items), NDJSON(end=True))
        )
        last = get(app).text.splitlines()[-1]
        assert json.loads(last) == {"end": True, "items": 3000}


def test_unencodable_character_fails_before_the_last_commit(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """Buffered output is encoded before the transaction is committed."""
    committed: list[bool] = []

    def items() -> Iterator[Any]:
        transaction.get().addAfterCommitHook(committed.append)
        yield ["\u20ac"]

    def start() -> Stream:
        return Stream(items(), CSV, charset="latin-1")

    call = get(make_download_app(make_app, start, tm__enabled=True))
    assert call.status.startswith("500")
    assert "UnicodeEncodeError" in call.errors.getvalue()
    assert committed == []
    assert [report.reason for report in reports] == ["failed"]


# Lengths.


@pytest.mark.parametrize("chunk_size", [0, 1000])
@pytest.mark.parametrize("make_source", [list, tuple, iter])
def test_encode_of_a_subclass_is_used_for_all_sources(
    make_app: MakeApp, make_source: Any, chunk_size: int
) -> None:
    """It hides a column, although the inherited format can encode batches."""

    class Masked(NDJSON):
        def encode(self, items: Any) -> Iterator[bytes]:
            return super().encode({**item, "secret": None} for item in items)

    items = [{"n": n, "secret": "x"} for n in range(3)]
    app = make_download_app(
        make_app, lambda: Stream(make_source(items), Masked, chunk_size=chunk_size)
    )
    sent = [json.loads(line) for line in get(app).text.splitlines()]
    assert sent == [{"n": n, "secret": None} for n in range(3)]


def test_str_subclass_keeps_its_place(make_app: MakeApp) -> None:
    """Markup is encoded with the text around it, after one byte order mark."""

    class Markup(str):
        pass

    app = make_download_app(
        make_app,
        lambda: Stream(["a", Markup("b"), "c"], chunk_size=100, charset="utf-16"),
    )
    assert Call(app).read() == "abc".encode("utf-16")


@pytest.mark.parametrize("options", [{}, {"chunk_size": 7}, {"chunk_size": 10**6}])
def test_exact_length_is_sent_as_content_length(
    make_app: MakeApp, options: dict[str, Any]
) -> None:
    """The length counts bytes, whatever the chunk size."""
    parts = ["one", "", "twö", "three"]
    app = make_download_app(make_app, lambda: Stream(iter(parts), length=12, **options))
    call = get(app)
    assert call.text == "onetwöthree"
    assert call.headers["Content-Length"] == "12"


@pytest.mark.parametrize(
    ("format", "length"), [(CSV(header=["n"]), 12), (NDJSON, 12), (JSONArray, 13)]
)
@pytest.mark.parametrize("source", SOURCES)
def test_length_includes_what_the_format_adds(
    make_app: MakeApp, format: Any, length: int, source: str
) -> None:
    """A header and an end marker count."""
    items: list[Any] = [[n] for n in range(3)]
    for size in (None, 0, 1):
        app = make_download_app(
            make_app,
            partial(
                Stream, SOURCES[source](items), format, length=length, chunk_size=size
            ),
        )
        call = get(app)
        assert len(call.text) == length
        assert call.headers["Content-Length"] == str(length)


@pytest.mark.parametrize("commit", ["end", "each", 2, "manual"])
def test_chunk_that_completes_the_length_is_sent_last(
    make_app: MakeApp, reports: list[Report], commit: Any
) -> None:
    """The generator has ended by then, with any ``commit=``."""
    ended: list[int] = []

    def items() -> Iterator[bytes]:
        try:
            yield from [b"ab", b"cd", b"ef"]
        finally:
            ended.append(len(reports))

    app = make_download_app(
        make_app, lambda: Stream(items(), length=6, commit=commit), tm__enabled=True
    )
    call = Call(app)
    assert [next(call), next(call)] == [b"ab", b"cd"]
    assert ended == []
    assert next(call) == b"ef"
    assert ended == [0]
    assert call.read() == b""
    assert [report.reason for report in reports] == ["completed"]


@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"commit": "each"}])
@pytest.mark.parametrize("made", [3, 5, 6])
def test_wrong_length_aborts_the_response(
    make_app: MakeApp, reports: list[Report], made: int, options: dict[str, Any]
) -> None:
    """The client never gets as many bytes as declared."""
    parts = [b"x"] * made
    app = make_download_app(
        make_app, lambda: Stream(iter(parts), length=4, **options), tm__enabled=True
    )
    call = Call(app)
    assert call.headers["Content-Length"] == "4"
    sent, error = read_until_error(call)
    assert sent == b"xxx"
    assert isinstance(error, StreamError)
    amount = "more than 4" if made > 4 else "3"
    message = f"RootController.index sent {amount} bytes, but length=4 was declared"
    assert message in str(error)
    assert [report.reason for report in reports] == ["failed"]


@pytest.mark.parametrize("length", [0, 3, 5])
@pytest.mark.parametrize("format", [None, NDJSON])
def test_wrong_length_in_the_first_pull_is_an_ordinary_error(
    make_app: MakeApp, format: Any, length: int
) -> None:
    """The error page has its own length."""

    def start() -> Stream:
        items = iter([1234 if format else b"1234\n"])
        return Stream(items, format, length=length + (length > 3), chunk_size=99)

    call = get(make_download_app(make_app, start))
    assert call.status.startswith("500")
    assert "StreamError" in call.errors.getvalue()
    assert call.headers.get("Content-Length") in (None, str(len(call.text)))


def test_empty_stream_can_have_the_length_0(make_app: MakeApp) -> None:
    """It has no items, or empty items only."""
    for items in ([], [""], [b"", b""]):
        call = get(make_download_app(make_app, partial(Stream, items, length=0)))
        assert (call.status, call.text) == ("200 OK", "")
        assert call.headers["Content-Length"] == "0"


def test_completing_chunk_waits_for_the_commit(make_app: MakeApp) -> None:
    """A client that has all bytes would not notice that the commit failed."""

    def items() -> Iterator[bytes]:
        yield b"ab"
        transaction.get().addBeforeCommitHook(fail)
        yield b"cd"

    app = make_download_app(
        make_app, lambda: Stream(items(), length=4), tm__enabled=True
    )
    sent, error = read_until_error(Call(app))
    assert (sent, type(error)) == (b"ab", LookupError)


@pytest.mark.parametrize(
    ("format", "length", "last"),
    [(None, 2, b"2"), (JSONArray, 9, b"]"), (NDJSON(end=True), None, b":2}\n")],
)
def test_last_byte_is_sent_after_the_commit(
    make_app: MakeApp, model: Model, format: Any, length: int | None, last: bytes
) -> None:
    """The changes of the generator are not committed with an earlier chunk."""

    def items() -> Iterator[str]:
        yield "1"
        model.DBSession.add(User(name="ada"))
        yield "2"

    app = make_download_app(
        make_app,
        lambda: Stream(items(), format, length=length, chunk_size=0),
        model=model,
    )
    call = Call(app)
    assert next(call) and model.names() == []
    sent = b""
    while not sent.endswith(last):
        assert model.names() == []
        sent = next(call)
    assert model.names() == ["ada"]
    call.close()
    assert_clean(model)


def test_head_request_gets_the_length(make_app: MakeApp) -> None:
    """The generator does not run."""
    ran: list[int] = []

    def items() -> Iterator[bytes]:
        ran.append(1)
        yield b"ab"

    app = make_download_app(
        make_app, lambda: Stream(items(), length=2, filename="ü.bin")
    )
    call = Call(app, method="HEAD")
    assert (call.read(), ran) == (b"", [])
    assert call.headers["Content-Length"] == "2"
    assert "filename*=UTF-8''%C3%BC.bin" in call.headers["Content-Disposition"]


@pytest.mark.parametrize("length", [-1, 1.0, "5", True, b"5"], ids=repr)
def test_length_that_is_not_a_number_of_bytes_is_rejected(length: Any) -> None:
    """The error is raised at decoration."""
    message = r"length must be a number of bytes"
    with pytest.raises(ValueError, match="@stream on .*" + message):
        stream(length=length)(downloads.rows)
    with pytest.raises(ValueError, match="Stream: " + message):
        Stream([], length=length)


def test_decorator_can_set_the_length(make_app: MakeApp) -> None:
    """The controller returns a file. The headers that it sets are kept."""
    size = os.path.getsize(__file__)

    class RootController(TGController):
        @expose(content_type="application/octet-stream")
        @stream(length=size, filename="../../etc/passwd")
        def index(self) -> Any:
            tg.response.headers["X-Mine"] = "kept"
            return open(__file__, "rb")

    call = get(make_app(RootController()))
    assert call.text == Path(__file__).read_text()
    assert call.headers["Content-Length"] == str(size)
    assert call.headers["X-Mine"] == "kept"
    assert call.headers["Content-Disposition"] == 'attachment; filename="passwd"'


# Over real sockets.


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """Each server, with the application of ``tests/live_apps/downloads.py``."""
    live = LiveServer(request.param, "downloads")
    yield live
    live.stop()


def download(server: LiveServer, path: str) -> tuple[bytes, bool]:
    """Download a path. Return the body, and whether the client takes it as complete."""
    client = Client(server, path)
    try:
        return client.response.read(), True
    except http.client.IncompleteRead as error:
        return error.partial, False
    except ConnectionResetError:
        return b"", False
    finally:
        client.close()


@pytest.mark.parametrize("end", ["raise", "commit"])
@pytest.mark.parametrize("format", ENDINGS)
def test_failed_export_is_aborted(server: LiveServer, format: str, end: str) -> None:
    """Clients detect it on every server and in every format. So does curl."""
    path = f"/rows?format={format}&end={end}"
    body, complete = download(server, path)
    assert not complete
    ending = ENDINGS[format]
    assert ending == b"" or ending not in body
    assert b"LookupError" not in body
    assert curl(server, path)[0] == 18


@pytest.mark.parametrize("listed", ["", "1"])
@pytest.mark.parametrize("format", ENDINGS)
def test_finished_export_is_complete(
    server: LiveServer, format: str, listed: str
) -> None:
    """Its source is a generator or a list."""
    body, complete = download(server, f"/rows?format={format}&end=&listed={listed}")
    assert complete and ENDINGS[format] in body
    assert body.count(downloads.ROW[1].encode()) == downloads.ROWS


@pytest.mark.parametrize("made", [99, 101, 150])
def test_wrong_length_is_aborted(server: LiveServer, made: int) -> None:
    """The client gets fewer bytes than declared, and curl reports it."""
    path = f"/sized?made={made}&length=100000"
    client = Client(server, path)
    assert client.response.getheader("Content-Length") == "100000"
    with pytest.raises(BROKEN) as failure:
        client.response.read()
    client.close()
    if isinstance(failure.value, http.client.IncompleteRead):
        assert len(failure.value.partial) < 100000
    status, data = curl(server, path)
    assert status == 18 and len(data) < 100000


def test_exact_length_is_complete(server: LiveServer) -> None:
    """For curl it is an ordinary download."""
    status, data = curl(server, "/sized?made=100&length=100000")
    assert (status, len(data)) == (0, 100000)


def test_length_is_not_completed_if_the_commit_fails(server: LiveServer) -> None:
    """The client does not get the last chunk."""
    body, complete = download(server, "/sized?made=100&length=100000&end=commit")
    assert not complete and len(body) <= 99000


@pytest.mark.parametrize("server", ["waitress", "gunicorn-gthread"], indirect=True)
@pytest.mark.parametrize("format", ["csv", "ndjson"])
def test_slow_items_are_sent_one_by_one(
    server: LiveServer, tmp_path: Path, format: str
) -> None:
    """The client receives each item before the generator yields the next."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    go = os.open(pipe, os.O_RDWR)  # O_WRONLY would wait for a reader
    os.write(go, b"item0\n")
    client = Client(server, f"/slow?format={format}&pipe={pipe}")
    body = b""
    for n in range(4):
        while f"item{n}".encode() not in body:
            chunk = client.response.read1()
            assert chunk
            body += chunk
        assert f"item{n + 1}".encode() not in body
        os.write(go, f"item{n + 1}\n".encode())
    client.leave()
    os.close(go)


def chunk_sizes(server: LiveServer, path: str) -> list[int]:
    """The sizes of the chunks of the chunked transfer encoding."""
    with socket.create_connection(("127.0.0.1", server.port), 20) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        file, sizes = raw.makefile("rb"), []
        while file.readline() != b"\r\n":
            pass
        while size := int(file.readline(), 16):
            sizes.append(size)
            file.read(size + 2)
        file.close()
    return sizes


@pytest.mark.parametrize("server", ["waitress", "gunicorn-gthread"], indirect=True)
@pytest.mark.parametrize("listed", ["", "1"])
@pytest.mark.parametrize("format", ENDINGS)
def test_fast_items_are_buffered(server: LiveServer, format: str, listed: str) -> None:
    """Each chunk except the last has at least 32 KiB."""
    sizes = chunk_sizes(server, f"/rows?format={format}&end=&listed={listed}")
    assert len(sizes) > 3
    assert min(sizes[:-1]) >= 32768
    assert max(sizes) < 2 * 32768 + 100 * 256


# A Content-Length that the application sets.


@pytest.mark.parametrize("where", ["controller", "generator"])
@pytest.mark.parametrize("made", [9, 10, 11])
@pytest.mark.parametrize("chunk_size", [0, 100])
def test_content_length_of_the_response_is_the_length_of_the_stream(
    make_app: MakeApp, where: str, made: int, chunk_size: int
) -> None:
    """It is set before the first item. A body of another size is aborted."""

    def set_length() -> None:
        tg.response.content_length = 10

    def items() -> Iterator[str]:
        if where == "generator":
            set_length()
        yield "x" * 4
        yield "x" * (made - 4)

    def make() -> Stream:
        if where == "controller":
            set_length()
        return Stream(items(), chunk_size=chunk_size)

    app = make_download_app(make_app, make, trace_errors__enable=False)
    if made == 10:
        call = Call(app)
        assert call.read() == b"x" * 10
        assert call.headers["Content-Length"] == "10"
        return
    with pytest.raises(
        StreamError, match=r"sent .* bytes, but length=\d+ was declared"
    ):
        Call(app, checked=False).read()


def test_content_length_of_the_controller_is_sent_for_head(make_app: MakeApp) -> None:
    """The headers are those of GET, and the generator does not run."""

    def make() -> Stream:
        tg.response.content_length = 10
        return Stream(map(int, ["never"]))

    call = Call(make_download_app(make_app, make), method="HEAD")
    assert call.read() == b""
    assert call.headers["Content-Length"] == "10"


def test_option_length_overrides_the_header(make_app: MakeApp) -> None:
    """The option belongs to the stream, the header only to the response."""

    def make() -> Stream:
        tg.response.content_length = 10
        return Stream(iter(["xx"]), length=2)

    call = get(make_download_app(make_app, make))
    assert (call.text, call.headers["Content-Length"]) == ("xx", "2")
