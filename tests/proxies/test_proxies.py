"""Streams that a client reads through a real proxy."""

from __future__ import annotations

import http.client
import os
import re
import select
import subprocess
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from tests.proxies.conftest import PAGE, Proxy, StartProxy

KINDS = ["nginx", "haproxy", "apache"]
SHORT = {
    "nginx": {"proxy_read_timeout 60s": "proxy_read_timeout 1s"},
    "haproxy": {"client 60s": "client 1s", "server 60s": "server 1s"},
    "apache": {"timeout=60": "timeout=1"},
}
OLD = {
    "nginx": {"proxy_http_version 1.1;": "proxy_http_version 1.0;"},
    "apache": {
        "<VirtualHost *:80>\n": "<VirtualHost *:80>\nSetEnv {}\n".format(
            "force-proxy-request-1.0 1"
        )
    },
}
BROKEN = (http.client.IncompleteRead, ConnectionResetError)


def ask(
    proxy: Proxy, path: str, seconds: float = 20, **headers: str
) -> http.client.HTTPResponse:
    """Return a response through the proxy, with an unread body."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, seconds)
    connection.request("GET", path, headers={"Connection": "close", **headers})
    return connection.getresponse()


def curl(proxy: Proxy, path: str, *options: str) -> tuple[int, bytes]:
    """Read a response with curl. Return its exit code, and the body."""
    scheme = "https" if "--insecure" in options else "http"
    url = f"{scheme}://127.0.0.1:{proxy.port}{path}"
    command = ["curl", "-sSN", "-m", "20", *options, url]
    run = subprocess.run(command, capture_output=True)
    return run.returncode, run.stdout


@pytest.fixture
def make_pipe(tmp_path: Path) -> Callable[[str], Path]:
    """Makes named pipes, with which client and server wait for each other."""

    def make(name: str) -> Path:
        os.mkfifo(tmp_path / name)
        (tmp_path / name).chmod(0o666)
        return tmp_path / name

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_first_event_is_sent_before_the_second_is_made(
    kind: str, start_proxy: StartProxy, make_pipe: Callable[[str], Path]
) -> None:
    """The client receives the first event while the generator waits."""
    pipe = make_pipe("pipe")
    with ask(start_proxy(kind), f"/traced/ticks?pipe={pipe}") as response:
        assert response.readline() == b": open\n"
        pipe.write_text("second\n")
        assert response.read() == b"\nevent: tick\ndata: second\n\n"


@pytest.mark.parametrize("kind", KINDS)
def test_heartbeats_keep_an_idle_feed_open(
    kind: str, start_proxy: StartProxy, make_pipe: Callable[[str], Path]
) -> None:
    """With a timeout of 1 s the feed is open after 2 s. Without heartbeats it ends."""
    proxy = start_proxy(kind, SHORT[kind])
    with ask(proxy, "/traced/silent") as response:
        assert response.readline() == b": open\n"
        started = time.monotonic()
        while time.monotonic() < started + 2:
            assert response.readline() in (b":\n", b"\n")
    pipe = make_pipe("pipe")
    with ask(proxy, f"/traced/ticks?pipe={pipe}") as response, pytest.raises(BROKEN):
        response.read()
    pipe.write_text("too late\n")


@pytest.mark.parametrize("kind", KINDS)
def test_failed_stream_is_incomplete(kind: str, start_proxy: StartProxy) -> None:
    """The client can distinguish failed and complete streams, like without a proxy."""
    proxy = start_proxy(kind)
    assert curl(proxy, "/traced/fail") == (18, b"one\ntwo\n")
    assert curl(proxy, "/traced/words") == (0, b"one\ntwo\n")


@pytest.mark.parametrize("kind", OLD)
def test_failed_stream_looks_complete_over_http_1_0(
    kind: str, start_proxy: StartProxy
) -> None:
    """A proxy that uses HTTP/1.0 to the server cannot see and report the failure."""
    proxy = start_proxy(kind, OLD[kind])
    assert curl(proxy, "/traced/fail") == (0, b"one\ntwo\n")


@pytest.mark.parametrize("path", ["silent", "endless"])
@pytest.mark.parametrize("kind", KINDS)
def test_disconnected_client_ends_the_stream(
    kind: str, path: str, start_proxy: StartProxy, make_pipe: Callable[[str], Path]
) -> None:
    """The server notices the disconnect at a heartbeat, or at the next chunk."""
    proxy, pipe = start_proxy(kind), make_pipe("pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    response = ask(proxy, f"/sqlite/{path}?tell={pipe}")
    response.read(1)
    response.close()
    assert select.select([reader], [], [], 20)[0]
    assert os.read(reader, 100) == b"disconnected"
    os.close(reader)


COMPRESSED = {
    "nginx": {
        "proxy_http_version 1.1;": "proxy_http_version 1.1; gzip on;"
        "gzip_types text/event-stream; gzip_min_length 0;"
    },
    "haproxy": {
        "mode http\n": "mode http\n compression algo gzip\n"
        " compression type text/event-stream\n"
    },
    "apache": {
        "<VirtualHost *:80>\n": "<VirtualHost *:80>\n"
        "AddOutputFilterByType DEFLATE text/event-stream\n"
    },
}


def read_compressed(proxy: Proxy, pipe: Path, seconds: float) -> str:
    """Wait for the first event of a compressed feed, and return the rest."""
    inflate, first = zlib.decompressobj(31), b""
    path = f"/traced/ticks?pipe={pipe}"
    with ask(proxy, path, seconds, **{"Accept-Encoding": "gzip"}) as response:
        assert response.headers["Content-Encoding"] == "gzip"
        try:
            while first != b": open\n\n":
                first += inflate.decompress(response.read1(100))
        finally:
            pipe.write_text("second\n")
        return inflate.decompress(response.read()).decode()


@pytest.mark.parametrize("kind", ["nginx", "apache"])
def test_compressed_event_is_sent_at_once(
    kind: str, start_proxy: StartProxy, make_pipe: Callable[[str], Path]
) -> None:
    """nginx and Apache flush compressed events."""
    proxy = start_proxy(kind, COMPRESSED[kind])
    rest = read_compressed(proxy, make_pipe("pipe"), 20)
    assert rest == "event: tick\ndata: second\n\n"


def test_compressed_event_is_buffered_by_haproxy(
    start_proxy: StartProxy, make_pipe: Callable[[str], Path]
) -> None:
    """HAProxy waits for more data before it sends a compressed event."""
    proxy = start_proxy("haproxy", COMPRESSED["haproxy"])
    with pytest.raises(TimeoutError):
        read_compressed(proxy, make_pipe("pipe"), 0.5)


# Only nginx.


def count_buffered(proxy: Proxy, pipe: Path, options: str = "") -> int:
    """Return how many bytes of the first chunk nginx buffers."""
    more = int(parse_qs(options).get("more", ["0"])[0])
    command = ["curl", "-sSN", "-m", "20"]
    address = f"http://127.0.0.1:{proxy.port}/traced/wait?pipe={pipe}&{options}"
    client: Any = subprocess.Popen([*command, address], stdout=subprocess.PIPE)
    with client:
        with pipe.open("w") as writer:  # opens when the first chunk was sent
            received = b""
            while select.select([client.stdout], [], [], 0.5)[0]:
                received += os.read(client.stdout.fileno(), 65536)
            writer.write("second\n")
        rest = client.stdout.read()
    assert received + rest == b"first" + b"x" * more + b"second\n"
    return len(b"first") + more - len(received)


def test_small_chunk_is_buffered_only_over_http_1_0(
    start_proxy: StartProxy, make_pipe: Callable[[str], Path]
) -> None:
    """nginx sends each chunk of HTTP/1.1. For HTTP/1.0 a header disables its buffer."""
    pipe = make_pipe("pipe")
    assert count_buffered(start_proxy("nginx"), pipe) == 0
    old = start_proxy("nginx", OLD["nginx"])
    assert count_buffered(old, pipe) == 5
    assert count_buffered(old, pipe, "direct=yes") == 0


def test_end_of_a_large_chunk_is_buffered_without_the_header(
    start_proxy: StartProxy, make_pipe: Callable[[str], Path]
) -> None:
    """The last bytes that do not fill a buffer of nginx wait for the next chunk."""
    pipe = make_pipe("pipe")
    proxy = start_proxy("nginx")
    assert 0 < count_buffered(proxy, pipe, "more=5000") < 4096
    assert count_buffered(proxy, pipe, "more=5000&direct=yes") == 0


def test_failed_export_is_incomplete_without_buffers(start_proxy: StartProxy) -> None:
    """The failure is visible with ``proxy_buffering off`` too."""
    line = "proxy_http_version 1.1;"
    proxy = start_proxy("nginx", {line: f"{line} proxy_buffering off;"})
    assert curl(proxy, "/traced/fail") == (18, b"one\ntwo\n")


# HTTP/2 between client and proxy.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a key and a self-signed certificate."""
    path = tmp_path_factory.mktemp("tls") / "myapp.pem"
    subject = ["-subj", "/CN=localhost", "-days", "1", "-nodes", "-newkey", "rsa:2048"]
    key = path.with_suffix(".key")
    files = ["-keyout", str(key), "-out", str(path)]
    command = ["openssl", "req", "-x509", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    path.write_text(path.read_text() + key.read_text())
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_streams_work_over_http_2(
    kind: str, start_proxy: StartProxy, certificate: Path
) -> None:
    """A failed stream is reset. Only HAProxy ends it like a complete stream."""
    key = certificate.with_suffix(".key")
    if kind == "nginx":
        pem = {"/etc/ssl/myapp.pem": str(certificate), "/etc/ssl/myapp.key": str(key)}
        proxy = start_proxy(kind, pem, 1)
    elif kind == "haproxy":
        line = re.search(r"``(bind :443 [^`]+)``", PAGE)
        assert line is not None
        bind = " ".join(line[1].split()).replace("/etc/ssl/myapp.pem", str(certificate))
        proxy = start_proxy(kind, {"bind :80\n": f"{bind}\n"})
    else:
        lines = re.search(r"``(SSLEngine on)``.*``(Protocols [^`]+)``", PAGE, re.DOTALL)
        assert lines is not None
        protocols = " ".join(lines[2].split())
        tls = [lines[1], protocols, f"SSLCertificateFile {certificate}"]
        head = "<VirtualHost *:80>\n"
        proxy = start_proxy(kind, {head: "\n".join([head, *tls, ""])})
    options = ["--insecure", "--http2", "-w", "%{http_version}"]
    assert curl(proxy, "/traced/words", *options) == (0, b"one\ntwo\n2")
    status = 0 if kind == "haproxy" else 92
    assert curl(proxy, "/traced/fail", *options) == (status, b"one\ntwo\n2")
