"""Django: "Streaming large CSV files" in its manual."""

from __future__ import annotations

import csv
import json
from typing import Any

import sqlalchemy as sa
from django.conf import settings
from django.core.serializers.json import DjangoJSONEncoder
from django.core.wsgi import get_wsgi_application
from django.http import StreamingHttpResponse
from django.urls import path

from ..apps import App
from ..people import FIELDS, Echo, records

urlpatterns: list[Any] = []


def make_app(url: str) -> App:
    engine = sa.create_engine(url)

    def export_csv(request: Any) -> Any:
        writer = csv.writer(Echo())

        def lines() -> Any:
            yield writer.writerow(FIELDS)
            for row in records(engine):
                yield writer.writerow(row)

        return StreamingHttpResponse(lines(), content_type="text/csv")

    def export_ndjson(request: Any) -> Any:
        return StreamingHttpResponse(
            (
                json.dumps(row._asdict(), cls=DjangoJSONEncoder) + "\n"
                for row in records(engine)
            ),
            content_type="application/x-ndjson",
        )

    urlpatterns[:] = [path("csv", export_csv), path("ndjson", export_ndjson)]
    settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"])
    app: App = get_wsgi_application()
    return app
