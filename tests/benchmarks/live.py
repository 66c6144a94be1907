"""How much do thousands of open event streams cost, and how late do events arrive?

Each server is one process with nothing else to do. All clients share another process.
"""

from __future__ import annotations

import gc
import resource
from contextlib import ExitStack, closing
from functools import partial
from statistics import median
from typing import NamedTuple

from .collector import DEFAULT, FROZEN, RARE
from .listeners import Listeners
from .measure import Result, in_turn, ratio
from .servers import Server

PLAIN, OURS = "plain TG2, by hand", "tgstream, a Channel"
PEER = "sse-starlette on uvicorn"
APPS = {
    PLAIN: ("gevent", "live_turbogears"),
    OURS: ("gevent", "live_streams"),
    PEER: ("uvicorn", "live_starlette"),
}
NAMES = {"cpu": "CPU of a delivery", "p50": "p50", "p99": "p99"}
COLLECTORS = {FROZEN: "gc.freeze()", RARE: "raised thresholds"}
FILES = 12_000


class Delivery(NamedTuple):
    """The cost of one event per second."""

    p50: float  # milliseconds
    p99: float  # milliseconds
    cpu: float  # the server's microseconds per delivered event


class Reading(NamedTuple):
    """The figures of one server."""

    memory: float  # KiB per open stream
    few: Delivery
    many: Delivery
    collectors: dict[str, Delivery]  # with many streams open


def deliver(server: Server, listeners: Listeners, events: int) -> Delivery:
    """Publish one event per second, and measure its delivery."""
    listeners.receive(2)  # the first events are slower
    before = server.cpu()
    gc.disable()  # the client's own
    try:
        delays = listeners.receive(events)
    finally:
        gc.enable()
    cpu = server.cpu() - before
    p50, p99 = (delays[int(len(delays) * share)] * 1e3 for share in (0.5, 0.99))
    return Delivery(p50, p99, cpu / len(delays) * 1e6)


def measure(way: str, few: int, many: int, events: int) -> Reading:
    """Measure a new server with ``few`` open streams, and then with ``many``."""
    with ExitStack() as stack:
        server = Server(*APPS[way], "-")
        stack.callback(server.stop)
        listeners = stack.enter_context(closing(Listeners(server.port)))
        with closing(Listeners(server.port)) as first:  # loads modules
            first.open(10)
            first.receive(1)
        before = server.memory()
        listeners.open(few)
        with_few = deliver(server, listeners, events)
        listeners.open(many)
        with_many = deliver(server, listeners, events)
        memory = (server.memory() - before) * 1024 / many
        collectors = {}
        for how in COLLECTORS:
            listeners.get(f"/collector?how={how}")
            collectors[how] = deliver(server, listeners, events)
            listeners.get(f"/collector?how={DEFAULT}")
        return Reading(memory, with_few, with_many, collectors)


def run(quick: bool) -> list[Result]:
    """Measure all ways in turn, each with its own server."""
    few, many, events = (200, 500, 5) if quick else (1000, 5000, 10)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, most), most))
    ways = {way: partial(measure, way, few, many, events) for way in APPS}
    readings = in_turn(1 if quick else 2, ways)
    return results(readings, few, many)


def results(readings: dict[str, list[Reading]], few: int, many: int) -> list[Result]:
    """Return the lines of the table, with their limits."""
    lines = []
    for way in (PLAIN, OURS):
        limit = (lambda _: None) if way == PLAIN else float
        seen, peer = readings[way], readings[PEER]
        lines.append(memory(way, many, seen, peer, limit(36)))
        for count, at in ((few, "few"), (many, "many")):
            for figure, unit, most in (
                ("cpu", "us", 0.7),
                ("p50", "ms", 1),
                ("p99", "ms", 1),
            ):
                ours, theirs = (
                    [getattr(getattr(reading, at), figure) for reading in side]
                    for side in (seen, peer)
                )
                has_limit = at == "many" or figure == "p99"
                lines.append(
                    Result(
                        f"{NAMES[figure]}, {count} open: {way}",
                        f"{median(theirs):.3g} {unit}",
                        f"{median(ours):.3g} {unit}",
                        ratio(ours, theirs),
                        limit(most) if has_limit else None,
                    )
                )
    return lines + collected(readings, many)


def memory(
    way: str, many: int, seen: list[Reading], peer: list[Reading], limit: float | None
) -> Result:
    ours, theirs = (median(reading.memory for reading in side) for side in (seen, peer))
    return Result(
        f"memory of a stream, {many} open: {way}",
        f"{theirs:.3g} KiB",
        f"{ours:.3g} KiB",
        ours,
        limit,
        "KiB",
    )


def collected(readings: dict[str, list[Reading]], many: int) -> list[Result]:
    """Return the effect of the collector's settings, compared with the default."""
    lines = []
    for way, seen in readings.items():
        for how, name in COLLECTORS.items():
            before = [reading.many.p99 for reading in seen]
            after = [reading.collectors[how].p99 for reading in seen]
            lines.append(
                Result(
                    f"p99, {many} open, {name}, without beside: {way}",
                    f"{median(before):.3g} ms",
                    f"{median(after):.3g} ms",
                    ratio(after, before),
                    None,
                )
            )
    return lines
