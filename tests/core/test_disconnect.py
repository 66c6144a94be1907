"""Whether a client has left: its server is asked, before a write fails."""

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
def test_client_that_left_a_mute_stream_is_asked_for(
    live_server: Callable[..., LiveServer], postgresql: str, tmp_path: Path, server: str
) -> None:
    """Its generator has nothing to say, and sees that it is to end."""
    live = live_server(server, "stream_app", "looks=0.1", f"postgresql={postgresql}")
    pipe = tmp_path / "reason"
    os.mkfifo(pipe)
    client = Client(live, f"/postgresql/mute?tell={pipe}")
    assert client.response.read1(100) == b": open\n\n"
    client.leave()
    assert pipe.read_text() in ("disconnected", "completed")
    assert_settles(live, "postgresql")


def test_short_check_notices_a_disconnect_without_idle_warnings(
    make_app: MakeApp, sqlite_model: Model, ended: Callable[[], Report]
) -> None:
    """The two intervals are independent of each other."""

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


def test_client_that_is_there_has_not_left() -> None:
    """Nor has one that has only ended its own sending, and waits for the rest."""
    client, server = connected()
    environ = {"gunicorn.socket": server}
    with client, server:
        assert not has_disconnected(environ)
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        assert not has_disconnected(environ)
        server.sendall(b"the rest")
        assert client.recv(100) == b"the rest"


def test_client_that_reset_the_connection_has_left() -> None:
    """And asking does not take the error from the server, that has yet to see it."""
    client, server = connected()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    with server:
        assert has_disconnected({"gunicorn.socket": server})
        with pytest.raises(ConnectionResetError):
            server.recv(1)


def test_nobody_knows_of_a_client_elsewhere() -> None:
    """Without a word of the server, over a Unix socket, and once it is closed."""
    one, other = socket.socketpair()
    with one, other:
        environs: list[dict[str, Any]] = [{}, {"gunicorn.socket": one}]
        assert not any(map(has_disconnected, environs))
    assert not has_disconnected({"gunicorn.socket": one})


def test_who_cannot_be_asked_ends_no_watch() -> None:
    """What a middleware has put there may raise anything; nobody has left then."""
    assert not has_disconnected({"waitress.client_disconnected": lambda: 1 / 0})
    assert not has_disconnected({"gunicorn.socket": object()})
