"""An application that sends back what it is sent, and feeds that must not run."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import tg
from tg import FullStackApplicationConfigurator, TGController, expose

import tgstream
from tgstream import SSE, Stream, stream

ran: list[int] = []


def endless() -> Iterator[str]:
    """A feed without an end, which counts how often it began."""
    ran.append(1)
    while True:
        yield "x"


class RootController(TGController):
    @expose(content_type="application/octet-stream")
    @stream
    def input(self) -> Any:
        return tg.request.environ["wsgi.input"]

    @expose(content_type="application/octet-stream")
    @stream
    def body_file(self) -> Any:
        return tg.request.body_file

    @expose()
    @stream(SSE)
    def endless(self) -> Any:
        tg.response.headers["Access-Control-Allow-Origin"] = "*"
        return endless()

    @expose()
    def preflight(self) -> Stream:
        tg.response.headers["Access-Control-Allow-Origin"] = "*"
        tg.response.status = 204
        return Stream(endless(), SSE)

    @expose()
    def ran(self) -> str:
        return str(len(ran))


def make_app() -> Any:
    """The application, without a database."""
    base_config = FullStackApplicationConfigurator()
    base_config.update_blueprint(
        {
            "root_controller": RootController(),
            "renderers": ["json"],
            "default_renderer": "json",
            "errorpage.enabled": False,
            "app_globals": SimpleNamespace,
            "helpers": SimpleNamespace,
            "i18n.enabled": False,
        }
    )
    tgstream.plugme(base_config)
    return base_config.make_wsgi_app({}, {})
