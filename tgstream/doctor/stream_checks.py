"""What is proved by a stream: each kind of harm, looked for, and who does it.

Rule: a proof sends streams of its own through an application, and returns what is wrong
with them in words, "" for nothing; so the same can be asked of each layer.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from .client import Exchange
from .finding import said
from .middleware_trace import Layer
from .probe import ITEMS, Probe

Proof = Callable[..., str]
"""``proof(app, path, inside=False)``."""

TYPES = ("text/plain", "text/html", "application/json", "text/event-stream")
"""Middlewares choose by them."""
GZIP = {"Accept-Encoding": "gzip"}
DROPPED = "a client that leaves ends it only when the server lets go of the body"


def held_back(
    app: Any,
    path: str,
    inside: bool = False,
    content_type: str = TYPES[0],
    headers: dict[str, str] | None = None,
) -> str:
    """Whether the first chunk has arrived before the second is made."""
    exchange = Exchange(app, path, Probe(content_type), headers, inside=inside)
    made = exchange.pull_first()
    exchange.end()
    if exchange.error is not None or made <= 1:
        return ""
    if made >= ITEMS:
        return f"the client has nothing until all {ITEMS} chunks are made"
    return f"the client has nothing until {made} chunks are made"


def refused(
    app: Any, path: str, content_type: str, headers: dict[str, str] | None = None
) -> str:
    """Whether something does not let a stream of this type pass at all."""
    exchange = Exchange(app, path, Probe(content_type), headers)
    exchange.read()
    if exchange.error is not None:
        return f"a stream of {content_type} raises {said(exchange.error)}"
    if not exchange.status.startswith("2"):
        return f"a stream of {content_type} is answered {exchange.status}"
    return ""


def counted(app: Any, path: str, inside: bool = False) -> str:
    """Whether something knows the length of a stream, which has none."""
    for content_type in TYPES:
        exchange = Exchange(app, path, Probe(content_type), inside=inside)
        length = exchange.headers.get("Content-Length")
        exchange.pull()
        length = length or exchange.headers.get("Content-Length")
        exchange.end()
        if length is not None and exchange.probe.begun:
            return f"{content_type} is sent with Content-Length: {length}"
    return ""


def unclosed(app: Any, path: str, inside: bool = False) -> str:
    """Whether a client that leaves ends the stream."""
    exchange = Exchange(app, path, Probe(), inside=inside)
    exchange.pull()
    exchange.close()
    if exchange.probe.closed or exchange.error is not None:
        return ""
    exchange.drop()
    gc.collect()
    return DROPPED if exchange.probe.closed else "a client that leaves does not end it"


def astray(app: Any, path: str, inside: bool = False) -> str:
    """Whether a chunk is made on another thread than pulls it."""
    exchange = Exchange(app, path, Probe(), inside=inside)
    exchange.pull()
    threads = exchange.probe.threads
    made = len(threads)
    if made == ITEMS:  # nothing is left to be made elsewhere
        exchange.read()
        return ""
    other = exchange.pull_elsewhere()
    exchange.end()
    if exchange.error is not None:
        kind = type(exchange.error).__name__
        return f"a pull on another thread than the first raises {kind}"
    if {*threads[1:made]} - {threading.get_ident()} or {*threads[made:]} - {other}:
        return "chunks are made on another thread than the server's"
    return ""


def whole(app: Any, path: str, inside: bool = False) -> str:
    """Whether a client could take a stream that failed for a whole one."""
    for lenient in False, True:
        exchange = Exchange(
            app, path, Probe(fails=True), lenient=lenient, inside=inside
        )
        exchange.read()
        if exchange.probe.begun and exchange.status.startswith("2"):
            if exchange.error is None and not exchange.after_restart:
                return "it looks whole: the error does not reach the server"
            if exchange.after_restart:
                return f"{_text(exchange.after_restart)!r} is appended to the data"
    return ""


def _text(appended: bytes) -> str:
    return " ".join(appended.decode(errors="replace").split())[:22]


# Who does it.


def culprit(layers: list[Layer], path: str, proof: Proof) -> str:
    """The name of the layer that does what ``proof`` finds.

    The same is asked of each layer, from the outside in: the last that shows it does
    it, or one right inside of it that cannot be asked.
    """
    named: list[str] = []
    for layer in layers:
        if layer.is_wrapper:
            continue
        if layer.app is None:
            named.append(layer.name)
        elif proof(layer.app, path, inside=True):
            named = [layer.name]
        else:
            break
    else:
        wrappers = [layer.name for layer in layers if layer.is_wrapper]
        foreign = [name for name in wrappers if not name.startswith("tg.")]
        named = foreign or named
    return " or ".join(named)


def of_type(content_type: str, headers: dict[str, str] | None = None) -> Proof:
    """The proof that a stream of this type is not held back."""
    return partial(held_back, content_type=content_type, headers=headers)
