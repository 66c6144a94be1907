"""What do thousands of open event streams cost, and how late do they hear?

Rule: each server is one process with nothing else to do; the clients are one more.
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


class Heard(NamedTuple):
    """What one event a second came to."""

    p50: float  # ms
    p99: float
    cpu: float  # us of the server, an event delivered


class Reading(NamedTuple):
    """What was measured of one server."""

    memory: float  # KiB an open stream
    few: Heard
    many: Heard
    collectors: dict[str, Heard]  # with many streams open


def hear(server: Server, listeners: Listeners, events: int) -> Heard:
    """Publish one event a second, and see what becomes of it."""
    listeners.hear(2)  # what any first event needs
    before = server.cpu()
    gc.disable()  # the client's own
    try:
        delays = listeners.hear(events)
    finally:
        gc.enable()
    cpu = server.cpu() - before
    p50, p99 = (delays[int(len(delays) * share)] * 1e3 for share in (0.5, 0.99))
    return Heard(p50, p99, cpu / len(delays) * 1e6)


def measure(way: str, few: int, many: int, events: int) -> Reading:
    """Open ``few`` streams and then ``many`` of a new server, and listen."""
    with ExitStack() as stack:
        server = Server(*APPS[way], "-")
        stack.callback(server.stop)
        listeners = stack.enter_context(closing(Listeners(server.port)))
        with closing(Listeners(server.port)) as first:  # what any first stream loads
            first.open(10)
            first.hear(1)
        before = server.memory()
        listeners.open(few)
        with_few = hear(server, listeners, events)
        listeners.open(many)
        with_many = hear(server, listeners, events)
        memory = (server.memory() - before) * 1024 / many
        collectors = {}
        for how in COLLECTORS:
            listeners.get(f"/collector?how={how}")
            collectors[how] = hear(server, listeners, events)
            listeners.get(f"/collector?how={DEFAULT}")
        return Reading(memory, with_few, with_many, collectors)


def run(quick: bool) -> list[Result]:
    """All ways in turn, each with a server of its own."""
    few, many, events = (200, 500, 5) if quick else (1000, 5000, 10)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, most), most))
    ways = {way: partial(measure, way, few, many, events) for way in APPS}
    readings = in_turn(1 if quick else 2, ways)
    return results(readings, few, many)


def results(readings: dict[str, list[Reading]], few: int, many: int) -> list[Result]:
    """The lines of the table, held against what is asked for."""
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
                    [getattr(getattr(each, at), figure) for each in side]
                    for side in (seen, peer)
                )
                asked = at == "many" or figure == "p99"
                lines.append(
                    Result(
                        f"{NAMES[figure]}, {count} open: {way}",
                        f"{median(theirs):.3g} {unit}",
                        f"{median(ours):.3g} {unit}",
                        ratio(ours, theirs),
                        limit(most) if asked else None,
                    )
                )
    return lines + collected(readings, many)


def memory(
    way: str, many: int, seen: list[Reading], peer: list[Reading], limit: float | None
) -> Result:
    ours, theirs = (median(each.memory for each in side) for side in (seen, peer))
    return Result(
        f"memory of a stream, {many} open: {way}",
        f"{theirs:.3g} KiB",
        f"{ours:.3g} KiB",
        ours,
        limit,
        "KiB",
    )


def collected(readings: dict[str, list[Reading]], many: int) -> list[Result]:
    """What the settings of the collector do, beside the same server without."""
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
