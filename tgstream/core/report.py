"""The report of a stream: how it ended, what it sent, and the lines of its log.

To report an end never changes it: an error of a log handler or of a hook is logged.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, NamedTuple, NoReturn, TypeAlias

import tg

from .errors import StreamError

log = logging.getLogger("tgstream")

Reason: TypeAlias = Literal[
    "completed",
    "failed",
    "disconnected",
    "expired",
    "drained",
    "lagged",
    "stopped",
    "replaced",
    "refused",
]

EARLY: tuple[Reason, ...] = (
    "expired",
    "drained",
    "lagged",
    "stopped",
    "replaced",
    "refused",
)
"""The reasons for which tgstream itself ends a stream before its last item."""

STARTED = "tgstream.started"
FINISHED = "tgstream.finished"


class Report(NamedTuple):
    """How a stream ended: the argument of the hook ``tgstream.finished``.

    ``reason`` is ``'completed'``, ``'failed'``, ``'disconnected'`` (closed before its
    end, or dropped), ``'expired'`` (by ``max_seconds``), ``'drained'`` (by
    :func:`drain`), ``'lagged'`` (its client was too slow for ``Channel.listen()``),
    ``'stopped'`` (by an operator or another request), ``'replaced'`` (by a newer stream
    under ``limit_action='replace'``) or ``'refused'`` (the permission was withdrawn).
    ``error`` is the first error of the stream, including errors while it closed.
    ``seconds`` and ``first_chunk_seconds`` are counted from the start of the stream.
    ``first_chunk_seconds`` is None if there was no chunk. ``bytes`` are counted before
    compression. ``commits`` is the number of committed transactions. ``incident`` is
    the id of a failure that ``SSE(failed=...)``, ``NDJSON(end=True)`` or the
    ``encode_failure()`` of another format reports to the client, otherwise None.
    ``detail`` is the text of :meth:`RunningStream.end`, or how else the stream was
    ``'stopped'``, otherwise None.

    A spooled stream has one report. If it was made completely, the report comes at the
    end of the sending: ``chunks`` and ``bytes`` are those that were sent, which are
    fewer for a range, and ``first_chunk_seconds`` is the time in which it was made. If
    it ended before, they are those that were made.
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
    incident: str | None = None
    detail: str | None = None


def is_needed(level: int) -> bool:
    """Whether a log handler or a hook may receive the report of a stream."""
    return log.isEnabledFor(level) or has_hooks(FINISHED)


def has_hooks(name: str) -> bool:
    """Whether a hook is registered under a name."""
    return bool(tg.hooks._hooks.get(name))


def call_hooks(name: str, argument: object, controller: str) -> None:
    """Call each hook of a name, and log its error. TG would log an Exception only."""
    for hook in [*tg.hooks._hooks.get(name, ())]:
        try:
            hook(argument)
        except BaseException:
            log.exception("%s: a hook of %s failed", controller, name)


def log_end(report: Report, level: int) -> None:
    """Log the report, and pass it to the hooks."""
    error = report.error
    log.log(
        level,
        "%s at %s %s: %d items, %d chunks, %d bytes, %d commits in %.3f s",
        report.controller,
        report.path,
        _describe_reason(report),
        report.items,
        report.chunks,
        report.bytes,
        report.commits,
        report.seconds,
        exc_info=None if error is None else (type(error), error, error.__traceback__),
    )
    call_hooks(FINISHED, report, report.controller)


def _describe_reason(report: Report) -> str:
    if report.incident is not None:
        return f"{report.reason} (incident {report.incident})"
    if report.detail is not None:
        return f"{report.reason} ({describe_detail(report.detail)})"
    return report.reason


def describe_detail(text: str) -> str:
    """The text on one line: a line break must not start a new line of the log."""
    return text if text.isprintable() else ascii(text)


def log_encode_error(controller: str, format: object, method: str) -> None:
    """Log the error of a format that cannot encode the last bytes of a body.

    :param method: ``encode_failure`` or ``encode_replaced``.
    """
    log.exception("%s: %s.%s() failed", controller, type(format).__name__, method)


def log_disconnect(controller: str, error: BaseException) -> None:
    """Log the error that a generator raised after its client had disconnected."""
    log.debug(
        "%s: the client has disconnected, and then the generator raised %s",
        controller,
        type(error).__name__,
        exc_info=(type(error), error, error.__traceback__),
    )


def log_interrupt(controller: str, reason: str, error: BaseException) -> None:
    """Log the error that a generator raised after its callbacks were called."""
    log.debug(
        "%s was %s, and then the generator raised %s",
        controller,
        reason,
        type(error).__name__,
        exc_info=(type(error), error, error.__traceback__),
    )


def call_logged(
    controller: str, callback: Callable[[], object]
) -> BaseException | None:
    """Call a callback of ``on_end()``, and log its error.

    :returns: a kill or a timeout of gevent, which is not an error of the callback.
    """
    try:
        callback()
    except BaseException as error:
        if is_of_gevent(error):
            return error
        log.exception("%s: a callback of on_end() failed: %r", controller, callback)
    return None


def warn_uncommitted(controller: str, changes: list[str]) -> None:
    """Warn about changes that ``commit='manual'`` does not commit or send."""
    log.warning(
        "%s ended with uncommitted changes, which are rolled back: %s. With "
        "commit='manual' call commit() to store and send them, or rollback()",
        controller,
        ", ".join(changes),
    )


def leave_child(controller: str, error: BaseException | None) -> NoReturn:
    """Exit a forked process that comes out of its parent's generator.

    Its database connection and its client are the parent's. Any other action would
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


def describe_early_end(
    controller: str,
    reason: Reason | None,
    max_seconds: float | None,
    detail: str | None,
) -> str:
    """The sentence for a stream that was ended before its last chunk."""
    if reason == "expired" and max_seconds is not None:
        how = f"was ended by max_seconds={max_seconds:g}"
    elif reason == "lagged":
        how = "was read too slowly, and was closed"
    elif reason in EARLY:
        how = f"was {reason}"
    else:
        how = "was closed"
    why = "" if detail is None else f": {describe_detail(detail)}"
    return f"{controller} {how} before its end{why}"


def as_error(controller: str, error: BaseException) -> BaseException:
    """An error that does not stop the server's thread.

    ``SystemExit`` and others would end the thread or the process: the client would wait
    forever, or other clients lose their streams. ``KeyboardInterrupt`` in the main
    thread, and a kill or a timeout of gevent, are returned unchanged.
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
    replacement = StreamError(
        f"{controller} raised {type(error).__name__}, which would stop the server's "
        "thread. Raise an Exception subclass, or return to end the stream"
    )
    replacement.__cause__ = error
    return replacement


def is_of_gevent(error: BaseException | None) -> bool:
    """True for a kill or a timeout, which gevent raises in a greenlet that switches."""
    gevent = sys.modules.get("gevent")
    return gevent is not None and isinstance(
        error, gevent.GreenletExit | gevent.Timeout
    )
