"""tgstream: the same exports, in a line each."""

from __future__ import annotations

from typing import Any

from tg import FullStackApplicationConfigurator, TGController, expose

from tgstream import CSV, NDJSON, JSONArray, copy, plugme, rows, stream

from .. import people
from ..apps import App, configure
from ..people import EVERYBODY


class RootController(TGController):
    @expose()
    @stream(CSV)
    def csv(self) -> Any:
        return rows(EVERYBODY)

    @expose()
    @stream(NDJSON)
    def ndjson(self) -> Any:
        return rows(EVERYBODY)

    @expose()
    @stream(JSONArray)
    def json(self) -> Any:
        return rows(EVERYBODY)

    @expose()
    @stream(CSV)
    def csv_copy(self) -> Any:
        return copy(EVERYBODY)


def make_app(url: str) -> App:
    configurator = FullStackApplicationConfigurator()
    plugme(configurator)
    return configure(
        RootController(),
        {"use_sqlalchemy": True, "sqlalchemy.url": url, "model": people},
        configurator,
    )
