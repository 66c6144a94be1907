"""An application with a table in several formats, from which each request chooses."""

from __future__ import annotations

from typing import Any

from tg import TGController, expose

import tgstream
from tests.application import make_wsgi_app
from tgstream import CSV, NDJSON, Arrow, JSONArray, Parquet, stream

ROWS = [{"id": n, "name": f"user {n}"} for n in range(1, 1001)]


class RootController(TGController):
    @expose()
    @stream([CSV, NDJSON, JSONArray, Parquet, Arrow], filename="users")
    def users(self) -> Any:
        return (row for row in ROWS)


def make_app(**options: Any) -> Any:
    """Return the application, without a database."""
    return make_wsgi_app({"root_controller": RootController()}, tgstream.plugme)
