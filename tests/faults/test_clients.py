"""Clients that leave, half leave or are slow, and generators that raise what would end
a thread, on real servers, while streams write."""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import LiveServer
from tests.faults.conftest import path_of, say, wait_until
from tests.model import MakeModel, Model
from tests.test_servers import BROKEN, SEVERAL, Client, assert_settles, read

MANY = 1000
"""Blocks of 64 KiB, and more than any server makes for who does not read."""

MEBIBYTE = 2**20


@pytest.fixture(scope="module", params=SEVERAL)
def server(request: pytest.FixtureRequest, postgresql: str) -> Iterator[LiveServer]:
    """A server that serves several clients at a time."""
    server = LiveServer(request.param, "faulty", f"url={postgresql}")
    yield server
    server.stop()


@pytest.fixture
def model(make_model: MakeModel, postgresql: str) -> Model:
    """The tables that the server uses, empty."""
    return make_model(postgresql)


def told(server: LiveServer, reason: str) -> int:
    """How many streams have ended so, by the server's log."""
    return sum(f"write {reason}: " in each for each in server.log)


@contextmanager
def told_once(server: LiveServer, reason: str) -> Iterator[None]:
    """The server's log gets one line of such an end, and no other one."""
    before, lines = told(server, reason), len(server.log)
    yield
    wait_until(lambda: told(server, reason) > before, "no line in the log")
    assert told(server, reason) == before + 1
    assert sum(" items, " in each for each in server.log[lines:]) == 1


def assert_serves(server: LiveServer, model: Model, *names: str) -> None:
    """These are stored, nothing is left, and the next stream is whole."""
    assert_settles(server, "faulty")
    assert model.names() == [*names]
    assert read(server, path_of("next")) == b"end"
    assert model.names() == [*names, "next stored", "next flushed"]


def test_reset_aborts_what_is_not_committed(server: LiveServer, model: Model) -> None:
    """Of an endless stream whose client resets the connection, commits alone stay."""
    client = Client(server, path_of("a", blocks=MANY))
    assert client.response.read(1) == b"x"
    client.leave()
    assert_serves(server, model, "a stored")


def test_reset_before_the_first_chunk_aborts_what_is_not_committed(
    server: LiveServer, model: Model, pipe: Path
) -> None:
    """The server finds out when it has something to send; then all ends as ever."""
    waiting = socket.create_connection(("127.0.0.1", server.port), 20)
    waiting.sendall(request(path_of("a", pipe=pipe, blocks=MANY)))
    wait_until(lambda: model.names() == ["a stored"], "the stream has not begun")
    reset(waiting)
    say(pipe, b"too late\n")
    assert_serves(server, model, "a stored")


def request(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()


def reset(connection: socket.socket) -> None:
    """Go away without a farewell."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


STRAYS = ["SystemExit", "KeyboardInterrupt", "GeneratorExit"]


@pytest.mark.parametrize("early", ["", "1"], ids=["before", "after"])
@pytest.mark.parametrize("kind", [*STRAYS, "StopIteration", "MemoryError"])
def test_stray_hangs_no_client_and_ends_no_server(
    server: LiveServer, model: Model, kind: str, early: str
) -> None:
    """A 500 before the first chunk, a break after it; the log tells, and it serves."""
    with told_once(server, "failed"):
        client = Client(server, path_of("a", early=early, error=kind))
        if early:
            with pytest.raises(BROKEN):
                client.response.read()
        else:
            assert client.response.status == 500
        client.close()
    assert_serves(server, model, "a stored")


@pytest.mark.parametrize("kind", ["LookupError", *STRAYS])
def test_finally_that_raises_when_the_client_leaves_ends_no_server(
    server: LiveServer, model: Model, kind: str
) -> None:
    """However it is closed: the log tells, once, and the server serves on."""
    client = Client(server, path_of("a", blocks=MANY, close=kind))
    assert client.response.read(1) == b"x"
    if kind == "GeneratorExit":  # which is how a generator closes
        client.leave()
    else:
        with told_once(server, "disconnected"):
            client.leave()
    assert_serves(server, model, "a stored")


@pytest.mark.parametrize("kind", ["LookupError", *STRAYS])
def test_finally_that_raises_at_the_end_breaks_the_transfer(
    server: LiveServer, model: Model, kind: str
) -> None:
    """All items are there, and the client is not told that it is all."""
    with told_once(server, "failed"):
        client = Client(server, path_of("a", close=kind))
        with pytest.raises(BROKEN):
            client.response.read()
        client.close()
    assert_serves(server, model, "a stored")


@pytest.mark.parametrize("kind", ["LookupError", "SystemExit", "KeyboardInterrupt"])
def test_hook_that_raises_ends_no_server(
    server: LiveServer, model: Model, kind: str
) -> None:
    """The stream is whole and committed, whatever is raised where it is told."""
    assert read(server, path_of("a", hook=kind)) == b"end"
    assert_serves(server, model, "a stored", "a flushed")


def test_half_closed_connection_gets_all(
    server: LiveServer, model: Model, pipe: Path
) -> None:
    """Who says at once that no more is to come gets all of it, and it is committed."""
    with socket.create_connection(("127.0.0.1", server.port), 20) as half:
        half.sendall(request(path_of("a", pipe=pipe, blocks=3)))
        half.shutdown(socket.SHUT_WR)
        wait_until(lambda: model.names() == ["a stored"], "the stream has not begun")
        say(pipe, b"first\n")
        response = http.client.HTTPResponse(half)
        response.begin()
        assert response.read() == b"first\n" + b"x" * 3 * 65536 + b"end"
        response.close()
    assert_serves(server, model, "a stored", "a flushed")


def test_slow_client_does_not_make_the_server_grow(
    server: LiveServer, model: Model
) -> None:
    """While it takes byte by byte, no more is made than buffers hold; then it takes
    all, and the process has had no more memory than that."""
    before = progress(server)["peak"]
    with slow(server, path_of("a", blocks=MANY)) as response:
        begin = [response.read(1) for _ in range(500)]
        assert begin == [b"x"] * 500
        assert settled(lambda: progress(server)["made"]) < 24 * MEBIBYTE
        assert model.names() == ["a stored"]
        left = MANY * 65536 + len("end") - len(begin)
        while chunk := response.read1(MEBIBYTE):
            left -= len(chunk)
        assert left == 0
    grown = progress(server)["peak"] - before
    assert grown * 1024 < 48 * MEBIBYTE
    assert_serves(server, model, "a stored", "a flushed")


@contextmanager
def slow(server: LiveServer, path: str) -> Iterator[http.client.HTTPResponse]:
    """A response over a connection whose receiving side has next to no buffer."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request(path))
        response = http.client.HTTPResponse(connection)
        response.begin()
        yield response
        response.close()


def progress(server: LiveServer) -> dict[str, int]:
    """What the server tells of its stream and of itself."""
    answer: dict[str, int] = json.loads(read(server, "/faulty/progress"))
    return answer


def settled(ask: Callable[[], int]) -> int:
    """What is answered when it does not change any more."""
    answers = [ask()]

    def unchanged() -> bool:
        answers.append(ask())
        return len(answers) > 20 and len({*answers[-20:]}) == 1

    wait_until(unchanged, "it grows and grows")
    return answers[-1]
