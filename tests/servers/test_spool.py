"""Spooled streams on servers that do not show a client that a stream was aborted."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import LiveServer
from tests.faults.test_spool import LARGE, get_state, make_body
from tests.test_servers import BROKEN, Client


@pytest.mark.parametrize(
    "server", ["wsgiref", "uwsgi-threads", "uwsgi-async", "uwsgi-gevent"]
)
def test_killed_worker_leaves_an_incomplete_response(
    server: str, tmp_path: Path
) -> None:
    """The client compares the bytes that it got with the ``Content-Length``."""
    live = LiveServer(server, "spooled", f"folder={tmp_path}")
    try:
        process = get_state(live)["process"]
        client = Client(live, f"/export?blocks={8 * LARGE}")
        assert client.response.read(10) == make_body(1)[:10]
        os.kill(process, signal.SIGKILL)
        with pytest.raises(BROKEN):
            client.response.read()
        client.close()
        assert list(tmp_path.iterdir()) == []
    finally:
        live.kill()
