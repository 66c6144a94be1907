"""Spooled streams on real servers: full disks, slow and lost clients, killed workers,
and downloads that are resumed."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import LiveServer
from tests.cutter import Cutter
from tests.faults.conftest import wait_until
from tests.faults.test_clients import request, reset
from tests.live_apps.spooled import BLOCK
from tests.model import MakeModel
from tests.test_servers import BROKEN, Client, read

SERVERS = ["waitress", "gunicorn-gthread", "gunicorn-gevent"]
LARGE = 1 << 10
"""Blocks of a body that is in a file."""

SLOW = 5 << 8
"""Blocks of a body that is larger than what sockets of a slow client buffer."""

Start = Callable[..., LiveServer]


@pytest.fixture
def start(live_server: Callable[..., LiveServer], tmp_path: Path) -> Start:
    """Starts the application on a server. Its temporary files are in ``spool``."""
    (tmp_path / "spool").mkdir()

    def start(server: str, *options: str) -> LiveServer:
        folder = f"folder={tmp_path / 'spool'}"
        return live_server(server, "spooled", folder, *options)

    return start


@pytest.fixture(scope="module", params=SERVERS)
def live(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """Each server that serves several clients concurrently."""
    folder = tmp_path_factory.mktemp("spool")
    server = LiveServer(request.param, "spooled", f"folder={folder}", "looks=0.1")
    yield server
    server.kill()


def make_body(blocks: int, version: str = "") -> bytes:
    """Return the body of ``/export``."""
    width = BLOCK - len(version)
    return b"".join(f"{version}{n:{width}}".encode() for n in range(1, blocks + 1))


def get_state(server: LiveServer) -> dict[str, Any]:
    """Return the state of the application."""
    state: dict[str, Any] = json.loads(read(server, "/state"))
    return state


# Disks.


def test_full_disk_is_a_500_and_leaves_no_file(start: Start, tmp_path: Path) -> None:
    """The next response, which has room, is complete."""
    server = start("gunicorn-gthread", f"room={2 << 20}")
    client = Client(server, f"/export?blocks={LARGE}")
    assert client.response.status == 500
    assert b"File too large" not in client.response.read()
    client.close()
    state = get_state(server)
    assert (state["files"], list((tmp_path / "spool").iterdir())) == (0, [])
    assert state["ended"][0][0] == "failed"
    assert state["ended"][0][1] < LARGE * BLOCK
    assert read(server, "/export?blocks=400") == make_body(400)
    assert f"cannot spool its response to {tmp_path / 'spool'}" in "".join(server.log)


def test_memory_does_not_grow_with_the_body(start: Start) -> None:
    """At most 1 MiB of it is in memory."""
    server = start("wsgiref")
    assert read(server, f"/export?blocks={LARGE}") == make_body(LARGE)
    before = get_state(server)["peak"]
    assert len(read(server, f"/export?blocks={8 * LARGE}")) == 32 << 20
    assert get_state(server)["peak"] < before + 4096  # KiB


# Clients.


def test_slow_clients_hold_no_connection(
    start: Start, postgresql: str, make_model: MakeModel
) -> None:
    """Twenty of them share a pool of two connections, and each gets its file."""
    model = make_model(postgresql)
    server = start("gunicorn-gthread", f"url={postgresql}", "threads=24")
    clients = [SlowClient(server, SLOW) for _ in range(20)]
    try:
        for client in clients:
            client.read_headers()
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            for client in clients:
                client.read(51)  # a twentieth of a second, at 1 kB/s
            time.sleep(0.05)
        state = get_state(server)
        assert (state["connections"], state["files"]) == (0, 20)
        assert (state["ended"], model.idle_in_transaction()) == ([], 0)
        assert {client.finish() for client in clients} == {
            hashlib.sha256(make_body(SLOW)).hexdigest()
        }
    finally:
        for client in clients:
            client.connection.close()
    wait_until(lambda: get_state(server)["files"] == 0, "a file is still open")
    assert {tuple(end) for end in get_state(server)["ended"]} == {
        ("completed", SLOW * BLOCK)
    }


class SlowClient:
    """A client with a small buffer, which reads a part of the response at a time."""

    def __init__(self, server: LiveServer, blocks: int) -> None:
        self.connection = socket.socket()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.connection.settimeout(20)
        self.connection.connect(("127.0.0.1", server.port))
        self.connection.sendall(request(f"/export?blocks={blocks}"))
        self._hash = hashlib.sha256()
        self._left = blocks * BLOCK

    def read_headers(self) -> None:
        """Read up to the body. The response must have its length."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.connection.recv(1)
        assert f"\r\ncontent-length: {self._left}\r\n".encode() in head.lower()

    def read(self, size: int) -> None:
        """Read some bytes of the body."""
        data = self.connection.recv(size)
        self._hash.update(data)
        self._left -= len(data)

    def finish(self) -> str:
        """Read the rest, and return the hash of the body."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        while self._left:
            self.read(65536)
        return self._hash.hexdigest()


def test_disconnect_while_spooling_ends_the_generator(live: LiveServer) -> None:
    """The server detects it without a write, where it can."""
    before = len(get_state(live)["ended"])
    waiting = socket.create_connection(("127.0.0.1", live.port), 20)
    waiting.sendall(request(f"/export?blocks={LARGE}&pause=0.02"))
    wait_until(lambda: get_state(live)["running"] == 1, "the stream has not begun")
    reset(waiting)
    wait_until(lambda: get_state(live)["ended"][before:], "the stream goes on")
    [[reason, made]] = get_state(live)["ended"][before:]
    assert reason == "disconnected"
    assert made < LARGE * BLOCK
    assert "Traceback" not in "".join(live.log)


# Servers that are killed.


def kill_worker_while_sending(live: LiveServer) -> None:
    """Kill the process of a server, whose client notices that bytes are missing."""
    process = get_state(live)["process"]
    client = Client(live, f"/export?blocks={8 * LARGE}")
    assert client.response.read(10) == make_body(1)[:10]
    os.kill(process, signal.SIGKILL)
    with pytest.raises(BROKEN):
        client.response.read()
    client.close()


@pytest.mark.parametrize("server", ["wsgiref", "gunicorn-gthread"])
def test_killed_worker_leaves_no_file_and_an_incomplete_response(
    start: Start, server: str, tmp_path: Path
) -> None:
    """The client compares the bytes that it got with the ``Content-Length``."""
    kill_worker_while_sending(start(server))
    assert list((tmp_path / "spool").iterdir()) == []


def test_worker_killed_while_spooling_leaves_no_file(
    start: Start, tmp_path: Path, pipe: Path
) -> None:
    """The file has no name from its beginning."""
    live = start("gunicorn-gthread")
    process = get_state(live)["process"]
    waiting = socket.create_connection(("127.0.0.1", live.port), 20)
    waiting.sendall(request(f"/export?blocks={LARGE}&pipe={pipe}"))
    with closing(waiting), pipe.open("wb"):  # the generator has opened it, too
        assert get_state(live)["files"] == 1
        assert list((tmp_path / "spool").iterdir()) == []
        os.kill(process, signal.SIGKILL)
        assert waiting.recv(1000) == b""
    assert list((tmp_path / "spool").iterdir()) == []


# Downloads that are resumed.


def test_curl_resumes_a_download(live: LiveServer, tmp_path: Path) -> None:
    """``curl -C -`` requests the rest of the file."""
    target = tmp_path / "export.bin"
    with Cutter(live.port) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/export?blocks={LARGE}"
        command = ["curl", "-sS", "-m", "20", "-C", "-", "-o", str(target), url]
        assert subprocess.run(command, capture_output=True).returncode == 18
        begun = target.stat().st_size
        assert 0 < begun < 500_000
        subprocess.run(command, check=True)
    assert f"Range: bytes={begun}-".encode() in proxy.requests[1]
    assert target.read_bytes() == make_body(LARGE)


def test_changed_file_is_sent_from_its_beginning(start: Start) -> None:
    """A client that sends ``If-Range`` never joins two versions."""
    live = start("waitress")
    begun = Client(live, f"/export?blocks={LARGE}&version=1")
    etag = begun.response.headers["ETag"]
    begun.leave()
    connection = http.client.HTTPConnection("127.0.0.1", live.port, 20)
    for version, status in (("1", 206), ("2", 200)):
        headers = {"Range": "bytes=5000-", "If-Range": etag}
        path = f"/export?blocks={LARGE}&version={version}"
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        body = make_body(LARGE, version)
        expected = body[5000:] if status == 206 else body
        assert (response.status, response.read()) == (status, expected)
    connection.close()
