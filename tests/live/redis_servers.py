"""Real servers that fail on purpose, and a proxy that loses connections."""

from __future__ import annotations

import selectors
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import redis

from tests.valkey import Valkey
from tgstream.live.backends.redis import RedisBackend
from tgstream.live.backends.redis_reader import RedisReader


def close_backends(backends: Iterable[RedisBackend]) -> None:
    """Close the connections of back ends, which an application keeps to its end.

    In garbage, Python may free a socket before its connection can close it.
    """
    for backend in backends:
        backend._streams.close()
        backend._publisher._disconnect()


class RedisProxy:
    """Forwards connections to a server. It runs in a ``with`` block.

    :param port: the port of the server. ``target`` may change: it is used when a client
        connects.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.cuts_request: Callable[[], bool] = lambda: False
        """Whether to close a connection before a call of a script is forwarded."""
        self.cuts_answer: Callable[[], bool] = lambda: False
        """Whether to close a connection when the answer of a script arrives."""
        self.delays_request: Callable[[], bool] = lambda: False
        """Whether to close a connection, but forward its call of a script later."""
        self.forward_delayed = threading.Event()
        self.delayed_is_done = threading.Event()
        self.turns = 0
        """How often a client has sent calls of scripts, and then received answers."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._threads: list[threading.Thread] = []
        self._clients: list[socket.socket] = []

    def __enter__(self) -> RedisProxy:
        self._start(self._accept)
        return self

    def __exit__(self, *_: Any) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=args))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is shut down
            while True:
                client, _ = self._listener.accept()
                self._clients.append(client)
                self._start(self._forward, client)

    def _forward(self, client: socket.socket) -> None:
        with closing(client), suppress(OSError):
            server = socket.create_connection(("127.0.0.1", self.target))
            with closing(server), selectors.DefaultSelector() as selector:
                selector.register(client, selectors.EVENT_READ)
                selector.register(server, selectors.EVENT_READ)
                is_script = False
                while True:
                    sources = [key.fileobj for key, _ in selector.select()]
                    if server in sources:
                        data = server.recv(65536)
                        if not data or (is_script and self.cuts_answer()):
                            return
                        self.turns += is_script
                        is_script = False
                        client.sendall(data)
                    if client in sources:
                        data = client.recv(65536)
                        has_script = b"EVAL" in data
                        if not data or (has_script and self.cuts_request()):
                            return
                        if has_script and self.delays_request():
                            client.close()
                            self._forward_later(server, data)
                            return
                        is_script |= has_script
                        server.sendall(data)

    def _forward_later(self, server: socket.socket, data: bytes) -> None:
        try:
            self.forward_delayed.wait(10)
            server.sendall(data)
            server.recv(65536)
        finally:
            self.delayed_is_done.set()


def once() -> Callable[[], bool]:
    """A decision that is True the first time."""
    decisions = [True]
    return lambda: bool(decisions) and decisions.pop()


def wait_for(server: Valkey, name: str, last: str) -> list[str]:
    """Wait for an event. Returns the data of all events, or the type of a reset."""
    received, id = list[str](), "0"
    with redis.Redis.from_url(server.url, protocol=2) as client:
        while last not in received:
            with suppress(redis.ConnectionError):  # it becomes the primary
                answer = client.xread({f"tgstream:{name}": id}, block=10_000)
                for entry_id, fields in answer[0][1]:
                    id = entry_id.decode()
                    received.append((fields.get(b"event") or fields[b"data"]).decode())
    return received


@contextmanager
def paused(server: Valkey) -> Iterator[None]:
    """Let a server hang: connections stay open, and nothing answers."""
    process = server._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@contextmanager
def blocked(reader: RedisReader) -> Iterator[None]:
    """Block the thread of a reader at its next message."""
    reached, done = threading.Event(), threading.Event()

    def receive(response: Any) -> None:
        reached.set()
        assert done.wait(30)
        RedisReader._receive(reader, response)

    reader._receive = receive  # type: ignore[method-assign]
    reader._wake()
    assert reached.wait(30)
    try:
        yield
    finally:
        done.set()
        del reader._receive
