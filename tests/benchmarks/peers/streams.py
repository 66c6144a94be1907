"""tgstream: the same exports, each in one line."""

from __future__ import annotations

from typing import Any

from tg import TGController, expose

from tgstream import (
    CSV,
    NDJSON,
    XLSX,
    ZIP,
    JSONArray,
    Stream,
    copy,
    plugme,
    rows,
    stream,
)

from ..apps import App, configure
from ..people import EVERYBODY, database_options, split_people


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

    @expose()
    @stream(ZIP)
    def zip(self) -> Any:
        for name, query in split_people():
            yield name, Stream(rows(query), CSV)


def make_app(url: str) -> App:
    return configure(RootController(), database_options(url), plugme)
