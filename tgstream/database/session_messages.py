"""The messages of a session that commits by itself.

Outside of requests, and with ``tm.enabled`` off, a session may have joined no
transaction of this thread, but be in a transaction of its own. The messages are sent
when that transaction commits.

A session begins a transaction for a read, too, and applications close it without a
commit. If the session has written nothing, nothing is undone, and the messages are
sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .engines import get_binds
from .insertion import ensure_commit
from .pending_messages import Entry, PendingMessages
from .session_transactions import committed, get_connection
from .writes import has_written

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, SessionTransaction

_KEY = "tgstream.messages"
"""The key of the messages in the ``info`` of their session."""
_LISTENED = "tgstream.listened"
"""The key of a session whose events are handled here."""


class SessionMessages(PendingMessages):
    """The messages that wait for a session to commit.

    :param session: is in a transaction.
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._transaction = session.get_transaction()
        has_changes = _has_changes(session)  # it may join a transaction only now
        # A session that is marked as changed is closed without a commit by aborts only.
        self.changed = ensure_commit(session) or has_changes

    def _is_undone(self, entry: Entry) -> bool:
        return entry.is_undone(lambda each: each is not self._transaction)

    def end(self) -> None:
        """Send the messages, unless the session has rolled back changes."""
        is_sent = self._transaction in committed or not self.changed
        self._close(lambda entry: is_sent and not self._is_undone(entry), "commit")


def join_session(session: Session) -> SessionMessages:
    """The messages of a session that is in a transaction."""
    messages: SessionMessages | None = session.info.get(_KEY)
    if messages is None:
        messages = session.info[_KEY] = SessionMessages(session)
        messages.warn_if_lost()
        _listen(session)
    return messages


def end_unchanged(session: Session) -> None:
    """Send the messages of a session that has written nothing, before a rollback."""
    messages: SessionMessages | None = session.info.get(_KEY)
    if messages is not None and not (messages.changed or _has_changes(session)):
        messages.end()


def _has_changes(session: Session) -> bool:
    """Whether a session has changes that a rollback undoes."""
    if session.new or session.dirty or session.deleted:
        return True
    engines = {bind.engine for bind in get_binds(session)}
    if len(engines) != 1:
        return True  # it may have written to any of them
    try:
        return has_written(get_connection(session, *engines))
    except Exception:  # its transaction has failed
        return True


# Handlers of SQLAlchemy's events.


def _listen(session: Session) -> None:
    if not session.info.get(_LISTENED):
        from sqlalchemy import event

        event.listen(session, "after_flush", _mark_changed)
        event.listen(session, "do_orm_execute", _after_execute)
        event.listen(session, "after_rollback", _after_rollback)
        event.listen(session, "after_transaction_end", _after_end)
        session.info[_LISTENED] = True


def _mark_changed(session: Session, *_: Any) -> None:
    if _KEY in session.info:
        session.info[_KEY].changed = True


def _after_execute(state: Any) -> None:
    if not state.is_select:
        _mark_changed(state.session)


def _after_rollback(session: Session) -> None:
    # The application may undo something that it has done elsewhere.
    if not session.in_nested_transaction():
        _mark_changed(session)


def _after_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None and _KEY in session.info:
        session.info.pop(_KEY).end()
