"""Files, pipes, HTTP responses and request bodies as the source of a stream."""

from __future__ import annotations

import gzip
import http.client
import io
import os
import socket
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import tg
from tg import TGController, expose

from tests.conftest import LiveServer, MakeApp
from tests.wsgi import Call, get
from tgstream import Stream, stream
from tgstream.core.source import BLOCK

Start = Callable[..., LiveServer]


def app_of(make_app: MakeApp, make: Callable[[], Any]) -> Any:
    """An application whose root streams the file that ``make`` returns."""

    class Root(TGController):
        @expose(content_type="application/octet-stream")
        @stream
        def index(self) -> Any:
            return make()

    return make_app(Root(), trace_errors__enable=False)


def first(call: Call) -> bytes:
    """The first bytes of a response."""
    return next(chunk for chunk in call if chunk)


# Bytes are sent as they come.


def test_pipe_is_sent_as_it_is_written(make_app: MakeApp) -> None:
    """A program's output is sent before the program has ended."""
    script = "import os; os.write(1, b'one\\n'); os.read(0, 1); os.write(1, b'two\\n')"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    call = Call(app_of(make_app, lambda: process.stdout))
    assert first(call) == b"one\n"
    process.stdin.close()
    assert call.read() == b"two\n"
    assert process.wait(10) == 0
    assert process.stdout is not None and process.stdout.closed


@pytest.mark.parametrize("buffering", [-1, 0])
def test_nonblocking_pipe_without_data_has_not_ended(
    make_app: MakeApp, buffering: int
) -> None:
    """Neither None of a raw file nor b"" of ``read1()`` is taken for the end."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.write(writer, b"one")
    call = Call(app_of(make_app, lambda: os.fdopen(reader, "rb", buffering)))
    assert first(call) == b"one"

    def write_late() -> None:
        os.write(writer, b"two")
        os.close(writer)

    later = threading.Timer(0.2, write_late)  # the stream has looked before
    later.start()
    assert call.read() == b"two"
    later.join()


def test_nonblocking_socket_without_data_has_not_ended(make_app: MakeApp) -> None:
    """A socket's file gives None as a pipe's does."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.sendall(b"one")
    with ours, theirs:
        file = socket.SocketIO(ours, "r")
        call = Call(app_of(make_app, lambda: file))
        assert first(call) == b"one"

        def send_late() -> None:
            theirs.sendall(b"two")
            theirs.shutdown(socket.SHUT_WR)

        later = threading.Timer(0.2, send_late)  # the stream has looked before
        later.start()
        assert call.read() == b"two"
        later.join()


class Reader:
    """A file that can do nothing but ``read()``."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, size: int) -> bytes:
        return self._file.read(size)


class Buffered(io.BufferedIOBase):
    """A file whose ``read1()`` is that of its abstract base, which only raises."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, size: int | None = -1, /) -> bytes:
        return self._file.read(size)


def spooled(mode: str, data: Any) -> Any:
    file = tempfile.SpooledTemporaryFile(mode=mode)  # noqa: SIM115
    file.write(data)
    file.seek(0)
    return file


def named(data: bytes) -> Any:
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115
    file.write(data)
    file.seek(0)
    return file


def zipped(data: bytes) -> Any:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data", data)
    return zipfile.ZipFile(archive).open("data")


def of_a_socket(data: bytes) -> Any:
    ours, theirs = socket.socketpair()

    def send() -> None:
        with theirs:
            theirs.sendall(data)

    threading.Thread(target=send).start()
    with ours:
        return ours.makefile("rb")


FILES: dict[str, Callable[[bytes], Any]] = {
    "BytesIO": io.BytesIO,
    "GzipFile": lambda data: gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(data))),
    "SpooledTemporaryFile": lambda data: spooled("w+b", data),
    "spooled text": lambda data: spooled("w+", data.decode()),
    "NamedTemporaryFile": named,
    "zipfile": zipped,
    "socket": of_a_socket,
    "read() alone": Reader,
    "read1() abstract": Buffered,
}


@pytest.mark.parametrize("kind", FILES)
def test_file_of_every_kind_is_sent_whole(make_app: MakeApp, kind: str) -> None:
    """In blocks, with ``read1()`` and ``close()`` where it has them."""
    data = b"0123456789\n" * 20_000
    file = FILES[kind](data)
    app = app_of(make_app, lambda: file)
    assert Call(app).read() == data
    assert getattr(file, "closed", True)


def test_file_that_only_reads_needs_no_format(make_app: MakeApp) -> None:
    """It has no lines that a format could take."""

    class Root(TGController):
        @expose()
        def index(self) -> Any:
            return Stream(Reader(b"x"), Lines())

    class Lines:
        content_type = "text/x-lines"

        def encode(self, items: Any) -> Iterator[Any]:
            yield from items

    with pytest.raises(TypeError, match=r"got a file of type Reader that only has"):
        get(make_app(Root(), trace_errors__enable=False))


# An upstream that is cut.


class Upstream:
    """A web server that answers one request with these bytes, and hangs up."""

    def __init__(self, answer: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(self._answer)

    def __enter__(self) -> Upstream:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.join()
        self._listener.close()


CUT = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf\n",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf\n",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhalf\n\r\n",
}


@pytest.mark.parametrize("wrap", [None, io.TextIOWrapper], ids=["bytes", "text"])
@pytest.mark.parametrize("how", CUT)
def test_response_that_was_cut_fails_the_stream(
    make_app: MakeApp, how: str, wrap: Any
) -> None:
    """``http.client`` itself returns b"" there, as at the end."""
    with Upstream(CUT[how]) as upstream:
        response = urlopen(upstream.url)
        file = response if wrap is None else wrap(response)
        with pytest.raises(http.client.IncompleteRead):
            Call(app_of(make_app, lambda: file)).read()


@pytest.mark.parametrize("framing", ["length", "chunks", "close"])
def test_response_is_sent_whole_and_closed(make_app: MakeApp, framing: str) -> None:
    """With any framing of the upstream's."""
    answer = {
        "length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        "chunks": CUT["chunks"] + b"0\r\n\r\n",
        "close": b"HTTP/1.1 200 OK\r\n\r\nhello",
    }[framing]
    with Upstream(answer) as upstream:
        response = urlopen(upstream.url)
        body = Call(app_of(make_app, lambda: response)).read()
    assert body == (b"half\n" if framing == "chunks" else b"hello")
    assert response.closed


# The request's own body.


def post(app: Any, file: io.BytesIO, length: int) -> Call:
    """A request whose body is in a file of the server's."""
    environ: dict[str, Any] = {
        "wsgi.input": file,
        "CONTENT_LENGTH": str(length),
        "CONTENT_TYPE": "application/octet-stream",
    }
    return Call(app, method="POST", checked=False, **environ)


class Socket(io.BytesIO):
    """What a server reads a connection from: more than one request."""


@pytest.mark.parametrize("name", ["environ", "body_file"])
def test_request_body_ends_at_its_length(make_app: MakeApp, name: str) -> None:
    """What follows is the next request, and the server's file stays open."""

    app = app_of(
        make_app,
        lambda: (
            tg.request.environ["wsgi.input"]
            if name == "environ"
            else tg.request.body_file
        ),
    )
    file = Socket(b"x" * BLOCK + b"body" + b"GET /next HTTP/1.1")
    for data in (b"x" * BLOCK, b"body"):
        call = post(app, file, len(data))
        assert call.read() == data
        assert not file.closed
    assert file.read() == b"GET /next HTTP/1.1"


def test_request_body_that_was_cut_fails_the_stream(make_app: MakeApp) -> None:
    """Half of an upload is not taken for the whole."""

    app = app_of(make_app, lambda: tg.request.environ["wsgi.input"])
    with pytest.raises(ConnectionResetError, match="6 bytes of the request body"):
        post(app, Socket(b"half"), 10).read()


HEAD = (
    b"%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    b"Content-Type: application/octet-stream\r\nContent-Length: 10\r\n\r\n"
)


@pytest.mark.parametrize("path", [b"/input", b"/body_file"])
@pytest.mark.parametrize("server", ["wsgiref", "waitress", "gunicorn-gthread"])
def test_upload_is_echoed(live_server: Start, server: str, path: bytes) -> None:
    """Complete, and on a server that hands on what it has, as it comes."""
    port = live_server(server, "echo").port
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.sendall(HEAD % (b"POST", path) + b"first")
        file, got = connection.makefile("rb"), b""
        if server == "wsgiref":
            while b"first" not in got:
                got += file.read1()
        connection.sendall(b"later")
        got += file.read()
        file.close()
    assert b" 200 OK\r\n" in got
    body = got.partition(b"\r\n\r\n")[2]
    assert b"first" in body and b"later" in body


@pytest.mark.parametrize("server", ["waitress", "gunicorn-gthread"])
def test_options_leaves_the_connection_usable(live_server: Start, server: str) -> None:
    """The answer is complete, has no body, and the next request is answered."""
    port = live_server(server, "echo").port
    connection = http.client.HTTPConnection("127.0.0.1", port, 20)
    for path in ("/endless", "/preflight", "/endless"):
        connection.request("OPTIONS", path)
        response = connection.getresponse()
        assert response.read() == b""
        assert response.status == (204 if path == "/preflight" else 200)
        if path == "/endless":
            assert response.getheader("Content-Length") == "0"
        assert response.getheader("Access-Control-Allow-Origin") == "*"
        same = connection.sock
        connection.request("GET", "/ran")
        assert connection.getresponse().read() == b"0"
        assert connection.sock is same or path == "/preflight"  # waitress closes a 204
    connection.close()


def test_file_is_read_from_where_it_stands(make_app: MakeApp, tmp_path: Path) -> None:
    """An ordinary file goes out in blocks of 64 KiB."""
    (tmp_path / "data").write_bytes(b"x" * (2 * BLOCK + 1))
    call = Call(app_of(make_app, (tmp_path / "data").open("rb").__enter__))
    assert [len(chunk) for chunk in call] == [BLOCK, BLOCK, 1]
    call.close()
