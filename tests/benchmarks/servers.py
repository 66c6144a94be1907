"""What does a stream cost a server, of its CPU and of its memory?"""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from .apps import BLOCK
from .measure import Measure, Result, compare, interleave

MIB = 2**20
REQUEST = "HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class Server:
    """A server in a process of its own, with all that it has forked."""

    def __init__(self, server: str, way: str, where: Path | str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.serve", server, way, str(where)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate()

    @property
    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children()]

    def cpu(self) -> float:
        """The CPU seconds that it has used so far."""
        times = [process.cpu_times() for process in self.processes]
        return float(sum(each.user + each.system for each in times))

    def memory(self) -> float:
        """What it holds now, in MiB."""
        return float(sum(each.memory_info().rss for each in self.processes) / MIB)

    def read(self, path: str, expected: int) -> float:
        """Read a response as fast as it comes; what the server grew at most, in MiB."""
        buffer = bytearray(MIB)
        received = looked = 0
        before = highest = self.memory()
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(f"GET {path} {REQUEST}".encode())
            while count := connection.recv_into(buffer):
                received += count
                if received - looked > 32 * MIB:
                    looked, highest = received, max(highest, self.memory())
        if received < expected:
            raise RuntimeError(f"{path} broke after {received} bytes")
        return max(highest, self.memory()) - before


def reader(server: Server, path: str, size: int) -> Measure:
    """The CPU seconds that a response costs the server."""

    def measure() -> float:
        start = server.cpu()
        server.read(path, size)
        return server.cpu() - start

    return measure


def run(folder: Path, quick: bool) -> list[Result]:
    """Large chunks over waitress, and small ones over gunicorn's threads."""
    return [*large_chunks(folder, quick), small_chunks(folder, quick)]


def large_chunks(folder: Path, quick: bool) -> list[Result]:
    count = 2**11 if quick else 2**14
    path, size = f"/blocks/{count}", count * BLOCK
    grown: list[float] = []
    with ExitStack() as stack:
        for server in start(stack, "unbuffered", folder):
            server.read("/blocks/1", BLOCK)
            grown.append(server.read(path, size))
    with ExitStack() as stack:
        plain, ours = start(stack, "waitress", folder)
        both = interleave(
            3 if quick else 11, reader(plain, path, size), reader(ours, path, size)
        )
    what = f"{size // MIB} MiB over waitress, chunks of 64 KiB"
    return [
        compare(f"{what}: CPU", both, 1.1, "s"),
        Result(
            f"{what}: memory",
            f"{grown[0]:.1f} MiB",
            f"{grown[1]:.1f} MiB",
            grown[1] - grown[0],
            5,
            "MiB",
        ),
    ]


def small_chunks(folder: Path, quick: bool) -> Result:
    count = 50_000 if quick else 200_000
    path, size = f"/lines/{count}", count * 20
    with ExitStack() as stack:
        plain, ours = start(stack, "gthread", folder)
        both = interleave(
            5 if quick else 11, reader(plain, path, size), reader(ours, path, size)
        )
    return compare(f"{count} chunks of 20 bytes over gthread: CPU", both, 1.6, "s")


def start(stack: ExitStack, server: str, folder: Path) -> tuple[Server, Server]:
    """The same server with both applications, until ``stack`` is left."""
    plain, ours = (Server(server, way, folder) for way in ("plain", "tgstream"))
    stack.callback(plain.stop)
    stack.callback(ours.stop)
    return plain, ours
