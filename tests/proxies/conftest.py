"""Real proxies, configured as in ``docs/proxies.rst``. See ``.ci/proxies``."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.conftest import LiveServer
from tests.live_apps.run import APACHE, accepts_connections
from tests.pages import DOCS, blocks

PAGE = (DOCS / "proxies.rst").read_text()
SERVERS = ["waitress", "gunicorn-gthread"]

NGINX = """
daemon off;
error_log stderr;
pid {folder}/pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{lines}
}}
"""
PROXY_MODULES = """
LoadModule socache_shmcb_module /usr/lib/apache2/modules/mod_socache_shmcb.so
LoadModule ssl_module /usr/lib/apache2/modules/mod_ssl.so
LoadModule http2_module /usr/lib/apache2/modules/mod_http2.so
LoadModule filter_module /usr/lib/apache2/modules/mod_filter.so
LoadModule deflate_module /usr/lib/apache2/modules/mod_deflate.so
LoadModule env_module /usr/lib/apache2/modules/mod_env.so
LoadModule proxy_module /usr/lib/apache2/modules/mod_proxy.so
LoadModule proxy_http_module /usr/lib/apache2/modules/mod_proxy_http.so
"""
LANGUAGES = {"nginx": "nginx", "haproxy": "text", "apache": "apache"}


class Proxy:
    """A running proxy in front of a server.

    :param kind: its name.
    :param lines: its configuration, from the page.
    """

    def __init__(self, kind: str, lines: str, server: LiveServer, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        ports = {":80\n": f":{self.port}\n", "*:80>": f"127.0.0.1:{self.port}>"}
        ports |= {"listen 80;": f"listen 127.0.0.1:{self.port};"}
        ports |= {"listen 443 ": f"listen 127.0.0.1:{self.port} "}
        ports |= {":443 ssl": f":{self.port} ssl"}
        ports |= {"127.0.0.1:8080": f"127.0.0.1:{server.port}"}
        for written, replacement in ports.items():
            lines = lines.replace(written, replacement)
        folder.mkdir()
        conf = folder / "conf"
        if kind == "nginx":
            lines = NGINX.format(folder=folder, lines=lines)
            command = ["/usr/sbin/nginx", "-p", str(folder), "-e", "stderr", "-c"]
        elif kind == "haproxy":
            command = ["/usr/sbin/haproxy", "-q", "-db", "-f"]
        else:
            head = APACHE.format(folder=folder, port=self.port)
            lines = f"{head}{PROXY_MODULES}{lines}"
            command = ["/usr/sbin/apache2", "-DFOREGROUND", "-f"]
        conf.write_text(lines)
        self._process = subprocess.Popen([*command, str(conf)])
        while not accepts_connections(self.port):
            assert self._process.poll() is None, f"{kind} has exited"

    def stop(self) -> None:
        """Stop the proxy."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="session", params=SERVERS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """The application of the tests on a server."""
    url = f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/test.db"
    live = LiveServer(request.param, "stream_app", f"sqlite={url}")
    yield live
    live.stop()


StartProxy = Callable[..., Proxy]


@pytest.fixture
def start_proxy(server: LiveServer, tmp_path: Path) -> Iterator[StartProxy]:
    """Starts a proxy with the configuration of the page, and changes to it."""
    numbers = count()
    with contextlib.ExitStack() as stack:

        def start(
            kind: str, changes: dict[str, str] | None = None, number: int = 0
        ) -> Proxy:
            lines = blocks(PAGE, LANGUAGES[kind])[number]
            for written, replacement in (changes or {}).items():
                assert written in lines
                lines = lines.replace(written, replacement)
            folder = tmp_path / f"proxy-{next(numbers)}"
            proxy = Proxy(kind, lines, server, folder)
            stack.callback(proxy.stop)
            return proxy

        yield start


@pytest.fixture(scope="session", autouse=True)
def proxies_are_there() -> None:
    """Check that all proxies are installed."""
    for command in "nginx", "haproxy", "apache2":
        assert shutil.which(command, path="/usr/sbin"), f"no {command}"
