"""What a developer is told while developing: what stands in a stream's way.

Rule: each piece of advice is one warning, once for each controller of an application,
and says what to do. To look for it costs a pull nothing.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from tg.support.converters import asbool

if TYPE_CHECKING:
    from ..core.body import Body

log = logging.getLogger("tgstream")
LONG = 10.0
"""Seconds that a stream may hold the only worker before it is told of."""

LOOKS = 100
"""Streams of a controller that are looked at for who reads them."""

KEY = "tgstream.guard"
"""Where the guard leaves its outcome in the environ."""

_SAID = "tgstream.said"
_LOOKS = "tgstream.looks"
_SERVERS = {"a2wsgi", "asgiref", "granian", "hypercorn", "uvicorn"}
"""They iterate in a function that looks like a middleware's."""
_PASSING = {"tgstream", "tg", "webob", "backlash", "wsgiref", "contextlib"}
"""They hand on what another one pulls."""


def _tell(body: Body, topic: str, text: str, *args: Any) -> None:
    """Warn, once for each controller."""
    said = body.context.tg_locals.config.setdefault(_SAID, set())
    if (topic, body.plan.controller) not in said:
        said.add((topic, body.plan.controller))
        log.warning(text, body.plan.controller, *args)


# When a stream leaves the application.


def advise_if_unguarded(body: Body) -> None:
    """Tell, once for each application, that it has no guard."""
    config = body.context.tg_locals.config
    if KEY not in body.context.environ and not config.get(KEY):
        config[KEY] = True
        log.warning(
            "%s streams from an application that was made before tgstream was "
            "imported: it has no guard, and a failed stream may look whole on some "
            "servers. In config/app_cfg.py: import tgstream; "
            "tgstream.plugme(base_config)",
            body.plan.controller,
        )


def advise(body: Body) -> None:
    """Tell of settings that do not go with streams."""
    config = body.context.tg_locals.config
    said = config.setdefault(_SAID, set())
    if ("settings", body.plan.controller) in said:
        return
    said.add(("settings", body.plan.controller))
    debug = asbool(config.get("debug"))
    slow = config.get("tg.slowreqs", {})
    if not debug and slow.get("enable"):
        path = body.context.environ.get("PATH_INFO", "")
        if not path.startswith(tuple(slow.get("exclude") or ())):
            _tell(
                body,
                "slow",
                "%s streams, and trace_slowreqs is on: backlash reports each stream "
                "that is longer than %s s as a slow request. Add its path to "
                "trace_slowreqs.exclude, here %s",
                slow.get("interval", 25),
                # A client's line end must not begin a line of the log.
                path if path.isprintable() else ascii(path),
            )
    if debug and config.get("debugbar.engine"):
        _tell(
            body,
            "debugbar",
            "%s streams, and tgext.debugbar is on: it keeps every query of a stream "
            "until it ends, and memory grows with it. Set debug = false for long "
            "streams; their pages have no debugbar anyway",
        )


def advise_of_dropped(body: Body, names: list[str]) -> None:
    """Warn that headers were dropped which only the server may set."""
    _tell(
        body,
        "hop-by-hop",
        "%s set a header that only the server may set (PEP 3333). It was dropped, "
        "because some servers refuse the whole response: %s. Remove it from the "
        "controller",
        ", ".join(names),
    )


# At the second pull.


def advise_if_buffered(body: Body) -> None:
    """Tell who reads the stream before the server has got its body."""
    looks = body.context.tg_locals.config.setdefault(_LOOKS, Counter())
    looks[body.plan.controller] += 1
    if looks[body.plan.controller] > LOOKS:
        return  # in production, to look would cost each stream some microseconds
    reader = _reader(sys._getframe(1))
    if reader is not None:
        _tell(
            body,
            "buffered",
            "%s is read by %s before the server has it, so that it is no stream: the "
            "client waits for all of it, and all of it is in memory. Let responses "
            "with a tgstream.Stream as app_iter pass there",
            reader,
        )


def _reader(frame: FrameType | None) -> str | None:
    """Who pulls, if a WSGI application or middleware has not yet returned.

    A middleware that is a generator function is pulled by the server itself.
    """
    reader = None
    while frame is not None:
        code = frame.f_code
        module = frame.f_globals.get("__name__", "")
        package = module.partition(".")[0]
        if package in _SERVERS:
            return None
        if reader is None and package not in _PASSING:
            reader = name_of(frame)
        names = code.co_varnames[: code.co_argcount]
        called = "start_response" in names or module == "webob.dec"
        if called and not code.co_flags & inspect.CO_GENERATOR:
            return reader or f"{module}.{code.co_name}"
        frame = frame.f_back
    return None


def name_of(frame: FrameType) -> str:
    """The name of what runs there, with its module."""
    code = frame.f_code
    name: str | None = getattr(code, "co_qualname", None)
    if name is None:  # Python 3.10
        owner = frame.f_locals.get("self")
        name = code.co_name
        if owner is not None:
            name = f"{type(owner).__qualname__}.{name}"
    return f"{frame.f_globals.get('__name__', '')}.{name}"


# While it runs, by the watch.


def look(body: Body, now: float, seen: tuple[int, ...] | None) -> tuple[int, ...]:
    """Tell of a stream that waits with a transaction open, or holds the only worker.

    :param now: by the clock.
    :param seen: how far it was ``idle_seconds`` ago, with a transaction open.
    :returns: how far it is now; () without a transaction.
    """
    if now - body.started >= LONG and _is_only(body.context.environ):
        _tell(
            body,
            "worker",
            "%s has streamed for %d s on a worker that serves one request at a time: "
            "every other request waits for its end. Use a server with threads, or "
            "gevent (gunicorn --worker-class gthread --threads 8, waitress)",
            now - body.started,
        )
    database = body.database
    if not body.plan.idle_seconds or database is None:
        return ()
    if database.idle:
        return ()
    where = (body.chunks, body.encoding.items, database.commits)
    if where == seen:
        _tell(
            body,
            "idle",
            "%s has %s for %g s with a transaction open, which pins a connection and "
            "whatever it has locked. Commit before it waits (commit='each', or "
            "tgstream.commit()), read with rows(..., key=...), or raise "
            "tgstream.idle_seconds",
            "not been asked for more" if body.idle else "yielded nothing",
            body.plan.idle_seconds,
        )
    return where


def _is_only(environ: dict[str, Any]) -> bool:
    """True if no other thread or process serves requests meanwhile."""
    if environ.get("wsgi.multithread") or environ.get("wsgi.multiprocess"):
        return False
    uwsgi: Any = sys.modules.get("uwsgi")  # --async tells of itself nowhere else
    option: Callable[[bytes], Any] = getattr(uwsgi, "opt", {}).get
    return not (option(b"async") or option(b"gevent"))
