"""Listeners that vanish, never read, or say what is not true, on real servers."""

from __future__ import annotations

import http.client
import json
import re
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.conftest import LiveServer
from tests.faults.conftest import wait_until
from tests.test_redis import Server
from tests.test_servers import SEVERAL

MEBIBYTE = 2**20
BLOCK = 65536
"""Bytes of an event, of which a connection's buffers hold few."""
MANY = 50
"""Listeners that are there at once."""


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for the channels."""
    with Server(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="module", params=SEVERAL)
def server(request: pytest.FixtureRequest, valkey: Server) -> Iterator[LiveServer]:
    """A server with threads for all, that keeps 20 events of a channel."""
    server = LiveServer(
        request.param, "listening", f"redis={valkey.url}", "threads=64", "beat=0.2"
    )
    yield server
    server.stop()


@pytest.fixture(params=[name for name in SEVERAL if name != "gunicorn-gevent"])
def few(
    request: pytest.FixtureRequest, live_server: Callable[..., LiveServer]
) -> LiveServer:
    """A server of sixteen threads, whose kernel gives a client up after 0.5 s."""
    return live_server(
        request.param, "listening", "threads=16", "beat=0.1", "patience=500"
    )


def ask(server: LiveServer, path: str) -> Any:
    """The answer to a request."""
    connection = http.client.HTTPConnection(*address(server), timeout=20)
    connection.request("GET", path, headers={"Connection": "close"})
    try:
        response = connection.getresponse()
        assert response.status == 200
        return json.loads(response.read())
    finally:
        connection.close()


def address(server: LiveServer) -> tuple[str, int]:
    return "127.0.0.1", server.port


def ended(server: LiveServer, name: str, reason: str) -> int:
    """How many of a channel's streams have ended so."""
    found: int = ask(server, "/vitals")["ended"].get(f"{name} {reason}", 0)
    return found


def publish(server: LiveServer, name: str, first: int, count: int, size: int) -> None:
    ask(server, f"/memory/publish?name={name}&first={first}&count={count}&size={size}")


class Listener:
    """A client that has a feed open, and has been told so.

    :param path: of the feed.
    :param id: its ``Last-Event-ID``.
    """

    def __init__(self, server: LiveServer, path: str, id: str | None = None) -> None:
        self.connection = http.client.HTTPConnection(*address(server), timeout=20)
        headers = {} if id is None else {"Last-Event-ID": id}
        self.connection.request("GET", path, headers=headers)
        self.response = self.connection.getresponse()
        assert self.response.status == 200
        self.id = self.next()["id"] or id

    def next(self) -> dict[str, str]:
        """The next event, or the next comment that says something."""
        fields: dict[str, str] = {"id": ""}
        while (line := self.response.readline().decode().rstrip("\n")) or (
            fields.keys() <= {"id"} and not self.response.isclosed()
        ):
            name, _, text = line.partition(": ")
            if line not in ("", ":"):
                fields[name or "comment"] = text
        self.id = fields["id"] or getattr(self, "id", None)
        return fields

    def numbers(self, count: int) -> list[int]:
        """The numbers of the next events."""
        return [int(self.next()["data"].split()[0]) for _ in range(count)]

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def stuck(server: LiveServer, path: str) -> socket.socket:
    """A client whose stream has begun, and that reads no more: to the server it is as
    one that has vanished, for its window is full and nobody answers."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    connection.settimeout(20)
    connection.connect(address(server))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head = b""
    while b": open\n" not in head:
        head += connection.recv(1)
    return connection


def test_clients_that_take_nothing_expire_and_hold_up_nobody(
    server: LiveServer,
) -> None:
    """``max_seconds`` ends all of them, their seats are free and so is their memory;
    meanwhile another listener gets every event."""
    before = ask(server, "/vitals")
    path = f"/memory/feed?name=stuck&seconds=1.5&limit={MANY}"
    with ExitStack() as stack:
        reader = Listener(server, "/memory/feed?name=stuck")
        stack.callback(reader.close)
        for _ in range(MANY):
            stack.callback(stuck(server, path).close)
        assert said_raw(server, path.encode()).startswith(b"HTTP/1.1 503")
        for first in range(0, 48, 8):
            publish(server, "stuck", first, 8, BLOCK)
            assert reader.numbers(8) == [*range(first, first + 8)]
        wait_until(lambda: ended(server, "stuck", "expired") == MANY, "not all expire")
        print(ask(server, "/vitals"))
        Listener(server, path).close()  # there is a seat
        publish(server, "stuck", 48, 1, 0)
        assert reader.numbers(1) == [48]
    # On threads, who is blocked in a write is so until the connection is gone.
    wait_until(lambda: ask(server, "/vitals")["alive"] == 0, "streams are left")
    after = ask(server, "/vitals")
    assert after["threads"] <= max(before["threads"], 64 + 3)
    assert after["memory"] - before["memory"] < 80 * MEBIBYTE  # of 150 published


def test_listener_that_never_reads_is_cut_off(server: LiveServer) -> None:
    """Others get every event meanwhile and the server's memory is bounded; where it
    reads on, it gets what buffers held and an end, and is told of the gap."""
    before = ask(server, "/vitals")["memory"]
    with ExitStack() as stack:
        never = stack.enter_context(stuck(server, "/memory/feed?name=never"))
        reader = Listener(server, "/memory/feed?name=never")
        stack.callback(reader.close)
        for first in range(0, 400, 8):
            publish(server, "never", first, 8, BLOCK)
            assert reader.numbers(8) == [*range(first, first + 8)]
        assert ask(server, "/vitals")["memory"] - before < 64 * MEBIBYTE
        never.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MEBIBYTE)
        rest = b""
        while not rest.endswith(b"0\r\n\r\n"):  # the end of a body in chunks
            taken = never.recv(MEBIBYTE)
            assert taken
            rest = rest[-100_000:] + taken
        id = re.findall(rb"id: ([^\n]+)\n", rest)[-1].decode()
        again = Listener(server, "/memory/feed?name=never", id)
        stack.callback(again.close)
        assert again.next()["event"] == "reset"
        publish(server, "never", 400, 1, 0)
        assert again.numbers(1) == reader.numbers(1) == [400]
    wait_until(lambda: ask(server, "/vitals")["alive"] == 0, "streams are left")
    assert ended(server, "never", "completed") == 1


def test_listener_that_takes_nothing_is_given_up_by_the_kernel(few: LiveServer) -> None:
    """With ``TCP_USER_TIMEOUT`` a write that blocks fails, and the thread is back."""
    with stuck(few, "/memory/feed?name=given"):
        for first in range(0, 400, 8):
            publish(few, "given", first, 8, BLOCK)
        wait_until(lambda: ask(few, "/vitals")["alive"] == 0, "a stream is left")
        listeners = [Listener(few, "/memory/feed?name=x") for _ in range(16)]
    for each in listeners:
        each.close()


def test_threads_are_as_many_streams(few: LiveServer) -> None:
    """Of sixteen the seventeenth request waits, until one of the listeners leaves."""
    listeners = [Listener(few, "/memory/feed?name=full") for _ in range(16)]
    with socket.create_connection(address(few), 20) as waiting:
        waiting.sendall(b"GET /vitals HTTP/1.1\r\nHost: x\r\n\r\n")
        for each in listeners:  # two beats each, in which nobody else was served
            assert [each.response.readline() for _ in range(4)][::2] == [b":\n"] * 2
        assert not select.select([waiting], [], [], 0)[0]
        listeners.pop().close()
        assert waiting.recv(15) == b"HTTP/1.1 200 OK"
    for each in listeners:
        each.close()


# What clients say.


def said_raw(server: LiveServer, target: bytes, header: bytes = b"x: y") -> bytes:
    """What a server answers to these very bytes, as far as a stream's opening."""
    with socket.create_connection(address(server), 20) as connection:
        connection.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n" % (target, header))
        connection.settimeout(20)
        answer = b""
        while b"\n:\n\n" not in answer.replace(b"\r\n", b"\n"):  # a beat
            taken = connection.recv(BLOCK)
            answer += taken
            if not taken or not answer.startswith(b"HTTP/1.1 200"):
                break
        return answer


IDS = {
    "CR": b"a\rdata: forged",
    "LF": b"a\ndata: forged",
    "CRLF": b"a\r\ndata: forged",
    "two of them": b"a\r\n\r\ndata: forged",
    "NUL": b"a\0data: forged",
    "10 kB": b"x" * 10_000,
    "no UTF-8": b"\xff\xfe",
}
REFUSES = {
    "waitress": {"CR", "LF", "CRLF", "NUL"},
    "gunicorn-gthread": {"CR", "NUL", "10 kB"},
    "gunicorn-gevent": {"CR", "NUL", "10 kB"},
}


@pytest.mark.parametrize("back_end", ["memory", "redis"])
def test_id_that_is_none_injects_nothing(server: LiveServer, back_end: str) -> None:
    """The server refuses the request, or the stream begins as for one without an id."""
    for said in IDS.values():
        target = b"/%s/feed?name=ids" % back_end.encode()
        in_query = target + b"&lastEventId=" + quote(said).encode()
        answers = {
            "header": said_raw(server, target, b"Last-Event-ID: " + said),
            "query": said_raw(server, in_query),
            "raw": said_raw(server, target + b"&lastEventId=" + said),
        }
        for kind, answer in answers.items():
            print(kind, said[:20], answer[:20], answer[-60:])
            assert b"forged" not in answer.partition(b"\r\n\r\n")[2]
