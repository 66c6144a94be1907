"""Async streams on real servers: 200 at once, with an upstream that HTTPX reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from tests.conftest import LiveServer
from tests.test_servers import Client, read
from tests.upstream import TOKENS, Upstream, wait_until

STREAMS = 200
SOME = 40
SERVERS = ["waitress", "gunicorn-gthread", "gunicorn-gevent"]


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    upstream = Upstream()
    yield upstream
    upstream.close()


@pytest.fixture(scope="module", params=SERVERS)
def server(
    request: pytest.FixtureRequest, upstream: Upstream, postgresql: str
) -> Iterator[LiveServer]:
    options = [f"upstream={upstream.url}", f"url={postgresql}", "looks=0.2"]
    server = LiveServer(request.param, "proxying", *options, f"threads={STREAMS + 5}")
    yield server
    server.kill()


def is_clean(server: LiveServer) -> bool:
    """Whether no stream is left, and no connection of the database is in use."""
    vitals: dict[str, int] = json.loads(read(server, "/vitals"))
    return vitals == {"streams": 0, "connections": 0}


async def request(server: LiveServer, path: str) -> asyncio.StreamReader:
    """Request a path. The headers of the response are read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 OK\r\n" in head
    writers[reader] = writer
    return reader


writers: dict[asyncio.StreamReader, asyncio.StreamWriter] = {}
"""The other half of each connection. It closes the connection."""


async def receive(reader: asyncio.StreamReader) -> str:
    """The next event. The heartbeats before it are left out."""
    while (event := await reader.readuntil(b"\n\n")) == b":\n\n":
        pass
    return event.decode().strip()


async def read_all(server: LiveServer, path: str) -> list[str]:
    """All events of a path."""
    reader = await request(server, path)
    text = (await reader.read()).decode().replace(":\n\n", "")
    writers.pop(reader).close()
    return text.split("\n\n")[:-1]


def run(test: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a client on a loop without the debug mode, which is several times slower."""
    return asyncio.run(asyncio.wait_for(test(), 40), debug=False)


def test_streams_proxy_an_upstream_at_once(
    server: LiveServer, upstream: Upstream
) -> None:
    """Each one gets its own tokens, in order, with its own request and session."""

    async def read_some() -> list[list[str]]:
        paths = [f"/chat?path=tokens/{number}&store=x" for number in range(SOME)]
        return await asyncio.gather(*(read_all(server, path) for path in paths))

    for number, events in enumerate(run(read_some)):
        tokens = [f"data: /tokens/{number} {token}" for token in range(TOKENS)]
        assert events == tokens
    assert upstream.open["tokens"] == 0
    wait_until(lambda: is_clean(server))


def test_database_is_read_in_threads_and_in_the_generator(server: LiveServer) -> None:
    """Many streams share the pool and the threads of ``asyncio.to_thread()``."""

    async def read_some() -> list[list[str]]:
        paths = [f"/count?path={number}" for number in range(SOME)]
        return await asyncio.gather(*(read_all(server, path) for path in paths))

    assert run(read_some) == [["data: 0", "data: 1", "data: 2"]] * SOME
    wait_until(lambda: is_clean(server))


def test_failed_upstream_is_an_error_page(server: LiveServer) -> None:
    """The status is that of ``abort()`` before the first item."""
    client = Client(server, "/chat?path=missing")
    assert client.response.status == 502
    client.close()


@pytest.mark.parametrize("page", ["chat", "blocking"])
def test_abort_of_a_client_closes_its_silent_upstream(
    server: LiveServer, upstream: Upstream, page: str
) -> None:
    """The heartbeat notices it: an async generator is cancelled, and a callback runs.

    It takes less than a second on an idle machine, whether the connection is reset or
    closed.
    """
    clients = [Client(server, f"/{page}?path=silent/{number}") for number in range(2)]
    for client in clients:
        assert client.response.read1(100).startswith(b"data: /silent/")
    wait_until(lambda: upstream.open["silent"] == 2)
    clients[0].leave()
    assert wait_until(lambda: upstream.open["silent"] == 1) < 3
    clients[1].close()
    assert wait_until(lambda: upstream.open["silent"] == 0) < 3
    wait_until(lambda: is_clean(server))


def test_reset_of_a_client_is_noticed_without_heartbeats(
    server: LiveServer, upstream: Upstream
) -> None:
    """``tgstream.disconnect_check_seconds`` is 0.2 here."""
    client = Client(server, "/quiet?path=silent/")
    assert client.response.read1(100).startswith(b"/silent/")
    assert upstream.open["silent"] == 1
    client.leave()
    wait_until(lambda: upstream.open["silent"] == 0)
    wait_until(lambda: is_clean(server))


def test_many_streams_wait_at_once_and_their_aborts_close_the_upstreams(
    server: LiveServer, upstream: Upstream
) -> None:
    """Each one has received its own first token, and nothing is left of it."""
    count = 90 if server.name == "waitress" else STREAMS  # its connection_limit is 100

    async def open_and_abort() -> None:
        paths = [f"/chat?path=silent/{number}" for number in range(count)]
        readers = await asyncio.gather(*(request(server, path) for path in paths))
        events = await asyncio.gather(*map(receive, readers))
        assert events == [f"data: /silent/{number} 0" for number in range(count)]
        assert upstream.open["silent"] == count
        for reader in readers:
            writers[reader].transport.abort()
        for reader in readers:
            await writers.pop(reader).wait_closed()

    run(open_and_abort)
    wait_until(lambda: upstream.open["silent"] == 0)
    wait_until(lambda: is_clean(server))
