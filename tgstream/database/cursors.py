"""Cursors and reads in a stream's transaction.

An open cursor needs its transaction, so nothing may end it but the stream itself. A
reader in batches (``rows(key=...)``) ends the transaction after each batch, so that no
connection is held between two batches. It must not if the transaction may hold more
than reads: a change, a lock, a setting. The session does not see all statements, so the
statements on its connections are tracked, too, from the first batch on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..core.context import thread
from .errors import automatic_commit_error
from .writes import OWN_STATEMENT, has_written, knows_writes

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from .database import StreamDatabase
    from .transaction import StreamDataManager


def find_database(session: Session) -> StreamDatabase | None:
    """The database of the stream that runs here, if ``session`` belongs to it."""
    database: StreamDatabase | None = thread.record.database
    if database is None or database.find_data_manager(session) is None:
        return None
    return database


@contextmanager
def close_with_transaction(session: Session, cursor: Any) -> Iterator[None]:
    """Close ``cursor`` at the end, or before if the stream ends its transaction."""
    database = find_database(session)
    cursors = set() if database is None else database.manager.cursors
    cursors.add(cursor)
    try:
        yield
    finally:
        cursors.discard(cursor)
        cursor.close()


def refuse_automatic_commits(hook: str, session: Session) -> None:
    """Refuse a cursor in a stream that commits while the cursor is read.

    :param hook: the name of the function that opens the cursor.
    :raises StreamError: when the stream commits after its items.
    """
    if find_database(session) is not None:
        body: Any = thread.record.body  # None in a check of a permission
        if body is not None and body.plan.commit_every:
            raise automatic_commit_error(body.plan.controller, hook)


# Reading in batches.


def track_connections(session: Session, database: StreamDatabase) -> None:
    """From now on see all statements on the connections of ``session``.

    Only readers in batches need it: the listener takes half as long as a small
    transaction.
    """
    from sqlalchemy import event

    data_manager = database.find_data_manager(session)
    if data_manager is None or data_manager.tracks_connections:
        return
    data_manager.tracks_connections = True
    tracker = _StatementTracker(data_manager)
    event.listen(session, "after_begin", tracker.after_begin)
    if session.in_transaction():
        _check_transaction(session, data_manager)
        for connection in data_manager.connections:
            tracker.after_begin(session, None, connection)
    data_manager.statements.clear()


def _check_transaction(session: Session, data_manager: StreamDataManager) -> None:
    """Find out if the transaction that ``session`` is in must go on.

    It must if the application wrote in it, or ran a statement that may have done more
    than read: a lock or a SET LOCAL would be lost.
    """
    from .transaction import MAX_STATEMENTS

    data_manager.changed = data_manager.changed or any(
        map(has_written, data_manager.connections)
    )
    if len(data_manager.statements) >= MAX_STATEMENTS or not all(
        _only_reads(statement.execution_options(**options), data_manager.connections)
        for statement, options in data_manager.statements
    ):
        data_manager.pinned = session.get_transaction()


def _only_reads(statement: Any, connections: Iterable[Any]) -> bool:
    """True if a statement certainly left nothing in its transaction.

    On SQLite that is each select() without an INSERT, UPDATE or DELETE.
    """
    from .effects import is_query, only_reads

    if all(connection.dialect.name == "sqlite" for connection in connections):
        return is_query(statement)
    return only_reads(statement)


class _StatementTracker:
    """Marks a data manager when a statement may have done more than read."""

    def __init__(self, data_manager: StreamDataManager) -> None:
        self._data_manager = data_manager
        self._reading: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    def after_begin(self, session: Session, begun: Any, connection: Any) -> None:
        from sqlalchemy import event

        event.listen(connection, "before_cursor_execute", self._before_execute)

    def _before_execute(self, *args: Any) -> None:
        connection, context = args[0], args[4]
        data_manager, options = self._data_manager, context.execution_options
        # The connection may be the application's own, and outlive the stream.
        if data_manager.released or OWN_STATEMENT in options:
            return
        compiled = context.compiled  # None for a driver's statement
        if not getattr(getattr(compiled, "statement", None), "is_select", False):
            data_manager.changed = True
            return
        if compiled not in self._reading:
            self._reading[compiled] = _only_reads(compiled.statement, [connection])
        if not self._reading[compiled] or options.get("stream_results"):
            data_manager.pinned = data_manager.session.get_transaction()


def end_read_transaction(
    session: Session,
    database: StreamDatabase,
    began: bool,
    connections: Iterable[Any] = (),
) -> None:
    """End the transaction of ``session`` if it has only read. Nothing is expired.

    :param began: whether the batch has begun the transaction. Otherwise it also goes on
        while a cursor is open, for a lock or a setting in it, and if the application
        has called ``begin()``.
    :param connections: those on which the statement of the batch may have written.
    """
    from sqlalchemy.orm import SessionTransactionOrigin

    data_manager, begun = database.find_data_manager(session), session.get_transaction()
    if data_manager is None or begun is None or not data_manager.unchanged:
        return
    if any(
        knows_writes(connection) and has_written(connection)
        for connection in connections
    ):
        data_manager.changed = True
        return
    if not began and (
        database.manager.cursors
        or data_manager.pinned is begun
        or begun.origin is SessionTransactionOrigin.BEGIN
    ):
        return
    database.manager.commit_alone(data_manager)
