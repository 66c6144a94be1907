"""How fast, and how lean, is an export of a whole table over a real socket?

Rule: the client only counts; what it measures is the server's.
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
from .servers import MIB, REQUEST, Server

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
TIMES = {  # as fast as a plain generator that yields a row, at least
    "waitress": {"CSV": 4.5, "NDJSON": 10, "JSONArray": 10},
    "gthread": {"CSV": 2.8, "NDJSON": 5.5, "JSONArray": 5.5},
}
MILLION = 1_000_000


class Reading(NamedTuple):
    """What a client has seen of an export."""

    seconds: float
    first: float  # seconds until the first byte
    grown: float  # MiB, what the server held at most, over what it had held before


def read(server: Server, path: str, rows: int) -> Reading:
    """Read an export as fast as it comes.

    A stream grows from its first byte on; a list, which has grown by then, before it.

    :raises RuntimeError: when it has not as many rows as there are.
    """
    processes = server.processes

    def held() -> float:
        return float(sum(each.memory_info().rss for each in processes) / MIB)

    buffer = bytearray(MIB)
    before = highest = held()
    found = unseen = 0
    first = 0.0
    start = perf_counter()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(0.02)  # to look at the memory while nothing comes
        connection.sendall(f"GET {path} {REQUEST}".encode())
        while True:
            try:
                count = connection.recv_into(buffer)
            except TimeoutError:
                highest = max(highest, held())
                continue
            if not count:
                break
            if not first:
                first = perf_counter() - start
                if not path.endswith("_list"):
                    before = highest = held()
            found += buffer.count(b"@", 0, count)
            unseen += count
            if unseen > 4 * MIB:
                unseen, highest = 0, max(highest, held())
    seconds = perf_counter() - start
    if found != rows:
        raise RuntimeError(f"{path} has {found} rows of {rows}")
    return Reading(seconds, first, max(highest, held()) - before)


class Group(NamedTuple):
    """What is compared with each other: the same rows, database and format."""

    database: str
    url: str
    server: str
    format: str

    def ways(self) -> Iterator[str]:
        """Who exports; the others are compared with the first."""
        yield from (PLAIN, LIST, HAND, ROWS)
        if self.format == "CSV" and self.database == "PostgreSQL":
            yield COPY
        if self.database == "SQLite" and self.format != "JSONArray":
            # Of them one database, and JSON in one form, tells all there is to tell.
            yield from ("Flask", "Django")
            if self.server == "waitress":
                yield "Starlette on uvicorn"

    def path(self, way: str) -> str:
        return f"/{FORMATS[self.format]}" + PATHS.get(way, "")

    def measure(self, rounds: int, rows: int) -> dict[str, list[Reading]]:
        """Export in every way, each from a server of its own, in turn."""
        with ExitStack() as stack:
            readings = in_turn(
                rounds,
                {w: self.reader(stack, w, self.server, rows) for w in self.ways()},
            )
        if self.server == "waitress":
            for way in STREAMS & readings.keys():
                with ExitStack() as stack:
                    grown = self.reader(stack, way, "unbuffered", rows)().grown
                readings[way] = [each._replace(grown=grown) for each in readings[way]]
        return readings

    def reader(
        self, stack: ExitStack, way: str, server: str, rows: int
    ) -> Callable[[], Reading]:
        """Start a server, until ``stack`` is left; what reads an export from it."""
        name = "uvicorn" if way.startswith("Starlette") else server
        started = Server(name, APPS[way], self.url)
        stack.callback(started.stop)
        started.read("/nothing", 1)  # what any first request loads
        return partial(read, started, self.path(way), rows)

    def results(self, readings: dict[str, list[Reading]], rows: int) -> list[Result]:
        """The lines of the table, held against what is asked for."""
        what = f"{self.format}, {self.database}, {self.server}: "
        speed = {
            way: [rows / e.seconds for e in seen] for way, seen in readings.items()
        }
        limits = {ROWS: TIMES[self.server][self.format]}
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
            both = thousands(speed[ROWS]), thousands(speed[COPY])
            results.append(
                Result(f"{what}copy(), rows() beside", *both, times, 2, at_least=True)
            )
        for way in sorted(STREAMS & readings.keys(), reverse=True):
            results += lean(
                f"{what}{way}, a list beside", readings[LIST], readings[way], rows
            )
        return results


def lean(
    what: str, listed: list[Reading], streamed: list[Reading], rows: int
) -> Iterator[Result]:
    """What is asked for of memory and of the first byte."""
    highest, grown = (max(e.grown for e in seen) for seen in (listed, streamed))
    yield Result(
        f"{what}: growth", f"{highest:.0f} MiB", f"{grown:.1f} MiB", grown, 10, "MiB"
    )
    late, first = ([e.first for e in seen] for seen in (listed, streamed))
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
    """Every database, server and format."""
    results = []
    for database, url in urls.items():
        for server in TIMES:
            for format in FORMATS:
                group = Group(database, url, server, format)
                readings = group.measure(2 if quick else 3, rows)
                results += (found := group.results(readings, rows))
                print(table(found), file=sys.stderr)  # all of them take their time
    return results
