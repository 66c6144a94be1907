"""An application whose streams complete or fail, in every format, at any length."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import transaction
from tg import TGController, expose

import tgstream
from tests.application import make_wsgi_app
from tgstream import CSV, NDJSON, JSONArray, Stream

FORMATS: dict[str, Any] = {
    "csv": CSV(header=["n", "text"]),
    "ndjson": NDJSON(end=True),
    "array": JSONArray,
}
ROW = (1, "x" * 90)
ROWS = 2000
PULL = 0.06
"""Seconds of work for an item: longer than tgstream buffers small output."""


def fail() -> None:
    raise LookupError("at the end")


def rows(end: str) -> Iterator[Any]:
    """Yield enough rows for several chunks.

    :param end: ``raise`` to fail after the rows, or ``commit`` to fail in the commit.
    """
    if end == "commit":
        transaction.get().addBeforeCommitHook(fail)
    for _ in range(ROWS):
        yield ROW
    if end == "raise":
        fail()


class RootController(TGController):
    @expose()
    def rows(self, format: str, end: str, listed: str = "") -> Stream:
        """Stream rows from a generator, or from a list."""
        items = [*rows(end)] if listed else rows(end)
        return Stream(items, FORMATS[format])

    @expose(content_type="application/octet-stream")
    def sized(self, made: str, length: str, end: str = "") -> Stream:
        """Stream ``made`` chunks of 1,000 bytes, and declare ``length`` bytes."""

        def chunks() -> Iterator[bytes]:
            if end == "commit":
                transaction.get().addBeforeCommitHook(fail)
            for _ in range(int(made)):
                yield b"x" * 1000

        return Stream(chunks(), length=int(length))

    @expose()
    def slow(self, format: str, pipe: str) -> Stream:
        """Stream an item for each line of a named pipe, after ``PULL`` seconds."""

        def items() -> Iterator[Any]:
            with open(pipe) as file:
                for line in file:
                    done = perf_counter() + PULL
                    while perf_counter() < done:
                        pass
                    yield [line.strip(), ""]

        return Stream(items(), FORMATS[format])


def make_app(**options: Any) -> Any:
    """Return the application, with transactions and without a database."""
    options = {"root_controller": RootController(), "tm.enabled": True}
    return make_wsgi_app(options, tgstream.plugme)
