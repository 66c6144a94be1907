"""An application whose streams are spooled, with a pool of two connections."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import tg
from tg import TGController, expose

import tgstream
from tests.application import database_options, make_wsgi_app
from tests.model import Model
from tgstream import Report, stream

BLOCK = 4096
POOL = {"sqlalchemy.pool_size": 2, "sqlalchemy.max_overflow": 0}


class RootController(TGController):
    def __init__(self, model: Model | None, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.running = 0
        """The number of generators that run now."""
        self.ended: list[Report] = []

    @expose(content_type="application/octet-stream")
    @stream(spool=True, filename="export.bin")
    def export(
        self, blocks: str, version: str = "", pipe: str = "", pause: str = "0"
    ) -> Iterator[bytes]:
        """Stream blocks, which are read from the database if there is one.

        :param version: another version has other bytes.
        :param pipe: a named pipe, from which a line is read before the last block.
        :param pause: seconds before each block.
        """
        self.running += 1
        try:
            for number in self.numbers(int(blocks)):
                time.sleep(float(pause))
                if pipe and number == int(blocks):
                    with open(pipe) as file:
                        file.readline()
                yield f"{version}{number:{BLOCK - len(version)}}".encode()
        finally:
            self.running -= 1

    def numbers(self, count: int) -> Iterator[int]:
        if self.model is None:
            return iter(range(1, count + 1))
        series = sa.select(sa.func.generate_series(1, count))
        numbers: Iterator[int] = self.model.DBSession.scalars(series)
        return numbers

    @expose("json")
    def state(self) -> dict[str, Any]:
        """Return what is held now, the peak memory in KiB, and the ends of streams."""
        pool: Any = self.model and self.model.engine.pool
        return {
            "process": os.getpid(),
            "running": self.running,
            "connections": pool.checkedout() if pool else 0,
            "files": count_files(self.folder),
            "free": shutil.disk_usage(self.folder).free,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "ended": [(report.reason, report.bytes) for report in self.ended],
        }


def count_files(folder: Path) -> int:
    """Return how many files without a name this process has open in a folder."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of this listing
            count += os.readlink(f"/proc/self/fd/{name}").startswith(f"{folder}/")
    return count


def make_app(
    folder: str, url: str = "", room: str = "", looks: str = "", **options: str
) -> Any:
    """Return the application.

    :param folder: for the temporary files.
    :param url: of a PostgreSQL database. Without it there is no database.
    :param room: bytes that a file of this process may have, as on a full disk.
    :param looks: seconds between two checks for clients that have disconnected.
    """
    if room:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), int(room)))
    model = Model(url, create=False) if url else None
    root = RootController(model, Path(folder))
    config: dict[str, Any] = {
        "root_controller": root,
        "debug": False,
        "tgstream.spool_directory": folder,
        **(POOL | database_options(model) if model else {}),
    }
    if looks:
        config["tgstream.disconnect_check_seconds"] = looks
    app = make_wsgi_app(config, tgstream.plugme)
    tg.hooks.register("tgstream.finished", root.ended.append)
    return app
