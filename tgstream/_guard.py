"""The way out: what makes a broken stream arrive broken, whatever stands around it.

Rule: only what happens between the application's return and the server is told here.
PEP 3333 forbids a second ``start_response`` without ``exc_info``; backlash calls it,
and ends a failed body as if it were whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from ._advice import KEY, advise, advise_if_unguarded
from ._body import Body
from ._cleanup import close
from ._options import StreamError
from ._report import Outcome
from ._stream import Stream

if TYPE_CHECKING:
    from ._database import Database


class Guard:
    """WSGI middleware outside everything of TG: a stream's failure gets through it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        # The outcome does not hold start_response, which on most servers holds environ.
        environ[KEY] = outcome = Outcome()

        def start_once(status: str, headers: Any, exc_info: Any = None) -> Any:
            if exc_info is not None:
                return start_response(status, headers, exc_info)
            if outcome.started and outcome.responded:
                raise AssertionError(
                    "start_response was called again, without exc_info, after the "
                    "stream's first chunk (PEP 3333 forbids it)"
                )
            if status.startswith("2"):  # of a middleware that has read all of it
                outcome.raise_error()
            outcome.responded = True
            return start_response(status, headers)

        # No variable for the body: an error's traceback holds this frame, and a body
        # that is dropped must end at once.
        return _guarded(self.app(environ, start_once), outcome)


def _guarded(body: Any, outcome: Outcome) -> Any:
    if outcome.body is not None or not outcome.responded:
        return _Guarded(body, outcome)  # the debugger begins only with its body
    return body


class _Guarded:
    def __init__(self, body: Any, outcome: Outcome) -> None:
        self._body = body
        self._outcome = outcome
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield from self._body
        self._outcome.raise_error()
        # Closed from inside, it may be a 304: then nobody has pulled for more.
        if self._closed and self._outcome.cut:
            raise StreamError("the stream was closed before its end, and pulled again")

    def close(self) -> None:
        self._closed = self._outcome.closing = True
        try:
            close(self._body)
        except ValueError as error:  # TG's generators refuse while another thread pulls
            if str(error) != "generator already executing":
                raise
        finally:
            self._outcome.close()  # which those do not pass on that never began


class _Alarm:
    """Raises a stream's error where ``RegistryManager`` cleans up, outside backlash."""

    _is_preserved = False

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    def _push_object(self, outcome: Outcome) -> None:
        """Nothing: registered to be told of the end."""

    def _pop_object(self, outcome: Outcome) -> None:
        self._outcome.raise_error()


class _Errors:
    """``wsgi.errors``, which raises a stream's error when backlash swallows it."""

    def __init__(self, errors: Any, outcome: Outcome) -> None:
        self._errors = errors
        self._outcome = outcome

    def __getattr__(self, name: str) -> Any:
        return getattr(self._errors, name)

    def write(self, text: str) -> Any:
        written = self._errors.write(text)
        if "headers were already sent" in text:
            self._outcome.raise_error()
        return written


def outcome_of(environ: dict[str, Any]) -> Outcome:
    """The outcome of this request: the guard's, or a substitute for it."""
    outcome: Outcome | None = environ.get(KEY)
    if outcome is not None:
        return outcome
    environ[KEY] = outcome = Outcome()
    outcome.closing = True
    alarm = _Alarm(outcome)
    environ["paste.registry"].register(alarm, outcome)
    environ["wsgi.errors"] = _Errors(environ["wsgi.errors"], outcome)
    return outcome


class _Closer:
    """Closes a stream when the request is cleaned up and another response has left."""

    _is_preserved = False  # the registry looks; to find it is faster than not to

    def _push_object(self, body: Body) -> None:
        """Nothing: registered to be told of the end."""

    def _pop_object(self, body: Body) -> None:
        if body.left:
            return
        body.close()
        if body.database is not None:
            body.database.clear_thread()  # of more sessions than TG removes


def watch_exit(environ: dict[str, Any], body: Body) -> None:
    """From now on end the stream with the request, unless its response leaves."""
    environ["paste.registry"].register(_Closer(), body)


class _Leaving:
    """A response that takes its stream along when it leaves the application."""

    tgstream: weakref.ref[Stream]

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        response: Any = self
        stream, app_iter = response.tgstream(), response.app_iter
        if stream is None or isinstance(app_iter, list | tuple):
            return response._plain(environ, start_response)  # another body took over
        body = stream._body
        if app_iter is stream:  # WebOb forgot the length when TG set that
            response.content_length = stream._length if body is None else body.length
        if body is None:  # for HEAD; some servers answer 500 where there is no chunk
            close(response._plain(environ, start_response))
            return [b""]
        app_iter = response._plain(environ, start_response)
        # The request keeps its response, and must not keep the stream: it must end at
        # once when it is dropped.
        del response.app_iter
        _depart(body, environ)
        return app_iter if body.database is None else _Departed(app_iter, body.database)


class _Departed:
    """What TG closes, for its ``DBSessionRemoverMiddleware`` to remove nothing then."""

    def __init__(self, app_iter: Any, database: Database) -> None:
        self._app_iter = app_iter
        self._database = database

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._app_iter)

    def close(self) -> None:
        close(self._app_iter)
        self._database.shield()


@cache
def _leaving(kind: Any) -> Any:
    members = {"_plain": kind.__call__, "__call__": _Leaving.__call__}
    return type(f"Streamed{kind.__name__}", (kind,), members)


def send_off(response: Any, stream: Stream) -> None:
    """Let ``response`` take ``stream`` along when it leaves the application."""
    response.__class__ = _leaving(response.__class__)
    response.tgstream = weakref.ref(stream)


def _depart(body: Body, environ: dict[str, Any]) -> None:
    """Take everything of the request off the thread, and tell the guard."""
    body.left = True
    if body.database is not None:
        body.database.clear_thread()  # while a scopefunc can still ask for the request
    registry = environ["paste.registry"]
    registry.cleanup()
    registry.prepare()
    if body.complete is None:
        advise_if_unguarded(body)
        advise(body)
        body.outcome = outcome_of(environ)
        body.outcome.body = body
        body.late = _Late(body).changes


class _Late:
    """What is changed on the response and the session after they have left."""

    def __init__(self, body: Body) -> None:
        self._tg_locals = body.context.tg_locals
        self._before = self._state()

    def _state(self) -> tuple[str, list[tuple[str, str]], dict[str, Any] | None]:
        response, session = self._tg_locals.response, self._tg_locals.session
        saved = session is not None and session.accessed() and session.dirty()
        content = {key: session[key] for key in session} if saved else None
        return response.status, response.headerlist[:], content

    def changes(self) -> list[str]:
        """The names of what has changed."""
        now = self._state()
        if now == self._before:
            return []
        (status, headers, session), (status_now, headers_now, session_now) = (
            self._before,
            now,
        )
        changed = {f"header {name}" for name, _ in set(headers) ^ set(headers_now)}
        if status != status_now:
            changed.add("status")
        if session != session_now:
            changed.add("tg.session")
        return sorted(changed)
