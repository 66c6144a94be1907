"""How fast is an export of a whole table over a socket, and what memory does it use?

The client only counts rows, so that the server is the slower side.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from statistics import median
from time import perf_counter
from typing import NamedTuple

from .measure import Result, in_turn, ratio, table
from .servers import MIB, REQUEST, Server, resident

PLAIN, LIST = "plain TG2, a generator", "plain TG2, a list"
HAND = "plain TG2, by hand: blocks, orjson"
ROWS, COPY = "tgstream, rows()", "tgstream, copy()"
STREAMS = {ROWS, COPY}
APPS = {
    PLAIN: "turbogears",
    LIST: "turbogears",
    HAND: "turbogears",
    ROWS: "streams",
    COPY: "streams",
    "Flask": "with_flask",
    "Django": "with_django",
    "Starlette on uvicorn": "with_starlette",
}
PATHS = {LIST: "_list", HAND: "_by_hand", COPY: "_copy"}
FORMATS = {"CSV": "csv", "NDJSON": "ndjson", "JSONArray": "json"}
TIMES = {  # how many times faster than a plain generator that yields rows, at least
    "waitress": {"CSV": 4.5, "NDJSON": 10, "JSONArray": 10},
    "gthread": {"CSV": 2.8, "NDJSON": 5.5, "JSONArray": 5.5},
}
COPY_TIMES = {  # the same for copy(), whose CSV is only compared with rows()
    "waitress": {"NDJSON": 12, "JSONArray": 12},
    "gthread": {"NDJSON": 8, "JSONArray": 8},
}
COPY_OVER_ROWS = {"CSV": 2, "NDJSON": 1.5, "JSONArray": 1.5}
MILLION = 1_000_000


class Reading(NamedTuple):
    """One export, as its client measured it."""

    seconds: float
    first: float  # seconds until the first byte
    grown: float  # MiB of the server's highest memory over its memory before


def read(server: Server, path: str, rows: int) -> Reading:
    """Read an export as fast as possible.

    The growth of a stream counts from its first byte. The growth of a list counts from
    the request, because a list has grown before its first byte.

    :raises RuntimeError: if the response does not have all rows.
    """
    processes = server.processes
    buffer = bytearray(MIB)
    before = resident(processes)
    highest = before
    found = unseen = 0
    first = 0.0
    start = perf_counter()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(0.02)  # to measure the memory during pauses
        connection.sendall(f"GET {path} {REQUEST}".encode())
        while True:
            try:
                count = connection.recv_into(buffer)
            except TimeoutError:
                highest = max(highest, resident(processes))
                continue
            if not count:
                break
            if not first:
                first = perf_counter() - start
                if not path.endswith("_list"):
                    before = resident(processes)
                    highest = before
            found += buffer.count(b"@", 0, count)
            unseen += count
            if unseen > 4 * MIB:
                unseen, highest = 0, max(highest, resident(processes))
    seconds = perf_counter() - start
    if found != rows:
        raise RuntimeError(f"{path} sent {found} of {rows} rows")
    return Reading(seconds, first, max(highest, resident(processes)) - before)


class Group(NamedTuple):
    """The exports that are compared: the same rows, database, server and format."""

    database: str
    url: str
    server: str
    format: str

    def ways(self) -> Iterator[str]:
        """Yield the ways to export. The first is the one to compare with."""
        yield from (PLAIN, LIST, HAND, ROWS)
        if self.database == "PostgreSQL":
            yield COPY
        if self.database == "SQLite" and self.format != "JSONArray":
            # For other frameworks, one database and one JSON format are enough.
            yield from ("Flask", "Django")
            if self.server == "waitress":
                yield "Starlette on uvicorn"

    def path(self, way: str) -> str:
        return f"/{FORMATS[self.format]}" + PATHS.get(way, "")

    def measure(self, rounds: int, rows: int) -> dict[str, list[Reading]]:
        """Export in every way in turn, each way from its own server."""
        with ExitStack() as stack:
            readings = in_turn(
                rounds,
                {
                    way: self.reader(stack, way, self.server, rows)
                    for way in self.ways()
                },
            )
        if self.server == "waitress":
            for way in STREAMS & readings.keys():
                with ExitStack() as stack:
                    grown = self.reader(stack, way, "unbuffered", rows)().grown
                readings[way] = [
                    reading._replace(grown=grown) for reading in readings[way]
                ]
        return readings

    def reader(
        self, stack: ExitStack, way: str, server: str, rows: int
    ) -> Callable[[], Reading]:
        """Start a server, and return a function that reads an export from it.

        The server stops when ``stack`` closes.
        """
        name = "uvicorn" if way.startswith("Starlette") else server
        started = Server(name, APPS[way], self.url)
        stack.callback(started.stop)
        started.read("/nothing", 1)  # the first request imports modules
        return partial(read, started, self.path(way), rows)

    def results(self, readings: dict[str, list[Reading]], rows: int) -> list[Result]:
        """Return the lines of the table, with their limits."""
        what = f"{self.format}, {self.database}, {self.server}: "
        speed = {
            way: [rows / reading.seconds for reading in seen]
            for way, seen in readings.items()
        }
        limits = {
            ROWS: TIMES[self.server][self.format],
            COPY: COPY_TIMES[self.server].get(self.format),
        }
        results = [
            Result(
                what + way,
                thousands(speed[PLAIN]),
                thousands(speed[way]),
                ratio(speed[way], speed[PLAIN]),
                limits.get(way),
                at_least=True,
            )
            for way in readings
        ]
        if COPY in readings:
            times = ratio(speed[COPY], speed[ROWS])
            results.append(
                Result(
                    f"{what}copy(), rows() beside",
                    thousands(speed[ROWS]),
                    thousands(speed[COPY]),
                    times,
                    COPY_OVER_ROWS[self.format],
                    at_least=True,
                )
            )
        for way in sorted(STREAMS & readings.keys(), reverse=True):
            results += compare_with_list(
                f"{what}{way}, a list beside", readings[LIST], readings[way], rows
            )
        return results


def compare_with_list(
    what: str, listed: list[Reading], streamed: list[Reading], rows: int
) -> Iterator[Result]:
    """Yield the lines about memory and the first byte."""
    highest = max(reading.grown for reading in listed)
    grown = max(reading.grown for reading in streamed)
    yield Result(
        f"{what}: growth", f"{highest:.0f} MiB", f"{grown:.1f} MiB", grown, 10, "MiB"
    )
    late = [reading.first for reading in listed]
    first = [reading.first for reading in streamed]
    yield Result(
        f"{what}: first byte",
        f"{median(late) * 1000:.0f} ms",
        f"{median(first) * 1000:.1f} ms",
        ratio(first, late),
        MILLION / rows / 50,  # a list's time grows with its rows
    )


def thousands(speeds: list[float]) -> str:
    return f"{median(speeds) / 1000:.0f} k/s"


def run(urls: dict[str, str], rows: int, quick: bool) -> list[Result]:
    """Measure every database, server and format."""
    results = []
    for database, url in urls.items():
        for server in TIMES:
            for format in FORMATS:
                group = Group(database, url, server, format)
                readings = group.measure(2 if quick else 3, rows)
                measured = group.results(readings, rows)
                print(table(measured), file=sys.stderr)  # progress: all take long
                results += measured
    return results
