"""tgstream: ``send_file()``, with the server's file wrapper and without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tg import TGController, expose

from tgstream import Stream, plugme, send_file

from ..apps import NO_DATABASE, App, configure


def make_app(folder: str) -> App:
    class RootController(TGController):
        @expose()
        def sent(self, name: str) -> Stream:
            return send_file(Path(folder, name))

    app = configure(RootController(), NO_DATABASE, plugme)

    def choose(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["QUERY_STRING"] == "chunks":
            environ = dict(environ)
            del environ["wsgi.file_wrapper"]
        return app(environ, start_response)

    return choose
