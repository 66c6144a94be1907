"""Start an application on its server, on a free port of this machine.

    python -m tests.comparison.serve uvicorn in_starlette url=...

Like ``tests.live_apps.run`` it prints ``port N``, and serves until it is terminated.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

from tests.live_apps import run


def uvicorn(make_app: run.MakeApp) -> None:
    """uvicorn, which Starlette's manual names first."""
    from uvicorn import Config, Server

    config = Config(make_app(), log_level="warning", timeout_graceful_shutdown=1)
    Server(config).run(sockets=[run.open_listener()])


SERVERS: dict[str, run.Serve] = {
    "gunicorn-gthread": run.SERVERS["gunicorn-gthread"],
    "uvicorn": uvicorn,
}


def make(name: str, *options: str) -> Any:
    """Return the application of a module in ``apps``."""
    module = import_module(f"tests.comparison.apps.{name}")
    return module.make_app(**dict(option.split("=", 1) for option in options))


def main(server: str, *words: str) -> None:
    """Serve an application."""
    del sys.argv[1:]  # gunicorn would read these arguments
    os.environ[run.APP] = ""  # no options of the server
    SERVERS[server](lambda: make(*words))


if __name__ == "__main__":
    main(*sys.argv[1:])
