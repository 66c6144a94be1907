"""How much does compression save, what does it cost, and when is data readable?

Each way runs in a process of its own, and sends the same chunks: CSV in chunks of 32
KiB, or server-sent events of 130 bytes. No server and no socket is involved. The client
decompresses what it gets.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from statistics import median
from time import process_time
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]

from .apps import NO_DATABASE, configure, environ
from .measure import Result, in_turn, ratio
from .people import FIELDS, person

KIB = 1024
CHUNK = 32 * KIB
STREAMS = 300
"""Open event streams whose memory is measured."""

NONE, DJANGO, STARLETTE = (
    "none",
    "Django's GZipMiddleware",
    "Starlette's GZipMiddleware",
)
WAYS = {
    NONE: "identity",
    "gzip": "gzip",
    "zstd": "zstd",
    "br": "br",
    DJANGO: "gzip",
    STARLETTE: "gzip",
}
LIMITS = {"gzip": 45, "zstd": 75, "br": 450}
"""KiB of an open event stream, more than without compression."""


def make_chunks(rows: int) -> list[bytes]:
    """Return a CSV, in the chunks of an export."""
    lines = [",".join(FIELDS)]
    for number in range(rows):
        lines.append(
            ",".join("" if v is None else str(v) for v in person(number).values())
        )
    data = "\r\n".join(lines).encode()
    return [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]


def make_event(number: int) -> bytes:
    fields = {name: str(value) for name, value in person(number).items()}
    return f"data: {json.dumps(fields)}\n\n".encode()


class Reading(NamedTuple):
    """The figures of one way."""

    size: int  # bytes that were sent for the CSV
    cpu: float  # seconds for the CSV
    first: int  # chunks of the CSV that were made when the first row was readable
    event: int  # events that were made when the first one was readable
    memory: float  # KiB of an open event stream


Open = Callable[[str, str, Iterator[bytes]], Iterator[bytes]]
"""Makes a request with a path and ``Accept-Encoding``, which streams the chunks."""


def make_tgstream() -> Open:
    """Return a function that streams with an application of tgstream."""
    from tg import TGController, expose

    from tgstream import SSE, Stream, plugme

    sources: list[Iterator[bytes]] = []

    class Events(SSE):
        """Events that are encoded already, so that the cost is that of compression."""

        def encode(self, items: Any) -> Iterator[bytes]:
            yield from items

    class RootController(TGController):
        @expose(content_type="text/csv")
        def csv(self) -> Any:
            return Stream(sources.pop(), compress=True)

        @expose()
        def events(self) -> Any:
            return Stream(sources.pop(), Events, compress=True)

    app = configure(RootController(), NO_DATABASE, plugme)
    return call_wsgi(app, sources)


def call_wsgi(app: Any, sources: list[Iterator[bytes]]) -> Open:
    """Return a function that makes requests to a WSGI application.

    :param sources: gets the chunks, which the application takes.
    """

    def call(path: str, accepted: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
        sources.append(chunks)
        variables = environ(path)
        variables["HTTP_ACCEPT_ENCODING"] = accepted
        return iter(app(variables, lambda *args: None))

    return call


urlpatterns: list[Any] = []
"""The routes of Django, which reads them from this module."""


def make_django() -> Open:
    """Return a function that streams with an application of Django."""
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.http import StreamingHttpResponse
    from django.urls import path as route

    sources: list[Iterator[bytes]] = []

    def view(request: Any) -> Any:
        return StreamingHttpResponse(sources.pop(), content_type="text/csv")

    urlpatterns[:] = [route("csv", view), route("events", view)]
    settings.configure(
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["*"],
        MIDDLEWARE=["django.middleware.gzip.GZipMiddleware"],
    )
    return call_wsgi(get_wsgi_application(), sources)


def make_starlette() -> Open:
    """Return a function that streams with an application of Starlette."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    sources: list[Iterator[bytes]] = []

    async def iterate(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def view(request: Any) -> Any:
        return StreamingResponse(iterate(sources.pop()), media_type="text/csv")

    app = Starlette(
        routes=[Route("/csv", view), Route("/events", view)],
        middleware=[Middleware(GZipMiddleware)],
    )
    loop = asyncio.new_event_loop()

    def call(path: str, accepted: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
        sources.append(chunks)
        queue: asyncio.Queue[Any] = asyncio.Queue()

        async def send(message: Any) -> None:
            await queue.put(message)
            await queue.join()  # until the client takes the next message

        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "headers": [(b"accept-encoding", accepted.encode())],
        }
        task = loop.create_task(app(scope, asyncio.Event().wait, send))
        while True:
            message = loop.run_until_complete(queue.get())
            yield message.get("body", b"")
            queue.task_done()
            if message["type"].endswith("body") and not message.get("more_body"):
                loop.run_until_complete(task)
                return

    return call


MAKERS = {DJANGO: make_django, STARLETTE: make_starlette}


class Counted:
    """An iterator that counts the chunks that were taken."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.count = 0
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self.count += 1
            yield chunk


def count_until_readable(
    opener: Open, path: str, coding: str, chunks: Iterator[bytes]
) -> int:
    """Return how many chunks were made when the client could read the first line."""
    decompress: Callable[[bytes], bytes] = bytes
    if coding != "identity":
        from tests.compressed import Decompressor

        decompress = Decompressor(coding).decompress
    counted, text = Counted(chunks), b""
    response = opener(path, coding, iter(counted))
    while b"\n" not in text:
        text += decompress(next(response))
    return counted.count


def measure_memory(opener: Open, coding: str) -> float:
    """Return the KiB of an open event stream that has made twenty events."""

    def start() -> Iterator[bytes]:
        counted = Counted(map(make_event, itertools.count()))
        response = opener("/events", coding, iter(counted))
        while counted.count < 20:
            next(response)
        return response

    warm = [start() for _ in range(10)]
    before = psutil.Process().memory_info().rss
    streams = [start() for _ in range(STREAMS)]
    grown = psutil.Process().memory_info().rss - before
    del warm, streams
    return float(grown / STREAMS / KIB)


def measure(way: str, rows: int) -> Reading:
    """Measure one way in this process."""
    coding, opener = WAYS[way], MAKERS.get(way, make_tgstream)()
    chunks, events = make_chunks(rows), map(make_event, itertools.count())
    first = count_until_readable(opener, "/csv", coding, iter(chunks))
    event = count_until_readable(opener, "/events", coding, events)
    start = process_time()
    size = sum(map(len, opener("/csv", coding, iter(chunks))))
    cpu = process_time() - start
    memory = 0.0 if way == STARLETTE else measure_memory(opener, coding)
    return Reading(size, cpu, first, event, memory)


def measure_in_process(way: str, rows: int) -> Reading:
    """Measure one way in a new process."""
    command = [sys.executable, "-W", "ignore", "-m", __name__, way, str(rows)]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return Reading(*json.loads(run.stdout))


def run(quick: bool) -> list[Result]:
    """Measure all ways in turn."""
    rows = 100_000 if quick else 500_000
    ways = {way: partial(measure_in_process, way, rows) for way in WAYS}
    readings = in_turn(2 if quick else 5, ways)
    size = readings[NONE][0].size
    return [line for way in WAYS for line in results(way, readings, size)]


def results(way: str, readings: dict[str, list[Reading]], size: int) -> list[Result]:
    """Return the lines of one way, beside Django's middleware."""
    ours, peer = readings[way], readings[DJANGO]
    megabytes = size / 1e6

    def speed(side: list[Reading]) -> str:
        return f"{median(reading.cpu for reading in side) / megabytes * 1e3:.3g} ms/MB"

    own = way in LIMITS
    memory = median(reading.memory for reading in ours)
    unpacked = median(reading.memory for reading in readings[NONE])
    lines = [
        Result(
            f"compression, {way}: ratio",
            f"{size / peer[0].size:.2f}",
            f"{size / ours[0].size:.2f}",
            peer[0].size / ours[0].size,
            0.85 if own else None,
            at_least=True,
        ),
        Result(
            f"compression, {way}: CPU",
            speed(peer),
            speed(ours),
            ratio([r.cpu for r in ours], [r.cpu for r in peer]),
            1 if own else None,
        ),
        Result(
            f"compression, {way}: events made when the first is readable",
            str(peer[0].event),
            str(ours[0].event),
            ours[0].event,
            1 if own else None,
            "",
        ),
    ]
    if way != STARLETTE:
        lines.append(
            Result(
                f"compression, {way}: memory of an open event stream",
                f"{median(reading.memory for reading in peer):.0f} KiB",
                f"{memory:.0f} KiB",
                memory - unpacked,
                LIMITS.get(way),
                "KiB more",
            )
        )
    return lines


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
