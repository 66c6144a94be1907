"""An application that returns the request's body, and feeds that must not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tg
from tg import TGController, expose

import tgstream
from tests.application import make_wsgi_app
from tgstream import SSE, Stream, stream

ran: list[int] = []


def endless() -> Iterator[str]:
    """Yield events forever, and count how often this generator was started."""
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
    """Return the application, without a database."""
    return make_wsgi_app({"root_controller": RootController()}, tgstream.plugme)
