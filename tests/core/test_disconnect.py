"""Whether a client has disconnected, which some servers know before a write fails."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tg import TGController, expose

from tests.conftest import LiveServer, MakeApp, assert_clean
from tests.model import Model
from tests.test_servers import Client, assert_settles
from tests.wsgi import Call
from tgstream import SSE, Report, stream
from tgstream.core.monitor import has_disconnected


@pytest.mark.parametrize("server", ["waitress", "gunicorn-gthread", "gunicorn-gevent"])
def test_disconnect_of_a_silent_stream_is_noticed(
    live_server: Callable[..., LiveServer], postgresql: str, tmp_path: Path, server: str
) -> None:
    """Its generator has nothing to send, and ends because of ``ending``."""
    live = live_server(server, "stream_app", "looks=0.1", f"postgresql={postgresql}")
    pipe = tmp_path / "reason"
    os.mkfifo(pipe)
    client = Client(live, f"/postgresql/mute?tell={pipe}")
    assert client.response.read1(100) == b": open\n\n"
    client.leave()
    assert pipe.read_text() in ("disconnected", "completed")
    assert_settles(live, "postgresql")


def test_disconnect_is_noticed_without_idle_warnings(
    make_app: MakeApp, sqlite_model: Model, ended: Callable[[], Report]
) -> None:
    """The interval of the check does not depend on that of the warning."""

    class Root(TGController):
        @expose()
        @stream(SSE)
        def events(self) -> Iterator[str]:
            yield "one"
            yield "two"

    options: dict[str, Any] = {
        "tgstream__idle_transaction_seconds": 0,
        "tgstream__disconnect_check_seconds": 0.05,
    }
    app = make_app(Root(), sqlite_model, **options)
    disconnected = threading.Event()
    environ: dict[str, Any] = {"waitress.client_disconnected": disconnected.is_set}
    call = Call(app, "/events", **environ)
    assert next(call) == b"data: one\n\n"
    disconnected.set()
    assert ended().reason == "disconnected"
    call.close()
    assert_clean(sqlite_model)


def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


def test_connected_client_has_not_left() -> None:
    """A client that only shuts down its sending side still waits for the response."""
    client, server = connected()
    environ = {"gunicorn.socket": server}
    with client, server:
        assert not has_disconnected(environ)
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        assert not has_disconnected(environ)
        server.sendall(b"the rest")
        assert client.recv(100) == b"the rest"


def test_client_that_reset_the_connection_has_disconnected() -> None:
    """The check does not consume the error, so that the server gets it as well."""
    client, server = connected()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    with server:
        assert has_disconnected({"gunicorn.socket": server})
        with pytest.raises(ConnectionResetError):
            server.recv(1)


def test_unknown_client_has_not_left() -> None:
    """No server key, a Unix socket, and a closed socket give no information."""
    one, other = socket.socketpair()
    with one, other:
        environs: list[dict[str, Any]] = [{}, {"gunicorn.socket": one}]
        assert not any(map(has_disconnected, environs))
    assert not has_disconnected({"gunicorn.socket": one})


def test_check_that_raises_means_that_the_client_has_not_left() -> None:
    """A middleware may have replaced the object with any other."""
    assert not has_disconnected({"waitress.client_disconnected": lambda: 1 / 0})
    assert not has_disconnected({"gunicorn.socket": object()})
