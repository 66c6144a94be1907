"""Downloads that are resumed on real servers, by real clients over sockets."""

from __future__ import annotations

import http.client
import os
import random
import subprocess
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import LiveServer
from tests.test_servers import BROKEN

SERVERS = [
    "wsgiref",
    "waitress",
    "gunicorn-gthread",
    "gunicorn-gevent",
]
PAGES = ["sent", "streamed"]
SIZE = 8_000_000
LARGE = 200_000_000
"""Bytes of a file that no server and no socket buffers whole."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random bytes."""
    file = tmp_path_factory.mktemp("files") / "data.bin"
    file.write_bytes(random.Random(1).randbytes(SIZE))
    return file


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """Each server, with the application of ``tests/live_apps/files.py``."""
    live = LiveServer(request.param, "files")
    yield live
    live.kill()


def digest(data: bytes) -> str:
    return sha256(data).hexdigest()


def url(server: LiveServer, path: Path, page: str = "sent") -> str:
    return f"http://127.0.0.1:{server.port}/{page}?path={path}"


def reports(server: LiveServer, path: Path, count: int) -> list[Any]:
    """Wait for the reports of a file. Return them: the reasons, and the bytes."""
    deadline = time.monotonic() + 10
    while True:
        found: list[Any] = httpx.get(url(server, path, "reports")).json()["reports"]
        if len(found) >= count or time.monotonic() > deadline:
            return found


def leave_early(server: LiveServer, path: Path, page: str) -> tuple[bytes, str]:
    """Read a part of a file, and disconnect. Return the part, and the ``ETag``."""
    with httpx.stream("GET", url(server, path, page)) as response:
        received = b""
        for chunk in response.iter_raw(100_000):
            received += chunk
            if len(received) >= 1_000_000:
                break
        return received, response.headers["ETag"]


@pytest.mark.parametrize("page", PAGES)
def test_interrupted_download_is_resumed(
    server: LiveServer, path: Path, tmp_path: Path, page: str
) -> None:
    """The two parts have the hash of the file, and the second one completes."""
    file = tmp_path / "data"
    file.hardlink_to(path)
    received, tag = leave_early(server, file, page)
    headers = {"Range": f"bytes={len(received)}-", "If-Range": tag}
    response = httpx.get(url(server, file, page), headers=headers)
    assert response.status_code == 206
    assert digest(received + response.content) == digest(path.read_bytes())
    first, second = sorted(reports(server, file, 2), reverse=True)
    assert first[0] == "disconnected"
    assert second == ["completed", SIZE - len(received)]


@pytest.mark.parametrize("page", PAGES)
def test_curl_resumes(
    server: LiveServer, path: Path, tmp_path: Path, page: str
) -> None:
    """``curl -C -`` requests the bytes that its file does not have."""
    part = tmp_path / "part"
    part.write_bytes(path.read_bytes()[:1_234_567])
    command = ["curl", "-sSf", "-C", "-", "-o", str(part), url(server, path, page)]
    subprocess.run(command, check=True)
    assert digest(part.read_bytes()) == digest(path.read_bytes())


def test_range_of_a_changed_file_is_the_whole_new_file(
    server: LiveServer, tmp_path: Path
) -> None:
    """No client gets a file of two halves."""
    file = tmp_path / "changing"
    file.write_bytes(b"a" * SIZE)
    received, tag = leave_early(server, file, "sent")
    (tmp_path / "new").write_bytes(b"b" * SIZE)
    os.replace(tmp_path / "new", file)
    headers = {"Range": f"bytes={len(received)}-", "If-Range": tag}
    response = httpx.get(url(server, file), headers=headers)
    assert response.status_code == 200
    assert response.content == b"b" * SIZE


@pytest.mark.parametrize("page", PAGES)
def test_truncated_file_aborts_the_transfer(
    server: LiveServer, tmp_path: Path, page: str
) -> None:
    """The client gets an incomplete response, and the report names the failure."""
    file = tmp_path / "shrinking"
    file.touch()
    os.truncate(file, LARGE)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, 20)
    connection.request("GET", f"/{page}?path={file}")
    response = connection.getresponse()
    assert response.getheader("Content-Length") == str(LARGE)
    response.read(1)
    os.truncate(file, 1_000_000)
    with pytest.raises(BROKEN):
        response.read()
    response.close()
    connection.close()
    assert [reason for reason, _ in reports(server, file, 1)] == ["failed"]


@pytest.mark.parametrize("page", PAGES)
def test_disconnected_client_ends_the_stream(
    server: LiveServer, tmp_path: Path, page: str
) -> None:
    """The file that it reads is closed."""
    file = tmp_path / "large"
    file.touch()
    os.truncate(file, LARGE)
    leave_early(server, file, page)
    assert [reason for reason, _ in reports(server, file, 1)] == ["disconnected"]


CASES: list[tuple[str, dict[str, str], int, int]] = [
    ("GET", {"Range": "bytes=5-9"}, 206, 5),
    ("GET", {"Range": "bytes=0-3999999"}, 206, 4_000_000),
    ("GET", {"Range": "bytes=-"}, 200, SIZE),
    ("GET", {"Range": f"bytes={SIZE}-"}, 416, 0),
    ("GET", {"If-None-Match": "*"}, 304, 0),
    ("GET", {"If-Match": '"x"'}, 412, 0),
    ("HEAD", {}, 200, 0),
    ("HEAD", {"If-None-Match": "*"}, 304, 0),
    ("GET", {}, 200, SIZE),
]


@pytest.mark.parametrize("page", PAGES)
def test_next_response_of_a_connection_is_in_step(
    server: LiveServer, path: Path, page: str
) -> None:
    """No response has a byte more or fewer than it declares."""
    with httpx.Client() as client:
        for method, headers, status, size in CASES:
            response = client.request(method, url(server, path, page), headers=headers)
            assert (response.status_code, len(response.content)) == (status, size)


def test_large_headers_do_no_harm(server: LiveServer, path: Path) -> None:
    """A range of 8 kB, with large numbers or many ranges, is an ordinary request."""
    for value in "9" * 7_000 + "-", "0-0," * 1_750, "-" * 7_000, f"-{10**30}":
        headers = {"Range": f"bytes={value}"}
        response = httpx.get(url(server, path), headers=headers)
        assert response.status_code in (200, 206, 416)


def test_ranges_of_one_file_are_sent_at_once(server: LiveServer, path: Path) -> None:
    """Download managers open several connections, each for a part."""
    if server.name in ("wsgiref",):
        return
    data, step = path.read_bytes(), SIZE // 4
    connections = []
    for first in range(0, SIZE, step):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, 20)
        headers = {"Range": f"bytes={first}-{first + step - 1}"}
        connection.request("GET", f"/sent?path={path}", headers=headers)
        connections.append(connection)
    responses = [connection.getresponse() for connection in connections]
    assert b"".join(response.read() for response in responses) == data
    for connection in connections:
        connection.close()


def test_slow_clients_hold_no_thread_of_waitress(
    live_server: Any, path: Path, tmp_path: Path
) -> None:
    """More clients than threads have begun a large file, and the next is answered.

    Without the file wrapper each client held one of the threads, because waitress
    buffers 16 MiB of a response and then waits.
    """
    file = tmp_path / "large"
    file.touch()
    os.truncate(file, LARGE)
    server = live_server("waitress", "files", "threads=2")
    clients = []
    for _ in range(5):
        client = http.client.HTTPConnection("127.0.0.1", server.port, 20)
        client.request("GET", f"/sent?path={file}")
        response = client.getresponse()
        assert response.read(1) == b"\0"
        clients.append((client, response))
    assert httpx.get(url(server, path)).content == path.read_bytes()
    for client, response in clients[1:]:
        response.close()
        client.close()
    client, response = clients[0]
    assert len(response.read()) == LARGE - 1
    client.close()
    ended = sorted(reports(server, file, 5))
    assert ended[0] == ["completed", LARGE]
    assert [reason for reason, _ in ended[1:]] == ["disconnected"] * 4
