"""What is to be sent when, and only when, a transaction commits.

Rule: it takes part in the transaction as a data manager, after all others; so nothing
that can still fail comes after it, and what fails here cannot undo them any more.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from . import _context
from ._config import tm_enabled
from ._report import log
from ._thread import thread

Send = Callable[[], None]
COMMITTING = "Committing"
"""transaction's word for what it is while its data managers commit."""


def send(what: str, send: Send) -> None:
    """Call ``send`` when the transaction that runs here commits; at once without one.

    :param what: is sent, for the log.
    """
    txn = _transaction()
    if txn is None:
        send()
        return
    outbox: Outbox | None = None
    with suppress(KeyError):
        outbox = txn.data(_KEY)
    if outbox is None or outbox.left:
        outbox = Outbox()
        outbox.join(txn)
        txn.set_data(_KEY, outbox)
    outbox.sends.append((what, send))


def unsent(txn: Any) -> int:
    """How many are waiting for ``txn`` to commit."""
    outbox: Outbox | None = None
    with suppress(KeyError):
        outbox = txn.data(_KEY)
    return 0 if outbox is None else len(outbox.sends)


def _transaction() -> Any:
    """The transaction of the stream that runs here, or of TG's request, if any."""
    database = thread.record.database
    if database is not None and database.over:
        return None  # the hook of its report: nothing will commit there
    if database is None:
        try:
            tg_locals = _context.current()
        except TypeError:  # no request at all
            return None
        if not tm_enabled(tg_locals):
            return None
    import transaction  # here there is one; an application may have none

    return transaction.manager.get()


class _Key:
    """What a transaction knows its outbox by."""


_KEY = _Key()


class Outbox:
    """The part that what is to be sent takes in a transaction."""

    transaction_manager = None

    def __init__(self) -> None:
        self.sends: list[tuple[str, Send]] = []
        self.left = False  # the transaction has ended, or taken it out for a savepoint

    def join(self, txn: Any) -> None:
        """Take part in a transaction; one that is committing takes nobody any more."""
        if txn.status == COMMITTING:
            txn.addAfterCommitHook(self._settle)
        else:
            txn.join(self)

    def _settle(self, committed: bool) -> None:
        if committed:
            self.tpc_finish(None)
        else:
            self.abort(None)

    # The protocol of transaction's data managers.

    def abort(self, transaction: Any) -> None:
        self.sends.clear()
        self.left = True

    def tpc_begin(self, transaction: Any) -> None:
        """Nothing."""

    def commit(self, transaction: Any) -> None:
        """Nothing: others may still fail."""

    def tpc_vote(self, transaction: Any) -> None:
        """Nothing."""

    def tpc_finish(self, transaction: Any) -> None:
        for what, send in self.sends:
            try:
                send()
            except Exception:  # the others have committed: the transaction is no less
                log.exception("%s was committed, and could not be sent", what)
        self.abort(transaction)

    tpc_abort = abort

    def sortKey(self) -> str:
        """Last: after ``~sqlalchemy``."""
        return f"~tgstream:{id(self)}"

    def savepoint(self) -> Any:
        """Of a savepoint that is rolled back, nothing is sent."""
        return _Savepoint(self.sends)


class _Savepoint:
    def __init__(self, sends: list[tuple[str, Send]]) -> None:
        self._sends, self._length = sends, len(sends)

    def rollback(self) -> None:
        del self._sends[self._length :]
