"""Serves one application: ``python -m tests.benchmarks.serve waitress plain FOLDER``.

It prints its port on a line of its own, and serves until it is terminated.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .apps import App, make_app


def waitress(app: App, **options: Any) -> None:
    from waitress import create_server

    server = create_server(app, host="127.0.0.1", port=0, **options)
    print(server.effective_port, flush=True)
    server.run()


def unbuffered(app: App) -> None:
    """waitress, which keeps up to 16 MiB of a response otherwise, as it happens."""
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


if __name__ == "__main__":
    server, way, folder = sys.argv[1:]
    made = make_app(way == "tgstream", Path(folder))
    sys.argv = sys.argv[:1]
    {"waitress": waitress, "unbuffered": unbuffered, "gthread": gthread}[server](made)
