"""Warnings for developers about settings and code that get in the way of a stream.

Each warning contains the remedy, and is logged once for each controller of an
application. The checks run when a stream starts, at its second pull, and on the thread
of the monitor. No other pull is slowed down.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections import Counter
from collections.abc import Callable, MutableMapping
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from tg.support.converters import asbool

from ..core.monitor import register_checks

if TYPE_CHECKING:
    from ..core.body import Body

log = logging.getLogger("tgstream")

OUTCOME_KEY = "tgstream.guard"
"""The key of the error guard's ``Outcome`` in the environ of a request."""

ONLY_WORKER_SECONDS = 10.0
"""Seconds that a stream may occupy the only worker before a warning is logged."""

CHECKED_STREAMS = 100
"""Streams of a controller whose callers are checked for buffering."""

_STATE_KEY = "tgstream.diagnostics"

_SERVERS = {"a2wsgi", "asgiref", "granian", "hypercorn", "uvicorn"}
"""Packages of servers that iterate a body in a function that looks like middleware."""

_PASS_THROUGH = {"tgstream", "tg", "webob", "backlash", "wsgiref", "contextlib"}
"""Packages that pass chunks through, and do not read a body themselves."""


class _State:
    """The warnings and checks of one application so far."""

    def __init__(self) -> None:
        self.warned: set[tuple[str, str]] = set()  # topics and controllers
        self.checked: Counter[str] = Counter()  # streams of a controller
        self.departed: set[str] = set()  # controllers whose streams have departed


def _get_state(body: Body) -> _State:
    config: MutableMapping[str, Any] = body.context.tg_locals.config
    state: _State | None = config.get(_STATE_KEY)
    return config.setdefault(_STATE_KEY, _State()) if state is None else state


def _is_first(body: Body, topic: str, controller: str) -> bool:
    """Whether this is the first call with these arguments in the application."""
    warned = _get_state(body).warned
    if (topic, controller) in warned:
        return False
    warned.add((topic, controller))
    return True


def _warn_once(body: Body, topic: str, text: str, *args: Any) -> None:
    """Log a warning about the controller, if it is the first on its topic."""
    if _is_first(body, topic, body.plan.controller):
        log.warning(text, body.plan.controller, *args)


# Checks when a stream leaves the application.


def check_departing(body: Body) -> None:
    """Check the guard, and the settings once for each controller."""
    if OUTCOME_KEY not in body.context.environ:
        _warn_of_missing_guard(body)
    state, controller = _get_state(body), body.plan.controller
    if controller not in state.departed:
        state.departed.add(controller)
        _warn_of_settings(body)


def _warn_of_missing_guard(body: Body) -> None:
    """Warn, once for each application, that it has no error guard."""
    if _is_first(body, "unguarded", ""):
        log.warning(
            "%s streams without the error guard, the outermost middleware, because the "
            "application was created before tgstream was imported. A failed stream can "
            "look complete on some servers. Add to config/app_cfg.py: import tgstream; "
            "tgstream.plugme(base_config)",
            body.plan.controller,
        )


def _warn_of_settings(body: Body) -> None:
    """Warn of settings that do not suit streams."""
    config = body.context.tg_locals.config
    debug = asbool(config.get("debug"))
    slow = config.get("tg.slowreqs", {})
    if not debug and slow.get("enable"):
        path = body.context.environ.get("PATH_INFO", "")
        if not path.startswith(tuple(slow.get("exclude") or ())):
            _warn_once(
                body,
                "slow",
                "%s streams, and trace_slowreqs is on. backlash reports each stream "
                "longer than %s s as a slow request. Add its path to "
                "trace_slowreqs.exclude: %s",
                slow.get("interval", 25),
                # A line break in a path must not start a new line of the log.
                path if path.isprintable() else ascii(path),
            )
    if debug and config.get("debugbar.engine"):
        _warn_once(
            body,
            "debugbar",
            "%s streams, and tgext.debugbar is on. It keeps every query until the "
            "stream ends, so memory grows. Set debug = false for long streams. Their "
            "pages have no debugbar anyway",
        )


def warn_of_dropped_headers(body: Body, names: list[str]) -> None:
    """Warn that headers were dropped which only the server may set."""
    _warn_once(
        body,
        "hop-by-hop",
        "%s set a header that only the server may set (PEP 3333). It was dropped, "
        "because some servers refuse the whole response: %s. Remove it from the "
        "controller",
        ", ".join(names),
    )


# Checks at the second pull.


def warn_if_buffered(body: Body) -> None:
    """Warn of a middleware that reads the whole body before the server does."""
    checked, controller = _get_state(body).checked, body.plan.controller
    if checked[controller] >= CHECKED_STREAMS:
        return  # the check takes some microseconds of each stream
    checked[controller] += 1
    caller = find_buffering_caller(sys._getframe(1))
    if caller is not None:
        _warn_once(
            body,
            "buffered",
            "%s is not streaming: %s reads the whole body before the server does, so "
            "the client waits and memory grows. Make it pass through responses whose "
            "app_iter is a tgstream.Stream",
            caller,
        )


def find_buffering_caller(frame: FrameType | None) -> str | None:
    """The name of the function that pulls, if a WSGI call has not returned yet.

    A middleware that is a generator function passes this check: the server pulls it.

    :param frame: the frame of a pull.
    :returns: None if the server pulls.
    """
    caller = None
    while frame is not None:
        code = frame.f_code
        module = frame.f_globals.get("__name__", "")
        package = module.partition(".")[0]
        if package in _SERVERS:
            return None
        if caller is None and package not in _PASS_THROUGH:
            caller = get_qualified_name(frame)
        parameters = code.co_varnames[: code.co_argcount]
        is_wsgi_call = "start_response" in parameters or module == "webob.dec"
        if is_wsgi_call and not code.co_flags & inspect.CO_GENERATOR:
            return caller or f"{module}.{code.co_name}"
        frame = frame.f_back
    return None


def get_qualified_name(frame: FrameType) -> str:
    """The name of the function that runs in a frame, with its module."""
    code = frame.f_code
    name: str | None = getattr(code, "co_qualname", None)
    if name is None:  # Python 3.10
        owner = frame.f_locals.get("self")
        name = code.co_name
        if owner is not None:
            name = f"{type(owner).__qualname__}.{name}"
    return f"{frame.f_globals.get('__name__', '')}.{name}"


# Checks of the monitor, while a stream runs.


class Progress(NamedTuple):
    """The progress of a stream at the first check that found it in its transaction."""

    counts: tuple[int, int, int]  # chunks, items and commits
    since: float  # by the clock


def check_running(body: Body, now: float, progress: Progress | None) -> Progress | None:
    """Warn of a stream that is idle in a transaction, or occupies the only worker.

    :param now: by the clock.
    :param progress: the result of the previous check, or None for the first check.
    :returns: the stream's progress, or None if it has no open transaction.
    """
    if now >= body.started + ONLY_WORKER_SECONDS:
        _warn_if_only_worker(body, now)
    seconds, database = body.plan.idle_transaction_seconds, body.transaction
    if not seconds or database is None:
        return None
    if database.idle:
        return None
    counts = (body.chunks, body.encoding.items, database.commits)
    if progress is None or counts != progress.counts:
        return Progress(counts, now)
    if now < progress.since + seconds:
        return progress
    _warn_once(
        body,
        "idle",
        "%s has been idle in a transaction for %g s, waiting for %s. It holds a "
        "database connection and its locks. Commit before waiting (commit='each', or "
        "tgstream.commit()), read with rows(..., key=...), or raise "
        "tgstream.idle_transaction_seconds",
        seconds,
        "the client" if body.idle else "the generator",
    )
    return Progress(counts, now)


def next_check(body: Body, now: float, progress: Progress | None) -> float:
    """When :func:`check_running` can have a new warning, by the clock.

    :param progress: the result of the check at ``now``, or None if there was none.
    """
    due = body.started + ONLY_WORKER_SECONDS
    if due <= now:
        due = float("inf")
    seconds = body.plan.idle_transaction_seconds
    if seconds and body.transaction is not None:
        due = min(due, (now if progress is None else progress.since) + seconds)
    return due


def _warn_if_only_worker(body: Body, now: float) -> None:
    if _is_only_worker(body.context.environ):
        _warn_once(
            body,
            "worker",
            "%s has streamed for %d s on a worker that serves one request at a time. "
            "Every other request waits until it ends. Use a server with threads or "
            "gevent, such as gunicorn --worker-class gthread --threads 8, or waitress",
            now - body.started,
        )


def _is_only_worker(environ: dict[str, Any]) -> bool:
    """Whether no other thread, greenlet or process of the server serves requests."""
    if environ.get("wsgi.multithread") or environ.get("wsgi.multiprocess"):
        return False
    uwsgi: Any = sys.modules.get("uwsgi")  # --async is in no other place
    get_option: Callable[[bytes], Any] = getattr(uwsgi, "opt", {}).get
    return not (get_option(b"async") or get_option(b"gevent"))


def _check_at_look(
    body: Body, now: float, progress: Progress | None
) -> tuple[Progress | None, float]:
    progress = check_running(body, now, progress)
    return progress, next_check(body, now, progress)


register_checks(at_second_pull=warn_if_buffered, at_look=_check_at_look)
