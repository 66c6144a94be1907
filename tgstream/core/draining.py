"""The shutdown of a process: its streams end, and no other stream starts.

The flag ``monitor.draining`` is never reset, except in a forked process, which has its
own life. A stream looks at it after it has registered with the monitor, and
:func:`drain` sets it before it looks for streams, so that one of the two always finds
the other. The decorator looks at it, too, because nothing has run there.

A client that reconnects must reach another process, so that its connection must close.
PEP 3333 forbids an application to set ``Connection: close``: waitress refuses the
response, and gunicorn drops the header. A refusal therefore has no ``Content-Length``,
after which waitress, wsgiref and uWSGI close the connection. gunicorn sends chunks and
keeps it. There :func:`end_requests` shuts down the half of the socket that is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypedDict

from webob.exc import WSGIHTTPException

from .monitor import (
    PAUSE,
    end_requests,
    end_soon,
    free_servers,
    monitor,
    start_thread,
)
from .options import clock
from .refusals import is_of_events, make_refusal


class Health(TypedDict):
    """The state of this process, as :func:`health` returns it."""

    draining: bool
    open_streams: int


_on_drain: list[Callable[[], None]] = []


def on_drain(callback: Callable[[], None]) -> None:
    """Call ``callback`` while streams are drained, so that a waiting generator ends."""
    _on_drain.append(callback)


def drain(timeout: float = 5.0) -> bool:
    """End every stream of this process, start no other, and wait until all have ended.

    Call it when the server shuts down. A stream that waits for its server ends at once.
    A stream whose generator runs ends at its next item, as with ``max_seconds``:
    uncommitted changes are rolled back, a format whose body may end anywhere (``SSE``)
    ends normally, and any other response is aborted. The report has the reason
    ``drained``. A stream whose generator is still making its first item ends after that
    item. gunicorn's connection to a client that does not read is shut down after a
    second, because it would block the server.

    From then on the process is draining, until it exits. A request for a stream runs no
    generator: the response is an event stream without an event, from which browsers
    reconnect, or 503 with ``Retry-After`` for other formats. gunicorn and waitress
    close the connection after it. Pages are served as usual.

    :param timeout: the maximum seconds to wait.
    :returns: whether all streams have ended.
    """
    deadline = clock() + timeout
    monitor.draining = True
    if bodies := monitor.running():
        with suppress(RuntimeError):  # no thread can be started
            start_thread("tgstream-end", partial(free_servers, bodies))
    while bodies := monitor.running():
        for body in bodies:
            end_soon(body, "drained")
        for wake in _on_drain:
            wake()
        left = deadline - clock()
        if left <= 0:
            return not monitor.running()
        time.sleep(min(left, PAUSE / 5))
    return True


def health() -> Health:
    """The state of this process, for a readiness probe.

    :returns: a dict with ``draining``, True after :func:`drain` was called, and
        ``open_streams``, the number of streams that have started and not ended.
    """
    return {"draining": monitor.draining, "open_streams": len(monitor.running())}


def make_drain_refusal(environ: dict[str, Any], format: Any) -> WSGIHTTPException:
    """The response to a request for a stream in a process that drains.

    :param format: of the stream. Without it, ``Accept`` decides about an event stream.
    """
    as_events = is_of_events(format)
    if format is None:
        as_events = "text/event-stream" in environ.get("HTTP_ACCEPT", "")
    refusal = make_refusal("The server restarts.", as_events)
    if not as_events:
        refusal.content_type = "text/plain"
        refusal.text = f"{refusal.detail}\n"
    refusal.app_iter = [refusal.body]  # without a Content-Length
    if environ.get("CONTENT_LENGTH") in (None, "", "0"):
        end_requests(environ)
    return refusal
