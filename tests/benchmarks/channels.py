"""How does the cost of an event depend on the channels, and on their back end?

A process of its own publishes. One process of gunicorn with gevent has all listeners,
and all clients share this process.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, NamedTuple

import sqlalchemy as sa

from tests.valkey import Valkey

from .listeners import Listeners
from .live import FILES
from .measure import Result, in_turn, ratio
from .people import databases
from .servers import Server

REDIS = "redis://, rows on PostgreSQL"
MERGED = 5
"""Channels of a merged stream."""

marks = sa.Table(
    "marks",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("text", sa.String(50)),
)
"""The rows beside which events are published."""
IDLE = 2.0
"""Seconds of which the CPU is measured while no event is published."""


def cpu(pid: int) -> float:
    """Return the CPU seconds of a process, with more digits than its CPU times have."""
    paths = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[0]) for path in paths) / 1e9


def cpu_of(server: Server) -> float:
    return sum(cpu(process.pid) for process in server.processes)


def start_publishing(where: str, *arguments: Any) -> subprocess.Popen[str]:
    """Start a process that publishes."""
    command = [sys.executable, "-m", f"{__package__}.publish", where]
    return subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def result_of(process: subprocess.Popen[str]) -> Any:
    """Wait for a process that publishes, and return its result."""
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError("the publisher failed")
    return json.loads(output)


def path(number: int) -> str:
    """Return the path of a stream that listens to a channel."""
    return f"/listen?name=user{number}"


# A channel for each user.


class Event(NamedTuple):
    """The cost of an event that one listener receives."""

    process: float  # milliseconds of CPU
    valkey: float  # milliseconds of CPU
    p50: float  # milliseconds
    p99: float  # milliseconds


def measure_event(channels: int, events: int, rate: float) -> Event:
    """Measure events in random channels, each with one listener."""
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        valkey = stack.enter_context(Valkey(Path(folder)))
        server = stack.enter_context(running(valkey.url))
        listeners = stack.enter_context(closing(Listeners(server.port)))
        listeners.open(channels, path)
        listeners.get("/collect")  # the garbage that the openings left
        pid = valkey.process_id

        def used() -> tuple[float, float]:
            return cpu_of(server), cpu(pid)

        def publish(count: int) -> list[float]:
            process = start_publishing(
                valkey.url, "events", "user", channels, count, rate
            )
            delays = listeners.collect(count)
            result_of(process)
            return delays

        publish(20)
        before = used()
        time.sleep(IDLE)
        after = used()
        idle = [(b - a) / IDLE for a, b in zip(before, after, strict=True)]
        begun, before = time.monotonic(), used()
        delays = publish(events)
        seconds, after = time.monotonic() - begun, used()
    process, stored = (
        (b - a - rest * seconds) * 1e3 / events
        for a, b, rest in zip(before, after, idle, strict=True)
    )
    return Event(process, stored, *percentiles(delays))


def percentiles(delays: list[float]) -> tuple[float, float]:
    """Return p50 and p99 of sorted delays, in milliseconds."""
    p50, p99 = (delays[int(len(delays) * share)] * 1e3 for share in (0.5, 0.99))
    return p50, p99


@contextmanager
def running(where: str) -> Iterator[Server]:
    """Run a server with the application of ``peers/live_channels.py``."""
    server = Server("gevent", "live_channels", where)
    try:
        yield server
    finally:
        server.stop()


def per_user(most: int, quick: bool) -> list[Result]:
    """Compare many channels with one channel."""
    events, rate = (100, 50.0) if quick else (500, 50.0)
    counts = sorted({1, min(1000, most), most})
    ways: dict[str, Callable[[], Event]] = {
        str(count): partial(measure_event, count, events, rate) for count in counts
    }
    readings = in_turn(1 if quick else 2, ways)
    lines = []
    for count in counts[1:]:
        names = {"process": "CPU of the process", "valkey": "CPU of Valkey"}
        for figure, name in {**names, "p50": "p50", "p99": "p99"}.items():
            one, many = (
                [getattr(reading, figure) for reading in readings[str(channels)]]
                for channels in (1, count)
            )
            lines.append(
                Result(
                    f"an event, {count} channels beside 1: {name}",
                    f"{median(one):.3g} ms",
                    f"{median(many):.3g} ms",
                    ratio(many, one),
                    1.3 if figure in names else None,
                )
            )
    return lines


# The back ends.


class Transport(NamedTuple):
    """How fast events of one publisher arrive over a back end."""

    per_second: float
    p50: float  # milliseconds, at a few events per second
    p99: float


def measure_transport(where: str, events: int) -> Transport:
    """Measure the delays of slow events, and then as many events as possible."""
    with running(where) as server, closing(Listeners(server.port)) as listeners:
        listeners.open(1, path)
        process = start_publishing(where, "events", "user", 1, events // 5 + 5, 20)
        delays = listeners.collect(events // 5 + 5)
        result_of(process)
        process = start_publishing(where, "events", "user", 1, events, 0)
        latest = listeners.collect(events)[-1]
        seconds: float = result_of(process)
    return Transport(events / (seconds + latest), *percentiles(delays))


def measure_commits(where: str, commits: int) -> tuple[float, float]:
    """Return the milliseconds of a commit without an event, and with one."""
    without, with_event = result_of(start_publishing(where, "commits", commits))
    return without, with_event


def create_tables(url: str) -> None:
    """Create the table of rows, and those of the channels."""
    from tgstream import channels  # not before the questions that need its absence

    engine = sa.create_engine(url)
    marks.create(engine)
    channels.metadata.create_all(engine)
    engine.dispose()


def back_ends(folder: Path, quick: bool) -> list[Result]:
    """Compare the events of the back ends, and the commits that publish them."""
    rounds, count = (1, 200) if quick else (3, 1000)
    with ExitStack() as stack:
        valkey = stack.enter_context(Valkey(folder / "valkey"))
        urls = stack.enter_context(databases(folder, 1))
        for url in urls.values():
            create_tables(url)
        ways = {REDIS: f"{valkey.url} {urls['PostgreSQL']}"}
        for name, url in urls.items():
            ways[f"database:// on {name}"] = f"database:// {url}"
        events = {way: partial(measure_transport, ways[way], count) for way in ways}
        commits = {way: partial(measure_commits, ways[way], count) for way in ways}
        return [
            *compare_transports(in_turn(rounds, events)),
            *compare_commits(in_turn(rounds, commits)),
        ]


def compare_transports(readings: dict[str, list[Transport]]) -> list[Result]:
    """Return the events a second and the delays, beside those of ``redis://``."""
    units = {"per_second": "events/s", "p50": "ms", "p99": "ms"}
    lines = []
    for way, seen in readings.items():
        for figure, unit in units.items():
            theirs, ours = (
                [getattr(reading, figure) for reading in side]
                for side in (readings[REDIS], seen)
            )
            name = "one publisher" if figure == "per_second" else figure
            shown = f"{median(theirs):.3g} {unit}", f"{median(ours):.3g} {unit}"
            lines.append(Result(f"{name}: {way}", *shown, ratio(ours, theirs), None))
    return lines


def compare_commits(costs: dict[str, list[tuple[float, float]]]) -> list[Result]:
    """Return the milliseconds that an event adds to the commit of a row."""
    lines = []
    for way, seen in costs.items():
        without, with_event = (median(times) for times in zip(*seen, strict=True))
        limit = 1.0 if way == "database:// on PostgreSQL" else None
        shown = f"{without:.3g} ms", f"{with_event:.3g} ms"
        more = with_event - without
        what = f"commit of a row, with an event: {way}"
        lines.append(Result(what, *shown, more, limit, "ms"))
    return lines


# Several channels of one client.


class Client(NamedTuple):
    """The cost of a client that listens to several channels."""

    memory: float  # KiB
    cpu: float  # microseconds of an event


def measure_clients(
    path: Callable[[int], str], streams: int, clients: int, events: int
) -> Client:
    """Measure clients, each of which has this number of streams.

    :param path: returns the path of a stream by its number.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        valkey = stack.enter_context(Valkey(Path(folder)))
        server = stack.enter_context(running(valkey.url))
        with closing(Listeners(server.port)) as first:  # loads modules
            first.open(10, path)
        before = server.memory()
        listeners = stack.enter_context(closing(Listeners(server.port)))
        listeners.open(clients * streams, path)
        used = cpu_of(server)
        process = start_publishing(valkey.url, "events", "user", MERGED, events, 5)
        deliveries = len(listeners.collect(events * clients))
        result_of(process)
        memory = (server.memory() - before) * 1024 / clients
        return Client(memory, (cpu_of(server) - used) * 1e6 / deliveries)


def merged(quick: bool) -> list[Result]:
    """Compare one stream of several channels with a stream for each channel."""
    clients, events = (100, 25) if quick else (500, 100)
    names = ",".join(f"user{number}" for number in range(MERGED))
    paths: dict[str, tuple[Callable[[int], str], int]] = {
        "single": (lambda number: path(number % MERGED), MERGED),
        "merged": (lambda number: f"/merged?names={names}", 1),
    }
    ways = {
        way: partial(measure_clients, *paths[way], clients, events) for way in paths
    }
    readings = in_turn(1 if quick else 3, ways)
    lines = []
    for figure, name, unit in (
        ("memory", "memory of a client", "KiB"),
        ("cpu", "CPU of a delivery", "us"),
    ):
        single, one = (
            [getattr(reading, figure) for reading in readings[way]]
            for way in ("single", "merged")
        )
        shown = f"{median(single):.3g} {unit}", f"{median(one):.3g} {unit}"
        what = f"{name}, a stream of {MERGED} channels beside {MERGED} streams"
        limit = 1.0 if figure == "memory" else None
        lines.append(Result(what, *shown, ratio(one, single), limit))
    return lines


def run(folder: Path, quick: bool, most: int) -> list[Result]:
    """Measure all of it.

    :param most: the maximum number of channels.
    """
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, files), files))
    lines = per_user(most, quick)
    lines += back_ends(Path(mkdtemp(dir=folder)), quick)
    return lines + merged(quick)
