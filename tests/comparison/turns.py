"""Pull two streams of an application in turn on one thread, and one on two threads.

    python -m tests.comparison.turns /turns in_flask url=...

It prints a line of JSON: the lines of each stream, or the name of its error. Some
servers pull like this (uWSGI's ``--async``, and adapters that use any free thread), but
not the servers of the comparison.
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


def open_body(app: Any, path: str, of: str) -> Generator[bytes, None, None]:
    """Yield an empty chunk, and then the body of a response of a WSGI application."""
    environ: dict[str, Any] = {"PATH_INFO": path, "QUERY_STRING": f"of={of}"}
    setup_testing_defaults(environ)
    body = app(environ, lambda status, headers, exc_info=None: None)
    try:
        yield b""  # the body is open, but not pulled
        yield from body
    finally:
        if hasattr(body, "close"):
            body.close()


def collect(lines: Lines, call: Callable[[], Any]) -> None:
    """Call a function, and add its lines, or the name of its error."""
    try:
        lines += (call() or b"").decode().split("\n")[:-1]
    except StopIteration:
        pass
    except BaseException as error:
        lines.append(type(error).__name__)


def wsgi(app: Any, path: str) -> dict[str, Lines]:
    """Pull two streams in turn, then one whose second chunk another thread pulls."""
    results: dict[str, Lines] = {of: [] for of in (*NAMES, "eve")}
    bodies = {of: open_body(app, path, of) for of in NAMES}
    for _ in range(4):
        for of, body in bodies.items():
            collect(results[of], partial(next, body))
    for of, body in bodies.items():
        collect(results[of], body.close)
    body, lines = open_body(app, path, "eve"), results["eve"]
    next(body)
    collect(lines, lambda: next(body))
    thread = Thread(target=collect, args=(lines, lambda: next(body)))
    thread.start()
    thread.join()
    collect(lines, lambda: next(body))
    collect(lines, body.close)
    return results


async def asgi(app: Any, path: str) -> dict[str, Lines]:
    """Pull two streams on one event loop, each chunk after the other's."""
    results: dict[str, Lines] = {of: [] for of in NAMES}
    turn = {of: asyncio.Semaphore(0) for of in NAMES}

    async def read(of: str, other: str) -> None:
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
            collect(results[of], lambda: message.get("body"))
            if message.get("body"):
                turn[other].release()
                await asyncio.wait_for(turn[of].acquire(), 10)

        await app(scope, asyncio.Event().wait, send)

    await asyncio.gather(read(*NAMES), read(*reversed(NAMES)))
    return results


def main(path: str, name: str, *options: str) -> None:
    """Print the results."""
    app = make(name, *options)
    is_asgi = name == "in_starlette"
    results = asyncio.run(asgi(app, path)) if is_asgi else wsgi(app, path)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
