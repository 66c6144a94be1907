"""A TCP proxy that cuts its first connection, so that a client must resume."""

from __future__ import annotations

import shutil
import socket
import threading
from contextlib import closing
from typing import Any


class Cutter:
    """Forwards connections to a server. The first one is cut in its response.

    Use it in a ``with`` statement.

    :param port: the server's port.
    :param after: bytes of the first response that the client gets, with its headers.
    """

    def __init__(self, port: int, after: int = 500_000) -> None:
        self._server, self._after = port, after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.requests: list[bytes] = []
        """The headers of the requests, in their order."""
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Cutter:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        """Serve one connection after the other, each with one request."""
        left = self._after
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # the listener is shut down
                return
            server = socket.create_connection(("127.0.0.1", self._server))
            with closing(client), closing(server):
                if request := self._read_request(client):
                    server.sendall(request)
                    left = self._copy(server, client, left)

    def _read_request(self, client: socket.socket) -> bytes:
        """Read a request without a body, and have the server close its connection."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = client.recv(65536)
            if not data:
                return b""
            head += data
        self.requests.append(head)
        lines = head.split(b"\r\n")
        kept = [line for line in lines if not line.lower().startswith(b"connection:")]
        return b"\r\n".join([kept[0], b"Connection: close", *kept[1:]])

    def _copy(self, server: socket.socket, client: socket.socket, left: int) -> int:
        """Copy a response. Returns the bytes after which the next one is cut."""
        if not left:
            with server.makefile("rb") as source, client.makefile("wb") as target:
                shutil.copyfileobj(source, target)
            return 0
        while left:
            data = server.recv(min(left, 65536))
            assert data, "the response is too short"
            client.sendall(data)
            left -= len(data)
        return 0
