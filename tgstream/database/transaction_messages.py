"""The messages of a transaction of the package ``transaction``.

They are sent when, and only when, it commits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .pending_messages import Entry, PendingMessages, Sender
from .session_transactions import committed, find_manager, find_sessions, track_commits

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, SessionTransaction

_COMMITTING = "Committing"
"""The status of a transaction while its data managers commit."""
_ENDED = "Committed", "Commit failed"
"""The status of a transaction that has ended, while its hooks run."""


class TransactionMessages(PendingMessages):
    """The data manager of the messages that wait for a transaction to commit.

    It takes part in the transaction after all others. When the messages are sent, the
    others have committed, so nothing that can fail comes after them, and a failure
    cannot undo the commit.
    """

    transaction_manager = None

    def __init__(self, txn: Any) -> None:
        super().__init__()
        # The transactions of messages from before a session's transaction began.
        self.waiting: list[list[SessionTransaction]] = []
        # The transaction has ended, or has dropped this for a savepoint.
        self.closed = False
        self._may_begin = txn.status != _COMMITTING
        self._join(txn)

    def _join(self, txn: Any) -> None:
        """Take part in ``txn``. While it commits, it accepts only hooks."""
        if txn.status == _COMMITTING:
            txn.addAfterCommitHook(self._after_commit)
            return
        txn.join(self)
        if any(txn.getAfterAbortHooks()):
            # If one of these publishes, this one is called after it.
            txn.addAfterAbortHook(self._after_abort)

    def add(self, message: Any, sender: Sender) -> None:
        """Register a message. It may be one from before the first statement."""
        super().add(message, sender)
        if not self.entries[-1].transactions:
            _wait_for_transaction(self)

    def _after_commit(self, has_committed: bool) -> None:
        if has_committed:
            self.tpc_finish(None)
        else:
            self.abort(None)

    def _after_abort(self) -> None:
        if not self.closed:  # it was registered after the abort
            self._close(lambda entry: not self._is_undone(entry), "abort")

    def _close(self, is_due: Callable[[Entry], bool], end: str) -> None:
        # First: a finaliser may publish meanwhile, which needs another data manager.
        self.closed = True
        self.waiting.clear()
        super()._close(is_due, end)

    # The protocol of transaction's data managers.

    def abort(self, transaction: Any) -> None:
        # Messages may be committed: by their session, before another manager failed.
        self._close(
            lambda entry: entry.inserted and entry.inserter in committed, "commit"
        )

    def tpc_begin(self, transaction: Any) -> None:
        """Drop what was rolled back. After this step, sessions end by commits, too."""
        self._may_begin = False
        self.entries[:] = [
            entry for entry in self.entries if not entry.is_undone(lambda _: True)
        ]

    def commit(self, transaction: Any) -> None:
        """Do nothing: others may still fail."""

    def tpc_vote(self, transaction: Any) -> None:
        """Do nothing."""

    def tpc_finish(self, transaction: Any) -> None:
        # The others have committed. An error here would not undo them.
        self._close(lambda entry: not self._is_undone(entry), "commit")

    tpc_abort = abort

    def sortKey(self) -> str:
        """Last: after ``~sqlalchemy``."""
        return f"~tgstream:{id(self)}"

    def savepoint(self) -> Any:
        """Messages that were registered after a savepoint are undone with it."""
        return _Savepoint(self.entries)


class _Savepoint:
    def __init__(self, entries: list[Entry]) -> None:
        self._entries, self._length = entries, len(entries)

    def rollback(self) -> None:
        del self._entries[self._length :]


class _Key:
    """The key of the pending messages in the data of a transaction."""


_KEY = _Key()


def is_over(txn: Any) -> bool:
    """Whether a transaction has ended, and its hooks run."""
    return txn.status in _ENDED


def find_messages(txn: Any) -> TransactionMessages | None:
    """The messages that wait for ``txn`` to commit."""
    try:
        return txn.data(_KEY)  # type: ignore[no-any-return]
    except KeyError:
        return None


def join_transaction(txn: Any) -> TransactionMessages:
    """The messages of a transaction that has not ended."""
    messages = find_messages(txn)
    if messages is None or messages.closed:
        messages = TransactionMessages(txn)
        txn.set_data(_KEY, messages)
    return messages


_waiting: WeakKeyDictionary[Any, TransactionMessages] = WeakKeyDictionary()
"""By transaction manager, the messages from before a session's transaction began."""


def _wait_for_transaction(messages: TransactionMessages) -> None:
    """Let the last message belong to the next transaction that a session begins."""
    orm = sys.modules.get("sqlalchemy.orm")
    if orm is None or any(session.in_transaction() for session in find_sessions()):
        return
    from sqlalchemy import event

    if not event.contains(orm.Session, "after_transaction_create", _after_create):
        event.listen(orm.Session, "after_transaction_create", _after_create)
    messages.waiting.append(messages.entries[-1].transactions)
    _waiting[find_manager()] = messages


def _after_create(session: Session, created: SessionTransaction) -> None:
    if created.parent is not None or not _waiting:
        return
    manager = find_manager()
    messages = _waiting.get(manager)
    if messages is not None and session in find_sessions():
        del _waiting[manager]
        track_commits(session)
        for transactions in messages.waiting:
            transactions.append(created)
        messages.waiting.clear()
