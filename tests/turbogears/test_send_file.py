"""``send_file()``, and open binary files under ``@stream``, in a TG application."""

from __future__ import annotations

import email
import gzip
import io
import os
import socket
import tempfile
import zipfile
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import tg
import transaction
from tg import TGController, abort, expose, predicates, require
from transaction.interfaces import TransientError

from tests.conftest import MakeApp, assert_clean
from tests.model import Model
from tests.turbogears.support import (
    ERROR_PAGES,
    WIRINGS,
    make_error_controller,
    plug_with_wrapper,
    use_upper_case,
)
from tests.wsgi import Call, get
from tgstream import CSV, Report, Stream, StreamError, send_file, stream
from tgstream.core.files import BLOCK_SIZE

DATA = bytes(range(256)) * 1000  # four blocks
UNTRACED = {"trace_errors__enable": False}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file whose content is ``DATA``."""
    file = tmp_path / "data.bin"
    file.write_bytes(DATA)
    return file


def make_root(make: Callable[[], Any]) -> TGController:
    """Return a controller whose pages return what ``make`` does."""

    class Root(TGController):
        error = make_error_controller()

        @expose()
        def index(self, **parameters: str) -> Any:
            return make()

        @expose()
        @stream
        def streamed(self) -> Any:
            return make()

    return Root()


def make_file_app(make_app: MakeApp, make: Callable[[], Any], **options: Any) -> Any:
    return make_app(make_root(make), **{**UNTRACED, **options})


def ask(app: Any, path: str = "/", method: str = "GET", **headers: str) -> Call:
    """Send a request with these headers."""
    environ: dict[str, Any] = {
        f"HTTP_{name.upper()}": value for name, value in headers.items()
    }
    return Call(app, path, method, **environ)


def tags(call: Call) -> tuple[str, str]:
    """The validators of a response, whose body is read."""
    call.read()
    return call.headers["ETag"], call.headers["Last-Modified"]


# Whole files.


@pytest.mark.parametrize("wiring", WIRINGS)
def test_file_has_its_length_and_its_validators(
    make_app: MakeApp, reports: list[Report], path: Path, wiring: dict[str, Any]
) -> None:
    """The ``ETag`` is strong, and the stream completes."""
    call = ask(make_file_app(make_app, lambda: send_file(path), **wiring))
    assert call.read() == DATA
    assert call.status == "200 OK"
    headers = call.headers
    assert headers["Content-Length"] == str(len(DATA))
    assert headers["Accept-Ranges"] == "bytes"
    assert headers["ETag"].startswith('"') and headers["ETag"].endswith('"')
    modified = formatdate(int(path.stat().st_mtime), usegmt=True)
    assert headers["Last-Modified"] == modified
    assert headers["Content-Type"] == "application/octet-stream"
    assert headers["Cache-Control"] == "no-cache"
    assert "Content-Disposition" not in headers
    report = reports[0]
    assert (report.reason, report.bytes, report.chunks) == ("completed", len(DATA), 4)
    assert report.controller == "Root.index"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("size", [0, 1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1])
def test_file_of_any_size_is_complete(
    make_app: MakeApp, path: Path, method: str, size: int
) -> None:
    """HEAD has the same headers, and no body."""
    path.write_bytes(DATA[:size])
    call = ask(make_file_app(make_app, lambda: send_file(path)), method=method)
    assert call.read() == (DATA[:size] if method == "GET" else b"")
    assert call.headers["Content-Length"] == str(size)
    assert {"ETag", "Last-Modified", "Accept-Ranges"} <= {*call.headers}


def test_file_is_closed_by_each_request(make_app: MakeApp, path: Path) -> None:
    """Nothing holds it after the end, nor for a response without its bytes."""
    files: list[Any] = []

    def make() -> Stream:
        files.append(path.open("rb"))
        return send_file(files[-1])

    app = make_file_app(make_app, make)
    tag, _ = tags(ask(app))
    for method, headers in [
        ("GET", {}),
        ("HEAD", {}),
        ("OPTIONS", {}),
        ("GET", {"if_none_match": tag}),
        ("HEAD", {"if_none_match": tag}),
        ("GET", {"if_match": '"x"'}),
        ("GET", {"range": "bytes=999999-"}),
        ("GET", {"range": "bytes=1-2,4-5"}),
    ]:
        ask(app, method=method, **headers).read()
    call = ask(app)
    next(call)
    call.close()  # a client that disconnects
    Call(app, checked=False).drop()
    assert [file.closed for file in files] == [True] * 11


def test_file_is_not_read_for_a_head_request(make_app: MakeApp, path: Path) -> None:
    """OPTIONS has no headers of the file either."""

    class Unread(io.FileIO):
        def read(self, *args: Any) -> Any:
            raise LookupError("read")

    app = make_file_app(make_app, lambda: send_file(Unread(path)))
    call = ask(app, method="HEAD")
    assert call.read() == b"" and call.headers["Content-Length"] == str(len(DATA))
    call = ask(app, method="OPTIONS")
    assert call.read() == b"" and "Accept-Ranges" not in call.headers


# Ranges.


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("page", ["/", "/streamed"])
def test_range_is_sent_and_completed(
    make_app: MakeApp,
    reports: list[Report],
    path: Path,
    wiring: dict[str, Any],
    page: str,
) -> None:
    """Its report has its bytes."""
    app = make_file_app(make_app, lambda: path.open("rb"), **wiring)
    if page == "/":
        app = make_file_app(make_app, lambda: send_file(path), **wiring)
    for header, first, stop in [
        ("bytes=0-0", 0, 1),
        ("bytes=5-99", 5, 100),
        ("bytes=70000-", 70_000, len(DATA)),
        ("bytes=-70000", len(DATA) - 70_000, len(DATA)),
        ("bytes=-99999999", 0, len(DATA)),
    ]:
        call = ask(app, page, range=header)
        assert call.read() == DATA[first:stop]
        assert call.status == "206 Partial Content"
        assert call.headers["Content-Length"] == str(stop - first)
        position = f"bytes {first}-{stop - 1}/{len(DATA)}"
        assert call.headers["Content-Range"] == position
        report = reports.pop()
        assert (report.reason, report.bytes) == ("completed", stop - first)


def test_range_seeks(make_app: MakeApp, path: Path) -> None:
    """Bytes outside of the range are not read."""
    reads: list[tuple[int, int]] = []

    class Watched(io.FileIO):
        def read(self, size: int | None = -1, /) -> Any:
            reads.append((self.tell(), size or 0))
            return super().read(size)

    app = make_file_app(make_app, lambda: send_file(Watched(path)))
    assert ask(app, range="bytes=200000-200009").read() == DATA[200_000:200_010]
    assert reads == [(200_000, 10)]


def test_several_ranges_are_a_multipart_body(make_app: MakeApp, path: Path) -> None:
    """The standard library's parser finds the parts."""
    app = make_file_app(make_app, lambda: send_file(path, content_type="text/x-data"))
    call = ask(app, range="bytes=200000-200005, 0-99999,-1")
    body = call.read()
    assert call.status_int == 206
    assert call.headers["Content-Length"] == str(len(body))
    assert "Content-Range" not in call.headers
    head = f"Content-Type: {call.headers['Content-Type']}\r\n\r\n"
    message = email.message_from_bytes(head.encode() + body)
    parts: Any = message.get_payload()
    expected = [(200_000, 200_006), (0, 100_000), (len(DATA) - 1, len(DATA))]
    assert len(parts) == 3
    for part, (first, stop) in zip(parts, expected, strict=True):
        assert part["Content-Range"] == f"bytes {first}-{stop - 1}/{len(DATA)}"
        assert part["Content-Type"] == "text/x-data; charset=utf-8"
    for first, stop in expected:
        assert DATA[first:stop] in body


def test_head_of_several_ranges_has_the_headers_of_the_file(
    make_app: MakeApp, path: Path
) -> None:
    """A range is for GET alone."""
    call = ask(
        make_file_app(make_app, lambda: send_file(path)),
        method="HEAD",
        range="bytes=0-1,5-6",
    )
    call.read()
    assert call.status_int == 200
    assert call.headers["Content-Length"] == str(len(DATA))


@pytest.mark.parametrize(
    "header",
    ["bytes=-", "bytes=9-1", "bytes=0-,0-", "bytes=" + "0-0," * 2500, "-" * 10_000],
    ids=lambda header: header[:20],
)
def test_invalid_range_gets_the_whole_file(
    make_app: MakeApp, path: Path, header: str
) -> None:
    """WebOb alone fails for some of these."""
    call = ask(make_file_app(make_app, lambda: send_file(path)), range=header)
    assert (call.status_int, call.read()) == (200, DATA)


@pytest.mark.parametrize("first", [str(len(DATA)), str(10**30), "9" * 10_000])
def test_range_after_the_end_is_a_416(
    make_app: MakeApp, reports: list[Report], path: Path, first: str
) -> None:
    """Its header has the size of the file."""
    app = make_file_app(make_app, lambda: send_file(path, filename="a.bin"))
    call = ask(app, range=f"bytes={first}-")
    assert (call.status_int, call.read()) == (416, b"")
    assert call.headers["Content-Range"] == f"bytes */{len(DATA)}"
    assert call.headers["Content-Length"] == "0"
    assert [report.reason for report in reports] == ["completed"]


# Conditions.


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_unmodified_file_is_a_304(
    make_app: MakeApp, path: Path, method: str, wiring: dict[str, Any]
) -> None:
    """It has no body, no length and no type of a body."""
    app = make_file_app(make_app, lambda: send_file(path), **wiring)
    tag, modified = tags(ask(app))
    for headers in {"if_none_match": tag}, {"if_modified_since": modified}:
        call = ask(app, method=method, **headers)
        assert (call.read(), call.status_int) == (b"", 304)
        assert not {"Content-Length", "Content-Type"} & {*call.headers}
        assert call.headers["ETag"] == tag


def test_failed_precondition_is_a_412(make_app: MakeApp, path: Path) -> None:
    """Nothing of the file is sent."""
    call = ask(make_file_app(make_app, lambda: send_file(path)), if_match='"x"')
    assert (call.status_int, call.read()) == (412, b"")


def test_range_of_a_changed_file_is_the_whole_new_file(
    make_app: MakeApp, path: Path
) -> None:
    """``If-Range`` protects a client from a file of two halves."""
    app = make_file_app(make_app, lambda: send_file(path))
    tag, modified = tags(ask(app))
    for validator in tag, modified:
        call = ask(app, range="bytes=100-", if_range=validator)
        assert (call.status_int, call.read()) == (206, DATA[100:])
    path.write_bytes(DATA[::-1])
    os.utime(path, (2**31, 2**31))
    for validator in tag, modified:
        call = ask(app, range="bytes=100-", if_range=validator)
        assert (call.status_int, call.read()) == (200, DATA[::-1])


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(DATA[::-1])
    os.replace(other, path)


def overwrite(path: Path) -> None:
    path.write_bytes(DATA[::-1])


@pytest.mark.parametrize("change", [replace, overwrite])
def test_etag_differs_for_a_change_of_equal_size_and_time(
    make_app: MakeApp, path: Path, change: Callable[[Path], None]
) -> None:
    """``cp -p``, ``rsync`` and reproducible builds set such times."""
    os.utime(path, (1, 1))
    app = make_file_app(make_app, lambda: send_file(path))
    tag, modified = tags(ask(app))
    assert tags(ask(app))[0] == tag
    change(path)
    os.utime(path, (1, 1))
    new_tag, same_time = tags(ask(app))
    assert (new_tag != tag, same_time) == (True, modified)
    call = ask(app, range="bytes=100-", if_range=tag)
    assert (call.status_int, call.read()) == (200, DATA[::-1])


def test_webob_does_not_answer_a_second_time(make_app: MakeApp, path: Path) -> None:
    """``conditional_response`` would apply the range to the range."""

    def make() -> Stream:
        tg.response.conditional_response = True
        return send_file(path)

    app = make_file_app(make_app, make)
    for header, expected in [("bytes=10-19", DATA[10:20]), ("bytes=-", DATA)]:
        assert ask(app, range=header).read() == expected


def test_validators_of_the_controller_are_used(make_app: MakeApp, path: Path) -> None:
    """They may be equal on several machines."""

    def make() -> Stream:
        tg.response.headers["ETag"] = '"v1"'
        tg.response.headers["Last-Modified"] = "Sun, 09 Sep 2001 01:46:40 GMT"
        return send_file(path)

    app = make_file_app(make_app, make)
    assert ask(app, range="bytes=5-6", if_range='"v1"').read() == DATA[5:7]
    call = ask(app, if_modified_since="Sun, 09 Sep 2001 01:46:40 GMT")
    assert (call.status_int, call.read()) == (304, b"")


def test_status_of_the_controller_is_kept(make_app: MakeApp, path: Path) -> None:
    """Conditions and ranges apply to a 200 alone."""

    def make() -> Stream:
        tg.response.status = 404
        return send_file(path)

    call = ask(make_file_app(make_app, make), range="bytes=0-1", if_none_match="*")
    assert (call.status_int, call.read()) == (404, DATA)
    assert "Accept-Ranges" not in call.headers


# Content type, file name, and caching.


@pytest.mark.parametrize(
    ("name", "options", "content_type"),
    [
        ("a.txt", {}, "text/plain; charset=utf-8"),
        ("a.html", {}, "text/html; charset=utf-8"),
        ("a.pdf", {}, "application/pdf"),
        ("a.json", {}, "application/json"),
        ("a.tar.gz", {}, "application/gzip"),
        ("a.csv.bz2", {}, "application/x-bzip"),
        ("a.unknown", {}, "application/octet-stream"),
        ("a", {}, "application/octet-stream"),
        ("data:text", {}, "application/octet-stream"),
        ("a.txt", {"filename": "b.pdf"}, "application/pdf"),
        ("a.pdf", {"filename": "b"}, "application/pdf"),
        ("a.pdf", {"content_type": "text/x-log"}, "text/x-log; charset=utf-8"),
        ("a", {"content_type": "text/a; charset=x"}, "text/a; charset=x"),
        ("a", {"content_type": "image/x-b"}, "image/x-b"),
    ],
)
def test_content_type_is_guessed_from_the_name(
    make_app: MakeApp,
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    content_type: str,
) -> None:
    """There is no ``Content-Encoding``: a browser would unpack a download."""
    file = tmp_path / name
    file.write_bytes(b"x")
    makes: list[Callable[[], Any]] = [
        lambda: send_file(str(file), **options),
        lambda: send_file(file, **options),
        lambda: send_file(file.open("rb"), **options),
    ]
    for make in makes:
        call = ask(make_file_app(make_app, make))
        call.read()
        assert call.headers["Content-Type"] == content_type
        assert "Content-Encoding" not in call.headers


def test_declared_content_type_is_kept(make_app: MakeApp, tmp_path: Path) -> None:
    """It is of ``@expose``, or of the controller. The parameter outranks both."""
    file = tmp_path / "a.txt"
    file.write_bytes(b"x")

    class Root(TGController):
        @expose(content_type="image/x-exposed")
        def exposed(self) -> Stream:
            return send_file(file)

        @expose(content_type="image/x-exposed")
        def own(self) -> Stream:
            tg.response.content_type = "image/x-own"
            return send_file(file)

        @expose(content_type="image/x-exposed")
        def given(self) -> Stream:
            tg.response.content_type = "image/x-own"
            return send_file(file, content_type="image/x-given")

        @expose("json")
        def engine(self) -> Stream:
            return send_file(file)

    app = make_app(Root())
    for page, content_type in [
        ("exposed", "image/x-exposed"),
        ("own", "image/x-own"),
        ("given", "image/x-given"),
        ("engine", "text/plain; charset=utf-8"),
    ]:
        assert get(app, f"/{page}").headers["Content-Type"] == content_type


def test_filename_makes_a_download(make_app: MakeApp, path: Path) -> None:
    """It passes the same cleaner as that of a stream."""
    app = make_file_app(make_app, lambda: send_file(path, filename="../ü.bin"))
    call = ask(app)
    call.read()
    assert call.headers["Content-Disposition"] == (
        "attachment; filename=\"u.bin\"; filename*=UTF-8''%C3%BC.bin"
    )


@pytest.mark.parametrize("ranges", [None, "bytes=0-9", "bytes=0-9,20-29"])
@pytest.mark.parametrize("content_type", ["text/plain\r\nX-A: b", "text/€"])
def test_content_type_that_cannot_be_sent_is_an_error(
    make_app: MakeApp, path: Path, content_type: str, ranges: str | None
) -> None:
    """It is also in the header of each of several ranges."""
    app = make_file_app(make_app, lambda: send_file(path, content_type=content_type))
    with pytest.raises(StreamError, match="Content-Type must be Latin-1"):
        ask(app, **({"range": ranges} if ranges else {}))


def test_max_age_lets_the_browser_keep_the_file(make_app: MakeApp, path: Path) -> None:
    """A shared cache must not answer for a controller that checks permissions."""
    app = make_file_app(make_app, lambda: send_file(path, max_age=60))
    tag, _ = tags(call := ask(app))
    assert call.headers["Cache-Control"] == "private, max-age=60"
    assert "Pragma" not in call.headers
    call = ask(app, if_none_match=tag)
    call.read()
    assert call.headers["Cache-Control"] == "private, max-age=60"


@pytest.mark.parametrize(
    "headers", [{"range": "bytes=900000-"}, {"if_match": '"other"'}], ids=str
)
def test_max_age_is_not_that_of_an_error(
    make_app: MakeApp, path: Path, headers: dict[str, str]
) -> None:
    """A browser must not use a 412 or 416 again for another request."""
    app = make_file_app(make_app, lambda: send_file(path, max_age=60))
    call = ask(app, **headers)
    assert call.read() == b""
    assert call.status_int in (412, 416)
    assert call.headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_age": -1}, "max_age must be a number of seconds"),
        ({"max_age": 1.5}, "max_age must be a number of seconds"),
        ({"max_age": True}, "max_age must be a number of seconds"),
        ({"content_type": b"text/plain"}, "content_type must be a str or None"),
        ({"filename": 5}, "filename must be a str"),
    ],
)
def test_invalid_parameter_is_rejected(
    path: Path, options: dict[str, Any], message: str
) -> None:
    """The error is raised before the file is opened."""
    with pytest.raises((TypeError, ValueError), match=f"send_file: {message}"):
        send_file(path, **options)


# Files of any kind.


def make_spooled(max_size: int) -> Any:
    file = tempfile.SpooledTemporaryFile(max_size)  # noqa: SIM115
    file.write(DATA)
    return file


def make_temporary(make: Any) -> Any:
    file = make()
    file.write(DATA)
    return file


def make_member() -> Any:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data", DATA)
    return zipfile.ZipFile(archive).open("data")


FILES: dict[str, Callable[[], Any]] = {
    "BytesIO": lambda: io.BytesIO(DATA),
    "spooled": lambda: make_spooled(10**9),
    "rolled": lambda: make_spooled(10),
    "temporary": lambda: make_temporary(tempfile.TemporaryFile),
    "named": lambda: make_temporary(tempfile.NamedTemporaryFile),
    "gzip": lambda: gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(DATA))),
    "zip": make_member,
}


@pytest.mark.parametrize("name", FILES)
def test_open_file_of_any_kind_is_sent_whole(make_app: MakeApp, name: str) -> None:
    """It is sent from its first byte, wherever it stands, and is closed."""
    files: list[Any] = []

    def make() -> Stream:
        files.append(FILES[name]())
        return send_file(files[-1])

    app = make_file_app(make_app, make)
    call = ask(app)
    assert call.read() == DATA
    assert call.headers["Content-Length"] == str(len(DATA))
    assert call.headers["Content-Type"] == "application/octet-stream"
    assert ask(app, range="bytes=70000-70009").read() == DATA[70_000:70_010]
    assert [file.closed for file in files] == [True, True]


@pytest.mark.parametrize("name", ["BytesIO", "spooled", "rolled"])
@pytest.mark.parametrize("page", ["/", "/streamed"])
def test_content_in_memory_has_an_etag_of_its_bytes(
    make_app: MakeApp, name: str, page: str
) -> None:
    """A download of equal content can be resumed, although the file is a new one."""
    content = [DATA]

    def make() -> Any:
        file = FILES[name]()
        file.seek(0)
        file.truncate()
        file.write(content[0])
        file.seek(0)
        return file if page == "/streamed" else send_file(file)

    app = make_file_app(make_app, make)
    call = ask(app, page)
    assert call.read() == DATA
    tag = call.headers["ETag"]
    assert "Last-Modified" not in call.headers
    call = ask(app, page, range="bytes=100-", if_range=tag)
    assert (call.status_int, call.read()) == (206, DATA[100:])
    content[0] = DATA[:-1] + b"x"
    call = ask(app, page, range="bytes=100-", if_range=tag)
    assert (call.status_int, call.read()) == (200, content[0])


def test_missing_file_raises_in_the_controller(
    make_app: MakeApp, tmp_path: Path
) -> None:
    """The controller can answer with a 404."""

    class Root(TGController):
        @expose()
        def missing(self) -> Stream:
            return send_file(tmp_path / "missing")

        @expose()
        def caught(self) -> Any:
            try:
                return send_file(tmp_path / "missing")
            except FileNotFoundError:
                abort(404)

    app = make_app(Root())
    call = get(app, "/missing")
    assert call.status_int == 500
    assert "FileNotFoundError" in call.errors.getvalue()
    assert get(app, "/caught").status_int == 404


def test_special_file_is_an_error(tmp_path: Path) -> None:
    """A named pipe without a writer does not make the request wait."""
    with pytest.raises(IsADirectoryError):
        send_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name, message in [
            ("pipe", "Not a regular file"),
            ("socket", "No such device"),
            ("link", "No such file"),
            ("x" * 300, "too long"),
        ]:
            with pytest.raises(OSError, match=message):
                send_file(tmp_path / name)
    with pytest.raises(OSError, match="Not a regular file"):
        send_file("/dev/null")
    with pytest.raises(ValueError, match="null byte"):
        send_file("a\0b")


def test_file_without_a_known_size_is_an_error() -> None:
    """The kernel makes a file of ``/proc`` while it is read."""
    with pytest.raises(ValueError, match=r"size of '/proc/meminfo' is not known"):
        send_file("/proc/meminfo")


@pytest.mark.parametrize("value", [None, 5, b"/etc/passwd", [b"x"]], ids=repr)
def test_value_that_is_not_a_file_is_rejected(value: Any) -> None:
    """The message shows the value."""
    with pytest.raises(TypeError, match="must be a path or an open, seekable binary"):
        send_file(value)


def test_text_file_is_rejected(path: Path) -> None:
    """Its positions are not those of bytes."""
    with path.open() as file, pytest.raises(TypeError, match="must be binary"):
        send_file(file)
    with pytest.raises(TypeError, match="must be binary"):
        send_file(io.StringIO())
    with (
        tempfile.SpooledTemporaryFile(mode="w+") as spooled,
        pytest.raises(TypeError, match="must be binary"),
    ):
        send_file(spooled)


def test_closed_file_is_rejected(path: Path) -> None:
    """A file of a ``with`` block is closed before the response is sent."""
    with path.open("rb") as file:
        pass
    with pytest.raises(ValueError, match=r"is closed\. Open it without 'with'"):
        send_file(file)


@pytest.mark.parametrize("status", [200, 206])
def test_file_that_cannot_be_read_is_an_error_page(
    make_app: MakeApp, path: Path, status: int
) -> None:
    """The page has none of the headers of the file, and its own status."""

    def make() -> Stream:
        with path.open("rb") as file:
            return send_file(file)

    headers = {"range": "bytes=1-2"} if status == 206 else {}
    call = ask(make_app(make_root(make)), **headers)
    body = call.read()
    assert call.status_int == 500
    assert int(call.headers.get("Content-Length", len(body))) == len(body) > 0
    for name in ("ETag", "Last-Modified", "Accept-Ranges", "Content-Range"):
        assert name not in call.headers
    assert "closed before it was sent. Open it without 'with'" in call.errors.getvalue()


def test_pipe_cannot_be_sent_as_a_file() -> None:
    """It has no size, and cannot be sought."""
    reader, writer = os.pipe()
    os.close(writer)
    with os.fdopen(reader, "rb") as file, pytest.raises(OSError, match="seek"):
        send_file(file)


def test_file_serves_one_request(make_app: MakeApp, path: Path) -> None:
    """The second request would read a closed file."""
    file = path.open("rb")
    sent = send_file(file)
    for make in (lambda: sent), (lambda: send_file(file)):
        app = make_file_app(make_app, make)
        if not file.closed:
            assert ask(app).read() == DATA
        with pytest.raises((StreamError, ValueError)):
            ask(app)


# Controllers.


def test_file_is_sent_after_require(make_app: MakeApp, path: Path) -> None:
    """A controller that refuses sends nothing."""

    class Root(TGController):
        @expose()
        @require(predicates.not_anonymous())
        def refused(self) -> Stream:
            return send_file(path)

        @expose()
        @require(predicates.Not(predicates.not_anonymous()))
        def allowed(self) -> Stream:
            return send_file(path)

    app = make_app(Root())
    assert get(app, "/refused").status_int == 401
    assert ask(app, "/allowed", range="bytes=0-9").read() == DATA[:10]


def test_file_needs_no_format_of_the_decorator(make_app: MakeApp, path: Path) -> None:
    """A controller of exports may return a stored one."""

    class Root(TGController):
        @expose()
        @stream(CSV, filename="a.csv", chunk_size=7, limit=1, charset="utf-16")
        def index(self) -> Any:
            return send_file(path)

    app = make_app(Root())
    for _ in range(2):
        call = ask(app, range="bytes=100000-")
        assert call.read() == DATA[100_000:]
        assert call.headers["Content-Disposition"] == 'attachment; filename="a.csv"'
        assert call.headers["Content-Type"] == "text/csv; charset=utf-8"


def test_database_connection_is_not_held(
    make_app: MakeApp, sqlite_model: Model, path: Path
) -> None:
    """The transaction of the request ends before the file is sent."""

    def make() -> Stream:
        assert sqlite_model.names() == []
        return send_file(path)

    app = make_file_app(make_app, make, model=sqlite_model)
    call = ask(app)
    next(call)
    assert_clean(sqlite_model)
    call.close()


def test_application_wrapper_can_change_the_bytes(
    make_app: MakeApp, path: Path
) -> None:
    """Its body takes the place of the file's."""
    path.write_bytes(b"ab" * BLOCK_SIZE)
    root = make_root(lambda: send_file(path))
    app = make_app(root, plug=plug_with_wrapper(use_upper_case), **UNTRACED)
    assert ask(app).read() == b"AB" * BLOCK_SIZE


def test_error_page_keeps_the_status(make_app: MakeApp, path: Path) -> None:
    """TurboGears shows pages for HTML alone."""
    options = {**ERROR_PAGES, "errorpage__status_codes": [416]}
    app = make_file_app(
        make_app, lambda: send_file(path, content_type="text/html"), **options
    )
    call = ask(app, range="bytes=9999999-")
    assert (call.status_int, call.read()) == (416, b"page 416")
    assert call.headers["Content-Length"] == "8"


def test_file_is_compressed_only_on_request(make_app: MakeApp, path: Path) -> None:
    """A compressed download has no ranges, so the option of all streams is not used."""

    class Root(TGController):
        @expose(content_type="text/plain")
        def sent(self) -> Stream:
            return send_file(path)

        @expose(content_type="text/plain")
        @stream
        def opened(self) -> Any:
            return path.open("rb")

        @expose(content_type="text/plain")
        @stream(compress=True)
        def compressed(self) -> Any:
            return path.open("rb")

    app = make_app(Root(), tgstream__compress=True)
    for page in "/sent", "/opened":
        call = ask(app, page, accept_encoding="gzip")
        assert call.read() == DATA
        assert "Content-Encoding" not in call.headers
        assert call.headers["Accept-Ranges"] == "bytes"
    call = ask(app, "/compressed", accept_encoding="gzip")
    assert gzip.decompress(call.read()) == DATA
    tag = call.headers["ETag"]
    assert tag.startswith('W/"') and "Accept-Ranges" not in call.headers
    headers = {"accept_encoding": "gzip", "range": "bytes=5-9"}
    assert ask(app, "/compressed", **headers).read() == DATA[5:10]
    for more, status in (
        ({**headers, "if_range": tag}, 200),
        ({"if_none_match": tag}, 304),
    ):
        call = ask(app, "/compressed", **more)
        call.read()
        assert call.status_int == status


@pytest.mark.parametrize("page", ["/", "/streamed"])
@pytest.mark.parametrize("when", ["commit", "wrapper"])
@pytest.mark.parametrize("source", ["file", "spool"])
@pytest.mark.parametrize(
    ("headers", "status", "body"),
    [
        ({}, 200, DATA),
        ({"range": "bytes=5-9"}, 206, DATA[5:10]),
        ({"range": "bytes=900000-"}, 416, b""),
        ({"if_none_match": "*"}, 304, b""),
    ],
    ids=["whole", "range", "after the end", "unmodified"],
)
def test_second_attempt_of_the_transaction_answers_again(
    make_app: MakeApp,
    sqlite_model: Model,
    path: Path,
    source: str,
    when: str,
    page: str,
    headers: dict[str, str],
    status: int,
    body: bytes,
) -> None:
    """``tm.attempts`` runs the controller again with the same response."""
    conflicts = [TransientError(), TransientError()]

    def conflict() -> None:
        if conflicts:
            transaction.abort()
            raise conflicts.pop()

    def make() -> Any:
        if when == "commit":
            transaction.get().addBeforeCommitHook(conflict)
        if source == "spool":
            return Stream([DATA], spool=True)
        return send_file(path, max_age=60)

    def retry_outside(response: Any) -> None:
        if when == "wrapper":
            conflict()

    plug = plug_with_wrapper(retry_outside, after=False)
    app = make_file_app(make_app, make, model=sqlite_model, plug=plug, tm__attempts=3)
    call = ask(app, page, **headers)
    assert call.read() == body
    assert call.status_int == status
    once = ask(app, page, **headers)
    once.read()
    assert sorted(call.headers.keys()) == sorted(once.headers.keys())
    for name in "Content-Length", "Content-Range", "Cache-Control", "Last-Modified":
        assert call.headers.get(name) == once.headers.get(name)
    assert_clean(sqlite_model)


def test_second_attempt_can_return_a_page(
    make_app: MakeApp, sqlite_model: Model, path: Path
) -> None:
    """It has not the status of the file that the first one returned."""
    attempts: list[int] = []

    def conflict() -> None:
        raise TransientError

    def make() -> Any:
        attempts.append(1)
        if len(attempts) > 1:
            return "page"
        transaction.get().addBeforeCommitHook(conflict)
        return send_file(path)

    app = make_file_app(make_app, make, model=sqlite_model, tm__attempts=2)
    call = ask(app, range="bytes=5-9")
    assert (call.status_int, call.read()) == (200, b"page")
    assert "Content-Range" not in call.headers
    assert "ETag" not in call.headers


# Files that change while they are sent.


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("page", ["/", "/streamed"])
@pytest.mark.parametrize("size", [0, BLOCK_SIZE + 5, len(DATA) - 1])
def test_file_that_shrinks_aborts_the_transfer(
    make_app: MakeApp,
    reports: list[Report],
    path: Path,
    wiring: dict[str, Any],
    page: str,
    size: int,
) -> None:
    """The client gets fewer bytes than declared, and the error names the file."""

    def make() -> Any:
        return path.open("rb") if page == "/streamed" else send_file(path)

    call = ask(make_file_app(make_app, make, **wiring), page)
    received = next(call)
    os.truncate(path, size)
    with pytest.raises(StreamError, match=r"data.bin' has become shorter"):
        for chunk in call:
            received += chunk
    call.close()
    assert len(received) < len(DATA) and DATA.startswith(received[:size])
    assert [report.reason for report in reports] == ["failed"]


def test_file_that_grows_is_sent_up_to_its_size(make_app: MakeApp, path: Path) -> None:
    """A log may be written while it is sent."""
    call = ask(make_file_app(make_app, lambda: send_file(path)))
    received = next(call)
    with path.open("ab") as file:
        file.write(b"more")
    assert received + call.read() == DATA


def test_removed_file_is_sent_completely(make_app: MakeApp, path: Path) -> None:
    """The open file keeps its bytes, and so does one that ``os.replace()`` replaces."""
    app = make_file_app(make_app, lambda: send_file(path))
    for change in replace, os.remove:
        call = ask(app)
        received, data = next(call), path.read_bytes()
        change(path)
        assert received + call.read() == data


def test_disconnect_is_reported(
    make_app: MakeApp, reports: list[Report], path: Path
) -> None:
    """The server closes the response before its end."""
    call = ask(make_file_app(make_app, lambda: send_file(path)))
    next(call)
    call.close()
    assert [report.reason for report in reports] == ["disconnected"]


# Open files under @stream.


def test_streamed_file_begins_at_its_position(make_app: MakeApp, path: Path) -> None:
    """The controller may have read a header. Positions count from there."""

    def make() -> Any:
        file = path.open("rb")
        file.read(1000)
        return file

    app = make_file_app(make_app, make)
    call = ask(app, "/streamed")
    assert call.read() == DATA[1000:]
    assert call.headers["Content-Length"] == str(len(DATA) - 1000)
    tag = call.headers["ETag"]
    assert ask(app, "/streamed", range="bytes=0-9").read() == DATA[1000:1010]
    whole = make_file_app(make_app, lambda: path.open("rb"))
    assert tags(ask(whole, "/streamed"))[0] != tag


def test_streamed_file_gets_the_type_of_its_name(
    make_app: MakeApp, tmp_path: Path
) -> None:
    """A file without a name gets that of ``@expose``."""
    (tmp_path / "a.pdf").write_bytes(b"x")
    for make, content_type in [
        ((lambda: (tmp_path / "a.pdf").open("rb")), "application/pdf"),
        ((lambda: io.BytesIO(b"x")), "text/html; charset=utf-8"),
    ]:
        call = get(make_file_app(make_app, make), "/streamed")
        assert call.headers["Content-Type"] == content_type


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_charset_option_is_that_of_the_file(
    make_app: MakeApp, tmp_path: Path, method: str
) -> None:
    """Each of several ranges has it, and their whole has none."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(charset="latin-1")
        def index(self) -> Any:
            return (tmp_path / "a.txt").open("rb")

    (tmp_path / "a.txt").write_bytes(bytes(30))
    app, expected = make_app(Root()), "text/plain; charset=latin-1"
    assert get(app, method=method).headers["Content-Type"] == expected
    call = ask(app, range="bytes=0-9,20-29", method=method)
    body = call.read()
    if method == "GET":
        assert body.count(f"\r\nContent-Type: {expected}\r\n".encode()) == 2
        assert "charset" not in call.headers["Content-Type"]


@pytest.mark.parametrize("name", ["gzip", "zip"])
def test_streamed_archive_is_not_read_twice(make_app: MakeApp, name: str) -> None:
    """Its size is known only when it was unpacked."""
    call = ask(make_file_app(make_app, FILES[name]), "/streamed", range="bytes=0-1")
    assert (call.status_int, call.read()) == (200, DATA)
    assert not {"Content-Length", "Accept-Ranges"} & {*call.headers}


@pytest.mark.parametrize("name", ["/proc/meminfo", "/sys/class/net/lo/mtu"])
def test_streamed_kernel_file_is_sent(make_app: MakeApp, name: str) -> None:
    """Its size is 0 or 4096 for the kernel, whatever its content is."""
    file = Path(name)
    app = make_file_app(make_app, lambda: file.open("rb"))
    call = get(app, "/streamed")
    assert call.text[:9] in ("MemTotal:", "65536\n")
    assert "Accept-Ranges" not in call.headers


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097])
def test_small_file_has_ranges(make_app: MakeApp, tmp_path: Path, size: int) -> None:
    """Its size may be that of a kernel file."""
    (tmp_path / "a").write_bytes(DATA[:size])
    app = make_file_app(make_app, lambda: (tmp_path / "a").open("rb"))
    call = ask(app, "/streamed")
    assert call.read() == DATA[:size]
    assert call.headers["Content-Length"] == str(size)
    assert call.headers["Accept-Ranges"] == "bytes"


def test_streamed_file_written_in_the_controller_is_complete(
    make_app: MakeApp, path: Path
) -> None:
    """Bytes that Python has buffered count."""

    def make() -> Any:
        file = path.open("w+b")
        file.write(b"x" * 100)
        file.seek(0)
        return file

    call = get(make_file_app(make_app, make), "/streamed")
    assert call.text == "x" * 100


def test_file_with_a_format_is_read_line_by_line(make_app: MakeApp, path: Path) -> None:
    """It has no ranges."""
    path.write_bytes(b"a\nb\n")

    class Lines:
        content_type = "text/x-lines"

        def encode(self, items: Any) -> Any:
            return (item.upper() for item in items)

    app = make_file_app(make_app, lambda: Stream(path.open("rb"), Lines))
    call = ask(app, range="bytes=0-0")
    assert (call.status_int, call.read()) == (200, b"A\nB\n")


@pytest.mark.parametrize("length", [len(DATA) - 1, len(DATA), len(DATA) + 1])
def test_declared_length_must_be_that_of_the_file(
    make_app: MakeApp, path: Path, length: int
) -> None:
    """The right length changes nothing, and a wrong one fails as for any stream."""
    app = make_file_app(make_app, lambda: Stream(path.open("rb"), length=length))
    if length == len(DATA):
        assert ask(app, range="bytes=-5").read() == DATA[-5:]
    else:
        with pytest.raises(StreamError, match=f"length={length} was declared"):
            ask(app).read()
