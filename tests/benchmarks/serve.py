"""Serve an application: ``python -m tests.benchmarks.serve waitress plain FOLDER``.

To serve a module of ``peers``, give its name, and the URL of a database instead of the
folder. The command prints its port on a line, and serves until it is terminated.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .apps import App


def waitress(app: App, **options: Any) -> None:
    from waitress import create_server

    server = create_server(app, host="127.0.0.1", port=0, **options)
    print(server.effective_port, flush=True)
    server.run()


def unbuffered(app: App) -> None:
    """Serve with waitress, but without its buffer of up to 16 MiB for large chunks."""
    waitress(app, outbuf_high_watermark=2**17)


def gthread(app: App) -> None:
    gunicorn(app, worker_class="gthread", threads=2)


def gevent(app: App) -> None:
    gunicorn(app, worker_class="gevent", worker_connections=11_000, graceful_timeout=1)


def gunicorn(app: App, **options: Any) -> None:
    from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]

    class Application(BaseApplication):
        def load_config(self) -> None:
            self.cfg.set("bind", "127.0.0.1:0")
            for name, value in options.items():
                self.cfg.set(name, value)
            self.cfg.set("loglevel", "warning")
            self.cfg.set("when_ready", print_port)

        def load(self) -> App:
            return app

    def print_port(arbiter: Any) -> None:
        print(arbiter.LISTENERS[0].sock.getsockname()[1], flush=True)

    Application().run()


def uvicorn(app: App) -> None:
    """Serve an ASGI application, here Starlette."""
    from uvicorn import Config, Server

    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        Server(Config(app, log_level="error")).run([listener])


SERVERS: dict[str, Callable[[App], None]] = {
    "waitress": waitress,
    "unbuffered": unbuffered,
    "gthread": gthread,
    "gevent": gevent,
    "uvicorn": uvicorn,
}


def make(way: str, where: str) -> App:
    """Return the application named ``way``.

    :param where: a folder for the database, or the URL of a database for a peer.
    """
    if way in ("plain", "tgstream"):
        from .apps import make_app

        return make_app(way == "tgstream", Path(where))
    app: App = import_module(f"{__package__}.peers.{way}").make_app(where)
    return app


if __name__ == "__main__":
    server, way, where = sys.argv[1:]
    sys.argv = sys.argv[:1]
    if server == "gevent":  # before the import of TG, whose context is per thread
        from gevent import monkey

        monkey.patch_all()
    SERVERS[server](make(way, where))
