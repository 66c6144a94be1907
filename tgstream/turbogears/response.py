"""The response that takes a stream along when it leaves the application."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from ..core.body import Body
from ..core.cleanup import close
from ..core.errors import StreamError
from ..core.headers import check_sendable, drop_hop_by_hop, has_no_body, is_clean
from ..core.stream import Stream
from .diagnostics import KEY, advise, advise_if_unguarded, advise_of_dropped
from .guard import Outcome, _Errors, outcome_of

if TYPE_CHECKING:
    from ..database.database import StreamDatabase

_ATTEMPT = "tgstream.attempt"


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
            body.database.remove_request_sessions()  # of more sessions than TG removes


def watch_exit(environ: dict[str, Any], body: Body) -> None:
    """From now on end the stream with the request, unless its response leaves."""
    environ["paste.registry"].register(_Closer(), body)
    environ[_ATTEMPT] = weakref.ref(body)


def end_previous(environ: dict[str, Any]) -> None:
    """End the stream of an earlier attempt of ``tm.attempts``, which holds a slot."""
    attempt = environ.get(_ATTEMPT)
    body = attempt and attempt()
    # It runs if its generator has sent a request with this environ into an application.
    if body is not None and body.idle and not body.left:
        body.close()


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
        try:
            _check_response(response, body)
            if body is None or has_no_body(response.status_int):
                _tell_bodiless(response, environ)
            app_iter = response._plain(environ, start_response)
        except BaseException as error:
            if body is not None:
                body.fail(error)
            _remember(error, environ)
            raise
        if body is None:  # for HEAD
            close(app_iter)
            return [b""]  # some servers answer 500 where there is no chunk
        # The request keeps its response, and must not keep the stream: it must end at
        # once when it is dropped.
        del response.app_iter
        _depart(body, environ)
        return app_iter if body.database is None else _Departed(app_iter, body.database)


def _check_response(response: Any, body: Body | None) -> None:
    """Check that status and headers can be sent, and go with the stream.

    :raises StreamError: when they cannot, or do not.
    """
    where = "the response to HEAD" if body is None else body.plan.controller
    if not is_clean(response):
        if (names := drop_hop_by_hop(response)) and body is not None:
            advise_of_dropped(body, names)
        check_sendable(where, response)
    if body is not None and has_no_body(response.status_int) and body.complete != b"":
        raise StreamError(
            f"{where} yielded items, but a response with status {response.status_int} "
            "has no body. Set another status, or return before the first yield"
        )


def _tell_bodiless(response: Any, environ: dict[str, Any]) -> None:
    """Have the guard send no byte, whatever middlewares make of none."""
    if response.status_int != 205 and has_no_body(response.status_int):
        response.content_length = None  # RFC 9110 forbids it, or it would be wrong
    outcome: Outcome | None = environ.get(KEY)
    if outcome is not None:
        outcome.bodiless = True
        outcome.length = response.content_length


def _remember(error: BaseException, environ: dict[str, Any]) -> None:
    """Have backlash raise the error of ``start_response`` again, like the guard."""
    if KEY not in environ:
        outcome = Outcome()
        outcome.error = error
        environ["wsgi.errors"] = _Errors(environ["wsgi.errors"], outcome)


class _Departed:
    """What TG closes, for its ``DBSessionRemoverMiddleware`` to remove nothing then."""

    def __init__(self, app_iter: Any, database: StreamDatabase) -> None:
        self._app_iter = app_iter
        self._database = database

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._app_iter)

    def close(self) -> None:
        close(self._app_iter)
        self._database.keep_over_next_remove()


@cache
def _leaving(kind: Any) -> Any:
    if hasattr(kind, "_plain"):  # tm.attempts runs again with the same response
        return kind
    members = {"_plain": kind.__call__, "__call__": _Leaving.__call__}
    return type(f"Streamed{kind.__name__}", (kind,), members)


def check_headers(response: Any, stream: Stream, controller: str) -> None:
    """Check the headers that the controller has set, before anything runs.

    :raises StreamError: when no server could send them; the stream is then discarded.
    """
    if is_clean(response):
        return
    try:
        check_sendable(controller, response)
    except StreamError:
        stream._discard()
        raise


def send_off(response: Any, stream: Stream) -> None:
    """Let ``response`` take ``stream`` along when it leaves the application.

    :raises StreamError: when it cannot be sent; the stream has then ended.
    """
    body = stream._body
    try:
        _check_response(response, body)
    except StreamError as error:
        if body is not None:
            body.fail(error, in_request=True)
        raise
    response.__class__ = _leaving(response.__class__)
    response.tgstream = weakref.ref(stream)


def _depart(body: Body, environ: dict[str, Any]) -> None:
    """Take everything of the request off the thread, and tell the guard."""
    body.left = True
    if body.database is not None:
        # While a scopefunc can still ask for the request.
        body.database.remove_request_sessions()
    registry = environ["paste.registry"]
    registry.cleanup()
    registry.prepare()
    if body.complete is None:
        advise_if_unguarded(body)
        advise(body)
        body.outcome = outcome = outcome_of(environ)
        outcome.unfinished, outcome.body = True, body
        if body.ended:  # by the monitor, and did not find its outcome
            outcome.body = None
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
