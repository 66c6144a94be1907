"""A TCP proxy that a test cuts: what stands between a browser and a server."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from selectors import EVENT_READ
from typing import Any

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() resets, what waits is lost


class Proxy:
    """Hands bytes on between a port of its own and a server's, until it is told else.

    :param port: the server's.
    """

    def __init__(self, port: int) -> None:
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._told, self._teller = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for each in self._listener, self._told:
            self._selector.register(each, EVENT_READ)
        self._peers: dict[socket.socket, socket.socket] = {}
        self._from_server: set[socket.socket] = set()
        self._tears = self._refuses = self._ended = False
        self._turned_away = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """Cut all, and end."""
        self._tell("end")
        self._thread.join()
        for each in self._listener, self._told, self._teller, self._selector:
            each.close()

    def cut(self) -> None:
        """Close every connection, as a server that ends does."""
        self._tell("cut")

    def tear(self) -> None:
        """Close every connection in the middle of the next piece, after half of it."""
        self._tell("tear")

    def refuse(self) -> None:
        """Reset every connection, and the next two as well."""
        self._tell("refuse")

    def _tell(self, what: str) -> None:
        self._done.clear()
        self._teller.sendall(what.encode())
        assert self._done.wait(20), f"{what}: not done"

    # What runs on its thread.

    def _run(self) -> None:
        while not self._ended:
            for key, _ in self._selector.select():
                side: Any = key.fileobj
                if side is self._told:
                    self._obey(side.recv(100).decode())
                elif side is self._listener:
                    self._accept(*side.accept())
                elif side in self._peers:
                    self._hand_on(side)

    def _obey(self, what: str) -> None:
        if what == "tear":
            self._tears = True
            return
        self._refuses, self._ended = what == "refuse", what == "end"
        self._close_all()
        if not self._refuses:
            self._done.set()

    def _accept(self, client: socket.socket, _: Any) -> None:
        if self._refuses:
            self._reset(client)
            self._turned_away += 1
            if self._turned_away == 2:
                self._refuses, self._turned_away = False, 0
                self._done.set()
            return
        server = socket.create_connection(("127.0.0.1", self._server))
        self._peers |= {client: server, server: client}
        self._from_server.add(server)
        for each in client, server:
            self._selector.register(each, EVENT_READ)

    def _hand_on(self, side: socket.socket) -> None:
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
        if side not in self._peers:  # closed with its peer
            return
        for each in side, self._peers[side]:
            del self._peers[each]
            self._from_server.discard(each)
            self._selector.unregister(each)
            self._reset(each) if self._refuses else each.close()

    def _reset(self, side: socket.socket) -> None:
        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        side.close()
