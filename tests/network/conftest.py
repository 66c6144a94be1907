"""A network whose link can be cut, and a wall clock that can be set."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class Network:
    """A namespace of the kernel's, and a pair of interfaces between it and this one."""

    def __init__(self) -> None:
        self.name = f"tgstream{os.getpid()}"
        self.link = f"tgs{os.getpid()}"
        high, low = divmod(os.getpid(), 250)  # of another run beside this one, others
        self.here, there = (f"10.{high % 250}.{low}.{host}" for host in (1, 2))
        self.ip("netns", "add", self.name)
        peer = "peer", "name", "eth0", "netns", self.name
        self.ip("link", "add", self.link, "type", "veth", *peer)
        self.ip("addr", "add", f"{self.here}/24", "dev", self.link)
        self.ip("link", "set", self.link, "up")
        self.ip("-n", self.name, "addr", "add", f"{there}/24", "dev", "eth0")
        self.ip("-n", self.name, "link", "set", "eth0", "up")

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A process that has this network alone, and a pipe to it and from it."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def cut(self) -> None:
        """From now on nothing comes from there, no FIN and no ACK."""
        self.ip("-n", self.name, "link", "set", "eth0", "down")

    def close(self) -> None:
        self.ip("netns", "del", self.name)  # and the interfaces with it


@pytest.fixture
def network() -> Iterator[Network]:
    """One that is not cut yet."""
    network = Network()
    yield network
    network.close()


class Clock:
    """The wall clock of the processes that are started meanwhile; no other clock, as
    the kernel has it when it is set."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_bytes(bytes(8))

    def set(self, seconds: int) -> None:
        """So many from now; it goes on from there."""
        with self.file.open("r+b") as file:  # the same file: it is in their memory
            file.write(struct.pack("q", seconds))


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The true time, until it is set."""
    source, library = Path(__file__).parent / "clock.c", tmp_path / "clock.so"
    command = "cc", "-shared", "-fPIC", "-Wall", "-Werror", "-O2", "-o"
    subprocess.run([*command, library, source, "-ldl"], check=True)
    clock = Clock(tmp_path / "clock")
    monkeypatch.setenv("TGSTREAM_CLOCK", str(clock.file))
    monkeypatch.setenv("LD_PRELOAD", str(library))
    return clock
