"""The response that takes a stream along when it leaves the application.

When the response of a stream leaves TG, the request ends without it: TG's context, the
sessions and the transaction are taken off the thread. WebOb has no hook for that
moment, so :func:`send_off` replaces the class of the response by a subclass whose
``__call__`` does it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from ..core.body import Body
from ..core.cleanup import close
from ..core.compression import compress_response
from ..core.errors import StreamError
from ..core.headers import (
    check_sendable,
    drop_hop_by_hop,
    has_length,
    has_no_body,
    is_usual,
)
from ..core.report import log
from ..core.stream import Stream
from .diagnostics import OUTCOME_KEY, check_departing, warn_of_dropped_headers
from .guard import Outcome, get_outcome, remember_error

if TYPE_CHECKING:
    from ..core.limits import Slot
    from ..core.options import Plan


class _CloseOnCleanup:
    """Ends a stream when its request is cleaned up and another response has left."""

    _is_preserved = False  # the registry looks for it

    def _push_object(self, body: Body) -> None:
        """Nothing: it is registered for the clean-up."""

    def _pop_object(self, body: Body) -> None:
        if body.departed:
            return
        body.close()
        if body.transaction is not None:
            body.transaction.remove_request_sessions()  # TG removes only the first


class _ReleaseOnCleanup:
    """Releases the slot of a request whose stream has not started."""

    _is_preserved = False

    def _push_object(self, slot: Slot) -> None:
        """Nothing: it is registered for the clean-up."""

    def _pop_object(self, slot: Slot) -> None:
        slot.release_unstarted()


def release_with_request(environ: dict[str, Any], slot: Slot) -> None:
    """Release the slot with the request, unless its stream starts.

    A decorator or a hook of the application may fail after the controller has returned
    a stream. The traceback of the error keeps the stream, and with it the slot.
    """
    environ["paste.registry"].register(_ReleaseOnCleanup(), slot)


def end_with_request(environ: dict[str, Any], body: Body) -> None:
    """From now on end the stream with the request, unless its response leaves."""
    environ["paste.registry"].register(_CloseOnCleanup(), body)


def end_previous(response: Any) -> None:
    """End the stream of an earlier attempt of ``tm.attempts``, which holds a slot."""
    if isinstance(response, StreamingResponse) and response.tgbody is not None:
        body = response.tgbody()  # gevent: without its stream until the monitor ends it
        if body is not None:
            body.close()


class StreamingResponse:
    """A response that takes its stream along when it leaves the application."""

    tgstream: weakref.ref[Stream]
    tgbody: weakref.ref[Body] | None
    tgplan: Plan

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        response: Any = self
        stream, app_iter = response.tgstream(), response.app_iter
        if stream is None or isinstance(app_iter, _COMPLETE):
            return response._plain(environ, start_response)  # another body took over
        body = stream._body
        length = stream._length if body is None else body.length
        if app_iter is stream and (length is not None or has_length(response)):
            response.content_length = length  # WebOb forgot it when TG set the stream
        try:
            if response.tgplan.compress is not None:
                compress_response(response, environ, response.tgplan, length, body)
            usual = is_usual(response)
            bodiless = body is None or has_no_body(response.status)
            if bodiless or not usual:
                _check_response(response, body, usual)
            if bodiless:
                _declare_bodiless(response, environ)
            app_iter = response._plain(environ, start_response)
        except BaseException as error:
            if body is not None:
                body.fail(error)
            remember_error(error, environ)
            raise
        if body is None:  # for HEAD
            close(app_iter)
            return [b""]  # some servers answer 500 if there is no chunk
        # The request keeps its response, and must not keep the stream: it must end at
        # once when it is dropped.
        response._app_iter = []
        _depart(body, environ)
        if app_iter is stream:
            return _DepartedBody(app_iter, body)
        return _WrappedBody(app_iter, body)


_COMPLETE = list, tuple
"""The bodies of other responses, which TG or a middleware sets."""


def _check_response(response: Any, body: Body | None, usual: bool) -> None:
    """Check that status and headers can be sent, and go with the stream.

    :param usual: whether the headers need no check.
    :raises StreamError: when they cannot, or do not.
    """
    where = "the response to HEAD" if body is None else body.plan.controller
    if not usual:
        if (names := drop_hop_by_hop(response)) and body is not None:
            warn_of_dropped_headers(body, names)
        check_sendable(where, response)
    if body is not None and has_no_body(response.status) and body.complete != b"":
        raise StreamError(
            f"{where} yielded items, but a response with status {response.status_int} "
            "has no body. Set another status, or return before the first yield"
        )


def _declare_bodiless(response: Any, environ: dict[str, Any]) -> None:
    """Have the guard send no byte, whatever middlewares make of no chunk."""
    if response.status_int != 205 and has_no_body(response.status):
        response.content_length = None  # RFC 9110 forbids it, or it would be wrong
        response.headers.pop("Content-Type", None)
    outcome: Outcome | None = environ.get(OUTCOME_KEY)
    if outcome is not None:
        outcome.bodiless = True
        outcome.length = response.content_length


class _DepartedBody:
    """The stream as the server and its middlewares have it. Only they close it.

    It also keeps ``DBSessionRemoverMiddleware`` from removing a session that is in use.
    That middleware of TG closes the body, and then removes the session of whatever runs
    on the thread.
    """

    __slots__ = "_app_iter", "_body"

    def __init__(self, app_iter: Any, body: Body) -> None:
        self._app_iter = app_iter
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._app_iter)

    def close(self) -> None:
        self._body.server_closes = True
        close(self._app_iter)
        if self._body.transaction is not None:
            self._body.transaction.keep_over_next_remove()


class _WrappedBody(_DepartedBody):
    """The stream in a wrapper of the application, which may close it when dropped."""

    __slots__ = ()

    def __del__(self) -> None:
        self._body.server_closes = True


@cache
def _streaming_class(response_class: Any) -> Any:
    if issubclass(response_class, StreamingResponse):  # of an earlier attempt
        return response_class
    members = {
        "_plain": response_class.__call__,
        "__call__": StreamingResponse.__call__,
    }
    name = f"Streaming{response_class.__name__}"
    return type(name, (response_class, StreamingResponse), members)


def check_headers(response: Any, stream: Stream, controller: str) -> Any:
    """Check the headers that the controller has set, before anything runs.

    :returns: the status and the headers for :func:`send_off`, if they are usual.
    :raises StreamError: when no server could send them. The stream is then discarded.
    """
    if is_usual(response):
        return response.status, response.headerlist[:]
    try:
        check_sendable(controller, response)
    except StreamError:
        stream._discard()
        raise
    return None


def send_off(response: Any, stream: Stream, plan: Plan, checked: Any = None) -> None:
    """Let ``response`` take ``stream`` along when it leaves the application.

    :param plan: the options of the stream.
    :param checked: status and headers that need no other check.
    :raises StreamError: when it cannot be sent.
    """
    usual = (response.status, response.headerlist) == checked or is_usual(response)
    if not usual or has_no_body(response.status):
        _check_response(response, stream._body, usual)
    response.__class__ = _streaming_class(response.__class__)
    response.tgstream, response.tgplan = weakref.ref(stream), plan
    response.tgbody = None if stream._body is None else weakref.ref(stream._body)


def _depart(body: Body, environ: dict[str, Any]) -> None:
    """Take everything of the request off the thread, and report to the guard."""
    body.depart()
    if body.transaction is not None:
        # While a scopefunc can still find the request.
        body.transaction.remove_request_sessions()
    registry = environ["paste.registry"]
    registry.cleanup()
    registry.prepare()
    if body.complete is None:
        check_departing(body)
        outcome = get_outcome(environ)
        outcome.leave_with(body, LateChanges(body))


class LateChanges:
    """Changes of the response and the session after they have left."""

    __slots__ = (
        "_content",
        "_controller",
        "_headers",
        "_response",
        "_session",
        "_status",
    )

    def __init__(self, body: Body) -> None:
        tg_locals = body.context.tg_locals
        self._controller = body.plan.controller
        self._response = response = tg_locals.response
        self._session = tg_locals.session
        self._status: str = response.status
        self._headers: list[tuple[str, str]] = response.headerlist[:]
        self._content = self._session_content()

    def _session_content(self) -> dict[str, Any] | None:
        session = self._session
        if session is None or not (session.accessed() and session.dirty()):
            return None
        return {key: session[key] for key in session}

    def warn(self) -> None:
        """Warn about the changes, which the client cannot see."""
        names = set()
        headers = self._response.headerlist
        if headers != self._headers:
            names = {f"header {name}" for name, _ in {*headers} ^ {*self._headers}}
        if self._response.status != self._status:
            names.add("status")
        if self._session_content() != self._content:
            names.add("tg.session")
        if names:
            log.warning(
                "%s modified these after the response had started: %s. The client will "
                "not see the change. Make it before the first yield",
                self._controller,
                ", ".join(sorted(names)),
            )
