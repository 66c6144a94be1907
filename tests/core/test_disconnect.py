"""Disconnects of clients, which some servers detect before a write fails."""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tg
from tg import TGController, expose

from tests.conftest import LiveServer, MakeApp, assert_clean
from tests.model import Model, User
from tests.test_servers import Client, assert_settles
from tests.turbogears.support import WIRINGS
from tests.wsgi import Call
from tgstream import SSE, Report, stream
from tgstream.core.monitor import has_disconnected


@pytest.mark.parametrize("server", ["waitress", "gunicorn-gthread", "gunicorn-gevent"])
def test_disconnect_of_an_idle_stream_is_detected(
    live_server: Callable[..., LiveServer], postgresql: str, tmp_path: Path, server: str
) -> None:
    """The generator has nothing to send, and ends because of ``ending``."""
    live = live_server(server, "stream_app", "looks=0.1", f"postgresql={postgresql}")
    pipe = tmp_path / "reason"
    os.mkfifo(pipe)
    client = Client(live, f"/postgresql/mute?tell={pipe}")
    assert client.response.read1(100) == b": open\n\n"
    client.leave()
    assert pipe.read_text() in ("disconnected", "completed")
    assert_settles(live, "postgresql")


def test_disconnect_is_detected_without_idle_warnings(
    make_app: MakeApp, sqlite_model: Model, next_report: Callable[[], Report]
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
    assert next_report().reason == "disconnected"
    call.close()
    assert_clean(sqlite_model)


def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


def test_connected_client_has_not_disconnected() -> None:
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


def test_unknown_client_has_not_disconnected() -> None:
    """No server key, a Unix socket, and a closed socket give no information."""
    one, other = socket.socketpair()
    with one, other:
        environs: list[dict[str, Any]] = [{}, {"gunicorn.socket": one}]
        assert not any(map(has_disconnected, environs))
    assert not has_disconnected({"gunicorn.socket": one})


def test_client_has_not_disconnected_if_the_check_raises() -> None:
    """A middleware may have replaced the object that is checked."""
    assert not has_disconnected({"waitress.client_disconnected": lambda: 1 / 0})
    assert not has_disconnected({"gunicorn.socket": object()})


# Generators that fail because the client has disconnected.


@pytest.mark.parametrize("wiring", WIRINGS)
def test_error_after_a_disconnect_is_not_a_failure(
    make_app: MakeApp,
    model: Model,
    reports: list[Report],
    caplog: pytest.LogCaptureFixture,
    wiring: dict[str, Any],
) -> None:
    """Nothing is committed, the response is aborted, and the log line is at DEBUG."""
    caplog.set_level(logging.DEBUG, "tgstream")
    disconnected = threading.Event()

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def relay(self) -> Iterator[str]:
            model.DBSession.add(User(name="ada"))
            yield "one"
            disconnected.set()
            raise TimeoutError("the upstream was cut")

    app = make_app(Root(), model, **wiring)
    environ: dict[str, Any] = {"waitress.client_disconnected": disconnected.is_set}
    call = Call(app, "/relay", checked=False, **environ)
    with pytest.raises(ConnectionResetError, match="relay has disconnected"):
        call.read()
    assert [(r.reason, r.error) for r in reports] == [("disconnected", None)]
    assert {r.levelname for r in caplog.records if r.name == "tgstream"} == {"DEBUG"}
    assert model.names() == []
    assert_clean(model)


def test_disconnect_before_the_first_chunk_is_not_a_failure(
    make_app: MakeApp, reports: list[Report], caplog: pytest.LogCaptureFixture
) -> None:
    """The application makes an error page. The stream is reported as disconnected."""
    caplog.set_level(logging.DEBUG, "tgstream")

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def upload(self) -> Iterator[str]:
            yield tg.request.body_file.read(100).decode()

    call = Call(
        make_app(Root()),
        "/upload",
        "POST",
        checked=False,
        CONTENT_LENGTH="100",
        CONTENT_TYPE="application/octet-stream",
    )
    call.read()
    assert call.status_int == 500
    assert [(r.reason, r.error) for r in reports] == [("disconnected", None)]
    assert {r.levelname for r in caplog.records if r.name == "tgstream"} == {"DEBUG"}


def test_error_while_the_client_is_connected_is_a_failure(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The connection that was reset is not the client's."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def relay(self) -> Iterator[str]:
            yield "one"
            raise ConnectionResetError("the upstream was cut")

    environ: dict[str, Any] = {"waitress.client_disconnected": lambda: False}
    call = Call(make_app(Root()), "/relay", **environ)
    with pytest.raises(ConnectionResetError, match="upstream"):
        call.read()
    assert [report.reason for report in reports] == ["failed"]
