"""How fast are Parquet and Arrow, and what memory do they use, compared with pandas?

Each way runs in its own process, which calls the application and reads the body. The
peers read the same rows, and make the file of all rows at once.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import sqlalchemy as sa

from .apps import environ, start_response
from .measure import Result, in_turn, ratio
from .people import EVERYBODY, FIELDS

PANDAS, HAND = "pandas: read_sql, to_parquet", "pyarrow by hand: all rows, write_table"
HAND_STREAM = "pyarrow by hand: all rows, write_batch"
PARQUET, ARROW = "Parquet", "Arrow"


class Reading(NamedTuple):
    """One export. ``grown`` is in MiB, and counts from the memory after a small one."""

    seconds: float  # of the processor, without the database server
    first: float  # seconds on the clock until the first byte
    bytes: int
    grown: float


# In the measured process.


def with_pandas(url: str, statement: Any) -> Iterator[bytes]:
    import pandas as pd

    file = io.BytesIO()
    engine = sa.create_engine(url)
    pd.read_sql(statement, engine).to_parquet(file, index=False)
    engine.dispose()
    yield file.getvalue()


def by_hand(url: str, statement: Any, streamed: bool) -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    engine = sa.create_engine(url)
    with engine.connect() as connection:
        columns = zip(*connection.execute(statement).all(), strict=True)
    engine.dispose()
    table = pa.table(dict(zip(FIELDS, map(pa.array, columns), strict=True)))
    file = io.BytesIO()
    if streamed:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=10_000)
    else:
        pq.write_table(table, file, row_group_size=100_000)
    yield file.getvalue()


def with_tgstream(url: str, statement: Any, format: str) -> Iterator[bytes]:
    from tg import TGController, expose

    import tgstream

    from .apps import configure
    from .people import database_options

    class RootController(TGController):
        @expose()
        @tgstream.stream(getattr(tgstream, format))
        def index(self) -> Any:
            return tgstream.rows(statement)

    app = configure(RootController(), database_options(url), tgstream.plugme)
    body = app(environ("/"), start_response)
    yield from body
    body.close()


WAYS: dict[str, Callable[[str, Any], Iterator[bytes]]] = {
    PANDAS: with_pandas,
    HAND: partial(by_hand, streamed=False),
    HAND_STREAM: partial(by_hand, streamed=True),
    PARQUET: partial(with_tgstream, format="Parquet"),
    ARROW: partial(with_tgstream, format="Arrow"),
}


def peak(reset: bool = False) -> float:
    """The highest memory of this process in MiB. Linux only."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


def main(way: str, url: str) -> None:
    export = WAYS[way]
    for _ in export(url, EVERYBODY.limit(1000)):
        pass  # it imports modules
    before = peak(reset=True)
    first = size = 0.0
    start, started = perf_counter(), process_time()
    for chunk in export(url, EVERYBODY):
        first = first or perf_counter() - start
        size += len(chunk)
    seconds = process_time() - started
    print(json.dumps([seconds, first, size, peak() - before]))


# The comparison.


def read(way: str, url: str) -> Reading:
    """Run one export in its own process."""
    command = [sys.executable, "-m", __spec__.name, way, url]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Reading(*json.loads(output))


def run(urls: dict[str, str], rows: int, quick: bool) -> list[Result]:
    """Measure all ways on both databases."""
    results: list[Result] = []
    for database, url in urls.items():
        readings = in_turn(
            2 if quick else 3, {way: partial(read, way, url) for way in WAYS}
        )
        results += compare(database, readings, rows)
    return results


def compare(
    database: str, readings: dict[str, list[Reading]], rows: int
) -> Iterator[Result]:
    """Yield the lines of one database."""
    speed = {
        way: [rows / reading.seconds for reading in seen]
        for way, seen in readings.items()
    }
    for way, beside, limit in (
        (PARQUET, PANDAS, 1.2),
        (PARQUET, HAND, 1.2),
        (ARROW, HAND_STREAM, 1.2),
    ):
        theirs, ours = readings[beside], readings[way]
        what = f"{way}, {database}, in process; {beside} beside"
        yield Result(
            what,
            f"{median(speed[beside]) / 1000:.0f} k/CPU s",
            f"{median(speed[way]) / 1000:.0f} k/CPU s",
            ratio(speed[way], speed[beside]),
            limit,
            at_least=True,
        )
        late = [reading.first for reading in theirs]
        first = [reading.first for reading in ours]
        yield Result(
            f"{what}: first byte",
            f"{median(late) * 1000:.0f} ms",
            f"{median(first) * 1000:.0f} ms",
            ratio(first, late),
            None,
        )
        grown = max(reading.grown for reading in ours)
        highest = max(reading.grown for reading in theirs)
        yield Result(
            f"{what}: growth",
            f"{highest:.0f} MiB",
            f"{grown:.1f} MiB",
            grown,
            64,
            "MiB",
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
