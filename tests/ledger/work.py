"""Execute the plan of a transaction, in any thread of any process."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from typing import Any

import sqlalchemy as sa
import tg
import transaction

import tgstream
from tests.ledger.model import DBSession, Entry, text_of
from tgstream import Channel

_numbers = itertools.count()
_countdown = threading.local()


def execute(plan: str, work: str, client: str) -> None:
    """Execute the steps of a plan. The caller commits.

    :param plan: the steps, as ``plans.py`` explains them.
    :param work: the name of the transaction.
    :param client: the client, which has one transaction after the other.
    """
    _countdown.statements = 0
    savepoints: list[Any] = []
    for word in plan.split():
        step, argument = word[0], word[1:]
        if step in "pm":
            publisher = f"{os.getpid()} {client}"
            add(Entry(channel=argument, work=work, publisher=publisher), step == "p")
        elif step == "f":
            DBSession.flush()
        elif step == "(":
            savepoints.append(DBSession.begin_nested())
        elif step == "s":
            savepoints.append(transaction.savepoint())
        elif step == "k":
            savepoints.pop()
        elif step == ")":
            savepoints.pop().commit()
        elif step in "<u":
            savepoints.pop().rollback()
        else:
            _end(step, argument)


def _end(step: str, argument: str) -> None:
    """Prepare the end of the transaction."""
    if step == "d":
        transaction.doom()
        if tg.config["ledger.plant"] == "aborted":
            Channel("0").publish("0 planted", now=True)
    elif step == "r":
        tgstream.rollback()
    elif step == "!":
        raise LookupError("planned")
    elif step in "BK":
        transaction.get().join(_Killer("~s" if step == "B" else "~t"))
    elif step == "Q":
        _countdown.statements = int(argument)


def add(entry: Entry, publish: bool = True) -> None:
    """Add a row, and publish its event now or when the row is inserted."""
    if publish:
        entry.number, entry.published = next(_numbers), time.monotonic()
    DBSession.add(entry)
    if publish:
        Channel(entry.channel).publish(text_of(entry, entry.number))


@sa.event.listens_for(Entry, "after_insert")
def _publish_inserted(_: Any, connection: sa.Connection, entry: Entry) -> None:
    """Publish the event of a new row, unless it was published before."""
    if entry.number is not None:
        return
    number, now = next(_numbers), time.monotonic()
    update = sa.update(Entry).where(Entry.id == entry.id)
    connection.execute(update.values(number=number, published=now))
    Channel(entry.channel).publish(text_of(entry, number))


class _Killer:
    """A data manager that kills its process when it votes.

    :param key: its ``sortKey``. The database commits in the vote of ``~sqlalchemy``.
    """

    transaction_manager = None

    def __init__(self, key: str) -> None:
        self._key = key

    def sortKey(self) -> str:
        return self._key

    def tpc_vote(self, transaction: Any) -> None:
        _kill()

    def _ignore(self, transaction: Any) -> None:
        pass

    abort = tpc_begin = commit = tpc_finish = tpc_abort = _ignore


@sa.event.listens_for(sa.Engine, "before_cursor_execute")
def _count_statements(*_: Any) -> None:
    """Kill the process if this is the statement of a plan's end."""
    left = getattr(_countdown, "statements", 0)
    _countdown.statements = left - 1
    if left == 1:
        _kill()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
