"""TurboGears2 with its full stack: the same controllers with tgstream and without.

Error pages and backlash are set up like in a quickstarted application.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
import tg
import transaction
from tg import TGController, abort, expose, redirect

from tests.application import database_options, make_wsgi_app
from tests.comparison.apps.outside import PACE, PACES, read_line, wait_for, write
from tests.model import Model, Note, User


def make_app(kind: str, url: str) -> Any:
    """Return the application.

    :param kind: ``tgstream``, or ``plain`` for TurboGears alone.
    :param url: of a database with its tables.
    """
    model = Model(url, create=False)
    options = {
        "root_controller": make_root(model, kind),
        "errorpage.enabled": True,
        "errorpage.status_codes": [403, 404],
        **database_options(model),
    }
    return make_wsgi_app(options, plug if kind == "tgstream" else None)


def plug(base_config: Any) -> None:
    """Plug tgstream, with frequent heartbeats."""
    import tgstream

    tgstream.plugme(base_config, {"heartbeat_seconds": 0.2})


def undecorated(function: Any) -> Any:
    """Return the controller, or its generator, as it is, for TurboGears alone."""
    return function


def read_notes(user: User) -> Iterator[Note]:
    """Yield the user's notes, which are loaded at the first pull."""
    yield from user.notes


class ErrorController(TGController):
    @expose()
    def document(self) -> str:
        return f"our page for {tg.response.status_int}"


def make_root(model: Model, kind: str) -> TGController:
    """Return the controllers, with ``@stream`` or without."""
    DBSession = model.DBSession
    stream: Any = undecorated
    response: Any = undecorated
    if kind == "tgstream":
        import tgstream

        stream, response = tgstream.stream, tgstream.Stream
        news = tgstream.Channel("news")

    class RootController(TGController):
        error = ErrorController()

        @expose(content_type="text/plain")
        @stream
        def text(self) -> Iterator[str]:
            yield "grüß "
            yield "dich"

        @expose(content_type="text/plain")
        @stream
        def request(self, of: str) -> Iterator[bytes]:
            for _ in range(3):
                yield tg.request.params["of"].encode() + b"\n"

        @expose(content_type="text/plain")
        def loaded(self) -> Any:
            user = DBSession.query(User).filter_by(name="ada").one()
            return response(note.text.encode() + b"\n" for note in read_notes(user))

        @expose(content_type="text/plain")
        @stream
        def adds(self, pipe: str, fails: str = "") -> Iterator[bytes]:
            yield from self._add(pipe)
            if fails:
                raise LookupError("no end")

        if kind == "plain":

            @expose(content_type="text/plain")
            def adds_helped(self, pipe: str, fails: str = "") -> Iterator[bytes]:
                yield from self._add(pipe)
                if fails:
                    raise LookupError("no end")
                transaction.commit()

        def _add(self, pipe: str) -> Iterator[bytes]:
            for number in range(3):
                DBSession.add(Note(text=f"added {number}"))
                DBSession.flush()
                yield b"added\n"
                if number == 0:
                    read_line(pipe)

        @expose()
        @stream
        def early(self, how: str) -> Iterator[bytes]:
            if how == "404":
                abort(404)
            if how == "302":
                redirect("/text")
            if how == "500":
                raise LookupError("no first")
            tg.response.headers["X-Made"] = "here"
            tg.response.set_cookie("made", "here")
            yield b"first"

        @expose(content_type="text/plain")
        @stream
        def fails(self) -> Iterator[bytes]:
            yield b"one\n"
            yield b"two\n"
            raise LookupError("no third")

        @expose(content_type="text/plain")
        @stream
        def paced(self, pipe: str) -> Iterator[bytes]:
            end = "closed"
            try:
                DBSession.add(Note(text="left"))
                DBSession.flush()
                for number in range(PACES):
                    yield b"%d\n" % number
                    time.sleep(PACE)
                end = "made all"
            finally:
                write(pipe, end)

        @expose(content_type="text/plain")
        @stream
        def waits(self, gate: str) -> Iterator[bytes]:
            yield b"first\n"
            wait_for(gate)
            yield b"second\n"

        @expose(content_type="text/plain")
        @stream
        def turns(self, of: str) -> Iterator[bytes]:
            for _ in range(3):
                backend = DBSession.scalar(sa.select(sa.func.pg_backend_pid()))
                yield f"{tg.request.params['of']} {backend}\n".encode()

        if kind == "tgstream":

            @expose()
            @tgstream.stream(tgstream.SSE)
            def listen(self) -> Any:
                return news.listen(after=tgstream.last_event_id())

            @expose(content_type="text/plain")
            def publish(self, text: str, fails: str = "") -> str:
                news.publish(text)
                if fails:
                    raise LookupError("not committed")
                return "published"

    return RootController()
