"""What is claimed of every server, with tgstream and, for comparison, without.

The controllers are the same: TG sends what a generator yields without tgstream, too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
import tg
import transaction
from tg import FullStackApplicationConfigurator, TGController, abort, expose, redirect

from tests.live_apps.stream_app import Mounted
from tests.model import Model, Note, User

PACE = 0.1
"""Seconds between two chunks of a generator that has something to wait for."""


def make_app(kind: str, url: str) -> Any:
    """The application in two wirings: with TG's error tracing, as is its default, and
    without.

    :param kind: ``tgstream``, or ``plain`` for TG alone.
    :param url: of its database.
    """
    model = Model(url)
    model.seed("ada", "bob", "eve")
    wirings = {"traced": True, "untraced": False}
    root = make_root(model, kind)
    apps = {name: variant(root, model, kind, on) for name, on in wirings.items()}
    return Mounted(apps, {"traced": model})


def variant(root: Any, model: Model, kind: str, traced: bool) -> Any:
    """One application; both have one model, and so one pool."""
    base_config = FullStackApplicationConfigurator()
    base_config.update_blueprint(
        {
            "root_controller": root,
            "renderers": ["json"],
            "default_renderer": "json",
            "errorpage.enabled": False,
            "app_globals": SimpleNamespace,
            "helpers": SimpleNamespace,
            "i18n.enabled": False,
            "trace_errors.enable": traced,
            "use_sqlalchemy": True,
            "sqlalchemy.url": model.url.render_as_string(hide_password=False),
            "model": model,
        }
    )
    if kind == "tgstream":
        import tgstream

        tgstream.plugme(base_config)
    return base_config.make_wsgi_app({}, {})


def write(pipe: str, text: str) -> None:
    """Tell the client out of band."""
    with open(pipe, "w") as file:
        file.write(text)


def alone(function: Any) -> Any:
    """What decorates a controller of TG alone."""
    return function


def make_root(model: Model, kind: str) -> TGController:
    """The controllers of the application."""
    DBSession = model.DBSession
    stream: Any = alone
    limited: Any = alone
    if kind == "tgstream":
        import tgstream

        stream, limited = tgstream.stream, tgstream.stream(max_seconds=0.5)

    class Root(TGController):
        # The page on streaming of TG's cookbook.

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

        # The end, and the beginning.

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
            """Sends the line that the client writes into a named pipe, when it does."""
            yield b"first"
            with open(pipe) as file:
                yield file.readline().encode()

        # The client leaves, or the server.

        @expose(content_type="text/plain")
        @stream
        def paced(self, pipe: str) -> Iterator[bytes]:
            """Tells how many chunks were made when it was closed, or that all were."""
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

        # Four at once.

        @expose(content_type="text/plain")
        @stream
        def mixed(self, of: str) -> Iterator[bytes]:
            """Each chunk tells whose request and whose transaction it is made in."""
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
