"""Messages that are sent when, and only when, a transaction commits.

They are the events of channels. The pending messages take part in the transaction as a
data manager, after all others. When they are sent, the others have committed, so
nothing that can fail comes after them, and a failure cannot undo the commit.

SQLAlchemy has savepoints and rollbacks of its own, which ``transaction`` does not see.
So each message has the transactions and savepoints of the sessions in which it was
published, and it is not sent if one of them has ended by anything but a commit.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary, WeakSet

from tg.support.converters import asbool

from ..core import context as _context
from ..core.context import thread
from .registry import scoped_sessions

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, SessionTransaction

    from .sessions import StreamSessions

log = logging.getLogger("tgstream")

_COMMITTING = "Committing"
"""The status of a transaction while its data managers commit."""
_ENDED = "Committed", "Commit failed"
"""The status of a transaction that has ended, while its hooks run."""


class Sender(Protocol):
    """Sends messages: the back end of channels."""

    def publish_committed(self, messages: Sequence[Any]) -> None:
        """Send the messages of a transaction that has committed, in order."""


def send_on_commit(message: Any, sender: Sender) -> bool:
    """Send a message when the transaction that runs here commits.

    :returns: False if there is no transaction, or if it has ended and its hooks run.
        The message is then not registered.
    """
    txn = _current_transaction()
    if txn is None or txn.status in _ENDED:
        return False
    pending = _find_pending(txn)
    if pending is None or pending.closed:
        pending = PendingMessages()
        pending.join(txn)
        txn.set_data(_KEY, pending)
    pending.entries.append(_Entry(message, sender, _open_transactions()))
    if not pending.entries[-1].transactions:
        _wait_for_transaction(pending)
    return True


def is_tm_enabled(tg_locals: Any) -> bool:
    """True if the request runs in a transaction, of TG or of repoze.tm2."""
    config, environ = tg_locals.config, tg_locals.request.environ
    return asbool(config.get("tm.enabled")) or "repoze.tm.active" in environ


def count_unsent(txn: Any) -> int:
    """The number of messages that wait for ``txn`` to commit."""
    pending = _find_pending(txn)
    return 0 if pending is None else len(pending.entries)


def _find_pending(txn: Any) -> PendingMessages | None:
    try:
        return txn.data(_KEY)  # type: ignore[no-any-return]
    except KeyError:
        return None


def _current_transaction() -> Any:
    """The transaction of the stream that runs here, or of TG's request, if any."""
    stream: StreamSessions | None = thread.record.database
    if stream is not None and stream.ended:
        return None  # a hook of tgstream.finished: nothing will commit any more
    if stream is None:
        try:
            tg_locals = _context.current()
        except TypeError:  # no request
            return None
        if not is_tm_enabled(tg_locals):
            return None
    import transaction  # an application without transactions may not have it

    return transaction.manager.get()


# The transactions and savepoints of sessions.


class _Entry(NamedTuple):
    """A message, and the transactions that must not be rolled back before it."""

    message: Any
    sender: Sender
    transactions: list[SessionTransaction]

    def is_undone(self, savepoints_only: bool) -> bool:
        """Whether one of the transactions has ended by anything but a commit.

        :param savepoints_only: True while the others are ending.
        """
        return any(
            not session_transaction.is_active and session_transaction not in _committed
            for session_transaction in self.transactions
            if session_transaction.nested or not savepoints_only
        )


def _open_transactions() -> list[SessionTransaction]:
    """The transactions, and the savepoints in them, of the sessions in use here."""
    transactions = []
    for session in _sessions():
        current = session.get_nested_transaction() or session.get_transaction()
        while current is not None:
            # Without those of a flush, and those that are committing: handlers run.
            if current.is_active and (current.nested or current.parent is None):
                _track_commits(session)
                transactions.append(current)
            current = current.parent
    return transactions


def _sessions() -> list[Session]:
    """The sessions in use by the stream that runs here, or by the request."""
    stream: StreamSessions | None = thread.record.database
    if stream is not None:
        return [data_manager.session for data_manager in stream.current.values()]
    try:
        config = _context.current().config
    except TypeError:  # no request
        return []
    return [scoped() for scoped in scoped_sessions(config) if scoped.registry.has()]


_tracked: WeakSet[Session] = WeakSet()
"""Sessions whose commits are tracked, from their first event on."""
_committed: WeakSet[SessionTransaction] = WeakSet()


def _track_commits(session: Session) -> None:
    if session not in _tracked:
        from sqlalchemy import event  # there is a session, so it is installed

        event.listen(session, "after_commit", _after_commit)
        _tracked.add(session)


def _after_commit(session: Session) -> None:
    committed = session.get_nested_transaction() or session.get_transaction()
    assert committed is not None
    _committed.add(committed)


_waiting: WeakKeyDictionary[Any, PendingMessages] = WeakKeyDictionary()
"""By transaction manager, the messages from before a session's transaction began."""


def _wait_for_transaction(pending: PendingMessages) -> None:
    """Let the last message belong to the next transaction that a session begins."""
    orm = sys.modules.get("sqlalchemy.orm")
    if orm is None or any(session.in_transaction() for session in _sessions()):
        return
    import transaction
    from sqlalchemy import event

    if not event.contains(orm.Session, "after_transaction_create", _after_create):
        event.listen(orm.Session, "after_transaction_create", _after_create)
    pending.waiting.append(pending.entries[-1].transactions)
    _waiting[transaction.manager.manager] = pending


def _after_create(session: Session, created: SessionTransaction) -> None:
    if created.parent is not None or not _waiting:
        return
    import transaction

    manager = transaction.manager.manager
    pending = _waiting.get(manager)
    if pending is not None and session in _sessions():
        del _waiting[manager]
        _track_commits(session)
        for transactions in pending.waiting:
            transactions.append(created)
        pending.waiting.clear()


class _Key:
    """The key of the pending messages in the data of a transaction."""


_KEY = _Key()


class PendingMessages:
    """The data manager of the messages that wait for a transaction to commit."""

    transaction_manager = None

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        # The transactions of messages from before a session's transaction began.
        self.waiting: list[list[SessionTransaction]] = []
        # The transaction has ended, or has dropped this for a savepoint.
        self.closed = False

    def join(self, txn: Any) -> None:
        """Take part in ``txn``. While it commits, it accepts only hooks."""
        if txn.status == _COMMITTING:
            txn.addAfterCommitHook(self._after_commit)
            return
        txn.join(self)
        if any(txn.getAfterAbortHooks()):
            # If one of these publishes, this one is called after it.
            txn.addAfterAbortHook(self._after_abort)

    def _after_commit(self, committed: bool) -> None:
        if committed:
            self.tpc_finish(None)
        else:
            self.abort(None)

    def _after_abort(self) -> None:
        if not self.closed:  # it was registered after the abort
            self._send_all(committed=False)

    def _send_all(self, committed: bool) -> None:
        # First: a finaliser may publish meanwhile, which needs another data manager.
        self.closed = True
        entries = [e for e in self.entries if not e.is_undone(savepoints_only=True)]
        for sender, group in groupby(entries, lambda entry: entry.sender):
            messages = [entry.message for entry in group]
            try:
                sender.publish_committed(messages)
            except Exception:
                log.exception(
                    "Events are lost: %d could not be sent after the %s",
                    len(messages),
                    "commit" if committed else "abort",
                )
        self.abort(None)

    # The protocol of transaction's data managers.

    def abort(self, transaction: Any) -> None:
        self.closed = True
        self.entries.clear()
        self.waiting.clear()

    def tpc_begin(self, transaction: Any) -> None:
        """Drop what was rolled back. After this step, sessions end by commits, too."""
        self.entries[:] = [
            each for each in self.entries if not each.is_undone(savepoints_only=False)
        ]

    def commit(self, transaction: Any) -> None:
        """Do nothing: others may still fail."""

    def tpc_vote(self, transaction: Any) -> None:
        """Do nothing."""

    def tpc_finish(self, transaction: Any) -> None:
        # The others have committed. An error here would not undo them.
        self._send_all(committed=True)

    tpc_abort = abort

    def sortKey(self) -> str:
        """Last: after ``~sqlalchemy``."""
        return f"~tgstream:{id(self)}"

    def savepoint(self) -> Any:
        """Messages that were registered after a savepoint are undone with it."""
        return _Savepoint(self.entries)


class _Savepoint:
    def __init__(self, entries: list[_Entry]) -> None:
        self._entries, self._length = entries, len(entries)

    def rollback(self) -> None:
        del self._entries[self._length :]
