"""Draw one export: the server's memory while it runs, and the time to the first byte.

Each export has its own server, so that no export reuses the memory of another. Each
server first exports a few rows, so that lazy imports are not measured.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import sqlalchemy as sa

from .exports import APPS, HAND, LIST, MILLION, PLAIN, ROWS, Group
from .measure import Result, in_turn, ratio
from .people import fill, people, person
from .servers import MIB, REQUEST, Server, resident

WAYS = {  # the colours of Okabe and Ito, which colour-blind readers can distinguish
    LIST: "#d55e00",
    PLAIN: "#0072b2",
    HAND: "#cc79a7",
    ROWS: "#009e73",
}
FEW = 1000
INTERVAL = 0.02
"""Seconds between two measurements of the memory."""


class Trace(NamedTuple):
    """An export as its client sees it. Times are seconds since the request."""

    memory: list[tuple[float, float]]  # times, each with the server's growth in MiB
    first: float
    last: float

    @property
    def highest(self) -> float:
        return max(grown for _, grown in self.memory)


def trace(engine: sa.Engine, way: str, rows: int) -> Trace:
    """Export the large table from a server that has exported the small table before.

    :raises RuntimeError: if the response does not have all rows.
    """
    url = str(engine.url)
    path = Group("SQLite", url, "gthread", "CSV").path(way)
    server = Server("gthread", APPS[way], url)
    try:
        read(server, path, FEW)
        swap(engine)
        return read(server, path, rows)
    finally:
        server.stop()
        swap(engine)


def make_tables(url: str, rows: int) -> sa.Engine:
    """Return a database with a small table ``people`` and a large table ``beside``."""
    fill(url, rows)
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE people RENAME TO beside"))
        people.create(connection)
        connection.execute(sa.insert(people), [person(n) for n in range(FEW)])
    return engine


def swap(engine: sa.Engine) -> None:
    """Exchange the names of the tables ``people`` and ``beside``."""
    with engine.begin() as connection:
        for old, new in ("people", "away"), ("beside", "people"), ("away", "beside"):
            connection.execute(sa.text(f"ALTER TABLE {old} RENAME TO {new}"))


def read(server: Server, path: str, rows: int) -> Trace:
    """Read a response as fast as possible, and measure the server's memory."""
    processes = server.processes
    buffer = bytearray(MIB)
    before, first, found = resident(processes), 0.0, 0
    memory = [(0.0, 0.0)]
    start = perf_counter()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(INTERVAL)
        connection.sendall(f"GET {path} {REQUEST}".encode())
        count = -1
        while count:
            try:
                count = connection.recv_into(buffer)
                first = first or perf_counter() - start
                found += buffer.count(b"@", 0, count)
            except TimeoutError:
                pass
            now = perf_counter() - start
            if now - memory[-1][0] >= INTERVAL or not count:
                memory.append((now, resident(processes) - before))
    if found != rows:
        raise RuntimeError(f"{path} sent {found} of {rows} rows")
    return Trace(memory, first, memory[-1][0])


def run(folder: Path, file: Path, quick: bool) -> list[Result]:
    """Measure three sizes, draw them into ``file``, and return the figures."""
    largest = MILLION // 10 if quick else MILLION
    traces: dict[int, dict[str, list[Trace]]] = {}
    for rows in (largest // 100, largest // 10, largest):
        engine = make_tables(f"sqlite:///{folder}/people-{rows}.db", rows)
        ways: dict[str, Callable[[], Trace]] = {
            way: partial(trace, engine, way, rows) for way in WAYS
        }
        traces[rows] = in_turn(3, ways)
    draw(traces, file)
    return [
        line for rows, measured in traces.items() for line in results(rows, measured)
    ]


def results(rows: int, measured: dict[str, list[Trace]]) -> Iterator[Result]:
    """Yield the drawn figures. Each is compared with the first byte of a list."""
    listed = [trace.first for trace in measured[LIST]]
    for way, traces in measured.items():
        highest = max(trace.highest for trace in traces)
        first = [trace.first for trace in traces]
        last = median(trace.last for trace in traces)
        yield Result(
            f"{rows:,} rows: {name(way)}",
            f"{median(listed) * 1000:.0f} ms",
            f"{highest:.1f} MiB, {median(first) * 1000:.0f} ms, {last:.2f} s",
            ratio(first, listed),
            None,
        )


def name(way: str) -> str:
    """Return the name without its note about JSON, which is not drawn."""
    return way.partition(":")[0]


def middle(traces: list[Trace]) -> Trace:
    """Return the trace whose time is the median."""
    return sorted(traces, key=lambda trace: trace.last)[len(traces) // 2]


# The picture.


def draw(traces: dict[int, dict[str, list[Trace]]], file: Path) -> None:
    """Draw both diagrams on a white background, for pages in dark colours too."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    settings: Any = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "tgstream",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "axes.axisbelow": True,
    }
    with mpl.rc_context(settings):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(9.4, 4), width_ratios=(3, 2), layout="constrained"
        )
        draw_memory(left, max(traces), traces[max(traces)])
        draw_first_bytes(right, traces)
        metadata = {"Date": None, "Creator": None, "Title": "One export, four ways"}
        figure.savefig(file, metadata=metadata)


def draw_memory(axes: Any, rows: int, measured: dict[str, list[Trace]]) -> None:
    """Draw the server's growth, from the request to the last byte."""
    axes.set_title(f"CSV of {rows:,} rows: memory of the server", loc="left")
    axes.set_xlabel(
        "seconds since the request; a dot is the first byte, a bar the last"
    )
    axes.set_ylabel("MiB more than before it")
    for way, colour in WAYS.items():
        drawn = middle(measured[way])
        axes.plot(*zip(*drawn.memory, strict=True), color=colour, linewidth=2)
        at = next(grown for time, grown in drawn.memory if time >= drawn.first)
        end = drawn.last, max(0, drawn.memory[-1][1])
        axes.plot(drawn.first, at, "o", color=colour, markersize=7, clip_on=False)
        axes.plot(*end, "|", color=colour, markersize=16, markeredgewidth=2)
        beside = {"xytext": (5, 2), "textcoords": "offset points", "weight": "bold"}
        axes.annotate(f"{drawn.last:.1f} s", end, color=colour, **beside)
    axes.set_xlim(0, 1.15 * max(middle(ways).last for ways in measured.values()))
    axes.set_ylim(bottom=0)


def draw_first_bytes(axes: Any, traces: dict[int, dict[str, list[Trace]]]) -> None:
    """Draw the time to the first byte by the number of rows."""
    axes.set_title("time to the first byte", loc="left")
    axes.set_xlabel("rows")
    for way, colour in WAYS.items():
        first = [
            median(trace.first for trace in measured[way])
            for measured in traces.values()
        ]
        axes.plot([*traces], first, "o-", color=colour, linewidth=2, label=name(way))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([*traces], [f"{rows:,}" for rows in traces])
    seconds = (0.001, 0.01, 0.1, 1, 10)
    axes.set_yticks(seconds, ["1 ms", "10 ms", "100 ms", "1 s", "10 s"])
    axes.set_ylim(min(seconds), max(seconds))
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper left")
