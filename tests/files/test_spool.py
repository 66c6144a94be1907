"""Spooled downloads: resumed by wget and Chromium, and on a disk that gets full."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.browser.conftest import Browser
from tests.conftest import LiveServer
from tests.cutter import Cutter
from tests.faults.conftest import wait_until
from tests.faults.test_spool import (
    LARGE,
    SERVERS,
    Start,
    get_state,
    make_body,
    start,
)
from tests.test_servers import Client, read

__all__ = ["start"]  # a fixture


@pytest.mark.parametrize("server", SERVERS)
def test_wget_resumes_a_download(start: Start, server: str, tmp_path: Path) -> None:
    """``wget -c`` requests the rest of the file, also without a new command."""
    live = start(server)
    with Cutter(live.port) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/export?blocks={LARGE}"
        command = ["wget", "-q", "-c", "-t", "1", "-O", str(tmp_path / "file"), url]
        assert subprocess.run(command).returncode != 0
        begun = (tmp_path / "file").stat().st_size
        assert 0 < begun < 500_000
        subprocess.run(command, check=True)
    assert f"Range: bytes={begun}-".encode() in proxy.requests[1]
    assert (tmp_path / "file").read_bytes() == make_body(LARGE)


@pytest.mark.parametrize("server", SERVERS)
def test_chromium_resumes_a_download(
    start: Start,
    server: str,
    tmp_path: Path,
    open_browser: Callable[[], Browser],
) -> None:
    """Its request has ``If-Range`` with the ``ETag``."""
    live = start(server)
    downloads = tmp_path / "downloads"
    browser = open_browser()
    browser.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior",
        {"behavior": "allow", "downloadPath": str(downloads)},
    )
    with Cutter(live.port) as proxy:
        browser.open(f"127.0.0.1:{proxy.port}/export?blocks={LARGE}")
        target = downloads / "export.bin"
        wait_until(target.exists, "the download is incomplete")
        _, resumed = proxy.requests
    etag = Client(live, f"/export?blocks={LARGE}").response.headers["ETag"]
    assert f"\r\nIf-Range: {etag}\r\n".encode() in resumed
    assert b"\r\nRange: bytes=" in resumed
    assert target.read_bytes() == make_body(LARGE)


SMALL_DISK = """
mount -t tmpfs -o size=2m tmpfs "$1"
exec "$0" -m tests.live_apps.run gunicorn-gthread spooled folder="$1"
"""


class ServerOnSmallDisk(LiveServer):
    """A server whose directory for temporary files is a file system of 2 MiB."""

    def __init__(self, folder: Path) -> None:
        self.name = "gunicorn-gthread"
        command = ["unshare", "-rm", "sh", "-ec", SMALL_DISK, sys.executable, folder]
        self.start([str(word) for word in command], r"port (\d+)")


def test_full_file_system_is_a_500_and_gets_its_room_back(tmp_path: Path) -> None:
    """The response that fails is closed before the next one is made."""
    live = ServerOnSmallDisk(tmp_path)
    try:
        for _ in range(3):
            client = Client(live, f"/export?blocks={LARGE}")
            assert client.response.status == 500
            client.response.read()
            client.close()
            assert get_state(live)["free"] == 2 << 20
            assert read(live, "/export?blocks=400") == make_body(400)
            wait_until(lambda: get_state(live)["free"] == 2 << 20, "a file is left")
    finally:
        log = live.stop()
    assert f"cannot spool its response to {tmp_path}" in log
    assert "[Errno 28] No space left on device" in log
