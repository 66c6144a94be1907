"""Flask: a generator as the response, like "Streaming Contents" in its manual."""

from __future__ import annotations

import csv
from collections.abc import Iterator

import sqlalchemy as sa
from flask import Flask, Response, json

from ..people import FIELDS, Echo, records


def make_app(url: str) -> Flask:
    app = Flask(__name__)
    engine = sa.create_engine(url)

    @app.get("/csv")
    def export_csv() -> Response:
        def generate() -> Iterator[str]:
            write = csv.writer(Echo()).writerow
            yield str(write(FIELDS))
            for row in records(engine):
                yield str(write(row))

        return Response(generate(), mimetype="text/csv")

    @app.get("/ndjson")
    def export_ndjson() -> Response:
        def generate() -> Iterator[str]:
            for row in records(engine):
                yield json.dumps(row._asdict()) + "\n"

        return Response(generate(), mimetype="application/x-ndjson")

    return app
