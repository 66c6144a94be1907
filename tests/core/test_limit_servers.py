"""``limit=`` on real servers, with clients that disconnect, reload, and reconnect."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import count
from typing import Any

import pytest

from tests.conftest import LiveServer
from tests.core.test_limit_action import REPLACED
from tests.test_servers import Client

SERVERS = ["gunicorn-gthread", "gunicorn-gevent", "waitress"]
BODY = b"a" * (1 << 20) + b"z" * (1 << 20)
users = count()


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """A server whose heartbeats and checks of the monitor are rare."""
    live = LiveServer(request.param, "limited", "threads=16")
    yield live
    live.kill()


@pytest.fixture
def user() -> str:
    """A user whose streams no other test has."""
    return f"user{next(users)}"


def open_feed(server: LiveServer, path: str) -> Client:
    """Open an event stream, and wait for its first event."""
    client = Client(server, path)
    assert client.response.status == 200
    assert b": open\n" in client.response.read1(1000)
    return client


def get_json(server: LiveServer, path: str) -> Any:
    client = Client(server, path)
    with client.response:
        return json.loads(client.response.read())


def test_reload_is_accepted_at_once(server: LiveServer, user: str) -> None:
    """The server is checked whether the client of the old stream is connected.

    A client that is connected keeps its slot.
    """
    path = f"/refusing?user={user}"
    for leave in Client.close, Client.leave, Client.close:
        client = open_feed(server, path)
        refused = Client(server, path)
        assert refused.response.status == 503
        refused.close()
        leave(client)
    open_feed(server, path).close()


@pytest.mark.parametrize("kind", SERVERS)
def test_stream_whose_client_reloads_logs_no_error(kind: str) -> None:
    """Its server has nothing to report, as after any other disconnect."""
    server = LiveServer(kind, "limited", "threads=16")
    for leave in Client.close, Client.leave:
        client = open_feed(server, "/refusing?user=ada")
        leave(client)
        open_feed(server, "/refusing?user=ada").close()
    log = server.stop()
    assert "Traceback" not in log
    assert "closed before its end" not in log


def go_on(server: LiveServer, user: str) -> None:
    """Let the downloads of a user go on."""
    Client(server, f"/go_on?user={user}").close()


def test_half_closed_client_gets_its_whole_download(
    server: LiveServer, user: str
) -> None:
    """It has ended its own sending, and still has its slot."""
    path = f"/download?user={user}"
    with socket.create_connection(("127.0.0.1", server.port), 20) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        client.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(client)
        response.begin()
        start = response.read(1 << 20)
        refused = Client(server, path)
        assert refused.response.status == 503
        refused.close()
        go_on(server, user)
        assert start + response.read() == BODY
        response.close()


def test_download_whose_client_crashed_has_no_slot(
    server: LiveServer, user: str
) -> None:
    """The next one starts at once, although the old generator still waits."""
    old = Client(server, f"/download?user={user}")
    assert old.response.read(1 << 20) == BODY[: 1 << 20]
    old.leave()
    new = Client(server, f"/download?user={user}")
    assert new.response.status == 200
    go_on(server, user)
    assert new.response.read() == BODY
    new.close()


def test_newer_stream_replaces_the_older_one(server: LiveServer, user: str) -> None:
    """The older one ends with its event. A reload replaces nobody."""
    path = f"/replacing?user={user}"
    old = open_feed(server, path)
    new = open_feed(server, path)
    Client(server, "/publish?data=news").close()
    with old.response:
        assert old.response.read().endswith(REPLACED)
    assert b"data: news\n" in new.response.read1(1000)
    new.close()
    open_feed(server, path).close()
    reasons = [r for p, r in get_json(server, "/state")["ended"] if p == "/replacing"]
    assert reasons.count("replaced") == 1


class EventSource(threading.Thread):
    """The part of a browser's ``EventSource`` that connects and reconnects.

    After WHATWG HTML, 9.2.2 and 9.2.3: it reconnects after each end of a response of
    events, and never after a response with another status or type. Its clock is a
    hundred times as fast.
    """

    def __init__(self, server: LiveServer, path: str) -> None:
        super().__init__()
        self._server, self._path = server, path
        self._closed = threading.Event()
        self._client: Client | None = None
        self.retry = 3000
        self.opened = 0
        self.received = threading.Event()
        """Set by a comment or an event."""
        self.start()

    def run(self) -> None:
        """Receive events until it is closed, or fails."""
        while not self._closed.wait(self.retry / 1000 / 100):
            self._client = client = Client(self._server, self._path)
            response = client.response
            content_type = response.headers["Content-Type"].partition(";")[0]
            if response.status == 200 and content_type == "text/event-stream":
                self.opened += 1
                with suppress(http.client.HTTPException):
                    self._receive(response)
            else:
                self._closed.set()
            client.close()

    def _receive(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            field, _, value = line.decode().rstrip("\n").partition(": ")
            if field == "retry":
                self.retry = int(value)
            elif line != b"\n":
                self.received.set()

    def close(self) -> None:
        self._closed.set()
        if self._client is not None and self._client.response.fp is not None:
            raw: Any = self._client.response.fp
            raw.raw._sock.shutdown(socket.SHUT_RDWR)
        self.join(10)


def test_browser_reconnects_until_a_slot_is_free(server: LiveServer, user: str) -> None:
    """With ``busy='retry'``. After a 503 it never tries again."""
    paths = f"/retrying?user={user}", f"/refusing?user={user}"
    holders = [open_feed(server, path) for path in paths]
    retrying, refused = (EventSource(server, path) for path in paths)
    refused.join(10)
    while retrying.opened < 4:
        assert retrying.is_alive()
        retrying.join(0.01)
    assert (retrying.retry, retrying.received.is_set()) == (5000, False)
    for holder in holders:
        holder.close()
    assert retrying.received.wait(10)
    assert retrying.retry == 20  # of the stream
    retrying.close()
    assert (refused.opened, refused.received.is_set()) == (0, False)
