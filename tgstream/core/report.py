"""What is told of a stream: its warnings, its errors, and how it ended, told once.

Rule: to tell it never changes how it ended.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypeAlias
from weakref import WeakSet

import tg

from ._plan import clock
from .options import StreamError

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from .body import Body

log = logging.getLogger("tgstream")

Reason: TypeAlias = Literal["completed", "failed", "disconnected", "expired", "drained"]


class Report(NamedTuple):
    """How a stream ended: the argument of the hook ``tgstream.finished``.

    ``reason`` is ``'completed'``, ``'failed'``, ``'disconnected'`` (closed before its
    end, or dropped), ``'expired'`` (by ``max_seconds``) or ``'drained'`` (by
    :func:`drain`); ``error`` is the first that was raised, also while it closed.
    ``seconds`` and ``first_chunk_seconds`` count from the start of the stream; the
    latter is None where no chunk was made. ``commits`` counts committed transactions.
    """

    reason: Reason
    error: BaseException | None
    controller: str
    path: str
    items: int
    chunks: int
    bytes: int
    seconds: float
    first_chunk_seconds: float | None
    commits: int


def tell(body: Body, error: BaseException | None) -> None:
    """Log how ``body`` ended, and tell those who registered for the hook."""
    assert body.reason is not None
    report = Report(
        reason=body.reason,
        error=error,
        controller=body.plan.controller,
        path=body.context.tg_locals.request.path,
        items=body.encoding.items,
        chunks=body.chunks,
        bytes=body.bytes,
        seconds=clock() - body.started,
        first_chunk_seconds=body.first_chunk_seconds,
        commits=0 if body.database is None else body.database.manager.commits,
    )
    log.log(
        _level(body, error),
        "%s at %s %s: %d items, %d chunks, %d bytes, %d commits in %.3f s",
        report.controller,
        report.path,
        report.reason,
        report.items,
        report.chunks,
        report.bytes,
        report.commits,
        report.seconds,
        exc_info=None if error is None else (type(error), error, error.__traceback__),
    )
    try:
        tg.hooks.notify("tgstream.finished", args=(report,), trap_exceptions=True)
    except BaseException:  # TG traps Exception alone
        log.exception("%s: a hook of tgstream.finished failed", report.controller)


def log_disconnect(controller: str, error: BaseException) -> None:
    """Log the error that a generator raised after its client had disconnected."""
    log.debug(
        "%s: the client has disconnected, and then the generator raised %s",
        controller,
        type(error).__name__,
        exc_info=(type(error), error, error.__traceback__),
    )


def leave_child(controller: str, error: BaseException | None) -> NoReturn:
    """Exit a forked process that comes out of its parent's generator.

    Its database connection and its client are the parent's. Whatever else it did would
    roll back the parent's transaction, or write into the parent's response.
    """
    code = error.code if isinstance(error, SystemExit) else 1
    if error is None or not isinstance(error, SystemExit):
        log.error(
            "%s: a process that was forked in the generator has come out of it, and "
            "exits. End it with os._exit() in the generator",
            controller,
            exc_info=error and (type(error), error, error.__traceback__),
        )
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _level(body: Body, error: BaseException | None) -> int:
    if error is not None:
        return logging.ERROR
    broken = body.reason in _BOUNDED and ended_early(body) is not None
    return logging.WARNING if broken else logging.DEBUG


_BOUNDED = {"expired": "was ended by max_seconds={:g}", "drained": "was drained"}
"""Reasons that are nobody's fault, in words."""


class Outcome:
    """What the outside of the application must know of the stream that left it."""

    started = responded = cut = False
    closing = False
    """Whether the server closes the response, also where nobody can tell."""
    answered = False
    """Whether a middleware has begun another response because the stream failed."""
    bodiless = False
    """Whether the response to this request has no body, and no bytes are sent."""
    length: int | None = None
    """The Content-Length of a response without a body, if it was declared."""
    unfinished = False
    """Whether a stream has left with the response, and has not run to its end."""
    body: Body | None = None
    error: BaseException | None = None
    refusal: BaseException | None = None
    """What the server's ``start_response`` raised, and no later call made good."""

    @property
    def lost(self) -> bool:
        """Whether the stream failed and no middleware has answered for it."""
        return self.error is not None and not self.answered

    def raise_error(self) -> None:
        """Raise the error again, where it was swallowed on the way out."""
        if self.lost:
            raise self.error  # type: ignore[misc]
        if self.refusal is not None:
            raise self.refusal

    def close(self) -> None:
        """Close the stream, if it has not ended."""
        if self.body is not None:
            self.body.close()


def tell_late(body: Body) -> None:
    """Warn of what was changed when it had left already."""
    if body.late is not None and (names := body.late()):
        log.warning(
            "%s changed what had left with its first chunk, so that the client cannot "
            "see it: %s; change it before the first yield",
            body.plan.controller,
            ", ".join(names),
        )


def tell_left(controller: str, left: list[str]) -> None:
    """Warn of what ``commit='manual'`` does not store or send."""
    log.warning(
        "%s ended with uncommitted changes, which are rolled back: %s. With "
        "commit='manual' call commit() to store and send them, or rollback()",
        controller,
        ", ".join(left),
    )


_warned: WeakSet[Any] = WeakSet()


def tell_shared(session: Session) -> None:
    """Warn, once an engine, that a stream cannot have a connection of its own there."""
    for bind in binds_of(session):
        if bind.engine not in _warned and is_shared(bind.engine):
            _warned.add(bind.engine)
            log.warning(
                "%s is one connection for all sessions of a thread: a stream's "
                "transaction cannot be kept apart from the request's. Use a file, in "
                "test.ini: sqlalchemy.url = sqlite:///%%(here)s/test.db",
                bind.engine.url.set(query={}),  # where a password may be, too
            )


def tell_not_atomic(application: Any) -> None:
    """Warn, once an application, that one commit may fail after another."""
    if application not in _warned:
        _warned.add(application)
        log.warning(
            "a stream commits changes of several sessions one after the other: if a "
            "database refuses its commit, those before it stay committed. Set "
            "twophase=True for these sessions, or commit() after each of them"
        )


def binds_of(session: Session) -> list[Any]:
    """The engines and connections that ``session`` is bound to, without a statement.

    A session that chooses by statement (``get_bind()``) may have no answer.
    """
    by_class: Any = getattr(session, "binds", None)
    if by_class is None:  # SQLAlchemy 2.0, which has no public name for it
        by_class = getattr(session, "_Session__binds", {})
    bound = dict.fromkeys([session.bind, *by_class.values()])
    binds = [each for each in bound if each is not None]
    if not binds:
        with suppress(Exception):  # UnboundExecutionError, or the application's own
            binds.append(session.get_bind())
    return binds


def binds_of_factory(scoped: Any) -> list[Any]:
    """The binds of a session that the factory of ``scoped`` makes, whatever it is."""
    with suppress(Exception):  # the factory may need a request
        session = scoped.session_factory()
        try:
            return binds_of(session)
        finally:
            session.close()
    return []


def is_shared(engine: Any) -> bool:
    """True where all sessions of a thread have one connection of ``engine``."""
    from sqlalchemy.pool import SingletonThreadPool, StaticPool

    return isinstance(engine.pool, SingletonThreadPool | StaticPool)


def tell_unclosed(error: BaseException) -> None:
    """Tell of a request's session that will not close: its context must go on."""
    log.error("a session could not be closed after its request", exc_info=error)


def cursor_ended(controller: str, cause: BaseException) -> StreamError:
    """What a driver means when it says that a cursor is gone."""
    error = StreamError(
        f"{controller}: a commit ended the transaction, and with it the cursor that "
        "the generator was reading from; read with rows(..., key=...), fetch the rows "
        "first, or choose another commit"
    )
    error.__cause__ = cause
    return error


def ended_early(body: Body) -> StreamError | None:
    """Why what there was is not the whole; None where a body may end anywhere."""
    bounded = _BOUNDED.get(body.closing or "")
    if bounded and getattr(body.plan.format, "endless", False):
        return None
    how = (bounded or "was closed").format(body.plan.max_seconds)
    return StreamError(f"{body.plan.controller} {how} before its end")


def as_error(controller: str, error: BaseException) -> BaseException:
    """What a server takes for an error: some exceptions would end its thread instead.

    The client would then wait for ever, or every other one lose its stream. In the main
    thread a KeyboardInterrupt is what it says. A kill or a timeout of gevent is for the
    greenlet, and reaches whoever started it.
    """
    if (
        isinstance(error, Exception)
        or is_of_gevent(error)
        or (
            isinstance(error, KeyboardInterrupt)
            and threading.current_thread() is threading.main_thread()
        )
    ):
        return error
    kind = type(error).__name__
    raised = StreamError(
        f"{controller} raised {kind}, which is for threads and processes, not for a "
        "response; raise an Exception in a stream, or return to end it"
    )
    raised.__cause__ = error
    return raised


def is_of_gevent(error: BaseException | None) -> bool:
    """True for a kill or a timeout, which gevent raises in a greenlet that switches."""
    gevent: Any = sys.modules.get("gevent")
    return gevent is not None and isinstance(
        error, gevent.GreenletExit | gevent.Timeout
    )


def cursor_open(where: str = "") -> StreamError:
    """Why a transaction cannot end now, or an open cursor cannot be had."""
    return StreamError(
        f"{where}a commit or rollback ends the transaction, and with it the cursor "
        "that rows() or copy() reads from; use rows(..., key=...), whose batches "
        "outlive it, or end reading before"
    )
