"""The application of ``tests.servers``, with tgstream or with TurboGears alone.

The controllers are the same: TurboGears alone also sends the chunks of a generator.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
import tg
import transaction
from tg import TGController, abort, expose, redirect

from tests.application import Plug, database_options, make_wsgi_app
from tests.live_apps.stream_app import Mounted
from tests.model import Model, Note, User

PACE = 0.1
"""Seconds between two chunks of a slow generator."""


def make_app(kind: str, url: str) -> Any:
    """Return the application, with TG's error tracing (the default) and without it.

    :param kind: ``tgstream``, or ``plain`` for TurboGears alone.
    :param url: of its database.
    """
    model = Model(url)
    model.seed("ada", "bob", "eve")
    wirings = {"traced": True, "untraced": False}
    root = make_root(model, kind)
    apps = {name: variant(root, model, kind, on) for name, on in wirings.items()}
    return Mounted(apps, {"traced": model})


def variant(root: Any, model: Model, kind: str, traced: bool) -> Any:
    """Return an application. Both share a model, and so a connection pool."""
    plug: Plug | None = None
    if kind == "tgstream":
        import tgstream

        plug = tgstream.plugme
    options = {"root_controller": root, "trace_errors.enable": traced}
    return make_wsgi_app({**options, **database_options(model)}, plug)


def write(pipe: str, text: str) -> None:
    """Write a text into the client's named pipe."""
    with open(pipe, "w") as file:
        file.write(text)


def undecorated(function: Any) -> Any:
    """Return the controller as it is, for TurboGears alone."""
    return function


def make_root(model: Model, kind: str) -> TGController:
    """Return the controllers of the application."""
    DBSession = model.DBSession
    stream: Any = undecorated
    limited: Any = undecorated
    if kind == "tgstream":
        import tgstream

        stream, limited = tgstream.stream, tgstream.stream(max_seconds=0.5)

    class Root(TGController):
        # The controllers of the streaming page in TG's cookbook.

        @expose(content_type="application/json")
        @stream
        def numbers(self) -> Iterator[str]:
            yield "["
            for number in range(1, 10):
                yield f"{number}, "
            yield "10]"

        @expose(content_type="text/plain")
        @stream
        def lines(self) -> Iterator[str]:
            for number in range(1, 4):
                yield f"{tg.request.path_info}/{number}\n"

        @expose(content_type="application/json")
        @stream
        def users(self) -> Iterator[str]:
            yield "["
            for number in range(9):
                user = DBSession.query(User).filter_by(id=number).first()
                yield f"{user.id}, " if user else "null, "
            yield "null]"

        @expose(content_type="text/plain")
        @stream
        def added(self, of: str) -> Iterator[str]:
            for number in range(9):
                DBSession.add(Note(text=f"{of} {number}"))
                yield "Added\n"
            DBSession.flush()
            transaction.commit()

        # Errors, and the first chunk.

        @expose(content_type="text/plain")
        @stream
        def fails(self) -> Iterator[bytes]:
            DBSession.add(Note(text="never"))
            yield b"one\n"
            yield b"two\n"
            raise LookupError("no third")

        @expose(content_type="text/plain")
        @stream
        def early(self, how: str) -> Iterator[bytes]:
            if how == "404":
                abort(404)
            if how == "302":
                redirect("/numbers")
            if how == "500":
                raise LookupError("no first")
            yield b"never"

        @expose(content_type="text/plain")
        @stream
        def empty(self) -> Iterator[bytes]:
            yield from ()

        @expose(content_type="text/plain")
        @stream
        def wait(self, pipe: str) -> Iterator[bytes]:
            """Wait for a line in a named pipe, and send it."""
            yield b"first"
            with open(pipe) as file:
                yield file.readline().encode()

        # The client disconnects, or the server stops.

        @expose(content_type="text/plain")
        @stream
        def paced(self, pipe: str) -> Iterator[bytes]:
            """Send slow chunks, and report in the pipe how the generator ended."""
            made = 0
            DBSession.query(User).count()
            try:
                for made in range(1, 26):
                    yield b"%d\n" % made
                    time.sleep(PACE)
            except GeneratorExit:
                write(pipe, f"closed at {made}")
                raise
            write(pipe, "made all")

        @expose(content_type="text/plain")
        @limited
        def bounded(self, pipe: str) -> Iterator[bytes]:
            yield from self.paced(pipe)

        # Four concurrent streams.

        @expose(content_type="text/plain")
        @stream
        def mixed(self, of: str) -> Iterator[bytes]:
            """Send in each chunk the request's parameter, a count and the backend."""
            mine = f"mixed {of}"
            for number in range(20):
                DBSession.add(Note(text=f"{mine} {number}"))
                DBSession.flush()
                found = DBSession.execute(
                    sa.select(sa.func.count(), sa.func.pg_backend_pid()).where(
                        Note.text.like("mixed%")
                    )
                ).one()
                yield json.dumps([tg.request.params["of"], *found]).encode() + b"\n"
                time.sleep(0.002)
            transaction.commit()

    return Root()
