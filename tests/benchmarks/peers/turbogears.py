"""Plain TurboGears2: a generator that yields a row at a time, and a naive list."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from tempfile import TemporaryFile
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import orjson
from tg import TGController, expose, json_encode
from zipstream import ZipStream

from ..apps import App, configure
from ..people import (
    BATCH,
    EVERYBODY,
    FIELDS,
    DBSession,
    Echo,
    database_options,
    split_people,
)

NAMES = tuple(map(str, FIELDS))  # orjson rejects the columns' subclass of str


class RootController(TGController):
    @expose(content_type="text/csv")
    def csv(self) -> Iterator[bytes]:
        write = csv.writer(Echo()).writerow
        yield line(write(FIELDS))
        for row in select():
            yield line(write(row))

    @expose(content_type="application/x-ndjson")
    def ndjson(self) -> Iterator[bytes]:
        for row in select():
            yield line(json_encode(row._asdict()) + "\n")

    @expose(content_type="application/json")
    def json(self) -> Iterator[bytes]:
        yield b"["
        before = ""
        for row in select():
            yield line(before + json_encode(row._asdict()))
            before = ","
        yield b"]"

    # By hand, in the fastest way: blocks of rows, and orjson.

    @expose(content_type="text/csv")
    def csv_by_hand(self) -> Iterator[bytes]:
        return write_blocks(EVERYBODY)

    @expose(content_type="application/x-ndjson")
    def ndjson_by_hand(self) -> Iterator[bytes]:
        for rows in select().partitions():
            yield b"".join([document(row) + b"\n" for row in rows])

    @expose(content_type="application/json")
    def json_by_hand(self) -> Iterator[bytes]:
        before = b"["
        for rows in select().partitions():
            yield before + b",".join(map(document, rows))
            before = b","
        yield b"]"

    @expose(content_type="application/zip")
    def zip_file(self) -> Iterator[bytes]:
        with TemporaryFile() as file:
            with ZipFile(file, "w", ZIP_DEFLATED) as archive:
                for name, query in split_people():
                    with archive.open(name, "w") as member:
                        for block in write_blocks(query):
                            member.write(block)
            file.seek(0)
            yield from iter(lambda: file.read(1 << 16), b"")

    @expose(content_type="application/zip")
    def zip_by_hand(self) -> Iterator[bytes]:
        archive = ZipStream(compress_type=ZIP_DEFLATED)
        for name, query in split_people():
            archive.add(write_blocks(query), name)
        yield from archive

    @expose(content_type="text/csv")
    def csv_list(self) -> bytes:
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        writer.writerows(DBSession.execute(EVERYBODY).all())
        return file.getvalue().encode()

    @expose(content_type="application/x-ndjson")
    def ndjson_list(self) -> bytes:
        rows = DBSession.execute(EVERYBODY).all()
        return "".join([json_encode(row._asdict()) + "\n" for row in rows]).encode()

    @expose(content_type="application/json")
    def json_list(self) -> bytes:
        rows = [row._asdict() for row in DBSession.execute(EVERYBODY).all()]
        return line(json_encode({"people": rows}))  # TG rejects a plain list


def select(query: Any = EVERYBODY) -> Any:
    return DBSession.execute(query, execution_options={"yield_per": BATCH})


def write_blocks(query: Any) -> Iterator[bytes]:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(FIELDS)
    for rows in select(query).partitions():
        writer.writerows(rows)
        yield file.getvalue().encode()
        file.seek(0)
        file.truncate()


def document(row: Any) -> bytes:
    return orjson.dumps(dict(zip(NAMES, row, strict=True)))


def line(text: Any) -> bytes:
    return str(text).encode()


def make_app(url: str) -> App:
    return configure(RootController(), database_options(url))
