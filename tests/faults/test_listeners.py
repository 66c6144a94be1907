"""Listeners that vanish, never read, or say what is not true, on real servers."""

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
from tests.live.test_redis import Server
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
    """A server with threads for all, that keeps 40 events of a channel."""
    server = LiveServer(
        request.param, "listening", f"redis={valkey.url}", "threads=64", "beat=0.1"
    )
    yield server
    server.stop()


@pytest.fixture(scope="module", params=["waitress", "gunicorn-gthread"])
def few(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """A server of sixteen threads, whose kernel gives a client up after 0.3 s."""
    options = "threads=16", "beat=0.05", "patience=300"
    server = LiveServer(request.param, "listening", *options)
    yield server
    server.stop()


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


def publish(
    server: LiveServer,
    name: str,
    first: int,
    count: int = 1,
    size: int = 0,
    back_end: str = "memory",
) -> None:
    """Publish so many events, numbered from the first on."""
    query = f"name={name}&first={first}&count={count}&size={size}"
    ask(server, f"/{back_end}/publish?{query}")


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

    def beat(self) -> None:
        """Wait for the next comment that says nothing."""
        while self.response.readline() != b":\n":
            assert not self.response.isclosed()

    def numbers(self, count: int) -> list[int]:
        """The numbers of the next events."""
        return [int(self.next()["data"].split()[0]) for _ in range(count)]

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def request(target: bytes, header: bytes = b"x: y") -> bytes:
    """What a client sends, with a header of its own."""
    return b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s\r\n\r\n" % (
        target,
        header,
    )


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
    path = f"/memory/feed?name=stuck&seconds=1&limit={MANY}"
    with ExitStack() as stack:
        reader = Listener(server, "/memory/feed?name=stuck")
        stack.callback(reader.close)
        for _ in range(MANY):
            stack.callback(stuck(server, path).close)
        assert said_raw(server, path.encode())[0] == 503
        for first in range(0, 32, 8):
            publish(server, "stuck", first, 8, BLOCK)
            assert reader.numbers(8) == [*range(first, first + 8)]
        wait_until(lambda: ended(server, "stuck", "expired") == MANY, "not all expire")
        print(ask(server, "/vitals"))
        Listener(server, path).close()  # there is a seat
        publish(server, "stuck", 32)
        assert reader.numbers(1) == [32]
    # On threads, who is blocked in a write is so until the connection is gone.
    wait_until(lambda: ask(server, "/vitals")["alive"] == 0, "streams are left")
    after = ask(server, "/vitals")
    assert after["threads"] <= max(before["threads"], 64 + 3)
    assert after["memory"] - before["memory"] < 64 * MEBIBYTE  # of 100 published


def test_listener_that_never_reads_is_cut_off(server: LiveServer) -> None:
    """Others get every event meanwhile and the server's memory is bounded; ended or
    not, its stream is held by the server's write, until it reads on: then it gets what
    buffers held and an end, and is told of the gap."""
    before = ask(server, "/vitals")["memory"]
    with ExitStack() as stack:
        never = stack.enter_context(stuck(server, "/memory/feed?name=never"))
        stack.enter_context(stuck(server, "/memory/feed?name=never&seconds=0.4"))
        reader = Listener(server, "/memory/feed?name=never")
        stack.callback(reader.close)
        for first in range(0, 400, 8):
            publish(server, "never", first, 8, BLOCK)
            assert reader.numbers(8) == [*range(first, first + 8)]
        assert ask(server, "/vitals")["memory"] - before < 64 * MEBIBYTE
        if server.name != "waitress":  # which has buffers enough for the end to come
            wait_until(lambda: ended(server, "never", "expired"), "it does not expire")
            # Both are held by a write that blocks, which nothing here can end.
            assert ask(server, "/vitals")["alive"] == 3
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
        publish(server, "never", 400)
        assert again.numbers(1) == reader.numbers(1) == [400]
    wait_until(lambda: ask(server, "/vitals")["alive"] == 0, "streams are left")
    assert ended(server, "never", "completed") >= 1


# Where clients say that they were.


def heard_after(server: LiveServer, back_end: str, name: str, id: str) -> list[str]:
    """What a client with this id is sent of what there is, each once and in order."""
    listener = Listener(server, f"/{back_end}/feed?name={name}", id)
    publish(server, name, 1000, back_end=back_end)
    heard = []
    while (event := listener.next())["data"] != "1000 ":
        heard.append(event.get("event") or event["data"].strip())
    listener.close()
    return heard


@pytest.mark.parametrize("back_end", ["memory", "redis"])
def test_id_is_answered_with_all_that_came_after_it_or_with_a_reset(
    server: LiveServer, back_end: str
) -> None:
    """Old, of another channel, from the future or forged: nothing is passed over."""

    def told(name: str, first: int, count: int) -> list[str]:
        listener = Listener(server, f"/{back_end}/feed?name={name}")
        ids = []
        for number in range(first, first + count):  # else it may be overtaken
            publish(server, name, number, back_end=back_end)
            ids.append(listener.next()["id"])
        listener.close()
        return ids

    ids = told("ids", 0, 60)
    (foreign,) = told("other", 0, 1)
    ids += told("ids", 60, 5)
    memory = back_end == "memory"
    newest, low = ids[-1].split("-")
    future = f"{newest}-{int(low) + 1000}", f"{int(newest, 16) + 1000}-0", f"{2**63}-0"
    forged = "7", "1-1", "00000000-1", "-", "9" * 256, "é-1"
    rest = [str(number) for number in range(59, 65)]
    # In the order of the process, or of the clock: a place among all events.
    expected = {ids[58]: rest, foreign: rest[1:] if memory else ["reset"]}
    expected |= {id: ["reset"] for id in (ids[0], *future, *forged)}
    for id, events in expected.items():
        escaped = id.encode().decode("latin-1")
        heard = heard_after(server, back_end, "ids", escaped)
        assert heard[: len(events)] == events, id


@pytest.fixture(scope="module")
def earlier(valkey: Server) -> dict[str, str]:
    """The ids by which clients know a first event of a process that has ended."""
    server = LiveServer("waitress", "listening", f"redis={valkey.url}")
    ids = {}
    for back_end in "memory", "redis":
        listener = Listener(server, f"/{back_end}/feed?name=runs")
        publish(server, "runs", 0, 2, back_end=back_end)
        ids[back_end] = listener.next()["id"]
        listener.close()
    server.stop()
    return ids


def test_id_of_another_process_is_good_over_redis_alone(
    server: LiveServer, earlier: dict[str, str]
) -> None:
    """A memory is gone with its process; Redis remembers for all of them."""
    assert heard_after(server, "memory", "runs", earlier["memory"]) == ["reset"]
    assert heard_after(server, "redis", "runs", earlier["redis"]) == ["1"]


# What clients say, to the byte.


def said_raw(
    server: LiveServer, target: bytes, header: bytes = b"x: y"
) -> tuple[int, bytes]:
    """The status and body for these very bytes; of a stream, up to its first beat."""
    with socket.create_connection(address(server), 3) as connection:
        connection.sendall(request(target, header))
        answer = b""
        with suppress(ConnectionResetError):  # of a server that refuses to read on
            while not answer.rstrip().endswith(b"\n:"):
                if not (taken := connection.recv(BLOCK)):
                    break
                answer += taken
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
    rb": open\nid: ID\n\n:\n\n",  # as of a client that has said nothing
    rb": open\n\nevent: reset\nid: ID\ndata: \n\n:\n\n",
]
OURS = re.compile(b"|".join(BEGINNINGS).replace(b"ID", rb"[0-9a-f]+-[0-9]+"))
WAYS = {
    "header": (b"", b"Last-Event-ID: %s"),
    "query": (b"&lastEventId=%s", b"x: y"),
    "escaped": (b"&lastEventId=%s", b"x: y"),
}
ALWAYS_REFUSED = {"header CR", "header LF", "header NUL", "query CR", "query NUL"}


def test_id_that_is_none_injects_nothing(server: LiveServer) -> None:
    """The server refuses the request, or the stream begins as any other."""

    def answer(back_end: str, way: str, name: str) -> tuple[str, int, bytes]:
        said = quote(BYTES[name]).encode() if way == "escaped" else BYTES[name]
        query, header = (each.replace(b"%s", said) for each in WAYS[way])
        target = b"/%s/feed?name=ids%s" % (back_end.encode(), query)
        return f"{way} {name}", *said_raw(server, target, header)

    said = [*product(["memory", "redis"], WAYS, BYTES)]
    with ThreadPoolExecutor(len(said)) as threads:
        answers = [*threads.map(answer, *zip(*said, strict=True))]
    for what, status, body in answers:
        if status == 200:
            pieces = re.sub(rb"[0-9A-F]+\r\n(.*?\n\n)\r\n", rb"\1", body, flags=re.S)
            assert OURS.fullmatch(pieces), what
    refused = {what for what, status, _ in answers if status in (400, 414, 431)}
    failed = {what for what, status, _ in answers if status != 200} - refused
    assert failed <= {"escaped no UTF-8"}  # a 400 from TurboGears 2.5.1 on
    assert refused >= ALWAYS_REFUSED


@pytest.mark.parametrize("name", ["CR", "LF", "CRLF", "NUL", "10 kB"])
def test_name_of_a_channel_that_is_none_opens_nothing(
    server: LiveServer, name: str
) -> None:
    """A controller that takes it from its client fails before the first chunk, and the
    log says why in one line; who publishes to it fails as well."""
    begun = len(server.log)
    for path in "feed?x=y", "publish?first=0&count=1":
        target = f"/memory/{path}&name={quote(BYTES[name])}"
        status, body = said_raw(server, target.encode())
        assert status == (414 if "gunicorn" in server.name and name == "10 kB" else 500)
        assert b"forged" not in body
        if status == 500:
            lines = wait_for_lines(server, begun, "Channel name must be 1 to 256")
            begun = len(server.log)
            assert all(line.startswith("ValueError: Channel name ") for line in lines)


def wait_for_lines(server: LiveServer, begun: int, text: str) -> list[str]:
    """The lines of a server's log that have this text, once there are some."""

    def lines() -> list[str]:
        return [each for each in server.log[begun:] if text in each]

    wait_until(lines, f"no line with {text}")
    return lines()


# As many streams as threads.


def test_listener_that_takes_nothing_is_given_up_by_the_kernel(few: LiveServer) -> None:
    """With ``TCP_USER_TIMEOUT`` a write that blocks fails, and the thread is back."""
    with stuck(few, "/memory/feed?name=given"):
        for first in range(0, 80, 8):
            publish(few, "given", first, 8, BLOCK)
        wait_until(lambda: ask(few, "/vitals")["alive"] == 0, "a stream is left")
        listeners = [Listener(few, "/memory/feed?name=x") for _ in range(16)]
    for each in listeners:
        each.close()


def test_threads_are_as_many_streams(few: LiveServer) -> None:
    """Of sixteen the seventeenth request waits, until one of the listeners leaves."""
    before = ask(few, "/vitals")["memory"]
    listeners = [Listener(few, "/memory/feed?name=full")]
    listeners += [Listener(few, "/memory/feed?name=full") for _ in range(14)]
    assert (ask(few, "/vitals")["memory"] - before) / 15 < MEBIBYTE / 4
    listeners.append(Listener(few, "/memory/feed?name=full"))
    with socket.create_connection(address(few), 20) as waiting:
        waiting.sendall(request(b"/vitals"))
        for each in listeners:  # two beats each, in which nobody else was served
            assert [each.response.readline() for _ in range(4)][::2] == [b":\n"] * 2
        assert not select.select([waiting], [], [], 0)[0]
        listeners.pop().close()
        assert waiting.recv(15) == b"HTTP/1.1 200 OK"
    for each in listeners:
        each.close()
    wait_until(lambda: ask(few, "/vitals")["alive"] == 0, "streams are left")
