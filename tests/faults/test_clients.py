"""Streams that write, on real servers: with clients that disconnect, half-close or read
slowly, and with generators that raise errors that would end a thread."""

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
from tests.faults.conftest import path_of, wait_until, write_line
from tests.model import MakeModel, Model
from tests.test_servers import BROKEN, SEVERAL, Client, assert_settles, read

MANY = 1000
"""Blocks of 64 KiB: more than a server buffers for a client that does not read."""

MEBIBYTE = 2**20


@pytest.fixture(scope="module", params=SEVERAL)
def server(request: pytest.FixtureRequest, postgresql: str) -> Iterator[LiveServer]:
    """A server that serves several clients concurrently."""
    server = LiveServer(request.param, "faulty", f"url={postgresql}")
    yield server
    server.kill()


@pytest.fixture
def model(make_model: MakeModel, postgresql: str) -> Model:
    """The server's tables, empty."""
    return make_model(postgresql)


def count_ends(server: LiveServer, reason: str) -> int:
    """Return how many streams ended for this reason, according to the server's log."""
    return sum(f"write {reason}: " in line for line in server.log)


@contextmanager
def logged_once(server: LiveServer, reason: str) -> Iterator[None]:
    """Check that the server logs one end of a stream, for this reason."""
    before, lines = count_ends(server, reason), len(server.log)
    yield
    wait_until(lambda: count_ends(server, reason) > before, "no line in the log")
    assert count_ends(server, reason) == before + 1
    assert sum(" items, " in line for line in server.log[lines:]) == 1


def assert_serves(server: LiveServer, model: Model, *names: str) -> None:
    """Check the stored users, that nothing is left, and that the next stream works."""
    assert_settles(server, "faulty")
    assert model.names() == [*names]
    assert read(server, path_of("next")) == b"end"
    assert model.names() == [*names, "next stored", "next flushed"]


def test_reset_aborts_what_is_not_committed(server: LiveServer, model: Model) -> None:
    """If the client resets the connection, only the committed changes stay."""
    client = Client(server, path_of("a", blocks=MANY))
    assert client.response.read(1) == b"x"
    client.leave()
    assert_serves(server, model, "a stored")


def test_reset_before_the_first_chunk_aborts_what_is_not_committed(
    server: LiveServer, model: Model, pipe: Path
) -> None:
    """The server notices the reset when it sends the first chunk."""
    waiting = socket.create_connection(("127.0.0.1", server.port), 20)
    waiting.sendall(request(path_of("a", pipe=pipe, blocks=MANY)))
    wait_until(lambda: model.names() == ["a stored"], "the stream has not begun")
    reset(waiting)
    write_line(pipe, b"too late\n")
    assert_serves(server, model, "a stored")


def request(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()


def reset(connection: socket.socket) -> None:
    """Reset the connection."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


THREAD_ENDERS = ["SystemExit", "KeyboardInterrupt", "GeneratorExit"]
"""Exceptions that would end a server's thread."""


@pytest.mark.parametrize("early", ["", "1"], ids=["before", "after"])
@pytest.mark.parametrize("error", [*THREAD_ENDERS, "StopIteration", "MemoryError"])
def test_error_that_would_end_a_thread_does_not_stop_the_server(
    server: LiveServer, model: Model, error: str, early: str
) -> None:
    """The status is 500 before the first chunk. After it, the transfer is aborted."""
    with logged_once(server, "failed"):
        client = Client(server, path_of("a", early=early, error=error))
        if early:
            with pytest.raises(BROKEN):
                client.response.read()
        else:
            assert client.response.status == 500
        client.close()
    assert_serves(server, model, "a stored")


@pytest.mark.parametrize("error", ["LookupError", *THREAD_ENDERS])
def test_error_in_finally_after_a_disconnect_does_not_stop_the_server(
    server: LiveServer, model: Model, error: str
) -> None:
    """The error is logged once, and the server serves the next request."""
    client = Client(server, path_of("a", blocks=MANY, close=error))
    assert client.response.read(1) == b"x"
    if error == "GeneratorExit":  # the normal end of a closed generator
        client.leave()
    else:
        with logged_once(server, "disconnected"):
            client.leave()
    assert_serves(server, model, "a stored")


@pytest.mark.parametrize("error", ["LookupError", *THREAD_ENDERS])
def test_error_in_finally_at_the_end_aborts_the_transfer(
    server: LiveServer, model: Model, error: str
) -> None:
    """The client gets all items, but no proper end."""
    with logged_once(server, "failed"):
        client = Client(server, path_of("a", close=error))
        with pytest.raises(BROKEN):
            client.response.read()
        client.close()
    assert_serves(server, model, "a stored")


@pytest.mark.parametrize("error", ["LookupError", "SystemExit", "KeyboardInterrupt"])
def test_error_in_a_hook_does_not_stop_the_server(
    server: LiveServer, model: Model, error: str
) -> None:
    """The response is complete and its changes are committed."""
    assert read(server, path_of("a", hook=error)) == b"end"
    assert_serves(server, model, "a stored", "a flushed")


def test_half_closed_connection_gets_the_whole_response(
    server: LiveServer, model: Model, pipe: Path
) -> None:
    """A client may close its sending side after the request."""
    with socket.create_connection(("127.0.0.1", server.port), 20) as half:
        half.sendall(request(path_of("a", pipe=pipe, blocks=3)))
        half.shutdown(socket.SHUT_WR)
        wait_until(lambda: model.names() == ["a stored"], "the stream has not begun")
        write_line(pipe, b"first\n")
        response = http.client.HTTPResponse(half)
        response.begin()
        assert response.read() == b"first\n" + b"x" * 3 * 65536 + b"end"
        response.close()
    assert_serves(server, model, "a stored", "a flushed")


def test_slow_client_does_not_make_the_server_grow(
    server: LiveServer, model: Model
) -> None:
    """While the client reads byte by byte, the generator waits when the buffers are
    full. The process needs no more memory than these buffers until the end."""
    before = progress(server)["peak"]
    with slow(server, path_of("a", blocks=MANY)) as response:
        first = [response.read(1) for _ in range(500)]
        assert first == [b"x"] * 500
        assert settled(lambda: progress(server)["made"]) < 24 * MEBIBYTE
        assert model.names() == ["a stored"]
        remaining = MANY * 65536 + len("end") - len(first)
        while chunk := response.read1(MEBIBYTE):
            remaining -= len(chunk)
        assert remaining == 0
    grown = progress(server)["peak"] - before
    assert grown * 1024 < 48 * MEBIBYTE
    assert_serves(server, model, "a stored", "a flushed")


@contextmanager
def slow(server: LiveServer, path: str) -> Iterator[http.client.HTTPResponse]:
    """Open a response on a connection with a very small receive buffer."""
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
    """Return the bytes that the server made, and its peak memory in KiB."""
    answer: dict[str, int] = json.loads(read(server, "/faulty/progress"))
    return answer


def settled(measure: Callable[[], int]) -> int:
    """Measure repeatedly until 20 values in a row are equal, and return that value."""
    values = [measure()]

    def unchanged() -> bool:
        values.append(measure())
        return len(values) > 20 and len({*values[-20:]}) == 1

    wait_until(unchanged, "the value still changes")
    return values[-1]
