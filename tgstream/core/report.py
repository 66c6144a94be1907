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

import tg

from .errors import StreamError
from .options import clock

if TYPE_CHECKING:
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
        commits=0 if body.database is None else body.database.commits,
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
