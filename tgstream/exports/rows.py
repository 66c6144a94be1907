"""``rows()``: what a statement selects, as items for any format, in constant memory.

Rule: nothing runs before it is iterated; and what was opened is closed with the
iterator, whoever closes it.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import tg

from ..core.errors import StreamError
from ..database.cursors import (
    Sizes,
    close_with_transaction,
    end_read_transaction,
    find_database,
    refuse_automatic_commits,
    track_connections,
)
from ..database.registry import scoped_sessions
from ..formats.protocols import BATCH

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.orm import Session

    from ..database.database import StreamDatabase
    from .keyset import Keyset
    from .statement import Prepared


def rows(
    statement: Any,
    *,
    batch: int = 1000,
    key: Any = None,
    after: Any = None,
    session: Any = None,
) -> Rows:
    """The rows of a statement as items for any format, fetched in batches.

    Entities become their mapped columns, but for deferred ones; an item is SQLAlchemy's
    ``Row``. The statement runs when the rows are iterated, and again when they are
    again, in the stream's own session, with what the application's handlers add to it.

    Without ``key`` one cursor reads one snapshot, and holds the stream's transaction:
    a commit or rollback before its end is refused, and so are automatic commits.
    On MySQL and MariaDB so is any other statement of the session. Where PostgreSQL
    can have no cursor (AUTOCOMMIT, INSERT ... RETURNING, SHOW) the driver fetches all
    rows at once.

    With ``key`` each batch is a query of its own, that goes on behind the last one's
    key. In between nothing is held: the transaction is over and the connection back in
    the pool, unless something was written and not committed. A transaction that the
    generator began goes on if it may hold more than reads: a lock, a ``SET LOCAL``, an
    open cursor. A commit is welcome. Rows that are added or changed meanwhile are seen
    if they sort behind.

    :param statement: ``select()``, a ``Query``; without ``key`` also a union or
        ``text()``.
    :param batch: how many rows are fetched at once, at most.
    :param key: columns that identify a row and by which the rows are ordered: one, or a
        tuple; each may be ``desc()``, ``nulls_first()`` and ``nulls_last()``.
    :param after: what the rows begin behind: a value of the key, or a tuple of them.
    :param session: a session or scoped session in place of the stream's own; to end
        its transaction is left to its owner.
    :raises TypeError: when an argument is of a wrong kind.
    :raises ValueError: when ``batch`` is no whole number from 1 on.
    :raises StreamError: when the statement has run already, or cannot be read by key:
        it locks rows, writes, or has an order of its own.
    """
    from .statement import prepared

    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise ValueError(
            f"rows(batch={batch!r}) makes no sense; it is a number of rows, from 1 on"
        )
    found = prepared("rows", statement)
    keyset = None
    if key is not None:
        from .keyset import Keyset

        keyset = Keyset(found.statement, key, after)
    elif after is not None:
        raise TypeError(
            f"rows(after={after!r}) has no key to compare with; give key= as well"
        )
    return Rows(found, batch, keyset, check_session("rows", session))


def is_statement(value: Any) -> bool:
    """True for a statement that :func:`rows` takes. It imports nothing."""
    if "sqlalchemy.orm" not in sys.modules:
        return False
    from .statement import KINDS

    return isinstance(value, KINDS)


class Rows:
    """What :func:`rows` returns: an iterable of ``Row`` that knows its batches."""

    def __init__(
        self, prepared: Prepared, batch: int, keyset: Keyset | None, session: Any
    ) -> None:
        self.fields: Sequence[str] = ()
        self._prepared = prepared
        self._batch = batch
        self._keyset = keyset
        self._session = session

    def __iter__(self) -> Iterator[Any]:
        with closing(self.batches()) as batches:
            for batch in batches:
                yield from batch

    def batches(self) -> Generator[Sequence[Any], None, None]:
        """The rows, a batch at a time; close it to close the cursor."""
        session = session_of("rows", self._session, self._prepared.session)
        if self._keyset is None:
            yield from self._by_cursor(session)
        else:
            yield from self._by_key(session, self._keyset)

    def _by_cursor(self, session: Session) -> Iterator[Sequence[Any]]:
        from .mysql import NAMES, alone
        from .server_side_cursor import WriterWatch, cursor_options
        from .statement import execute

        refuse_automatic_commits("rows", session)
        connections: list[sa.Connection] = []

        def prepare(connection: sa.Connection, statement: Any) -> Mapping[str, Any]:
            connections.append(connection)
            return cursor_options(connection, statement, self._batch)

        result = execute(session, self._prepared.statement, {}, prepare)
        unbuffered = [each for each in connections if each.dialect.name in NAMES]
        lock = WriterWatch(connections)
        with (
            close_with_transaction(session, result),
            alone(unbuffered, result),
            closing(lock),
        ):
            self.fields = self._fields(result)
            sizes = Sizes(min(self._batch, BATCH))
            # SQLAlchemy has the first row already where it reads by a cursor of the
            # server. It shows how many can be fetched at once.
            batch = result.fetchmany(1)
            if room := sizes.room_after(batch):
                batch = [*batch, *result.fetchmany(room)]
            while batch:
                sizes.grow(batch)
                yield batch
                lock.look()
                batch = result.fetchmany(sizes.size)

    def _by_key(self, session: Session, keyset: Keyset) -> Iterator[Sequence[Any]]:
        from .statement import OtherEngine, dialect_of

        database = find_database(session)
        if database is not None:
            track_connections(session, database)
        dialect = dialect_of(session, self._prepared.statement)
        batches = self._batches_on(dialect, session, keyset, database)
        try:
            first = next(batches, None)
        except OtherEngine as other:
            batches = self._batches_on(other.dialect, session, keyset, database)
            first = next(batches, None)
        if first is not None:
            yield first
            yield from batches

    def _batches_on(
        self,
        dialect: sa.Dialect,
        session: Session,
        keyset: Keyset,
        database: StreamDatabase | None,
    ) -> Iterator[Sequence[Any]]:
        """The batches; OtherEngine before the first if the dialect is not this one."""
        from ..database.effects import only_reads
        from .statement import OtherEngine, execute

        name = f"{dialect.name}+{dialect.driver}"
        may_write = not only_reads(keyset.statement)

        def fetch(statement: Any) -> tuple[list[str], Sequence[Any]]:
            began = not session.in_transaction()
            connections: list[sa.Connection] = []

            def prepare(connection: sa.Connection, statement: Any) -> Mapping[str, Any]:
                its = connection.dialect
                if connections or name != f"{its.name}+{its.driver}":
                    raise OtherEngine("rows", its, name)
                connections.append(connection)
                return {"stream_results": False}

            result = execute(session, statement, {}, prepare)
            fetched = self._fields(result), result.all()
            if database is not None:
                end_read_transaction(
                    session, database, began, connections if may_write else ()
                )
            return fetched

        run = keyset.run(dialect, self._batch, fetch)
        for batch in run:
            self.fields = run.fields
            if batch:
                yield batch

    def _fields(self, result: sa.Result[Any]) -> list[str]:
        from .statement import fields_of

        return fields_of("rows", result)


# Whose session it is, for rows() and copy() alike.


def check_session(hook: str, session: Any) -> Any:
    """``session``, if it is one.

    :raises TypeError: when it is not.
    """
    if session is not None and not (
        hasattr(session, "execute") and hasattr(session, "get_bind")
    ):
        raise TypeError(
            f"{hook}(session={session!r}) is no session; give a Session or a "
            "scoped_session, or leave it out for the stream's own"
        )
    return session


def session_of(hook: str, asked: Any, statements: Any) -> Session:
    """The session to run in: what was asked for, the Query's, the application's.

    :raises StreamError: when there is none.
    """
    session = asked if asked is not None else statements
    if session is None:
        scoped = scoped_sessions(tg.config)
        if not scoped:
            raise StreamError(
                f"{hook}() has no session to run its statement in: the application has "
                f"no DBSession; give {hook}(statement, session=...)"
            )
        session = scoped[0]
    return session() if callable(session) else session  # type: ignore[no-any-return]
