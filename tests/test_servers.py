"""The same claims on every server: over real sockets, seen by real clients."""

from __future__ import annotations

import http.client
import json
import os
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
SEVERAL = [name for name in SERVERS if name != "gunicorn-sync"]  # requests at a time
BROKEN = (http.client.IncompleteRead, ConnectionResetError)

Start = Callable[[str, str], LiveServer]


@pytest.fixture(scope="module")
def start(postgresql: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts each server once, with its applications plugged or not."""
    servers: dict[tuple[str, str], LiveServer] = {}

    def start(name: str, plugged: str) -> LiveServer:
        if (name, plugged) not in servers:
            while servers:
                servers.popitem()[1].stop()
            folder = tmp_path_factory.mktemp(name)
            urls = [f"sqlite=sqlite:///{folder}/test.db", f"postgresql={postgresql}"]
            servers[name, plugged] = LiveServer(
                name, "stream_app", f"plugged={plugged}", *urls
            )
        return servers[name, plugged]

    yield start
    for server in servers.values():
        server.stop()


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, start: Start) -> LiveServer:
    """A server whose applications are plugged."""
    return start(request.param, "yes")


@pytest.fixture(scope="module", params=SERVERS)
def unplugged(request: pytest.FixtureRequest, start: Start) -> LiveServer:
    """A server whose applications were made before tgstream was imported."""
    return start(request.param, "no")


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A named pipe, by which client and server wait for each other."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


class Client:
    """One request to a server."""

    def __init__(self, server: LiveServer, path: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, 20)
        self.connection.request("GET", path, headers={"Connection": "close"})
        self.response = self.connection.getresponse()

    def leave(self) -> None:
        """Go away without a farewell, as a client that crashes does."""
        linger = struct.pack("ii", 1, 0)
        assert self.response.fp is not None
        raw: Any = self.response.fp
        raw.raw._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def read(server: LiveServer, path: str) -> bytes:
    """The body of a response, to its end."""
    client = Client(server, path)
    try:
        return client.response.read()
    finally:
        client.close()


def curl(server: LiveServer, path: str) -> tuple[int, bytes]:
    """What curl makes of a response: its exit status, and the data."""
    url = f"http://127.0.0.1:{server.port}{path}"
    run = subprocess.run(["curl", "-sS", "-m", "20", url], capture_output=True)
    return run.returncode, run.stdout


def assert_settles(server: LiveServer, database: str) -> None:
    """Soon no thread has a context, and nobody a connection.

    A server may tell the client of the end before it tells the application.
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


def assert_breaks(server: LiveServer, wiring: str) -> None:
    """No client takes the failed stream for a whole one, nor sees foreign text."""
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
def test_failed_stream_arrives_broken(server: LiveServer, wiring: str) -> None:
    """Plugged, a failure after the first chunk breaks the transfer in any wiring."""
    assert_breaks(server, wiring)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_failed_stream_arrives_broken_without_the_plug(
    unplugged: LiveServer, wiring: str
) -> None:
    """As these servers refuse a second ``start_response``, so does it unplugged; what
    is open with servers that take it, ``test_guard`` tells."""
    assert_breaks(unplugged, wiring)


@pytest.mark.parametrize("database", DATABASES)
def test_failed_stream_leaves_nothing(server: LiveServer, database: str) -> None:
    """On the server, no context, no connection and no transaction is left of it."""
    with pytest.raises(BROKEN):
        read(server, f"/{database}/fail")
    assert_settles(server, database)


def test_abort_before_the_first_chunk_is_a_missing_page(server: LiveServer) -> None:
    """The client gets the 404 that the generator asked for."""
    client = Client(server, "/traced/missing")
    assert client.response.status == 404
    client.close()


@pytest.mark.parametrize("wiring", WIRINGS)
def test_whole_stream_arrives_whole(server: LiveServer, wiring: str) -> None:
    """What is not broken is complete."""
    assert curl(server, f"/{wiring}/words") == (0, b"one\ntwo\n")


REFUSED = [("X-Answer", "a\nb"), ("X-Answer", "42"), ("X-Answer", "\u20ac")]


def assert_headers_are_handled(server: LiveServer) -> None:
    """A hop-by-hop header is dropped, any other that is refused is a server error."""
    for wiring in WIRINGS:
        late = "yes" if wiring.endswith("buffered") else ""

        def path(name: str, value: str, wiring: str = wiring, late: str = late) -> str:
            query = urlencode({"name": name, "value": value, "late": late})
            return f"/{wiring}/header?{query}"

        got = curl(server, path("Connection", "keep-alive"))
        assert got == (0, b"one\ntwo\n")
        for name, value in REFUSED:
            client = Client(server, path(name, value))
            assert client.response.status == 500
            client.close()


def test_header_that_the_server_refuses_is_no_empty_page(server: LiveServer) -> None:
    """In any wiring, whether the controller or the generator has set it."""
    assert_headers_are_handled(server)


def test_header_that_the_server_refuses_is_no_empty_page_without_the_plug(
    unplugged: LiveServer,
) -> None:
    """Without the error guard it is the same."""
    assert_headers_are_handled(unplugged)


@pytest.mark.parametrize("plugged", ["yes", "no"])
def test_header_that_wsgiref_refuses_is_no_empty_page(
    start: Start, plugged: str
) -> None:
    """wsgiref is as strict as PEP 3333 allows."""
    assert_headers_are_handled(start("wsgiref", plugged))


def test_status_without_a_body_keeps_the_connection_intact(server: LiveServer) -> None:
    """Two requests are pipelined, and the second response is its own."""
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
def test_first_chunk_comes_before_the_second_is_made(
    server: LiveServer, pipe: Path, wiring: str
) -> None:
    """The client has the first chunk while the generator waits for the client."""
    client = Client(server, f"/{wiring}/wait?pipe={pipe}")
    assert client.response.read(5) == b"first"
    go = os.open(pipe, os.O_RDWR)  # which does not wait for the other side
    os.write(go, b"second\n")
    assert client.response.read() == b"second\n"
    os.close(go)
    client.close()


@pytest.mark.parametrize("database", DATABASES)
def test_client_that_leaves_ends_the_stream(
    server: LiveServer, pipe: Path, database: str
) -> None:
    """An endless stream is disconnected when its client is gone, and leaves nothing."""
    told = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    client = Client(server, f"/{database}/endless?tell={pipe}")
    assert client.response.read(1) == b"x"
    client.leave()
    assert select.select([told], [], [], 20)[0]
    assert os.read(told, 100) == b"disconnected"
    os.close(told)
    assert_settles(server, database)


@pytest.mark.parametrize("database", DATABASES)
@pytest.mark.parametrize("server", SEVERAL, indirect=True)
def test_concurrent_streams_do_not_mix(server: LiveServer, database: str) -> None:
    """Four streams, each chunk of which waits for the others', keep to themselves."""

    def stream_of(letter: str) -> str:
        return read(server, f"/{database}/names?of={letter}&concurrent=1").decode()

    with ThreadPoolExecutor(4) as threads:
        bodies = list(threads.map(stream_of, "wxyz"))
    assert bodies == [
        "".join(f"{of}={of}:{name}\n" for name in ["ada", "bob", "eve"])
        for of in "wxyz"
    ]
    assert_settles(server, database)
