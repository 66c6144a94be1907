"""The commands of ``docs/servers.rst`` start servers, and uWSGI drains.

TGSTREAM_SERVERS=yes python -m pytest tests/servers
"""

from __future__ import annotations

import http.client
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import LiveServer
from tests.live_apps.run import APACHE, MOD_WSGI, accepts_connections
from tests.pages import DOCS, blocks, commands
from tests.returning import measure_stop, returning

PAGE = (DOCS / "servers.rst").read_text()
ROOT = Path(__file__).parents[2]
LINES = [line for line in commands(PAGE) if "8080" in line or "gearbox" in line]
FILES = {block for block in blocks(PAGE) if "loadapp" in block}
ASGI = [block for block in blocks(PAGE) if "wsgi_application" in block]
APPLICATION = """
from tests.live_apps.stream_app import make_app as make


def make_app(global_conf, **app_conf):
    return make()
"""

LOGGING = """
[loggers]
keys = root

[handlers]
keys = console

[formatters]
keys =

[logger_root]
level = DEBUG
handlers = console

[handler_console]
class = StreamHandler
args = (sys.stderr,)
"""


def run(folder: Path, command: Callable[[int], list[str]]) -> tuple[int, bytes]:
    """Start a server, and return the status and the body of a stream.

    :param command: returns the command for a port.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    [page] = FILES
    (folder / "wsgi.py").write_text(page)
    (folder / "myapp.py").write_text(APPLICATION)
    [server] = blocks(PAGE, "ini")
    ini = f"[app:main]\npaste.app_factory = myapp:make_app\n\n{server}\n{LOGGING}"
    (folder / "production.ini").write_text(ini.replace("8080", str(port)))
    path = os.pathsep.join([str(folder), str(ROOT)])
    environ = {**os.environ, "PYTHONPATH": path}
    words = command(port)
    process = subprocess.Popen(words, cwd=folder, env=environ)
    try:
        while not accepts_connections(port):
            assert process.poll() is None, f"{words[0]} has exited"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/traced/words", headers={"Connection": "close"})
        with connection.getresponse() as response:
            return response.status, response.read()
    finally:
        # SIGTERM would only reload uWSGI.
        process.send_signal(signal.SIGQUIT if "uwsgi" in words[0] else signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def command_of(line: str) -> Callable[[int], list[str]]:
    """Return the line's command, in this virtual environment."""

    def command(port: int) -> list[str]:
        program, *words = shlex.split(line.replace("8080", str(port)))
        if program == "uwsgi":
            words += ["--virtualenv", sys.prefix]
        return [str(Path(sys.executable).parent / program), *words]

    return command


@pytest.mark.parametrize("line", [line for line in LINES if "uvicorn" not in line])
def test_command_starts_a_server(line: str, tmp_path: Path) -> None:
    """The command of the page serves a stream, on another port."""
    assert run(tmp_path, command_of(line)) == (200, b"one\ntwo\n")


@pytest.mark.parametrize("adapter", ASGI, ids=["a2wsgi", "asgiref"])
def test_command_starts_uvicorn(adapter: str, tmp_path: Path) -> None:
    """The command serves a stream with each adapter."""
    (tmp_path / "asgi.py").write_text(adapter)
    [line] = [line for line in LINES if "uvicorn" in line]
    assert run(tmp_path, command_of(line)) == (200, b"one\ntwo\n")


def test_configuration_starts_apache() -> None:
    """Apache with Debian's module serves a stream. Its workers run as www-data."""
    [lines] = blocks(PAGE, "apache")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)

        def command(port: int) -> list[str]:
            paths = {"/srv/myapp/venv": sys.prefix, "/srv/myapp": str(folder)}
            page_lines = lines
            for path, here in paths.items():
                page_lines = page_lines.replace(path, here)
            # A reader of the page has installed these packages instead.
            python_path = f" python-path={ROOT}:{folder} home="
            page_lines = page_lines.replace(" home=", python_path)
            head = APACHE + MOD_WSGI.partition("WSGIDaemonProcess")[0]
            conf = head.format(folder=folder, port=port) + f"{page_lines}\n"
            conf += f"<Directory {folder}>\nRequire all granted\n</Directory>\n"
            (folder / "conf").write_text(conf)
            return ["/usr/sbin/apache2", "-DFOREGROUND", "-f", str(folder / "conf")]

        assert run(folder, command) == (200, b"one\ntwo\n")


@pytest.mark.parametrize("server", ["uwsgi-threads", "uwsgi-gevent"])
def test_uwsgi_drains_its_streams(
    server: str, live_server: Callable[..., LiveServer], tmp_path: Path
) -> None:
    """Within 2 s of SIGTERM, all streams end normally, and the server exits."""
    live = live_server(server, "stream_app", "drains=yes")
    open_streams = []
    for number in range(3):
        pipe = tmp_path / f"pipe{number}"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        connection = http.client.HTTPConnection("127.0.0.1", live.port, 20)
        connection.request("GET", f"/traced/silent?tell={pipe}")
        response = connection.getresponse()
        assert response.readline() == b": open\n"
        open_streams.append((response, reader))
    started = time.monotonic()
    live.process.terminate()
    for response, reader in open_streams:
        assert select.select([reader], [], [], 10)[0]
        assert os.read(reader, 100) in (b"drained", b"completed")
        os.close(reader)
        assert (b": open\n" + response.read()).endswith(b"\n\n")
        response.close()
    live.process.wait(10)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("server", ["uwsgi-threads", "uwsgi-gevent"])
def test_uwsgi_stops_soon_although_its_clients_reconnect(
    server: str, live_server: Callable[..., LiveServer]
) -> None:
    """It stops within 2 s of SIGTERM. The next server can bind the address at once."""
    live = live_server(server, "stream_app", "drains=yes")
    with returning(live, 3, "/untraced/clock", pause=0.01) as clients:
        assert measure_stop(live) < 2
        socket.create_server(("127.0.0.1", live.port)).close()
    assert all(client.answers[0][1].endswith(b"\n\n") for client in clients)
