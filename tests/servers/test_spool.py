"""Spooled streams on servers that do not show a client that a stream was aborted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import LiveServer
from tests.faults.test_spool import kill_worker_while_sending


@pytest.mark.parametrize(
    "server", ["wsgiref", "uwsgi-threads", "uwsgi-async", "uwsgi-gevent"]
)
def test_killed_worker_leaves_an_incomplete_response(
    server: str, tmp_path: Path
) -> None:
    """The client compares the bytes that it got with the ``Content-Length``."""
    live = LiveServer(server, "spooled", f"folder={tmp_path}")
    try:
        kill_worker_while_sending(live)
        assert list(tmp_path.iterdir()) == []
    finally:
        live.kill()
