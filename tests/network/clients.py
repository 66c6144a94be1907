"""Open feeds and keep them open until this process is killed.

    python -m tests.network.clients 10.213.0.1 8080 "/memory/feed?name=x" 50

It prints ``open`` when all feeds are open.
"""

from __future__ import annotations

import socket
import sys


def main(host: str, port: str, path: str, count: str) -> None:
    connections = []
    for _ in range(int(count)):
        connection = socket.create_connection((host, int(port)), 20)
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head = b""
        while b": open\n" not in head:
            head += connection.recv(1)
        connections.append(connection)
    print("open", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
