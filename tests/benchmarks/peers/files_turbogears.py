"""Plain TurboGears2: an open file as the response, and WebOb's ``FileApp``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tg
from tg import TGController, expose
from webob.static import FileApp

from ..apps import NO_DATABASE, App, configure


def make_app(folder: str) -> App:
    class RootController(TGController):
        @expose(content_type="application/octet-stream")
        def opened(self, name: str) -> Any:
            return Path(folder, name).open("rb")

        @expose()
        def file_app(self, name: str) -> Any:
            return tg.use_wsgi_app(FileApp(str(Path(folder, name))))

    return configure(RootController(), NO_DATABASE)
