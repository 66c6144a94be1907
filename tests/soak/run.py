"""The soak test of a server: its clients, its rows, and its state at the end."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tests.conftest import LiveServer
from tests.model import Model

from .client import Clients, Received
from .counters import Totals, add_up, scrape
from .ledger import Account, Ending, Row, balance
from .plans import STUCK, Plan, visits
from .vitals import Vitals, settle

SERVERS = ["waitress", "gunicorn-gthread", "gunicorn-gevent"]
CLIENTS = 16
"""Concurrent visits."""

WARM = 0.25
"""The part of the streams after which a server must no longer grow."""

GROWTH = 16.0
"""MiB that the process may still grow, because of fragmented memory."""


class SoakResult(NamedTuple):
    """The result of a server."""

    server: str
    account: Account
    warm: Vitals
    staying: Vitals
    """While the clients that never read are still connected."""
    end: Vitals
    log: str
    ledger: Totals = Totals()
    counters: Totals = Totals()
    """The totals, as the server's metrics have counted them."""

    @property
    def growth(self) -> float:
        """MiB since the server was warm."""
        return self.end.memory - self.warm.memory

    @property
    def wrongs(self) -> list[str]:
        """The faults, a few words each."""
        account = self.account
        wrongs = [*account.faults, *account.wrong_ends]
        for fault in ("lost", "extra", "mixed"):
            if count := getattr(account, fault):
                wrongs.append(f"{count} rows {fault}")
        if self.growth > GROWTH:
            wrongs.append(f"grew by {self.growth:.1f} MiB")
        if not self.warm.at_rest(None, STUCK):
            wrongs.append(f"left when warm: {self.warm}")
        if not self.staying.at_rest(None, STUCK):
            wrongs.append(f"left while clients stay: {self.staying}")
        if not self.end.at_rest(self.warm.threads):
            wrongs.append(f"left in the end: {self.end}")
        if self.counters != self.ledger:
            wrongs.append(f"counted {self.counters} instead of {self.ledger}")
        _, ignored, text = self.log.partition("Exception ignored")
        if ignored:
            wrongs.append(f"the server's log has: {ignored}{text:.2000}")
        return wrongs


def soak(server: str, url: str, seed: int, streams: int, seconds: float) -> SoakResult:
    """Start a server, load it, and check the results.

    :param url: of the PostgreSQL database. Its tables are created again.
    :param seed: of the random choices.
    :param streams: the number of streams.
    :param seconds: after which no more clients connect.
    """
    plans = visits(f"{seed} {server}", streams)
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        endings = Path(folder, "endings")
        live = LiveServer(server, "soak_app", f"url={url}", f"endings={endings}")
        clients = Clients(live.port)
        try:
            received = load(clients, plans, int(streams * WARM), deadline)
            warm = settle(live, staying=STUCK)
            received += load(clients, plans, streams, deadline)
            staying = settle(live, staying=STUCK)
            clients.close()
            end = settle(live, warm.threads)
            counters = scrape(live.port)
        finally:
            clients.close()
            log = live.stop()
        account = balance(received, rows_of(url), endings_of(endings))
        ledger = add_up(endings)
    return SoakResult(server, account, warm, staying, end, log, ledger, counters)


def load(
    clients: Clients, plans: Iterator[list[Plan]], streams: int, deadline: float
) -> list[Received]:
    """Execute the next plans, ``CLIENTS`` at a time.

    :param streams: the number of streams to execute.
    """

    def visit(plans: list[Plan]) -> list[Received]:
        """Make a visit, unless the deadline is over."""
        return clients.visit(plans) if time.monotonic() < deadline else []

    chosen: list[list[Plan]] = []
    while sum(map(len, chosen)) < streams and (next_plans := next(plans, None)):
        chosen.append(next_plans)
    with ThreadPoolExecutor(CLIENTS) as threads:
        return [*chain.from_iterable(threads.map(visit, chosen))]


def rows_of(url: str) -> list[Row]:
    """Return the stored rows, read without SQLAlchemy."""
    model = Model(url, create=False)
    found = model.fetch("SELECT text, name FROM notes JOIN users ON users.id = user_id")
    model.dispose()
    rows = []
    for text, owner in found:
        stream, number = text.split()
        rows.append(Row(stream, int(number), owner))
    return rows


def endings_of(path: Path) -> dict[str, list[Ending]]:
    """Return the server's reports about ended streams."""
    endings: dict[str, list[Ending]] = defaultdict(list)
    for line in path.read_text().splitlines():
        stream, reason, items, _ = line.split()
        if reason != "started":
            endings[stream].append(Ending(reason, int(items)))
    return endings
