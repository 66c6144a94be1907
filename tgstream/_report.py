"""What is told of a stream: its warnings, its errors, and how it ended, told once.

Rule: to tell it never changes how it ended.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias
from weakref import WeakSet

import tg

from ._options import StreamError
from ._plan import clock

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from ._body import Body

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
    body: Body | None = None
    error: BaseException | None = None

    def raise_error(self) -> None:
        """Raise the stream's error again, where it was swallowed on the way out."""
        if self.error is not None:
            raise self.error

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


def tell_left(controller: str, new: int, changed: int, deleted: int) -> None:
    """Warn of what ``commit='manual'`` does not store."""
    log.warning(
        "%s ended with %d new, %d changed and %d deleted objects that are not "
        "committed, and aborts them: with commit='manual' only commit() stores",
        controller,
        new,
        changed,
        deleted,
    )


_warned: WeakSet[Any] = WeakSet()


def tell_shared(session: Session) -> None:
    """Warn, once an engine, that a stream cannot have a connection of its own there."""
    engine = getattr(session.bind, "engine", None)
    if engine is None or engine in _warned:
        return
    if is_shared(engine):
        _warned.add(engine)
        log.warning(
            "%s is one connection for all sessions of a thread: a stream's transaction "
            "cannot be kept apart from the request's. Use a file, in test.ini: "
            "sqlalchemy.url = sqlite:///%%(here)s/test.db",
            engine.url.set(query={}),  # where a password may be, too
        )


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
    thread a KeyboardInterrupt is what it says.
    """
    if isinstance(error, Exception) or (
        isinstance(error, KeyboardInterrupt)
        and threading.current_thread() is threading.main_thread()
    ):
        return error
    kind = type(error).__name__
    raised = StreamError(
        f"{controller} raised {kind}, which is for threads and processes, not for a "
        "response; raise an Exception in a stream, or return to end it"
    )
    raised.__cause__ = error
    return raised


def cursor_open(where: str = "") -> StreamError:
    """Why a transaction cannot end now, or an open cursor cannot be had."""
    return StreamError(
        f"{where}a commit or rollback ends the transaction, and with it the cursor "
        "that rows() or copy() reads from; use rows(..., key=...), whose batches "
        "outlive it, or end reading before"
    )
