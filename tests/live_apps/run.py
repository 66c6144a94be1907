"""Starts one application under one real server, on a free port of this machine.

    python -m tests.live_apps.run waitress stream_app plugged=no

It prints ``port N`` when it listens, and serves until it is terminated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

MakeApp = Callable[[], Any]


def waitress(make_app: MakeApp) -> None:
    """Threads of one process."""
    from waitress.server import create_server

    server = create_server(make_app(), host="127.0.0.1", port=0, threads=6)
    say_port(server.effective_port)
    server.run()


def gunicorn(worker_class: str) -> Callable[[MakeApp], None]:
    """One worker process, in which the application is made as it is there."""

    def serve(make_app: MakeApp) -> None:
        from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]

        class Application(BaseApplication):
            def load_config(self) -> None:
                for name, value in {
                    "bind": "127.0.0.1:0",
                    "worker_class": worker_class,
                    "threads": 6 if worker_class == "gthread" else 1,
                    "loglevel": "warning",
                    "graceful_timeout": 1,
                    "when_ready": lambda server: say_port(
                        server.LISTENERS[0].sock.getsockname()[1]
                    ),
                }.items():
                    self.cfg.set(name, value)

            def load(self) -> Any:
                return make_app()

        Application().run()

    return serve


SERVERS: dict[str, Callable[[MakeApp], None]] = {
    "waitress": waitress,
    "gunicorn-sync": gunicorn("sync"),
    "gunicorn-gthread": gunicorn("gthread"),
    "gunicorn-gevent": gunicorn("gevent"),
}


def say_port(port: int) -> None:
    """What ``LiveServer`` waits for."""
    print(f"port {port}", flush=True)


def main(server: str, app: str, *options: str) -> None:
    """Serve ``tests.live_apps.<app>.make_app(**options)``."""
    del sys.argv[1:]  # which gunicorn would read
    keywords = dict(option.split("=", 1) for option in options)

    def make_app() -> Any:
        # Not before: gevent's worker has patched the standard library by now.
        return import_module(f"tests.live_apps.{app}").make_app(**keywords)

    SERVERS[server](make_app)


if __name__ == "__main__":
    main(*sys.argv[1:])
