"""PgBouncer in front of PostgreSQL. ``.ci/pgbouncer`` installs it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
import sqlalchemy as sa

from tests.conftest import LiveServer
from tests.model import MakeModel, Model

SETTINGS = """\
[databases]
postgres = host={server} user=postgres pool_size={backends}
[pgbouncer]
listen_addr =
listen_port = 6432
unix_socket_dir = {folder}
auth_type = any
pool_mode = transaction
server_round_robin = 1
"""
BACKENDS = 3


class PgBouncer(LiveServer):
    """PgBouncer in transaction mode: each transaction may get another backend."""

    def __init__(self, command: str, server: Path) -> None:
        owner = server.stat()  # PgBouncer refuses to run as root
        self.folder = Path(tempfile.mkdtemp())
        settings = self.folder / "pgbouncer.ini"
        settings.write_text(
            SETTINGS.format(server=server, folder=self.folder, backends=BACKENDS)
        )
        options: dict[str, Any] = {}
        if os.getuid() == 0:
            options = {"user": owner.st_uid, "group": owner.st_gid}
            for path in (self.folder, settings):
                os.chown(path, owner.st_uid, owner.st_gid)
        self.name = "pgbouncer"
        self.start(
            [command, str(settings)], r".*listening on unix:.*\.(\d+)", **options
        )
        self.url = (
            f"postgresql+psycopg://postgres@/postgres?host={quote(str(self.folder))}"
            f"&port={self.port}"
        )

    def warm_up(self) -> None:
        """Make PgBouncer open all its backends, with as many parallel transactions."""
        with ExitStack() as stack:
            pids = set()
            for _ in range(BACKENDS):
                connection = psycopg.connect(
                    host=str(self.folder), port=self.port, user="postgres"
                )
                stack.enter_context(connection)
                pids |= set(connection.execute("SELECT pg_backend_pid()").fetchall())
        assert len(pids) == BACKENDS

    def stop(self) -> str:
        log = super().stop()
        shutil.rmtree(self.folder)
        return log


@pytest.fixture
def pgbouncer(postgresql: str) -> Iterator[PgBouncer]:
    """PgBouncer in front of PostgreSQL."""
    server = Path(str(sa.make_url(postgresql).query["host"]))
    pgbouncer = PgBouncer(os.environ["TGSTREAM_PGBOUNCER"], server)
    yield pgbouncer
    pgbouncer.stop()


@pytest.fixture
def model(make_model: MakeModel, postgresql: str, pgbouncer: PgBouncer) -> Model:
    """A model whose tables are created and queried without PgBouncer."""
    model = make_model(postgresql)
    model.seed(*(f"user{number}" for number in range(60)))
    pgbouncer.warm_up()
    return model
