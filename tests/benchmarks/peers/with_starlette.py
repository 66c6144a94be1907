"""Starlette: a ``StreamingResponse`` with a generator, which Starlette runs in threads.

An ``async`` generator needs no threads, but it would block all other requests during
each database call.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator

import sqlalchemy as sa
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from ..people import FIELDS, Echo, records


def make_app(url: str) -> Starlette:
    engine = sa.create_engine(url)

    def export_csv(request: Request) -> StreamingResponse:
        def generate() -> Iterator[str]:
            write = csv.writer(Echo()).writerow
            yield str(write(FIELDS))
            for row in records(engine):
                yield str(write(row))

        return StreamingResponse(generate(), media_type="text/csv")

    def export_ndjson(request: Request) -> StreamingResponse:
        def generate() -> Iterator[str]:
            for row in records(engine):
                yield json.dumps(row._asdict(), default=str) + "\n"

        return StreamingResponse(generate(), media_type="application/x-ndjson")

    return Starlette(
        routes=[Route("/csv", export_csv), Route("/ndjson", export_ndjson)]
    )
