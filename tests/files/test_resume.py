"""wget and Chromium resume downloads that were interrupted."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.browser.conftest import Browser
from tests.browser.proxy import Proxy
from tests.conftest import LiveServer

SERVERS = ["waitress", "gunicorn-gthread", "gunicorn-gevent"]
"""Chromium resumes no response of HTTP/1.0, so that wsgiref is not one of them."""
PAGES = ["sent", "streamed"]
SIZE = 20_000_000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random bytes."""
    file = tmp_path_factory.mktemp("files") / "data.bin"
    file.write_bytes(random.Random(1).randbytes(SIZE))
    return file


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """Each server, with the application of ``tests/live_apps/files.py``."""
    live = LiveServer(request.param, "files")
    yield live
    live.kill()


@pytest.fixture
def proxy(server: LiveServer) -> Iterator[Proxy]:
    """A proxy whose connections the test can cut."""
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def check(client: str, server: LiveServer, saved: Path, path: Path) -> None:
    """Check that the saved file is the server's. ``.ci/files`` shows the line."""
    print(f"{client} from {server.name}: sha256 {digest(saved)}")
    assert digest(saved) == digest(path)


@pytest.mark.parametrize("page", PAGES)
def test_curl_resumes_a_part(
    server: LiveServer, path: Path, tmp_path: Path, page: str
) -> None:
    """``curl -C -`` requests the bytes that its file does not have."""
    part = tmp_path / "part"
    part.write_bytes(path.read_bytes()[:1_234_567])
    url = f"http://127.0.0.1:{server.port}/{page}?path={path}"
    subprocess.run(["curl", "-sSf", "-C", "-", "-o", str(part), url], check=True)
    check("curl -C -", server, part, path)


@pytest.mark.parametrize("page", PAGES)
def test_wget_resumes_a_part(
    server: LiveServer, path: Path, tmp_path: Path, page: str
) -> None:
    """``wget -c`` requests the bytes that its file does not have, once."""
    part = tmp_path / "part"
    part.write_bytes(path.read_bytes()[:1_234_567])
    url = f"http://127.0.0.1:{server.port}/{page}?path={path}"
    for expected in "206 Partial", "416 Requested Range Not Satisfiable":
        command = ["wget", "-c", "-S", "-O", str(part), url]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        assert expected in run.stderr
        check("wget -c", server, part, path)


def test_wget_resumes_after_a_cut(
    server: LiveServer, proxy: Proxy, path: Path, tmp_path: Path
) -> None:
    """It connects again, and requests the rest."""
    part = tmp_path / "part"
    url = f"http://127.0.0.1:{proxy.port}/sent?path={path}"
    command = ["wget", "-S", "--waitretry=0", "--limit-rate=8m", "-O", str(part), url]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: received(tmp_path) > 1_000_000)
    proxy.cut()
    _, log = run.communicate()
    assert run.returncode == 0
    assert "206 Partial" in log
    check("wget after a cut", server, part, path)


def ended(port: int, path: Path) -> list[tuple[str, int]]:
    """How the streams of a file ended: the reasons, and the bytes."""
    answer = urlopen(f"http://127.0.0.1:{port}/reports?path={path}")
    with answer:
        return [(reason, size) for reason, size in json.load(answer)["reports"]]


def received(folder: Path) -> int:
    """Bytes of the downloads in a folder, finished or not."""
    return sum(file.stat().st_size for file in folder.iterdir())


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


RESUME = """
const manager = document.querySelector('downloads-manager').shadowRoot
const item = manager.querySelector('downloads-item')
const buttons = item ? [...item.shadowRoot.querySelectorAll('cr-button')] : []
const button = buttons.find(each => each.textContent.trim() == 'Resume')
if (button && button.offsetParent) button.click()
return Boolean(button && button.offsetParent)
"""


def test_chromium_resumes_after_a_cut(
    server: LiveServer,
    proxy: Proxy,
    path: Path,
    tmp_path: Path,
    open_browser: Callable[[], Browser],
) -> None:
    """It requests the rest, and the saved file has the hash of the server's."""
    file = tmp_path / "data.bin"
    file.hardlink_to(path)
    folder = tmp_path / "downloads"
    folder.mkdir()
    driver = open_browser().driver
    behavior = {"behavior": "allow", "downloadPath": str(folder)}
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)
    limits = {"offline": False, "latency": 0, "downloadThroughput": 4_000_000}
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd(
        "Network.emulateNetworkConditions", {**limits, "uploadThroughput": -1}
    )
    driver.get(f"http://127.0.0.1:{proxy.port}/sent?path={file}")
    wait_for(lambda: received(folder) > 1_000_000)
    proxy.cut()
    driver.get("chrome://downloads")
    wait_for(lambda: driver.execute_script(RESUME) or (folder / "data.bin").exists())
    wait_for((folder / "data.bin").exists)
    check("Chromium after a cut", server, folder / "data.bin", path)
    wait_for(lambda: len(ended(server.port, file)) == 2)
    sizes = {reason: size for reason, size in ended(server.port, file)}
    assert sizes["completed"] < SIZE and "disconnected" in sizes
