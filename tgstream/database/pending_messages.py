"""Messages that wait for a transaction to commit, and the senders of messages.

Each message has the transactions and savepoints of the sessions in which it was
published. It is not sent if one of them has ended by anything but a commit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol
from weakref import finalize

from .insertion import begin_insertion, call_before_commit
from .session_transactions import committed, find_sessions, get_open_transactions

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.orm import SessionTransaction

log = logging.getLogger("tgstream")


class Sender(Protocol):
    """Sends messages: the back end of channels."""

    def publish_committed(self, messages: Sequence[Any]) -> None:
        """Send the messages of a transaction that has committed, in order."""


class InsertingSender(Sender, Protocol):
    """A sender that stores its messages in the application's own database."""

    @property
    def engine(self) -> Engine:
        """The engine of the database that has the messages."""

    def insert(self, connection: Connection, messages: Sequence[Any]) -> None:
        """Insert messages in a transaction, immediately before its commit.

        It is called again for messages that are published after it. An error fails the
        commit. After the commit, ``publish_committed`` gets the messages.

        :param connection: that of the application's first session.
        :param messages: in the order in which they were published.
        """

    def publish(self, messages: Sequence[Any]) -> None:
        """Store messages in a transaction of its own, and send them.

        It is called for messages of a transaction that no session could insert.
        """


@dataclass(slots=True, eq=False)
class Entry:
    """A message, and the transactions that must not be rolled back before it."""

    message: Any
    sender: Any
    transactions: list[SessionTransaction]
    inserter: SessionTransaction | None
    """The transaction that inserts the message before its commit."""
    inserted: bool = False

    def is_undone(self, counts: Callable[[SessionTransaction], bool]) -> bool:
        """Whether one of the transactions has ended by anything but a commit.

        :param counts: False for transactions that are ending.
        """
        return any(
            not transaction.is_active
            and transaction not in committed
            and counts(transaction)
            for transaction in self.transactions
        )

    @property
    def send(self) -> Callable[[Sequence[Any]], None]:
        """The method of the sender that sends the message after the commit."""
        is_stored = self.inserted or not _can_insert(self.sender)
        name = "publish_committed" if is_stored else "publish"
        return getattr(self.sender, name)  # type: ignore[no-any-return]


def _can_insert(sender: Any) -> bool:
    return getattr(sender, "insert", None) is not None


def is_savepoint(transaction: SessionTransaction) -> bool:
    """Whether a transaction is a savepoint of another one."""
    return transaction.nested


class PendingMessages:
    """The messages of one transaction."""

    _may_begin = False
    """Whether the application's first session may begin a transaction to insert."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._inserters: dict[SessionTransaction, Connection] = {}
        self._warning: finalize[Any, Any] | None = None

    def add(self, message: Any, sender: Sender) -> None:
        """Register a message."""
        inserter = self._find_inserter(sender) if _can_insert(sender) else None
        transactions = get_open_transactions(find_sessions())
        self.entries.append(Entry(message, sender, transactions, inserter))

    def warn_if_lost(self, owner: object = None) -> None:
        """Warn if the transaction never ends, because only the application ends it.

        :param owner: the transaction must end before it. None for the transaction.
        """
        if self._warning is None:
            self._warning = finalize(self if owner is None else owner, _warn_lost)

    def _find_inserter(self, sender: Any) -> SessionTransaction | None:
        found = begin_insertion(sender.engine, self._may_begin)
        if found is None:
            return None
        inserter, connection = found
        if inserter not in self._inserters:
            self._inserters[inserter] = connection
            call_before_commit(connection, partial(self._insert, inserter))
        return inserter

    def _insert(self, inserter: SessionTransaction, connection: Connection) -> None:
        entries = [
            entry
            for entry in self.entries
            # None: the session had not begun. Now it can insert the message in order.
            if entry.inserter in (inserter, None)
            and _can_insert(entry.sender)
            and not entry.inserted
            and not self._is_undone(entry)
        ]
        for sender, group in groupby(entries, lambda entry: entry.sender):
            sender.insert(connection, [entry.message for entry in group])
        for entry in entries:
            entry.inserter, entry.inserted = inserter, True

    def _insert_late(self) -> None:
        """Insert where a session has committed, and its connection goes on.

        A test may have begun the connection's transaction, to roll it back at the end.
        """
        inserters, self._inserters = self._inserters, {}
        for inserter, connection in inserters.items():
            if inserter in committed and not connection.closed:
                with suppress(Exception):  # the messages are then published
                    self._insert(inserter, connection)

    def _is_undone(self, entry: Entry) -> bool:
        """Whether a message was rolled back, while the transaction commits."""
        return entry.is_undone(is_savepoint)

    def _close(self, is_due: Callable[[Entry], bool], end: str) -> None:
        """Send the messages that are due. The others are dropped.

        :param end: of the transaction, for the log.
        """
        if self._warning is not None:
            self._warning.detach()
        self._insert_late()
        entries = [entry for entry in self.entries if is_due(entry)]
        self.entries.clear()
        for send, group in groupby(entries, lambda entry: entry.send):
            messages = [entry.message for entry in group]
            try:
                send(messages)
            except Exception:
                log.exception(
                    "Events are lost: %d could not be sent after the %s",
                    len(messages),
                    end,
                )


def _warn_lost() -> None:
    log.warning(
        "Events are lost: their transaction was neither committed nor aborted. Commit "
        "after publish(), or call publish(..., now=True)"
    )
