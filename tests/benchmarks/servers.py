"""How much CPU and memory does a stream cost a server?"""

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


def resident(processes: list[psutil.Process]) -> float:
    """Return the resident memory of these processes, in MiB."""
    return float(sum(process.memory_info().rss for process in processes) / MIB)


class Server:
    """A server in its own process, together with its child processes."""

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
        """Return the CPU seconds used so far."""
        times = [process.cpu_times() for process in self.processes]
        return float(sum(used.user + used.system for used in times))

    def memory(self) -> float:
        """Return the resident memory, in MiB."""
        return resident(self.processes)

    def read(self, path: str, expected: int) -> float:
        """Read a response as fast as possible. Return the server's growth in MiB.

        :raises RuntimeError: if the response has fewer bytes than ``expected``.
        """
        buffer = bytearray(MIB)
        received = 0
        measured = 0  # bytes received at the last measurement of the memory
        before = self.memory()
        highest = before
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(f"GET {path} {REQUEST}".encode())
            while count := connection.recv_into(buffer):
                received += count
                if received - measured > 32 * MIB:
                    measured, highest = received, max(highest, self.memory())
        if received < expected:
            raise RuntimeError(f"{path} sent {received} of {expected} bytes")
        return max(highest, self.memory()) - before


def reader(server: Server, path: str, size: int) -> Measure:
    """Measure the server's CPU seconds for a response."""

    def measure() -> float:
        start = server.cpu()
        server.read(path, size)
        return server.cpu() - start

    return measure


def run(folder: Path, quick: bool) -> list[Result]:
    """Measure large chunks on waitress, and small chunks on gunicorn's threads."""
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
    """Start a server for each application. Both stop when ``stack`` closes."""
    plain, ours = (Server(server, way, folder) for way in ("plain", "tgstream"))
    stack.callback(plain.stop)
    stack.callback(ours.stop)
    return plain, ours
