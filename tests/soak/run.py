"""The soak of one server: its clients, its ledger, and what it has become by then."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.conftest import LiveServer
from tests.model import Model

from .client import Clients, Told
from .ledger import Account, Ending, Row, balance
from .plans import STUCK, Plan, visits
from .vitals import Vitals, settle

SERVERS = ["waitress", "gunicorn-gthread", "gunicorn-gevent"]
CLIENTS = 16
"""Visits at a time."""

WARM = 0.25
"""The part of the streams after which a server is warm: it may not grow any more."""

GROWTH = 16.0
"""MiB that the process may grow all the same, as its memory is cut up."""


class Soaked(NamedTuple):
    """What became of one server."""

    server: str
    account: Account
    warm: Vitals
    staying: Vitals
    """Before the clients that never read have gone."""
    end: Vitals
    log: str

    @property
    def growth(self) -> float:
        """MiB since it was warm."""
        return self.end.memory - self.warm.memory

    @property
    def wrongs(self) -> list[str]:
        """What is wrong, a few words each; nothing, if all is well."""
        account = self.account
        wrongs = [*account.faults, *account.astray]
        for what in ("lost", "extra", "mixed"):
            if count := getattr(account, what):
                wrongs.append(f"{count} rows {what}")
        if self.growth > GROWTH:
            wrongs.append(f"grew by {self.growth:.1f} MiB")
        if not self.warm.at_rest(None, STUCK):
            wrongs.append(f"left when warm: {self.warm}")
        if not self.staying.at_rest(None, STUCK):
            wrongs.append(f"left while clients stay: {self.staying}")
        if not self.end.at_rest(self.warm.threads):
            wrongs.append(f"left in the end: {self.end}")
        _, ignored, what = self.log.partition("Exception ignored")
        if ignored:
            wrongs.append(f"the server's log has: {ignored}{what:.2000}")
        return wrongs


def soak(server: str, url: str, seed: int, streams: int, seconds: float) -> Soaked:
    """Start a server, load it, and hold it to account.

    :param url: of the PostgreSQL database, whose tables are made anew.
    :param seed: for the choices, which are the same for the same number of streams.
    :param streams: how many, of all fates.
    :param seconds: after so many, no client comes any more.
    """
    plans = visits(f"{seed} {server}", streams)
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        endings = Path(folder, "endings")
        live = LiveServer(server, "soak_app", f"url={url}", f"endings={endings}")
        clients = Clients(live.port)
        try:
            told = load(clients, plans, int(streams * WARM), deadline)
            warm = settle(live, staying=STUCK)
            told += load(clients, plans, streams, deadline)
            staying = settle(live, staying=STUCK)
            clients.close()
            end = settle(live, warm.threads)
        finally:
            clients.close()
            log = live.stop()
        account = balance(told, rows_of(url), endings_of(endings))
    return Soaked(server, account, warm, staying, end, log)


def load(
    clients: Clients, plans: Iterator[list[Plan]], streams: int, deadline: float
) -> list[Told]:
    """Send the clients that come next, so many at a time.

    :param streams: after which it is enough.
    """

    def visit(plans: list[Plan]) -> list[Told]:
        """One visit, unless it is too late for it."""
        return clients.visit(plans) if time.monotonic() < deadline else []

    coming: list[list[Plan]] = []
    while sum(map(len, coming)) < streams and (next_one := next(plans, None)):
        coming.append(next_one)
    with ThreadPoolExecutor(CLIENTS) as threads:
        return [told for visited in threads.map(visit, coming) for told in visited]


def rows_of(url: str) -> list[Row]:
    """What the table has, over a connection that knows no SQLAlchemy."""
    model = Model(url, create=False)
    found = model.look("SELECT text, name FROM notes JOIN users ON users.id = user_id")
    model.dispose()
    rows = []
    for text, owner in found:
        stream, number = text.split()
        rows.append(Row(stream, int(number), owner))
    return rows


def endings_of(path: Path) -> dict[str, list[Ending]]:
    """What the server said of the streams that ended."""
    endings: dict[str, list[Ending]] = defaultdict(list)
    for line in path.read_text().splitlines():
        stream, reason, items = line.split()
        endings[stream].append(Ending(reason, int(items)))
    return endings
