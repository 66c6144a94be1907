"""What does a ZIP of ten CSV files cost a server, and when is its first byte sent?

The speed is in rows for each second of the server's CPU. The peers write the same files
with Python's ``csv`` in blocks, from the same queries on PostgreSQL: into a temporary
file with :mod:`zipfile`, and with zipstream-ng.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import median
from time import perf_counter
from urllib.request import urlopen
from zipfile import ZipFile

from .exports import MILLION, Reading, thousands
from .measure import Result, in_turn, ratio
from .servers import MIB, Server

FILE = "plain TG2, zipfile in a temporary file"
HAND = "plain TG2, zipstream-ng by hand"
STREAM = "tgstream, ZIP of ten Streams"
WAYS = {
    FILE: ("turbogears", "/zip_file"),
    HAND: ("turbogears", "/zip_by_hand"),
    STREAM: ("streams", "/zip"),
}


def read(server: Server, path: str, rows: int) -> Reading:
    """Read an archive as fast as possible. The seconds are those of the CPU.

    :raises RuntimeError: when it does not have ten files with all rows.
    """
    body, measured, first = bytearray(), 0, 0.0
    before = highest = server.memory()
    start, cpu = perf_counter(), server.cpu()
    with urlopen(f"http://127.0.0.1:{server.port}{path}") as response:
        while chunk := response.read1(MIB):
            first = first or perf_counter() - start
            body += chunk
            if len(body) - measured > MIB:
                measured, highest = len(body), max(highest, server.memory())
    seconds = server.cpu() - cpu
    highest = max(highest, server.memory())
    with ZipFile(io.BytesIO(body)) as archive:
        names = archive.namelist()
        found = sum(archive.read(name).count(b"@") for name in names)
    if (len(names), found) != (10, rows):
        raise RuntimeError(f"{path} sent {found} of {rows} rows in {len(names)} files")
    return Reading(seconds, first, highest - before)


def run(url: str, rows: int, quick: bool) -> list[Result]:
    """Measure all ways on waitress, each way with its own server.

    :param url: of the PostgreSQL server.
    """
    ways: dict[str, Callable[[], Reading]] = {}
    with ExitStack() as stack:
        for way, (app, path) in WAYS.items():
            server = Server("unbuffered", app, url)
            stack.callback(server.stop)
            server.read("/nothing", 1)  # the first request imports modules
            ways[way] = partial(read, server, path, rows)
        readings = in_turn(2 if quick else 3, ways)
    seconds = {way: [reading.seconds for reading in readings[way]] for way in WAYS}
    first = {way: [reading.first for reading in readings[way]] for way in WAYS}
    grown = {way: max(reading.grown for reading in readings[way]) for way in WAYS}
    what = "ZIP of ten CSV files, PostgreSQL, waitress: "
    results = []
    for peer in (FILE, HAND):
        beside = f"{what}{STREAM}, {peer} beside"
        results += [
            Result(
                beside,
                thousands([rows / each for each in seconds[peer]]),
                thousands([rows / each for each in seconds[STREAM]]),
                ratio(seconds[peer], seconds[STREAM]),
                1,
                at_least=True,
            ),
            Result(
                f"{beside}: first byte",
                f"{median(first[peer]) * 1000:.0f} ms",
                f"{median(first[STREAM]) * 1000:.1f} ms",
                ratio(first[STREAM], first[peer]),
                MILLION / rows / 20 if peer == FILE else None,
            ),
        ]
    growth, beside = grown[STREAM], f"{grown[HAND]:.1f} MiB"
    name = f"{what}growth, {HAND} beside"
    results.append(Result(name, beside, f"{growth:.1f} MiB", growth, 10, "MiB"))
    return results
