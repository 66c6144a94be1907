"""``docs/servers.rst``: each of its lines starts a server, and uWSGI drains as it says.

TGSTREAM_SERVERS=yes python -m pytest tests/servers
"""

from __future__ import annotations

import http.client
import os
import select
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import LiveServer
from tests.live_apps.run import answers
from tests.pages import DOCS, blocks, commands

PAGE = (DOCS / "servers.rst").read_text()
ROOT = Path(__file__).parents[2]
LINES = [line for line in commands(PAGE) if "8080" in line or "gearbox" in line]
FILES = {each for each in blocks(PAGE) if "loadapp" in each}
ASGI = [each for each in blocks(PAGE) if "wsgi_application" in each]
APPLICATION = """
from tests.live_apps.stream_app import make_app as make


def make_app(global_conf, **app_conf):
    return make()
"""


def run(folder: Path, line: str) -> tuple[int, bytes]:
    """What a stream of the application is, under a server that a line starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    [page] = FILES
    (folder / "wsgi.py").write_text(page)
    (folder / "myapp.py").write_text(APPLICATION)
    [server] = blocks(PAGE, "ini")
    ini = f"[app:main]\npaste.app_factory = myapp:make_app\n\n{server}"
    (folder / "production.ini").write_text(ini.replace("8080", str(port)))
    program, *words = shlex.split(line.replace("8080", str(port)))
    command = str(Path(sys.executable).parent / program)
    path = os.pathsep.join([str(folder), str(ROOT)])
    environ = {**os.environ, "PYTHONPATH": path}
    if program == "uwsgi":
        words += ["--virtualenv", sys.prefix]
    process = subprocess.Popen([command, *words], cwd=folder, env=environ)
    try:
        while not answers(port):
            assert process.poll() is None, f"{line} has ended"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/traced/words", headers={"Connection": "close"})
        with connection.getresponse() as response:
            return response.status, response.read()
    finally:
        process.send_signal(3 if program == "uwsgi" else 15)  # which reloads it
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.parametrize("line", [each for each in LINES if "uvicorn" not in each])
def test_line_starts_a_server(line: str, tmp_path: Path) -> None:
    """As it is written, but for the port."""
    assert run(tmp_path, line) == (200, b"one\ntwo\n")


@pytest.mark.parametrize("adapter", ASGI, ids=["a2wsgi", "asgiref"])
def test_line_starts_uvicorn(adapter: str, tmp_path: Path) -> None:
    """With either adapter."""
    (tmp_path / "asgi.py").write_text(adapter)
    [line] = [each for each in LINES if "uvicorn" in each]
    assert run(tmp_path, line) == (200, b"one\ntwo\n")


@pytest.mark.parametrize("server", ["uwsgi-threads", "uwsgi-gevent"])
def test_uwsgi_drains_its_streams(
    server: str, live_server: Callable[..., LiveServer], tmp_path: Path
) -> None:
    """Within 2 s of SIGTERM each has ended as it ends well, and not been cut."""
    live = live_server(server, "stream_app", "drains=yes")
    open_streams = []
    for number in range(3):
        os.mkfifo(pipe := tmp_path / f"tell{number}")
        told = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        connection = http.client.HTTPConnection("127.0.0.1", live.port, 20)
        connection.request("GET", f"/traced/silent?tell={pipe}")
        response = connection.getresponse()
        assert response.readline() == b": open\n"
        open_streams.append((response, told))
    begun = time.monotonic()
    live.process.terminate()
    for response, told in open_streams:
        assert select.select([told], [], [], 10)[0]
        assert os.read(told, 100) in (b"drained", b"completed")
        os.close(told)
        assert response.read().endswith(b": close\n\n")
        response.close()
    live.process.wait(10)
    assert time.monotonic() - begun < 2
