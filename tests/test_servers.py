"""Streams on real servers, read by real clients over sockets."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.conftest import LiveServer

WIRINGS = ["traced", "traced-buffered", "untraced", "debugged", "debugged-buffered"]
DATABASES = ["sqlite", "postgresql"]
SERVERS = ["waitress", "gunicorn-sync", "gunicorn-gthread", "gunicorn-gevent"]
SEVERAL = [name for name in SERVERS if name != "gunicorn-sync"]  # concurrent requests
BROKEN = (http.client.IncompleteRead, ConnectionResetError)

Start = Callable[[str, str], LiveServer]


@pytest.fixture(scope="module")
def start(postgresql: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a server, with plugged applications or not. Only the last one runs."""
    servers: dict[tuple[str, str], LiveServer] = {}

    def start(name: str, plugged: str) -> LiveServer:
        if (name, plugged) not in servers:
            while servers:
                servers.popitem()[1].kill()
            folder = tmp_path_factory.mktemp(name)
            urls = [f"sqlite=sqlite:///{folder}/test.db", f"postgresql={postgresql}"]
            servers[name, plugged] = LiveServer(
                name, "stream_app", f"plugged={plugged}", *urls
            )
        return servers[name, plugged]

    yield start
    for server in servers.values():
        server.kill()


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, start: Start) -> LiveServer:
    """A server with plugged applications."""
    return start(request.param, "yes")


@pytest.fixture(scope="module", params=SERVERS)
def unplugged(request: pytest.FixtureRequest, start: Start) -> LiveServer:
    """A server whose applications are made before tgstream is imported."""
    return start(request.param, "no")


class Client:
    """A request to a server."""

    def __init__(self, server: LiveServer, path: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, 20)
        self.connection.request("GET", path, headers={"Connection": "close"})
        self.response = self.connection.getresponse()

    def leave(self) -> None:
        """Reset the connection, like a client that crashes."""
        linger = struct.pack("ii", 1, 0)
        assert self.response.fp is not None
        raw: Any = self.response.fp
        raw.raw._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def read(server: LiveServer, path: str) -> bytes:
    """Return the whole body of a response."""
    client = Client(server, path)
    try:
        return client.response.read()
    finally:
        client.close()


def curl(server: LiveServer, path: str) -> tuple[int, bytes]:
    """Read a response with curl. Return its exit code, and the body."""
    url = f"http://127.0.0.1:{server.port}{path}"
    run = subprocess.run(["curl", "-sS", "-m", "20", url], capture_output=True)
    return run.returncode, run.stdout


def assert_settles(server: LiveServer, database: str) -> None:
    """Wait until no thread has a context, and no connection is in use.

    A server may end the response before it closes the application's body.
    """
    clean = {"contexts": 0, "connections": 0, "idle in transaction": 0}
    deadline = time.monotonic() + 10
    state: dict[str, int] = {}
    while time.monotonic() < deadline:
        state = json.loads(read(server, f"/{database}/state"))
        del state["process"]
        if state == clean:
            return
    assert state == clean


def assert_aborted(server: LiveServer, wiring: str) -> None:
    """Check that the failed response is incomplete, and has no error text."""
    client = Client(server, f"/{wiring}/fail")
    assert client.response.status == 200
    received = b""
    with pytest.raises(BROKEN):
        while chunk := client.response.read1():
            received += chunk
    client.close()
    assert b"one\ntwo\n".startswith(received)
    assert curl(server, f"/{wiring}/fail") == (18, b"one\ntwo\n")


@pytest.mark.parametrize("wiring", WIRINGS)
def test_failed_stream_is_incomplete(server: LiveServer, wiring: str) -> None:
    """An error after the first chunk aborts the transfer, with any middleware."""
    assert_aborted(server, wiring)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_failed_stream_is_incomplete_without_the_plug(
    unplugged: LiveServer, wiring: str
) -> None:
    """The transfer is aborted without the plug too, because these servers refuse a
    second ``start_response``. ``test_guard`` tests servers that accept it."""
    assert_aborted(unplugged, wiring)


FAILURES = {
    "fail_events": r"data: one\ndata: \n\ndata: two\ndata: \n\n"
    r"event: failed\ndata: [0-9a-f]{16}\n\n",
    "fail_lines": r'"one\\n"\n"two\\n"\n{"end":false,"incident":"[0-9a-f]{16}"}\n',
}
"""Paths of streams that report their failure, and the expected bodies."""


@pytest.mark.parametrize("wiring", WIRINGS)
def test_failure_is_sent_before_the_transfer_is_aborted(
    server: LiveServer, wiring: str
) -> None:
    """The client gets all bytes, and an incomplete transfer."""
    for path, expected in FAILURES.items():
        status, body = curl(server, f"/{wiring}/{path}")
        assert status == 18
        assert re.fullmatch(expected, body.decode())


def test_failure_is_sent_without_the_plug(unplugged: LiveServer) -> None:
    """The client gets it without the error guard too."""
    for wiring in WIRINGS:
        for path, expected in FAILURES.items():
            status, body = curl(unplugged, f"/{wiring}/{path}")
            assert status == 18
            assert re.fullmatch(expected, body.decode())


def test_failure_is_sent_by_a_server_that_cannot_abort(start: Start) -> None:
    """The response of wsgiref looks complete, but its data reports the failure."""
    server = start("wsgiref", "yes")
    for path, expected in FAILURES.items():
        status, body = curl(server, f"/traced/{path}")
        assert status == 0
        assert re.fullmatch(expected, body.decode())


@pytest.mark.parametrize("database", DATABASES)
def test_failed_stream_leaves_nothing(server: LiveServer, database: str) -> None:
    """No context, no connection and no transaction remains on the server."""
    with pytest.raises(BROKEN):
        read(server, f"/{database}/fail")
    assert_settles(server, database)


def test_abort_before_the_first_chunk_is_an_error_page(server: LiveServer) -> None:
    """The client gets the generator's status 404."""
    client = Client(server, "/traced/missing")
    assert client.response.status == 404
    client.close()


@pytest.mark.parametrize("wiring", WIRINGS)
def test_successful_stream_is_complete(server: LiveServer, wiring: str) -> None:
    """The client gets the whole body and its proper end."""
    assert curl(server, f"/{wiring}/words") == (0, b"one\ntwo\n")


REFUSED = [("X-Answer", "a\nb"), ("X-Answer", "42"), ("X-Answer", "\u20ac")]


def assert_headers_are_handled(server: LiveServer) -> None:
    """Check that a hop-by-hop header is dropped, and an invalid header is an error."""
    for wiring in WIRINGS:
        late = "yes" if wiring.endswith("buffered") else ""

        def path(name: str, value: str, wiring: str = wiring, late: str = late) -> str:
            query = urlencode({"name": name, "value": value, "late": late})
            return f"/{wiring}/header?{query}"

        result = curl(server, path("Connection", "keep-alive"))
        assert result == (0, b"one\ntwo\n")
        for name, value in REFUSED:
            client = Client(server, path(name, value))
            assert client.response.status == 500
            client.close()


def test_rejected_header_is_a_server_error(server: LiveServer) -> None:
    """The status is 500, whether the controller or the generator set the header."""
    assert_headers_are_handled(server)


def test_rejected_header_is_a_server_error_without_the_plug(
    unplugged: LiveServer,
) -> None:
    """The status is 500 without the error guard too."""
    assert_headers_are_handled(unplugged)


@pytest.mark.parametrize("plugged", ["yes", "no"])
def test_header_rejected_by_wsgiref_is_a_server_error(
    start: Start, plugged: str
) -> None:
    """The status is 500 with wsgiref too, which is as strict as PEP 3333."""
    assert_headers_are_handled(start("wsgiref", plugged))


def test_status_without_a_body_does_not_disturb_the_next_response(
    server: LiveServer,
) -> None:
    """Of two pipelined requests, the second gets its own response."""
    for status in "204 No Content", "304 Not Modified":
        for items, expected in ("0", status[:3]), ("1", "500"):
            query = urlencode({"status": status, "items": items})
            requests = [
                f"GET /traced/status?{query} HTTP/1.1\r\nHost: a\r\n\r\n",
                "GET /traced/words HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            ]
            with socket.create_connection(("127.0.0.1", server.port), 20) as client:
                client.sendall("".join(requests).encode())
                received = b""
                while data := client.recv(65536):
                    received += data
            head, _, rest = received.decode("latin-1").partition("\r\n\r\n")
            assert head.startswith(f"HTTP/1.1 {expected}")
            if expected != "500" and "Connection: close" not in head:
                assert rest.startswith("HTTP/1.1 200 OK")
                assert "one\n" in rest
            assert "one\n" not in rest.partition("HTTP/1.1 200")[0]


@pytest.mark.parametrize("wiring", WIRINGS)
def test_first_chunk_is_sent_before_the_second_is_made(
    server: LiveServer, pipe: Path, wiring: str
) -> None:
    """The client receives the first chunk while the generator waits for the client."""
    client = Client(server, f"/{wiring}/wait?pipe={pipe}")
    assert client.response.read(5) == b"first"
    writer = os.open(pipe, os.O_RDWR)  # does not block until there is a reader
    os.write(writer, b"second\n")
    assert client.response.read() == b"second\n"
    os.close(writer)
    client.close()


@pytest.mark.parametrize("database", DATABASES)
def test_disconnected_client_ends_the_stream(
    server: LiveServer, pipe: Path, database: str
) -> None:
    """An endless stream ends when its client disconnects, and leaves nothing behind."""
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    client = Client(server, f"/{database}/endless?tell={pipe}")
    assert client.response.read(1) == b"x"
    client.leave()
    assert select.select([reader], [], [], 20)[0]
    assert os.read(reader, 100) == b"disconnected"
    os.close(reader)
    assert_settles(server, database)


@pytest.mark.parametrize("database", DATABASES)
@pytest.mark.parametrize("server", SEVERAL, indirect=True)
def test_concurrent_streams_do_not_mix(server: LiveServer, database: str) -> None:
    """Four streams that wait for each other at every chunk keep their own context."""

    def stream_of(letter: str) -> str:
        return read(server, f"/{database}/names?of={letter}&concurrent=1").decode()

    with ThreadPoolExecutor(4) as threads:
        bodies = list(threads.map(stream_of, "wxyz"))
    assert bodies == [
        "".join(f"{of}={of}:{name}\n" for name in ["ada", "bob", "eve"])
        for of in "wxyz"
    ]
    assert_settles(server, database)
