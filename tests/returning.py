"""Clients that reconnect forever, like ``EventSource``, to a server that stops."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from tests.conftest import LiveServer

FAILED = (OSError, http.client.HTTPException)


class ReturningClient(threading.Thread):
    """Reads a path again and again, on a connection that it keeps.

    :param pause: the seconds between two requests.
    """

    def __init__(self, port: int, path: str, pause: float) -> None:
        super().__init__(daemon=True)
        self._path, self._pause = path, pause
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._stopped = threading.Event()
        self.opened = threading.Event()
        """Set when the first bytes of a response have come."""
        self.answers: list[tuple[int, bytes]] = []
        """The status and the body of each complete response."""

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._read()
            except FAILED:
                self._connection.close()
            self._stopped.wait(self._pause)

    def _read(self) -> None:
        self._connection.request("GET", self._path)
        response = self._connection.getresponse()
        body = b""
        while chunk := response.read1():
            body += chunk
            self.opened.set()
        self.answers.append((response.status, body))

    def stop(self) -> None:
        """Stop it, also while it waits for the server."""
        self._stopped.set()
        sock = self._connection.sock
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(2)
        self._connection.close()


@contextmanager
def returning(
    live: LiveServer, count: int, path: str, pause: float
) -> Iterator[list[ReturningClient]]:
    """Run clients, each of which has received bytes."""
    with ExitStack() as stack:
        clients = [ReturningClient(live.port, path, pause) for _ in range(count)]
        for client in clients:
            client.start()
            stack.callback(client.stop)
        assert all(client.opened.wait(20) for client in clients)
        yield clients


def measure_stop(live: LiveServer) -> float:
    """Return the seconds from SIGTERM until the server has exited."""
    started = time.monotonic()
    live.process.terminate()
    live.process.wait(60)
    return time.monotonic() - started
