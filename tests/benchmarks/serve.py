"""Serves one application: ``python -m tests.benchmarks.serve waitress plain FOLDER``.

Or one of ``peers``, by its name, and with the URL of a database for the folder.

It prints its port on a line of its own, and serves until it is terminated.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from .apps import App, make_app


def waitress(app: App, **options: Any) -> None:
    from waitress import create_server

    server = create_server(app, host="127.0.0.1", port=0, **options)
    print(server.effective_port, flush=True)
    server.run()


def unbuffered(app: App) -> None:
    """waitress, which keeps up to 16 MiB of what it has sent in large chunks else."""
    waitress(app, outbuf_high_watermark=2**17)


def gthread(app: App) -> None:
    from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]

    class Application(BaseApplication):
        def load_config(self) -> None:
            self.cfg.set("bind", "127.0.0.1:0")
            self.cfg.set("worker_class", "gthread")
            self.cfg.set("threads", 2)
            self.cfg.set("loglevel", "warning")
            self.cfg.set("when_ready", tell)

        def load(self) -> App:
            return app

    def tell(arbiter: Any) -> None:
        print(arbiter.LISTENERS[0].sock.getsockname()[1], flush=True)

    Application().run()


def uvicorn(app: App) -> None:
    """What Starlette is served by: of the servers here the only one for ASGI."""
    from uvicorn import Config, Server

    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        Server(Config(app, log_level="error")).run([listener])


SERVERS: dict[str, Callable[[App], None]] = {
    "waitress": waitress,
    "unbuffered": unbuffered,
    "gthread": gthread,
    "uvicorn": uvicorn,
}


def make(way: str, where: str) -> App:
    """The application ``way``, with its database ``where``."""
    if way in ("plain", "tgstream"):
        return make_app(way == "tgstream", Path(where))
    app: App = import_module(f"{__package__}.peers.{way}").make_app(where)
    return app


if __name__ == "__main__":
    server, way, where = sys.argv[1:]
    sys.argv = sys.argv[:1]
    SERVERS[server](make(way, where))
