"""The response to a client that gets no stream now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from webob.exc import HTTPOk, HTTPServiceUnavailable, WSGIHTTPException

RETRY_SECONDS = 5
"""Seconds after which the client may try again."""


_on_refusal: list[Callable[[], None]] = []


def on_refusal(callback: Callable[[], None]) -> None:
    """Call ``callback`` for each refusal from now on, in the request."""
    _on_refusal.append(callback)


def make_refusal(reason: str, as_events: bool) -> WSGIHTTPException:
    """The response that refuses a stream, to be raised before anything runs.

    :param reason: a sentence for the client.
    :param as_events: whether to answer with an event stream without an event. After a
        503 a browser's ``EventSource`` gives up (WHATWG HTML, server-sent events).
    """
    for callback in _on_refusal:
        callback()
    if as_events:
        return HTTPOk(
            body=b"retry: %d\n\n" % (RETRY_SECONDS * 1000),
            headers=[("Cache-Control", "no-store")],
            content_type="text/event-stream",
            charset="utf-8",
        )
    return HTTPServiceUnavailable(
        f"{reason} Please try again in {RETRY_SECONDS} seconds.",
        headers=[("Retry-After", str(RETRY_SECONDS))],
    )


def is_of_events(format: Any) -> bool:
    """Whether a format sends an event stream. False for None."""
    content_type: str = getattr(format, "content_type", "")
    return content_type.partition(";")[0].strip().lower() == "text/event-stream"
