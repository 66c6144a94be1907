"""Pulls two streams of an application in turn on one thread, and one on two threads.

    python -m tests.comparison.turns /turns in_flask url=...

It prints a line of JSON: what each stream gave, or the error it ended in. Some servers
pull so (uWSGI's ``--async``; adapters pull on whichever thread is free), and a server
here would not.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Generator
from functools import partial
from threading import Thread
from typing import Any
from wsgiref.util import setup_testing_defaults

from tests.comparison.serve import make

NAMES = "ada", "bob"
Lines = list[str]


def opened(app: Any, path: str, of: str) -> Generator[bytes, None, None]:
    """The body of a response of a WSGI application; tgstream is not imported here."""
    environ: dict[str, Any] = {"PATH_INFO": path, "QUERY_STRING": f"of={of}"}
    setup_testing_defaults(environ)
    body = app(environ, lambda status, headers, exc_info=None: None)
    try:
        yield b""  # opened, and not pulled
        yield from body
    finally:
        if hasattr(body, "close"):
            body.close()


def safely(lines: Lines, act: Callable[[], Any]) -> None:
    """Keep what an act gives, or the name of its error."""
    try:
        lines += (act() or b"").decode().split("\n")[:-1]
    except StopIteration:
        pass
    except BaseException as error:
        lines.append(type(error).__name__)


def wsgi(app: Any, path: str) -> dict[str, Lines]:
    """Two streams in turn; then one whose second chunk another thread pulls."""
    found: dict[str, Lines] = {of: [] for of in (*NAMES, "eve")}
    bodies = {of: opened(app, path, of) for of in NAMES}
    for _ in range(4):
        for of, body in bodies.items():
            safely(found[of], partial(next, body))
    for of, body in bodies.items():
        safely(found[of], body.close)
    body, lines = opened(app, path, "eve"), found["eve"]
    next(body)
    safely(lines, lambda: next(body))
    thread = Thread(target=safely, args=(lines, lambda: next(body)))
    thread.start()
    thread.join()
    safely(lines, lambda: next(body))
    safely(lines, body.close)
    return found


async def asgi(app: Any, path: str) -> dict[str, Lines]:
    """Two streams on one event loop, each of whose chunks waits for the other's."""
    found: dict[str, Lines] = {of: [] for of in NAMES}
    turn = {of: asyncio.Semaphore(0) for of in NAMES}

    async def one(of: str, other: str) -> None:
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "GET",
            "path": path,
            "query_string": f"of={of}".encode(),
            "headers": [],
        }

        async def send(message: Any) -> None:
            safely(found[of], lambda: message.get("body"))
            if message.get("body"):
                turn[other].release()
                await asyncio.wait_for(turn[of].acquire(), 10)

        await app(scope, asyncio.Event().wait, send)

    await asyncio.gather(one(*NAMES), one(*reversed(NAMES)))
    return found


def main(path: str, name: str, *options: str) -> None:
    """Print what was found."""
    app = make(name, *options)
    found = wsgi(app, path) if name != "in_starlette" else asyncio.run(asgi(app, path))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
