"""A TCP proxy between a browser and a server, whose connections a test can close."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from selectors import EVENT_READ
from typing import Any

RESET = struct.pack("ii", 1, 0)
"""A value of SO_LINGER with which close() resets the connection."""


class Proxy:
    """Forwards bytes between its own port and a server's port.

    :param port: the server's port.
    """

    def __init__(self, port: int) -> None:
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._commands, self._sender = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for side in self._listener, self._commands:
            self._selector.register(side, EVENT_READ)
        self._peers: dict[socket.socket, socket.socket] = {}
        self._from_server: set[socket.socket] = set()
        self._tears = False
        self._refuses = self._blocks = False
        self._ended = False
        self._refused = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """Close all connections, and end the proxy."""
        self._send("end")
        self._thread.join()
        self._listener.close()
        self._commands.close()
        self._sender.close()
        self._selector.close()

    def cut(self) -> None:
        """Close all connections, like a server that stops."""
        self._send("cut")

    def tear(self) -> None:
        """Close all connections after half of the server's next data."""
        self._send("tear")

    def refuse(self) -> None:
        """Reset all connections, and also the next two."""
        self._send("refuse")

    def block(self) -> None:
        """Reset all connections, and all others until :meth:`unblock`."""
        self._send("block")

    def unblock(self) -> None:
        """Forward the next connections again."""
        self._send("unblock")

    def _send(self, command: str) -> None:
        self._done.clear()
        self._sender.sendall(command.encode())
        assert self._done.wait(20), f"the proxy has not done this: {command}"

    # The methods below run on the proxy's thread.

    def _run(self) -> None:
        while not self._ended:
            for key, _ in self._selector.select():
                side: Any = key.fileobj
                if side is self._commands:
                    self._execute(side.recv(100).decode())
                elif side is self._listener:
                    self._accept(*side.accept())
                elif side in self._peers:
                    self._forward(side)

    def _execute(self, command: str) -> None:
        if command == "tear":
            self._tears = True
            return
        self._blocks = command == "block"
        self._refuses = self._blocks or command == "refuse"
        self._ended = command == "end"
        self._close_all()
        if command != "refuse":
            self._done.set()

    def _accept(self, client: socket.socket, _: Any) -> None:
        if self._refuses:
            self._reset(client)
            self._refused += not self._blocks
            if self._refused == 2:
                self._refuses, self._refused = False, 0
                self._done.set()
            return
        server = socket.create_connection(("127.0.0.1", self._server))
        self._peers |= {client: server, server: client}
        self._from_server.add(server)
        for side in client, server:
            self._selector.register(side, EVENT_READ)

    def _forward(self, side: socket.socket) -> None:
        try:
            data = side.recv(65536)
            tears = self._tears and side in self._from_server
            if tears:
                data = data[: len(data) // 2]
            self._peers[side].sendall(data)
        except OSError:
            data = b""
        if not data:
            self._close(side)
        elif tears:
            self._tears = False
            self._close_all()
            self._done.set()

    def _close_all(self) -> None:
        for side in [*self._peers]:
            self._close(side)

    def _close(self, side: socket.socket) -> None:
        if side not in self._peers:  # already closed with its peer
            return
        for end in side, self._peers[side]:
            del self._peers[end]
            self._from_server.discard(end)
            self._selector.unregister(end)
            if self._refuses:
                self._reset(end)
            else:
                end.close()

    def _reset(self, side: socket.socket) -> None:
        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        side.close()
