"""An application that sends ZIP archives: of known sizes, and some that fail."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transaction
from tg import TGController, expose

import tgstream
from tests.application import make_wsgi_app
from tgstream import CSV, ZIP, Stream, stream

ROW = ("x" * 90, "ä" * 5)
LINE = "{},{}\r\n".format(*ROW).encode()
DATA = random.Random(1).randbytes(256_000)


def fail() -> None:
    raise LookupError("at the end")


class RootController(TGController):
    @expose()
    @stream(ZIP(compress=False), filename="known")
    def known(self, path: str) -> Any:
        """Send members of all kinds whose sizes are known."""
        file = io.BytesIO(b"skipped" + DATA)
        file.seek(7)
        with open(path, "wb") as made:
            made.write(DATA * 3)
        return [
            ("bytes", DATA),
            ("view", memoryview(DATA)[10:]),
            ("no bytes", b""),
            ("ä/text.txt", "ä" * 1000),
            ("path", Path(path)),
            ("file", open(path, "rb")),
            ("memory", file),
            ("stream.csv", Stream([ROW] * 5000, CSV, length=5000 * len(LINE))),
        ]

    @expose()
    @stream(ZIP(compress=False))
    def wrong(self, length: str) -> Any:
        """Send a Stream that has another length."""
        return [("a.csv", Stream([ROW] * 5000, CSV, length=int(length))), ("b", b"b")]

    @expose()
    @stream(ZIP)
    def failing(self, end: str) -> Any:
        """Fail in the second member, or in the commit."""
        if end == "commit":
            transaction.get().addBeforeCommitHook(fail)
        yield "first.bin", DATA * 5
        yield "second.bin", self.make_second(end)

    def make_second(self, end: str) -> Iterator[bytes]:
        for number in range(2000):
            yield b"%d" % number * 100
        if end == "raise":
            fail()


def make_app(**options: Any) -> Any:
    """Return the application, with transactions and without a database."""
    options = {"root_controller": RootController(), "tm.enabled": True}
    return make_wsgi_app(options, tgstream.plugme)
