"""A network that can be disconnected, and a wall clock that can be set."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class Network:
    """A network namespace, and a pair of interfaces that connect it to this one."""

    def __init__(self) -> None:
        self.name = f"tgstream{os.getpid()}"
        self.link = f"tgs{os.getpid()}"
        high, low = divmod(os.getpid(), 250)  # unique for each run
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
        """Start a process in this network, with pipes to it and from it."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def cut(self) -> None:
        """Disconnect the network, so that it sends neither FIN nor ACK."""
        self.ip("-n", self.name, "link", "set", "eth0", "down")

    def close(self) -> None:
        self.ip("netns", "del", self.name)  # and the interfaces with it


@pytest.fixture
def network() -> Iterator[Network]:
    """A connected network."""
    network = Network()
    yield network
    network.close()


class Clock:
    """The wall clock of all processes that a test starts. Other clocks do not change,
    like in the kernel when its wall clock is set."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_bytes(bytes(8))

    def set(self, seconds: int) -> None:
        """Move the clock by so many seconds."""
        with self.file.open("r+b") as file:  # the same file: processes have mapped it
            file.write(struct.pack("q", seconds))


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock with the true time, until the test sets it."""
    source, library = Path(__file__).parent / "clock.c", tmp_path / "clock.so"
    command = "cc", "-shared", "-fPIC", "-Wall", "-Werror", "-O2", "-o"
    subprocess.run([*command, library, source, "-ldl"], check=True)
    clock = Clock(tmp_path / "clock")
    monkeypatch.setenv("TGSTREAM_CLOCK", str(clock.file))
    monkeypatch.setenv("LD_PRELOAD", str(library))
    return clock
