"""Clients that never read or send invalid ids and names, on real servers."""

from __future__ import annotations

import http.client
import json
import re
import select
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import product
from typing import Any
from urllib.parse import quote

import pytest

from tests.conftest import LiveServer
from tests.faults.conftest import wait_until
from tests.test_servers import SEVERAL
from tests.valkey import DurableValkey

MEBIBYTE = 2**20
BLOCK = 65536
"""Bytes of an event. The buffers of a connection hold only a few of these events."""
MANY = 50
"""Number of simultaneous listeners."""


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DurableValkey]:
    """The server that stores the channels."""
    with DurableValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="module", params=SEVERAL)
def server(
    request: pytest.FixtureRequest, valkey: DurableValkey
) -> Iterator[LiveServer]:
    """A server with enough threads. It stores 40 events of a channel."""
    options = f"redis={valkey.url}", "threads=64", "heartbeat=0.1"
    server = LiveServer(request.param, "listening", *options)
    yield server
    server.stop()


@pytest.fixture(scope="module", params=["waitress", "gunicorn-gthread"])
def small_server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """A server of 16 threads. The kernel closes dead connections after 0.3 s."""
    options = "threads=16", "heartbeat=0.05", "patience=300"
    server = LiveServer(request.param, "listening", *options)
    yield server
    server.stop()


def get_json(server: LiveServer, path: str) -> Any:
    """The JSON of a response."""
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


def count_ended(server: LiveServer, name: str, reason: str) -> int:
    """How many streams of a channel ended for a reason."""
    count: int = get_json(server, "/vitals")["ended"].get(f"{name} {reason}", 0)
    return count


def publish(
    server: LiveServer,
    name: str,
    first: int,
    count: int = 1,
    size: int = 0,
    back_end: str = "memory",
) -> None:
    """Publish ``count`` events, with the numbers from ``first`` on."""
    query = f"name={name}&first={first}&count={count}&size={size}"
    get_json(server, f"/{back_end}/publish?{query}")


class Listener:
    """A client of a feed that has received the opening comment.

    :param path: the path of the feed.
    :param id: the ``Last-Event-ID`` to send.
    """

    def __init__(self, server: LiveServer, path: str, id: str | None = None) -> None:
        self.connection = http.client.HTTPConnection(*address(server), timeout=20)
        headers = {} if id is None else {"Last-Event-ID": id}
        self.connection.request("GET", path, headers=headers)
        self.response = self.connection.getresponse()
        assert self.response.status == 200
        self.id = self.next()["id"] or id

    def next(self) -> dict[str, str]:
        """The fields of the next event, or of the next comment with text."""
        fields: dict[str, str] = {"id": ""}
        while (line := self.response.readline().decode().rstrip("\n")) or (
            fields.keys() <= {"id"} and not self.response.isclosed()
        ):
            name, _, text = line.partition(": ")
            if line not in ("", ":"):
                fields[name or "comment"] = text
        self.id = fields["id"] or getattr(self, "id", None)
        return fields

    def wait_for_heartbeat(self) -> None:
        """Wait for the next comment without text."""
        while self.response.readline() != b":\n":
            assert not self.response.isclosed()

    def numbers(self, count: int) -> list[int]:
        """The numbers of the next events."""
        return [int(self.next()["data"].split()[0]) for _ in range(count)]

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def request(target: bytes, header: bytes = b"x: y") -> bytes:
    """The bytes of a request with an additional header."""
    return b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s\r\n\r\n" % (
        target,
        header,
    )


def open_stuck_client(server: LiveServer, path: str) -> socket.socket:
    """A client that stops reading when its stream has begun.

    Its TCP window is full and it does not answer. To the server it looks like a client
    that has vanished.
    """
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    connection.settimeout(20)
    connection.connect(address(server))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head = b""
    while b": open\n" not in head:
        head += connection.recv(1)
    return connection


def test_clients_that_never_read_expire_and_block_no_other_client(
    server: LiveServer,
) -> None:
    """``max_seconds`` ends their streams, and frees their slots and their memory.

    In the meantime another listener receives every event.
    """
    before = get_json(server, "/vitals")
    path = f"/memory/feed?name=stuck&seconds=1&limit={MANY}"
    with ExitStack() as stack:
        reader = Listener(server, "/memory/feed?name=stuck")
        stack.callback(reader.close)
        for _ in range(MANY):
            stack.callback(open_stuck_client(server, path).close)
        assert send_raw(server, path.encode())[0] == 503
        for first in range(0, 32, 8):
            publish(server, "stuck", first, 8, BLOCK)
            assert reader.numbers(8) == [*range(first, first + 8)]
        wait_until(
            lambda: count_ended(server, "stuck", "expired") == MANY, "not all expire"
        )
        print(get_json(server, "/vitals"))
        Listener(server, path).close()  # a slot is free
        publish(server, "stuck", 32)
        assert reader.numbers(1) == [32]
    # A thread that is blocked in a write stays blocked until the connection is closed.
    wait_until(lambda: get_json(server, "/vitals")["alive"] == 0, "streams are left")
    after = get_json(server, "/vitals")
    assert after["threads"] <= max(before["threads"], 64 + 3)
    assert after["memory"] - before["memory"] < 64 * MEBIBYTE  # of 100 MiB of events


def test_client_that_never_reads_is_disconnected(server: LiveServer) -> None:
    """Other clients receive every event, and the memory of the server stays bounded.

    The server's write blocks until the client reads again, even after its stream has
    ended. The client then receives the buffered events and the end of the response.
    When it reconnects, it receives a reset.
    """
    before = get_json(server, "/vitals")["memory"]
    with ExitStack() as stack:
        never = stack.enter_context(
            open_stuck_client(server, "/memory/feed?name=never")
        )
        stack.enter_context(
            open_stuck_client(server, "/memory/feed?name=never&seconds=0.4")
        )
        reader = Listener(server, "/memory/feed?name=never")
        stack.callback(reader.close)
        for first in range(0, 400, 8):
            publish(server, "never", first, 8, BLOCK)
            assert reader.numbers(8) == [*range(first, first + 8)]
        assert get_json(server, "/vitals")["memory"] - before < 64 * MEBIBYTE
        if server.name != "waitress":  # its buffers have room for the end, too
            wait_until(
                lambda: count_ended(server, "never", "expired"), "it does not expire"
            )
            # The writes of both clients block, and nothing in the server can end them.
            assert get_json(server, "/vitals")["alive"] == 3
        never.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MEBIBYTE)
        rest = b""
        while not rest.endswith(b"0\r\n\r\n"):  # the end of a body in chunks
            received = never.recv(MEBIBYTE)
            assert received
            rest = rest[-100_000:] + received
        id = re.findall(rb"id: ([^\n]+)\n", rest)[-1].decode()
        reconnected = Listener(server, "/memory/feed?name=never", id)
        stack.callback(reconnected.close)
        assert reconnected.next()["event"] == "reset"
        publish(server, "never", 400)
        assert reconnected.numbers(1) == reader.numbers(1) == [400]
    wait_until(lambda: get_json(server, "/vitals")["alive"] == 0, "streams are left")
    assert count_ended(server, "never", "lagged") >= 1


# Reconnecting with an id.


def receive_after(server: LiveServer, back_end: str, name: str, id: str) -> list[str]:
    """The events that a client with this id receives, each once and in order."""
    listener = Listener(server, f"/{back_end}/feed?name={name}", id)
    publish(server, name, 1000, back_end=back_end)
    received = []
    while (event := listener.next())["data"] != "1000 ":
        received.append(event.get("event") or event["data"].strip())
    listener.close()
    return received


@pytest.mark.parametrize("back_end", ["memory", "redis"])
def test_client_receives_all_events_after_its_id_or_a_reset(
    server: LiveServer, back_end: str
) -> None:
    """The id may be old, of another channel, from the future, or forged."""

    def ids_of_new_events(name: str, first: int, count: int) -> list[str]:
        listener = Listener(server, f"/{back_end}/feed?name={name}")
        ids = []
        for number in range(first, first + count):  # one by one, so that it keeps up
            publish(server, name, number, back_end=back_end)
            ids.append(listener.next()["id"])
        listener.close()
        return ids

    ids = ids_of_new_events("ids", 0, 60)
    (foreign,) = ids_of_new_events("other", 0, 1)
    ids += ids_of_new_events("ids", 60, 5)
    newest, low = ids[-1].split("-")
    future = f"{newest}-{int(low) + 1000}", f"{int(newest, 16) + 1000}-0", f"{2**63}-0"
    forged = "7", "1-1", "00000000-1", "-", "9" * 256, "é-1"
    rest = [str(number) for number in range(59, 65)]
    expected = {ids[58]: rest}
    expected |= {id: ["reset"] for id in (ids[0], foreign, *future, *forged)}
    for id, events in expected.items():
        escaped = id.encode().decode("latin-1")
        received = receive_after(server, back_end, "ids", escaped)
        assert received[: len(events)] == events, id


@pytest.fixture(scope="module")
def earlier_ids(valkey: DurableValkey) -> dict[str, str]:
    """The ids of the first event that a server sent before it ended."""
    server = LiveServer("waitress", "listening", f"redis={valkey.url}")
    ids = {}
    for back_end in "memory", "redis":
        listener = Listener(server, f"/{back_end}/feed?name=runs")
        publish(server, "runs", 0, 2, back_end=back_end)
        ids[back_end] = listener.next()["id"]
        listener.close()
    server.stop()
    return ids


def test_id_of_an_earlier_process_is_valid_only_with_redis(
    server: LiveServer, earlier_ids: dict[str, str]
) -> None:
    """The events of memory:// are lost when the process ends."""
    assert receive_after(server, "memory", "runs", earlier_ids["memory"]) == ["reset"]
    assert receive_after(server, "redis", "runs", earlier_ids["redis"]) == ["1"]


# Injection.


def send_raw(
    server: LiveServer, target: bytes, header: bytes = b"x: y"
) -> tuple[int, bytes]:
    """Send these exact bytes.

    :returns: the status and the body. The body of a stream ends at its first heartbeat.
    """
    with socket.create_connection(address(server), 3) as connection:
        connection.sendall(request(target, header))
        answer = b""
        with suppress(ConnectionResetError):  # the server stopped reading
            while not answer.rstrip().endswith(b"\n:"):
                if not (received := connection.recv(BLOCK)):
                    break
                answer += received
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head[9:12] or 400), body


BYTES = {
    "CR": b"a\rdata: forged",
    "LF": b"a\ndata: forged",
    "CRLF": b"a\r\ndata: forged",
    "two CRLF": b"a\r\n\r\ndata: forged",
    "NUL": b"a\0data: forged",
    "10 kB": b"x" * 10_000,
    "no UTF-8": b"a\xff",
}
BEGINNINGS = [
    rb": open\nid: ID\n\n:\n\n",  # as without an id
    rb": open\n\nevent: reset\nid: ID\ndata: ids\n\n:\n\n",
]
VALID_BODY = re.compile(b"|".join(BEGINNINGS).replace(b"ID", rb"[0-9a-f]+-[0-9]+"))
WAYS = {
    "header": (b"", b"Last-Event-ID: %s"),
    "query": (b"&lastEventId=%s", b"x: y"),
    "escaped": (b"&lastEventId=%s", b"x: y"),
}
ALWAYS_REJECTED = {"header CR", "header LF", "header NUL", "query CR", "query NUL"}


def test_invalid_id_injects_no_line(server: LiveServer) -> None:
    """The server rejects the request, or the stream begins as without an id."""

    def answer(back_end: str, way: str, name: str) -> tuple[str, int, bytes]:
        id = quote(BYTES[name]).encode() if way == "escaped" else BYTES[name]
        query, header = (part.replace(b"%s", id) for part in WAYS[way])
        target = b"/%s/feed?name=ids%s" % (back_end.encode(), query)
        return f"{way} {name}", *send_raw(server, target, header)

    cases = [*product(["memory", "redis"], WAYS, BYTES)]
    with ThreadPoolExecutor(len(cases)) as threads:
        answers = [*threads.map(answer, *zip(*cases, strict=True))]
    for case, status, body in answers:
        if status == 200:
            events = re.sub(rb"[0-9A-F]+\r\n(.*?\n\n)\r\n", rb"\1", body, flags=re.S)
            assert VALID_BODY.fullmatch(events), case
    rejected = {case for case, status, _ in answers if status in (400, 414, 431)}
    failed = {case for case, status, _ in answers if status != 200} - rejected
    assert failed <= {"escaped no UTF-8"}  # from TurboGears 2.5.1 on with 400
    assert rejected >= ALWAYS_REJECTED


@pytest.mark.parametrize("name", ["CR", "LF", "CRLF", "NUL", "10 kB"])
def test_invalid_channel_name_is_rejected(server: LiveServer, name: str) -> None:
    """A request that listens or publishes fails before the first chunk.

    The log has the reason in one line.
    """
    start = len(server.log)
    for path in "feed?x=y", "publish?first=0&count=1":
        target = f"/memory/{path}&name={quote(BYTES[name])}"
        status, body = send_raw(server, target.encode())
        assert status == (414 if "gunicorn" in server.name and name == "10 kB" else 500)
        assert b"forged" not in body
        if status == 500:
            lines = wait_for_lines(server, start, "Channel name must be 1 to 256")
            start = len(server.log)
            assert all(line.startswith("ValueError: Channel name ") for line in lines)


def wait_for_lines(server: LiveServer, start: int, text: str) -> list[str]:
    """Wait until the log of a server contains this text.

    :param start: ignore the lines before this one.
    :returns: the lines that contain the text.
    """

    def lines() -> list[str]:
        return [line for line in server.log[start:] if text in line]

    wait_until(lines, f"no line with {text}")
    return lines()


# One thread for each stream.


def test_kernel_closes_the_connection_of_a_client_that_never_reads(
    small_server: LiveServer,
) -> None:
    """With ``TCP_USER_TIMEOUT`` the blocked write fails, and frees the thread."""
    with open_stuck_client(small_server, "/memory/feed?name=given"):
        for first in range(0, 80, 8):
            publish(small_server, "given", first, 8, BLOCK)
        wait_until(
            lambda: get_json(small_server, "/vitals")["alive"] == 0, "a stream is left"
        )
        listeners = [Listener(small_server, "/memory/feed?name=x") for _ in range(16)]
    for listener in listeners:
        listener.close()


def test_each_stream_occupies_a_thread(small_server: LiveServer) -> None:
    """With 16 threads the 17th request waits until one listener disconnects."""
    before = get_json(small_server, "/vitals")["memory"]
    listeners = [Listener(small_server, "/memory/feed?name=full")]
    listeners += [Listener(small_server, "/memory/feed?name=full") for _ in range(14)]
    assert (get_json(small_server, "/vitals")["memory"] - before) / 15 < MEBIBYTE / 4
    listeners.append(Listener(small_server, "/memory/feed?name=full"))
    with socket.create_connection(address(small_server), 20) as waiting:
        waiting.sendall(request(b"/vitals"))
        for listener in listeners:  # two heartbeats each, without a response to it
            lines = [listener.response.readline() for _ in range(4)]
            assert lines[::2] == [b":\n"] * 2
        assert not select.select([waiting], [], [], 0)[0]
        listeners.pop().close()
        assert waiting.recv(15) == b"HTTP/1.1 200 OK"
    for listener in listeners:
        listener.close()
    wait_until(
        lambda: get_json(small_server, "/vitals")["alive"] == 0, "streams are left"
    )
