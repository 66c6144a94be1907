"""The cursor that ``rows()`` reads from: if there can be one, and how it is planned.

A server-side cursor keeps the result in the database. If the database has no cursor for
a statement, the driver fetches the whole result.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import sqlalchemy as sa

from ..core.options import clock
from ..core.report import log
from ..database.cursors import OWN_STATEMENT
from ..database.effects import is_query

WRITERS_WAIT = 5.0
"""Seconds that sqlite3 waits for a lock by default, before it raises an error."""


def cursor_options(
    connection: sa.Connection, statement: Any, batch: int
) -> Mapping[str, Any]:
    """The execution options with which ``statement`` is read on ``connection``."""
    if not _is_possible(connection, statement):
        return {"stream_results": False}
    if connection.dialect.name == "postgresql":
        _plan_for_all_rows(connection)
    return {"stream_results": True, "max_row_buffer": batch}


def _is_possible(connection: sa.Connection, statement: Any) -> bool:
    """True if the server can have a cursor for a statement on this connection.

    PostgreSQL's DECLARE CURSOR accepts only a query, in a transaction. AUTOCOMMIT
    can be set in many places, but the driver's connection always shows it.
    """
    if not _is_postgresql(connection.dialect):
        return True
    driver = connection.connection.driver_connection
    return not getattr(driver, "autocommit", False) and is_query(statement)


def _is_postgresql(dialect: Any) -> bool:
    """True for PostgreSQL and dialects that derive from it.

    To import them, for an application without PostgreSQL, takes longer than a query.
    """
    base = sys.modules.get("sqlalchemy.dialects.postgresql.base")
    return base is not None and isinstance(dialect, base.PGDialect)


_FRACTION = sa.func.current_setting("cursor_tuple_fraction", True)
_PLAN_FOR_ALL = sa.select(sa.func.set_config("cursor_tuple_fraction", "1", True)).where(
    _FRACTION == "0.1"
)


def _plan_for_all_rows(connection: sa.Connection) -> None:
    """Let PostgreSQL plan for all rows, not for the first tenth of them.

    It costs one round trip. The setting lasts until the transaction ends and affects
    only cursors. A value that the application has chosen stays.
    """
    connection.execute(_PLAN_FOR_ALL, execution_options={OWN_STATEMENT: True})


# SQLite.


_warned: WeakSet[Any] = WeakSet()


class WriterWatch:
    """Warns once an engine, when reading an SQLite file keeps writers out for long.

    With a rollback journal, an open cursor holds a lock that blocks every commit.
    """

    def __init__(self, connections: Sequence[sa.Connection]) -> None:
        self._connections = [
            each
            for each in connections
            if each.dialect.name == "sqlite" and each.engine not in _warned
        ]
        self._begun = clock()

    def look(self) -> None:
        """Call it while the cursor is open. It costs a look at the clock."""
        seconds = clock() - self._begun
        if seconds > WRITERS_WAIT:
            while self._connections:
                self._warn(self._connections.pop(), seconds)

    def close(self) -> None:
        """Look again at the end, because a client may stop reading for good."""
        with suppress(sa.exc.SQLAlchemyError):  # the connection is gone
            self.look()

    def _warn(self, connection: sa.Connection, seconds: float) -> None:
        mode = _journal_of_file(connection)
        if mode is None or mode == "wal" or connection.engine in _warned:
            return
        _warned.add(connection.engine)
        log.warning(
            "rows() has been reading from %s for %.0f s. Its journal mode is %r, in "
            "which writers get 'database is locked' until the last row is read. "
            "Switch the file to WAL once (PRAGMA journal_mode=WAL), or use "
            "rows(..., key=...), which holds no lock between its batches",
            connection.engine.url.set(query={}),  # where a password may be
            seconds,
            mode,
        )


def _journal_of_file(connection: sa.Connection) -> str | None:
    """The journal mode of an SQLite file, or None in memory, without other writers."""
    cursor = connection.connection.cursor()
    try:
        cursor.execute("PRAGMA database_list")
        if not any(row[1] == "main" and row[2] for row in cursor.fetchall()):
            return None
        cursor.execute("PRAGMA main.journal_mode")
        ((mode,),) = cursor.fetchall()
        return str(mode).lower()
    finally:
        cursor.close()
