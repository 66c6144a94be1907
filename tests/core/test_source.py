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
from tgstream.core.files import BLOCK_SIZE

Start = Callable[..., LiveServer]


def make_file_app(make_app: MakeApp, make: Callable[[], Any]) -> Any:
    """An application whose root streams the file that ``make`` returns."""

    class Root(TGController):
        @expose(content_type="application/octet-stream")
        @stream
        def index(self) -> Any:
            return make()

    return make_app(Root(), trace_errors__enable=False)


def first(call: Call) -> bytes:
    """The first chunk of a response that is not empty."""
    return next(chunk for chunk in call if chunk)


# Bytes are sent as soon as they can be read.


def test_pipe_is_sent_while_it_is_written(make_app: MakeApp) -> None:
    """The output of a program is sent before the program has ended."""
    script = "import os; os.write(1, b'one\\n'); os.read(0, 1); os.write(1, b'two\\n')"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    call = Call(make_file_app(make_app, lambda: process.stdout))
    assert first(call) == b"one\n"
    process.stdin.close()
    assert call.read() == b"two\n"
    assert process.wait(10) == 0
    assert process.stdout is not None and process.stdout.closed


@pytest.mark.parametrize("buffering", [-1, 0])
def test_nonblocking_pipe_without_data_has_not_ended(
    make_app: MakeApp, buffering: int
) -> None:
    """``None`` from a raw file and ``b""`` from ``read1()`` do not mean the end."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.write(writer, b"one")
    call = Call(make_file_app(make_app, lambda: os.fdopen(reader, "rb", buffering)))
    assert first(call) == b"one"

    def write_late() -> None:
        os.write(writer, b"two")
        os.close(writer)

    later = threading.Timer(0.2, write_late)  # after the stream has found no data
    later.start()
    assert call.read() == b"two"
    later.join()


def test_nonblocking_socket_without_data_has_not_ended(make_app: MakeApp) -> None:
    """The file of a socket returns ``None`` as well."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.sendall(b"one")
    with ours, theirs:
        file = socket.SocketIO(ours, "r")
        call = Call(make_file_app(make_app, lambda: file))
        assert first(call) == b"one"

        def send_late() -> None:
            theirs.sendall(b"two")
            theirs.shutdown(socket.SHUT_WR)

        later = threading.Timer(0.2, send_late)  # after the stream has found no data
        later.start()
        assert call.read() == b"two"
        later.join()


class Reader:
    """A file whose only method is ``read()``."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, size: int) -> bytes:
        return self._file.read(size)


class Buffered(io.BufferedIOBase):
    """A file that inherits the abstract ``read1()``, which only raises."""

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


@pytest.mark.parametrize("name", FILES)
def test_file_of_any_type_is_sent_completely(make_app: MakeApp, name: str) -> None:
    """It is read in blocks, and closed."""
    data = b"0123456789\n" * 20_000
    file = FILES[name](data)
    app = make_file_app(make_app, lambda: file)
    assert Call(app).read() == data
    assert getattr(file, "closed", True)


def test_file_with_only_read_cannot_have_a_format(make_app: MakeApp) -> None:
    """It has no lines that a format could encode."""

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


# Truncated responses of an upstream server.


class Upstream:
    """A web server that sends these bytes to one client, and disconnects."""

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


TRUNCATED = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf\n",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf\n",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhalf\n\r\n",
}


@pytest.mark.parametrize("wrap", [None, io.TextIOWrapper], ids=["bytes", "text"])
@pytest.mark.parametrize("framing", TRUNCATED)
def test_truncated_response_fails_the_stream(
    make_app: MakeApp, framing: str, wrap: Any
) -> None:
    """``http.client`` itself returns ``b""``, like at the end."""
    with Upstream(TRUNCATED[framing]) as upstream:
        response = urlopen(upstream.url)
        file = response if wrap is None else wrap(response)
        with pytest.raises(http.client.IncompleteRead):
            Call(make_file_app(make_app, lambda: file)).read()


@pytest.mark.parametrize("framing", ["length", "chunks", "close"])
def test_response_is_sent_completely_and_closed(
    make_app: MakeApp, framing: str
) -> None:
    """The upstream server may use any framing."""
    answer = {
        "length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        "chunks": TRUNCATED["chunks"] + b"0\r\n\r\n",
        "close": b"HTTP/1.1 200 OK\r\n\r\nhello",
    }[framing]
    with Upstream(answer) as upstream:
        response = urlopen(upstream.url)
        body = Call(make_file_app(make_app, lambda: response)).read()
    assert body == (b"half\n" if framing == "chunks" else b"hello")
    assert response.closed


# The body of the request.


def post(app: Any, file: io.BytesIO, length: int) -> Call:
    """A request whose body is read from a file of the server."""
    environ: dict[str, Any] = {
        "wsgi.input": file,
        "CONTENT_LENGTH": str(length),
        "CONTENT_TYPE": "application/octet-stream",
    }
    return Call(app, method="POST", checked=False, **environ)


class Connection(io.BytesIO):
    """A file of the server, with more than one request in it."""


@pytest.mark.parametrize("name", ["environ", "body_file"])
def test_request_body_ends_at_its_length(make_app: MakeApp, name: str) -> None:
    """The bytes after it are the next request, and the server's file stays open."""
    app = make_file_app(
        make_app,
        lambda: (
            tg.request.environ["wsgi.input"]
            if name == "environ"
            else tg.request.body_file
        ),
    )
    file = Connection(b"x" * BLOCK_SIZE + b"body" + b"GET /next HTTP/1.1")
    for data in (b"x" * BLOCK_SIZE, b"body"):
        call = post(app, file, len(data))
        assert call.read() == data
        assert not file.closed
    assert file.read() == b"GET /next HTTP/1.1"


def test_truncated_request_body_fails_the_stream(make_app: MakeApp) -> None:
    """The upload is not taken as complete."""
    app = make_file_app(make_app, lambda: tg.request.environ["wsgi.input"])
    with pytest.raises(ConnectionResetError, match="6 bytes of the request body"):
        post(app, Connection(b"half"), 10).read()


HEAD = (
    b"%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    b"Content-Type: application/octet-stream\r\nContent-Length: 10\r\n\r\n"
)


@pytest.mark.parametrize("path", [b"/input", b"/body_file"])
@pytest.mark.parametrize("server", ["wsgiref", "waitress", "gunicorn-gthread"])
def test_upload_is_echoed(live_server: Start, server: str, path: bytes) -> None:
    """The echo is complete. wsgiref does not buffer, so its echo starts at once."""
    port = live_server(server, "echo").port
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.sendall(HEAD % (b"POST", path) + b"first")
        file, received = connection.makefile("rb"), b""
        if server == "wsgiref":
            while b"first" not in received:
                received += file.read1()
        connection.sendall(b"later")
        received += file.read()
        file.close()
    assert b" 200 OK\r\n" in received
    body = received.partition(b"\r\n\r\n")[2]
    assert b"first" in body and b"later" in body


@pytest.mark.parametrize("server", ["waitress", "gunicorn-gthread"])
def test_options_request_leaves_the_connection_usable(
    live_server: Start, server: str
) -> None:
    """The response is complete and has no body, and the next request works."""
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


def test_ordinary_file_is_sent_in_blocks(make_app: MakeApp, tmp_path: Path) -> None:
    """A block has 64 KiB."""
    (tmp_path / "data").write_bytes(b"x" * (2 * BLOCK_SIZE + 1))
    call = Call(make_file_app(make_app, (tmp_path / "data").open("rb").__enter__))
    assert [len(chunk) for chunk in call] == [BLOCK_SIZE, BLOCK_SIZE, 1]
    call.close()
