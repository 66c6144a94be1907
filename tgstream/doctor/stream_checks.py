"""The checks that send streams, and the search for the layer that is at fault.

A check sends streams of its own through an application. It returns the fault as a
phrase that has the faulty layer as its subject, or ``""``. So it can also be applied to
each layer by itself.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

from .client import Exchange
from .finding import describe_error
from .middleware_trace import Layer
from .probe import ITEM_COUNT, Probe

StreamCheck = Callable[..., str]
"""``check(app, path, is_inner=False)``."""

CONTENT_TYPES = ("text/plain", "text/html", "application/json", "text/event-stream")
"""Some middlewares process only some of them."""
ACCEPT_GZIP = {"Accept-Encoding": "gzip"}
IGNORES_UNLESS_DROPPED = (
    "does not pass on close(): a disconnect ends the stream only when the server drops "
    "the body"
)


def buffers(
    app: Any,
    path: str,
    is_inner: bool = False,
    content_type: str = CONTENT_TYPES[0],
    headers: dict[str, str] | None = None,
) -> str:
    """Check that the first chunk arrives before the second is produced."""
    exchange = Exchange(app, path, Probe(content_type), headers, is_inner=is_inner)
    count = exchange.pull_first_item()
    exchange.end()
    if exchange.error is not None or count <= 1:
        return ""
    until = f"all {count}" if count >= ITEM_COUNT else str(count)
    return (
        f"buffers chunks of {content_type}: the client receives nothing until {until} "
        "are produced"
    )


def rejects(
    app: Any, path: str, content_type: str, headers: dict[str, str] | None = None
) -> str:
    """Check that a stream of this type gets through, with a status 2xx.

    :returns: the fault as a whole sentence, or ``""``.
    """
    exchange = Exchange(app, path, Probe(content_type), headers)
    exchange.read()
    if exchange.error is not None:
        return f"a stream of {content_type} raises {describe_error(exchange.error)}"
    if not exchange.status.startswith("2"):
        return f"a stream of {content_type} is answered with {exchange.status}"
    return ""


def sets_length(app: Any, path: str, is_inner: bool = False) -> str:
    """Check that a stream has no Content-Length."""
    for content_type in CONTENT_TYPES:
        exchange = Exchange(app, path, Probe(content_type), is_inner=is_inner)
        length = exchange.headers.get("Content-Length")
        exchange.pull()
        length = length or exchange.headers.get("Content-Length")
        exchange.end()
        if length is not None and exchange.probe.started:
            return f"sets Content-Length: {length} for a stream of {content_type}"
    return ""


def ignores_close(app: Any, path: str, is_inner: bool = False) -> str:
    """Check that a disconnect ends the stream."""
    exchange = Exchange(app, path, Probe(), is_inner=is_inner)
    exchange.pull()
    exchange.close()
    if exchange.probe.closed or exchange.error is not None:
        return ""
    exchange.drop()
    gc.collect()
    if exchange.probe.closed:
        return IGNORES_UNLESS_DROPPED
    return "does not pass on close(): a disconnect does not end the stream"


def changes_thread(app: Any, path: str, is_inner: bool = False) -> str:
    """Check that each chunk is produced on the thread that the server calls."""
    exchange = Exchange(app, path, Probe(), is_inner=is_inner)
    exchange.pull()
    threads = exchange.probe.threads
    count = len(threads)
    if count == ITEM_COUNT:  # another thread would have nothing to pull
        exchange.read()
        return ""
    other = exchange.pull_on_thread()
    exchange.end()
    if exchange.error is not None:
        name = type(exchange.error).__name__
        return f"raises {name} when a second thread iterates the response"
    if {*threads[1:count]} - {threading.get_ident()} or {*threads[count:]} - {other}:
        return "produces chunks on a thread that is not the server's"
    return ""


def hides_failure(app: Any, path: str, is_inner: bool = False) -> str:
    """Check that the response to a stream that fails does not look complete."""
    for allows_restart in False, True:
        exchange = Exchange(
            app,
            path,
            Probe(fails=True),
            allows_restart=allows_restart,
            is_inner=is_inner,
        )
        exchange.read()
        if exchange.probe.started and exchange.status.startswith("2"):
            if exchange.after_restart:
                text = " ".join(exchange.after_restart.decode(errors="replace").split())
                return f"appends {text[:22]!r} to the data of a failed stream"
            if exchange.error is None:
                return "hides the error of a failed stream, so it looks complete"
    return ""


def find_layer(layers: list[Layer], path: str, check: StreamCheck) -> str:
    """The name of the layer with the fault that ``check`` finds.

    Each layer is checked, from the outside in. The innermost that shows the fault has
    it, or a layer directly inside of it that cannot be called by itself.

    :returns: one name, several with ``or`` in between, or ``""``.
    """
    names: list[str] = []
    for layer in layers:
        if layer.is_wrapper:
            continue
        if layer.app is None:
            names.append(layer.name)
        elif check(layer.app, path, is_inner=True):
            names = [layer.name]
        else:
            break
    else:
        wrappers = [layer.name for layer in layers if layer.is_wrapper]
        names = [name for name in wrappers if not name.startswith("tg.")] or names
    return " or ".join(names)
