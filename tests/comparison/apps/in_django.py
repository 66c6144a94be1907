"""Django: a ``StreamingHttpResponse``, with ``ATOMIC_REQUESTS``, like in its manual.

Django has no global ``request``, and no exception that redirects.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import django
import sqlalchemy as sa
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.db import connection, transaction
from django.http import Http404, HttpResponse, StreamingHttpResponse
from django.urls import path

from tests.comparison.apps.outside import (
    PACE,
    PACES,
    read_line,
    wait_for,
    wait_for_async,
    write,
)

urlpatterns: list[Any] = []


def handler404(request: Any, exception: Exception) -> Any:
    """Return the error page. Django finds this function by its name."""
    return HttpResponse("our page for 404", status=404)


def handler500(request: Any) -> Any:
    """Return the page for server errors."""
    return HttpResponse("our page for 500", status=500)


def make_app(url: str, asgi: str = "") -> Any:
    """Return the application.

    :param url: of a database with its tables.
    :param asgi: anything, for an ASGI application.
    """
    database = sa.make_url(url)
    settings.configure(
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["*"],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": database.database,
                "USER": database.username,
                "HOST": database.query["host"],
                "ATOMIC_REQUESTS": True,
            }
        },
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    )
    django.setup()
    urlpatterns[:] = make_views()
    return get_asgi_application() if asgi else get_wsgi_application()


def plain(generator: Iterator[str] | AsyncIterator[str]) -> Any:
    """Return the generator as a response of plain text."""
    return StreamingHttpResponse(generator, content_type="text/plain")


def make_views() -> list[Any]:
    """Return the routes. Models can be defined only after Django's setup."""
    from django.db import models

    class User(models.Model):
        name = models.TextField()

        class Meta:
            app_label, db_table, managed = "comparison", "users", False

    class Note(models.Model):
        text = models.TextField()
        user = models.ForeignKey(User, models.CASCADE, null=True, related_name="notes")

        class Meta:
            app_label, db_table, managed = "comparison", "notes", False

    def text(request: Any) -> Any:
        def generate() -> Iterator[str]:
            yield "grüß "
            yield "dich"

        return plain(generate())

    def request_helped(request: Any) -> Any:
        return plain(request.GET["of"] + "\n" for _ in range(3))

    def loaded(request: Any) -> Any:
        user: Any = User.objects.get(name="ada")

        def generate() -> Iterator[str]:
            for note in user.notes.all():
                yield note.text + "\n"

        return plain(generate())

    def add(request: Any) -> Iterator[str]:
        for number in range(3):
            Note.objects.create(text=f"added {number}")
            yield "added\n"
            if number == 0:
                read_line(request.GET["pipe"])
        if request.GET.get("fails"):
            raise LookupError("no end")

    def adds(request: Any) -> Any:
        return plain(add(request))

    def adds_helped(request: Any) -> Any:
        def generate() -> Iterator[str]:
            with transaction.atomic():
                yield from add(request)

        return plain(generate())

    def early(request: Any) -> Any:
        def generate() -> Iterator[str]:
            how = request.GET["how"]
            if how == "404":
                raise Http404
            if how == "500":
                raise LookupError("no first")
            response.headers["X-Made"] = "here"
            response.set_cookie("made", "here")
            yield "first"

        if request.GET["how"] == "302":
            return HttpResponse(status=501)
        response = StreamingHttpResponse(generate(), content_type="text/html")
        return response

    def fails(request: Any) -> Any:
        def generate() -> Iterator[str]:
            yield "one\n"
            yield "two\n"
            raise LookupError("no third")

        return plain(generate())

    def pace(request: Any) -> Iterator[str]:
        end = "closed"
        try:
            Note.objects.create(text="left")
            for number in range(PACES):
                yield f"{number}\n"
                time.sleep(PACE)
            end = "made all"
        finally:
            write(request.GET["pipe"], end)

    def paced(request: Any) -> Any:
        return plain(pace(request))

    def paced_helped(request: Any) -> Any:
        def generate() -> Iterator[str]:
            with transaction.atomic():
                yield from pace(request)

        return plain(generate())

    def waits(request: Any) -> Any:
        def generate() -> Iterator[str]:
            yield "first\n"
            wait_for(request.GET["gate"])
            yield "second\n"

        return plain(generate())

    def waits_helped(request: Any) -> Any:
        async def generate() -> AsyncIterator[str]:
            yield "first\n"
            await wait_for_async(request.GET["gate"])
            yield "second\n"

        return plain(generate())

    def turn(request: Any) -> Iterator[str]:
        for _ in range(3):
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                (backend,) = cursor.fetchone()
            yield f"{request.GET['of']} {backend}\n"

    def turns(request: Any) -> Any:
        return plain(turn(request))

    views = [text, request_helped, loaded, adds, adds_helped, early, fails]
    views += [paced, paced_helped, waits, waits_helped, turns]
    return [path(view.__name__, view) for view in views]
