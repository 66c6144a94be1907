"""What is to be sent when, and only when, a transaction commits.

It takes part in the transaction as a data manager, after all others; so nothing that
can still fail comes after it, and what fails here cannot undo them any more.

SQLAlchemy has savepoints and rollbacks of its own, which ``transaction`` does not see.
So an event remembers the transactions and savepoints of the sessions in which it was
published, and it is not sent where one of them has ended by anything but a commit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

from tg.support.converters import asbool

from ..core import context as _context
from ..core.context import thread
from ..core.report import log
from .registry import scoped_sessions

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, SessionTransaction

Send = Callable[[], None]
COMMITTING = "Committing"
"""transaction's word for what it is while its data managers commit."""
OVER = "Committed", "Commit failed"
"""Its words for one that has ended and is there until its hooks have run."""


def send(what: str, send: Send) -> None:
    """Call ``send`` when the transaction that runs here commits; at once without one.

    At once also where it is over, and its hooks run.

    :param what: is sent, for the log.
    """
    txn = _transaction()
    if txn is None or txn.status in OVER:
        send()
        return
    outbox: Outbox | None = None
    with suppress(KeyError):
        outbox = txn.data(_KEY)
    if outbox is None or outbox.left:
        outbox = Outbox()
        outbox.join(txn)
        txn.set_data(_KEY, outbox)
    outbox.sends.append(_Sending(what, send, _open_transactions()))
    if not outbox.sends[-1].inside:
        _note_next(outbox)


def tm_enabled(tg_locals: Any) -> bool:
    """True where the request runs in a transaction, TG's own or repoze.tm2's."""
    config, environ = tg_locals.config, tg_locals.request.environ
    return asbool(config.get("tm.enabled")) or "repoze.tm.active" in environ


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


class _Sending(NamedTuple):
    """What is to be sent, and what must not be rolled back until then."""

    what: str
    send: Send
    inside: list[SessionTransaction]

    def is_undone(self, nested: bool) -> bool:
        """Whether it is for nothing.

        :param nested: whether savepoints alone count, for the others are ending.
        """
        return any(
            not each.is_active and each not in _committed
            for each in self.inside
            if each.nested or not nested
        )


def _open_transactions() -> list[SessionTransaction]:
    """The transactions, and the savepoints in them, of the sessions in use here."""
    found = []
    for session in _sessions():
        place = session.get_nested_transaction() or session.get_transaction()
        while place is not None:
            # Not a flush's; nor one that is committing: its handlers run.
            if place.is_active and (place.nested or place.parent is None):
                _note_commits(session)
                found.append(place)
            place = place.parent
    return found


def _sessions() -> list[Session]:
    """The sessions in use by the stream that runs here, or by the request."""
    database = thread.record.database
    if database is not None:
        return [member.session for member in database.members.values()]
    try:
        known = scoped_sessions(_context.current().config)
    except TypeError:  # no request, or none any more
        return []
    return [scoped() for scoped in known if scoped.registry.has()]


_noted: WeakSet[Session] = WeakSet()
"""Sessions whose commits are noted, from their first event on."""
_committed: WeakSet[SessionTransaction] = WeakSet()


def _note_commits(session: Session) -> None:
    if session not in _noted:
        from sqlalchemy import event  # here there is a session

        event.listen(session, "after_commit", _note_commit)
        _noted.add(session)


def _note_commit(session: Session) -> None:
    ending = session.get_nested_transaction() or session.get_transaction()
    assert ending is not None
    _committed.add(ending)


_waiting: WeakKeyDictionary[Any, Outbox] = WeakKeyDictionary()
"""By their managers, those with events from before any session's transaction."""


def _note_next(outbox: Outbox) -> None:
    """What was published before any, belongs to the transaction that begins next."""
    orm = sys.modules.get("sqlalchemy.orm")
    if orm is None or any(each.in_transaction() for each in _sessions()):
        return
    import transaction
    from sqlalchemy import event

    if not event.contains(orm.Session, "after_transaction_create", _note_begun):
        event.listen(orm.Session, "after_transaction_create", _note_begun)
    outbox.early.append(outbox.sends[-1].inside)
    _waiting[transaction.manager.manager] = outbox


def _note_begun(session: Session, begun: SessionTransaction) -> None:
    if begun.parent is not None or not _waiting:
        return
    import transaction

    manager = transaction.manager.manager
    outbox = _waiting.get(manager)
    if outbox is not None and session in _sessions():
        del _waiting[manager]
        _note_commits(session)
        for inside in outbox.early:
            inside.append(begun)
        outbox.early.clear()


class _Key:
    """What a transaction knows its outbox by."""


_KEY = _Key()


class Outbox:
    """The part that what is to be sent takes in a transaction."""

    transaction_manager = None

    def __init__(self) -> None:
        self.sends: list[_Sending] = []
        self.early: list[list[SessionTransaction]] = []  # of those from before any
        self.left = False  # the transaction has ended, or taken it out for a savepoint

    def join(self, txn: Any) -> None:
        """Take part in a transaction; one that is committing takes nobody any more."""
        if txn.status == COMMITTING:
            txn.addAfterCommitHook(self._settle)
            return
        txn.join(self)
        if any(txn.getAfterAbortHooks()):
            # Where one of these publishes, this one is called after it.
            txn.addAfterAbortHook(self._after_abort)

    def _settle(self, committed: bool) -> None:
        if committed:
            self.tpc_finish(None)
        else:
            self.abort(None)

    def _after_abort(self) -> None:
        if not self.left:  # it was not there to be aborted: the transaction was over
            self._send_all(committed=False)

    def _send_all(self, committed: bool) -> None:
        # First: what a finaliser publishes meanwhile must not come too late for this.
        self.left = True
        for each in self.sends:
            if each.is_undone(nested=True):
                continue
            try:
                each.send()
            except Exception:
                if committed:
                    log.exception("%s was committed, and could not be sent", each.what)
                else:
                    log.exception("%s could not be sent after an abort", each.what)
        self.abort(None)

    # The protocol of transaction's data managers.

    def abort(self, transaction: Any) -> None:
        self.left = True
        self.sends.clear()
        self.early.clear()

    def tpc_begin(self, transaction: Any) -> None:
        """Look what was rolled back: from here on sessions end, however they do."""
        self.sends[:] = [
            each for each in self.sends if not each.is_undone(nested=False)
        ]

    def commit(self, transaction: Any) -> None:
        """Nothing: others may still fail."""

    def tpc_vote(self, transaction: Any) -> None:
        """Nothing."""

    def tpc_finish(self, transaction: Any) -> None:
        # The others have committed: the transaction is no less, whatever fails here.
        self._send_all(committed=True)

    tpc_abort = abort

    def sortKey(self) -> str:
        """Last: after ``~sqlalchemy``."""
        return f"~tgstream:{id(self)}"

    def savepoint(self) -> Any:
        """Of a savepoint that is rolled back, nothing is sent."""
        return _Savepoint(self.sends)


class _Savepoint:
    def __init__(self, sends: list[_Sending]) -> None:
        self._sends, self._length = sends, len(sends)

    def rollback(self) -> None:
        del self._sends[self._length :]
