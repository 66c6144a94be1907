"""Reading in a stream's transaction: what may end it, and when reading itself does.

Rule: an open cursor needs its transaction, so that no one ends it but the stream; who
reads in batches ends it after each, unless something was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..core.context import thread
from ..core.stream import current_stream
from ..formats.protocols import estimate_largest_item
from .errors import cursor_open

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from .database import Database
    from .transaction import Member

OWN = "tgstream_rows"
"""The execution option of the statements that rows() and copy() run."""


FETCH = 1 << 20
"""Bytes of text that are fetched at once, if the rows are as large as those before."""


class Sizes:
    """The sizes of batches: small at first, for a slow query to be seen.

    :param most: rows of a batch, at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.size = min(16, most)

    def room_after(self, rows: Sequence[Any]) -> int:
        """How many rows there may be in a batch behind these, if they are as large."""
        most = FETCH // (estimate_largest_item(rows) or 1)
        return max(0, min(self.size, most) - len(rows)) if rows else 0

    def grow(self, rows: Sequence[Any] = ()) -> None:
        """Make the next batch larger, unless the rows of the last one were large."""
        most = FETCH // (estimate_largest_item(rows) or 1)
        self.size = max(1, min(self.size * 2, self._most, most))


def database_of(session: Session) -> Database | None:
    """The database of the running stream, if ``session`` is the stream's own."""
    database = thread.record.database
    if database is None or database.member_of(session) is None:
        return None
    return database


@contextmanager
def opened(session: Session, cursor: Any) -> Iterator[None]:
    """Close ``cursor`` at the end, or when its transaction ends before."""
    database = database_of(session)
    cursors = set() if database is None else database.manager.cursors
    cursors.add(cursor)
    try:
        yield
    finally:
        cursors.discard(cursor)
        cursor.close()


def check_commits(hook: str, session: Session) -> None:
    """Refuse a cursor in a stream that commits while it is read.

    :raises StreamError: when the stream does.
    """
    if database_of(session) is not None:
        body = current_stream()._body
        if body is not None and body.plan.every:
            raise cursor_open(f"{body.plan.controller} commits after its items: ")


def watch(session: Session, database: Database) -> None:
    """See from here on also what is written past ``session``, on its connection.

    Nobody else does: to listen there takes half as long as a small transaction.
    """
    from sqlalchemy import event

    member = database.member_of(session)
    if member is None or member.watched:
        return
    member.watched = True
    listener = _Watch(member)
    event.listen(session, "after_begin", listener.begin)
    if session.in_transaction():
        _judge(session, member)
        for connection in member.connections:
            listener.begin(session, None, connection)
    member.statements.clear()


def _judge(session: Session, member: Member) -> None:
    """Find out if the transaction that ``session`` is in must last.

    It must if the application wrote in it, or ran a statement that may have done more
    than read: a lock or a SET LOCAL would be lost.
    """
    from .transaction import KEPT

    member.changed = member.changed or any(map(has_written, member.connections))
    if len(member.statements) >= KEPT or not all(
        _is_reading(statement.execution_options(**options), member.connections)
        for statement, options in member.statements
    ):
        member.held_in = session.get_transaction()


def _is_reading(statement: Any, connections: Iterable[Any]) -> bool:
    """True if a statement certainly left nothing in its transaction.

    On SQLite no select() can, without an INSERT, UPDATE or DELETE.
    """
    from .effects import is_query, only_reads

    if all(each.dialect.name == "sqlite" for each in connections):
        return is_query(statement)
    return only_reads(statement)


class _Watch:
    """What looks at each statement of a session's connections."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._reading: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    def begin(self, session: Session, begun: Any, connection: Any) -> None:
        from sqlalchemy import event

        event.listen(connection, "before_cursor_execute", self._look)

    def _look(self, *args: Any) -> None:
        connection, context = args[0], args[4]
        member = self._member
        # The connection may be the application's own, and outlive the stream.
        if member.released or OWN in context.execution_options:
            return
        compiled = context.compiled  # None for a driver's statement
        if not getattr(getattr(compiled, "statement", None), "is_select", False):
            member.changed = True
            return
        if compiled not in self._reading:
            self._reading[compiled] = _is_reading(compiled.statement, [connection])
        if not self._reading[compiled] or context.execution_options.get(
            "stream_results"
        ):
            member.held_in = member.session.get_transaction()


_WRITES_ARE_KNOWN = frozenset({"postgresql", "sqlite"})


def has_written(connection: Any) -> bool:
    """True if something may have been written in the transaction of ``connection``."""
    name = connection.dialect.name
    if name == "postgresql":
        asked = "SELECT txid_current_if_assigned() IS NOT NULL"
        options = {OWN: True}
        result = connection.exec_driver_sql(asked, execution_options=options)
        return bool(result.scalar())
    if name == "sqlite":
        return bool(connection.connection.driver_connection.in_transaction)
    return True


def end_reading(
    session: Session, database: Database, began: bool, connections: Iterable[Any] = ()
) -> None:
    """End the transaction of ``session`` if it has only read; nothing is expired.

    In a transaction of its own: other sessions, and a doom, are not its matter.

    :param began: whether the reading itself began it. Another one also lasts while a
        cursor is open, for what it holds (a lock, a SET LOCAL), and if the application
        began it by ``begin()``.
    :param connections: those on which the statement that was read may have written.
    """
    import transaction
    from sqlalchemy.orm import SessionTransactionOrigin

    member, begun = database.member_of(session), session.get_transaction()
    if member is None or begun is None or not member.unchanged:
        return
    known = [each for each in connections if each.dialect.name in _WRITES_ARE_KNOWN]
    if any(map(has_written, known)):
        member.changed = True
        return
    if not began and (
        database.manager.cursors
        or member.held_in is begun
        or begun.origin is SessionTransactionOrigin.BEGIN
    ):
        return
    reading = transaction.TransactionManager()
    reading.get().join(member)
    manager, managers = database.manager, database.managers_of_thread()
    managers["manager"] = reading  # zope.sqlalchemy looks whether it commits
    manager.settling = True
    try:
        reading.commit()
    finally:
        manager.settling = False
        managers["manager"] = manager
