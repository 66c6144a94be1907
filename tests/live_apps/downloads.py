"""An application whose streams end well or badly, in every format, at any length."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import transaction
from tg import FullStackApplicationConfigurator, TGController, expose

import tgstream
from tgstream import CSV, NDJSON, JSONArray, Stream

FORMATS: dict[str, Any] = {
    "csv": CSV(header=["n", "text"]),
    "ndjson": NDJSON(end=True),
    "array": JSONArray,
}
ROW = (1, "x" * 90)
ROWS = 2000
PULL = 0.06
"""Seconds, and more than a pull may gather what is small."""


def fail() -> None:
    raise LookupError("at the end")


def rows(end: str) -> Iterator[Any]:
    """Some chunks of rows, and an end that is one or none."""
    if end == "commit":
        transaction.get().addBeforeCommitHook(fail)
    for _ in range(ROWS):
        yield ROW
    if end == "raise":
        fail()


class RootController(TGController):
    @expose()
    def rows(self, format: str, end: str, listed: str = "") -> Stream:
        """Rows one by one, or as a list."""
        items = [*rows(end)] if listed else rows(end)
        return Stream(items, FORMATS[format])

    @expose(content_type="application/octet-stream")
    def sized(self, made: str, length: str, end: str = "") -> Stream:
        """So many chunks of 1,000 bytes, under that length."""

        def chunks() -> Iterator[bytes]:
            if end == "commit":
                transaction.get().addBeforeCommitHook(fail)
            for _ in range(int(made)):
                yield b"x" * 1000

        return Stream(chunks(), length=int(length))

    @expose()
    def slow(self, format: str, pipe: str) -> Stream:
        """An item for each line of a named pipe, after some work."""

        def items() -> Iterator[Any]:
            with open(pipe) as file:
                for line in file:
                    done = perf_counter() + PULL
                    while perf_counter() < done:
                        pass
                    yield [line.strip()]

        return Stream(items(), FORMATS[format])


def make_app(**options: Any) -> Any:
    """The application, with transactions and without a database."""
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
            "tm.enabled": True,
        }
    )
    tgstream.plugme(base_config)
    return base_config.make_wsgi_app({}, {})
