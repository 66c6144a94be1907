"""Compressed streams on real servers, read and decompressed by real clients.

A client of these tests decompresses with its own code. curl has its own libraries.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from itertools import count
from urllib.request import urlopen

import aiohttp
import httpx
import pytest
import requests

from tests.conftest import LiveServer

SERVERS = ["waitress", "gunicorn-gthread", "gunicorn-gevent"]
Read = Callable[[str, str], Iterator[bytes]]
names = count()


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[[str], LiveServer]]:
    """Starts servers with compressed streams. Each server starts once."""
    servers: dict[str, LiveServer] = {}

    def start(name: str) -> LiveServer:
        if name not in servers:
            servers[name] = LiveServer(name, "compressed_app")
        return servers[name]

    yield start
    for server in servers.values():
        server.kill()


def address(server: LiveServer, path: str) -> str:
    return f"http://127.0.0.1:{server.port}/{path}"


class TransferError(Exception):
    """curl has reported an error."""


def read_with_curl(url: str, coding: str) -> Iterator[bytes]:
    """Yield the output of curl as soon as it is written."""
    command = ["curl", "-sSN", "-m", "20", "--compressed", url]
    command += ["-H", f"Accept-Encoding: {coding}"] if coding else []
    with subprocess.Popen(command, stdout=-1, stderr=-1, bufsize=0) as curl:
        assert curl.stdout is not None and curl.stderr is not None
        while data := curl.stdout.read(65536):
            yield data
        error = curl.stderr.read()
    if curl.returncode:
        raise TransferError(curl.returncode, error)


def make_headers(coding: str) -> dict[str, str]:
    """The client's own ``Accept-Encoding``, if no coding is given."""
    return {"Accept-Encoding": coding} if coding else {}


def read_with_httpx(url: str, coding: str) -> Iterator[bytes]:
    headers = make_headers(coding)
    with httpx.stream("GET", url, headers=headers, timeout=20) as response:
        yield from response.iter_bytes()


def read_with_requests(url: str, coding: str) -> Iterator[bytes]:
    headers = make_headers(coding)
    with requests.get(url, headers=headers, stream=True, timeout=20) as response:
        yield from response.iter_content(None)


def read_with_aiohttp(url: str, coding: str) -> Iterator[bytes]:
    """The loop does not run between two chunks."""
    loop = asyncio.new_event_loop()
    run = loop.run_until_complete
    session = aiohttp.ClientSession(
        loop=loop, headers=make_headers(coding), timeout=aiohttp.ClientTimeout(20)
    )
    try:
        response = run(session.get(url).__aenter__())
        try:
            while data := run(response.content.readany()):
                yield data
        finally:
            response.close()
    finally:
        run(session.close())
        loop.close()


CLIENTS: dict[str, Read] = {
    "curl": read_with_curl,
    "httpx": read_with_httpx,
    "requests": read_with_requests,
    "aiohttp": read_with_aiohttp,
}

# Without backports.zstd, requests and aiohttp do not decompress zstd, nor offer it.
READERS = [
    (client, coding)
    for client in CLIENTS
    for coding in ("gzip", "br", "zstd", "")
    if coding != "zstd" or client in ("curl", "httpx")
]


ITEMS = {
    "events": (b"data: one\n\n", b"data: two, True\n\n"),
    "lines": (b'{"line":1}\n', b'{"line":2,"seen":true}\n'),
}


@pytest.mark.parametrize(
    ("client", "coding", "path"),
    [(*reader, "events") for reader in READERS]
    + [(client, "", "lines") for client in CLIENTS],
)
@pytest.mark.parametrize("server", SERVERS)
def test_first_event_is_read_before_the_second_is_made(
    start: Callable[[str], LiveServer],
    server: str,
    client: str,
    coding: str,
    path: str,
) -> None:
    """The server makes the second one when the client has decompressed the first."""
    live, name, (first, rest) = start(server), str(next(names)), ITEMS[path]
    chunks = CLIENTS[client](address(live, f"{path}?name={name}"), coding)
    received = b""
    while len(received) < len(first):
        received += next(chunks)
    assert received == first
    urlopen(address(live, f"see?name={name}")).close()
    assert b"".join(chunks) == rest


@pytest.mark.parametrize(("client", "coding"), READERS)
@pytest.mark.parametrize("server", [*SERVERS, "wsgiref"])
def test_export_is_the_same_with_each_coding(
    start: Callable[[str], LiveServer], server: str, client: str, coding: str
) -> None:
    """wsgiref answers with HTTP/1.0, and closes the connection at the end."""
    live = start(server)
    data = b"".join(CLIENTS[client](address(live, "export"), coding))
    lines = [f"{number},{'x' * (number % 70)}\r\n" for number in range(3000)]
    assert data.decode() == "".join(["n,text\r\n", *lines])


# Truncated responses.

ERRORS = (
    TransferError,
    httpx.RemoteProtocolError,
    requests.exceptions.ChunkedEncodingError,
    aiohttp.ClientPayloadError,
)


@pytest.mark.parametrize(("client", "coding"), READERS)
@pytest.mark.parametrize("server", SERVERS)
def test_truncated_chunked_response_is_an_error_of_every_client(
    start: Callable[[str], LiveServer], server: str, client: str, coding: str
) -> None:
    """HTTP/1.1 reports it, with any coding."""
    url = address(start(server), "export?fail=yes")
    with pytest.raises(ERRORS):
        for _ in CLIENTS[client](url, coding):
            pass


@pytest.mark.parametrize(("client", "coding"), READERS)
def test_truncated_coding_is_not_reported_without_http_1_1(
    start: Callable[[str], LiveServer], client: str, coding: str
) -> None:
    """Only httpx checks the end of a coding, and only that of zstd.

    ``docs/exports.rst`` has the table. If this fails, a client has learned it.
    """
    url = address(start("wsgiref"), "export?fail=yes")
    if client == "httpx" and coding in ("zstd", ""):
        with pytest.raises(httpx.DecodingError, match="incomplete"):
            for _ in CLIENTS[client](url, coding):
                pass
    else:
        data = b"".join(CLIENTS[client](url, coding))
        assert data.startswith(b"n,text\r\n0,\r\n1,x\r\n")
        assert len(data) < 100_000  # of 123,098 bytes
