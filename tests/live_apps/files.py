"""An application that sends files of the machine, and reports how each stream ended."""

from __future__ import annotations

from typing import Any

import tg
from tg import TGController, expose

import tgstream
from tests.application import make_wsgi_app
from tgstream import Report, Stream, send_file, stream

ended: list[tuple[str, str, int]] = []
"""The files of the ended streams, the reasons, and the bytes that were sent."""


def add(report: Report) -> None:
    ended.append((tg.request.params["path"], report.reason, report.bytes))


class RootController(TGController):
    @expose()
    def sent(self, path: str) -> Stream:
        return send_file(path, filename="data.bin")

    @expose(content_type="application/octet-stream")
    @stream
    def streamed(self, path: str) -> Any:
        return open(path, "rb")

    @expose("json")
    def reports(self, path: str) -> dict[str, Any]:
        """The reports of a file."""
        return {"reports": [report for name, *report in ended if name == path]}


def make_app(wrapper: str = "yes", **options: str) -> Any:
    """Return the application.

    :param wrapper: ``no`` to hide ``wsgi.file_wrapper`` from it.
    :param options: of the server.
    """
    tg.hooks.register("tgstream.finished", add)
    app = make_wsgi_app({"root_controller": RootController()}, tgstream.plugme)

    def without_wrapper(environ: dict[str, Any], start_response: Any) -> Any:
        own = dict(environ)  # gunicorn looks into its own environ later
        del own["wsgi.file_wrapper"]
        return app(own, start_response)

    return app if wrapper == "yes" else without_wrapper
