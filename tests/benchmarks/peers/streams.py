"""tgstream: the same exports, each in one line."""

from __future__ import annotations

from typing import Any

from tg import TGController, expose

from tgstream import CSV, NDJSON, XLSX, JSONArray, copy, plugme, rows, stream

from ..apps import App, configure
from ..people import EVERYBODY, database_options


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

    @expose()
    @stream(XLSX)
    def xlsx(self) -> Any:
        return rows(EVERYBODY)


def make_app(url: str) -> App:
    return configure(RootController(), database_options(url), plugme)
