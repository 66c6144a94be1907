"""Publish events in a process of its own, and print what was measured as JSON.

    python -m tests.benchmarks.publish WHERE events NAME CHANNELS EVENTS RATE
    python -m tests.benchmarks.publish WHERE commits COMMITS

``WHERE`` is that of ``peers/live_channels.py``. If it has a database, each event is
published in a transaction that also writes a row.
"""

from __future__ import annotations

import json
import sys
import time
from random import Random
from statistics import median
from typing import Any

import sqlalchemy as sa
import transaction
from zope.sqlalchemy import mark_changed

from tgstream import Channel

from .channels import marks
from .peers.live_channels import make_app
from .people import DBSession


def write_row() -> None:
    """Write a row, in a transaction that the caller commits."""
    DBSession.execute(sa.insert(marks).values(text="a text of some words"))
    mark_changed(DBSession())


def publish(name: str, has_database: bool) -> None:
    """Publish the time. It must not be later than the start of the transaction."""
    now = str(time.monotonic())
    if not has_database:
        Channel(name).publish(now)
        return
    with transaction.manager:
        write_row()
        Channel(name).publish(now)


def events(where: str, name: str, channels: str, count: str, rate: str) -> float:
    """Publish events in random channels of a number of channels.

    :param rate: how many events a second. 0 means as many as possible.
    :returns: the seconds that it took.
    """
    random, begun = Random(1), time.monotonic()
    for number in range(int(count)):
        if float(rate):
            time.sleep(max(0, begun + number / float(rate) - time.monotonic()))
        publish(f"{name}{random.randrange(int(channels))}", " " in where)
    return time.monotonic() - begun


def commits(where: str, count: str) -> tuple[float, float]:
    """Commit a row in turn without and with an event.

    :returns: the median milliseconds of both.
    """
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * int(count)):
        publishes = bool(number % 2)
        begun = time.perf_counter()
        with transaction.manager:
            write_row()
            if publishes:
                Channel("commits").publish("done")
        times[publishes].append((time.perf_counter() - begun) * 1e3)
    return median(times[False]), median(times[True])


def main(where: str, what: str, *arguments: str) -> None:
    make_app(where)
    measures: dict[str, Any] = {"events": events, "commits": commits}
    print(json.dumps(measures[what](where, *arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
