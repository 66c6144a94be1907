"""Clients that reconnect forever, like ``EventSource``, to a server that stops."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.conftest import LiveServer

FAILED = (OSError, http.client.HTTPException)


class ReturningClient(threading.Thread):
    """Requests an event stream again and again, and reads it line by line.

    It keeps its connection while the server does. A response stays open until the next
    request, because ``readline()`` does not close it after its ``Content-Length``.

    :param pause: the seconds between two requests.
    """

    def __init__(self, port: int, path: str, pause: float) -> None:
        super().__init__()
        self._path, self._pause = path, pause
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._response: http.client.HTTPResponse | None = None
        self._stopped = threading.Event()
        self.opened = threading.Event()
        """Set when it has received the first bytes."""
        self.answers: list[tuple[int, bytes]] = []
        """The status and the body of each complete response."""

    def run(self) -> None:
        while not self._stopped.wait(self._pause if self.answers else 0):
            try:
                self._read()
            except FAILED:
                self._close()
        self._close()

    def _read(self) -> None:
        if self._response is not None:
            self._response.close()
        self._connection.request("GET", self._path)
        self._response = response = self._connection.getresponse()
        body = b""
        while line := response.readline():
            body += line
            self.opened.set()
        self.answers.append((response.status, body))

    def _close(self) -> None:
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def stop(self) -> None:
        """Request nothing any more. Call it when the server has stopped."""
        self._stopped.set()
        self.join()


@contextmanager
def returning(
    live: LiveServer, count: int, path: str, pause: float
) -> Iterator[list[ReturningClient]]:
    """Clients that have received bytes. The server is killed before they stop."""
    with ExitStack() as stack:
        clients = [ReturningClient(live.port, path, pause) for _ in range(count)]
        for client in clients:
            client.start()
            stack.callback(client.stop)
        stack.callback(live.kill)
        assert all(client.opened.wait(20) for client in clients)
        yield clients


def measure_stop(live: LiveServer) -> float:
    """Return the seconds from SIGTERM until the server has exited."""
    started = time.monotonic()
    live.process.terminate()
    live.process.wait(60)
    return time.monotonic() - started
