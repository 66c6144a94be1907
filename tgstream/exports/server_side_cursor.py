"""The cursor of ``rows()``: its options, its plan, and the writers that it blocks.

A server-side cursor keeps the result in the database. For some statements and
connections a server-side cursor is impossible. The driver then fetches all rows.
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
from ..database.effects import is_query
from ..database.writes import OWN_STATEMENT

BUSY_TIMEOUT = 5.0
"""Seconds that sqlite3 waits for a lock by default before it raises an error."""


def cursor_options(
    connection: sa.Connection, statement: Any, batch: int
) -> Mapping[str, Any]:
    """Return the execution options to read ``statement`` on ``connection``.

    :param batch: maximum number of rows that are fetched at once.
    """
    if not _can_have_cursor(connection, statement):
        return {"stream_results": False}
    if connection.dialect.name == "postgresql":
        _plan_for_all_rows(connection)
    return {"stream_results": True, "max_row_buffer": batch}


def _can_have_cursor(connection: sa.Connection, statement: Any) -> bool:
    """True if a statement can have a server-side cursor on this connection.

    PostgreSQL's DECLARE CURSOR accepts only a query, in a transaction. AUTOCOMMIT
    can be set in many places, but the driver's connection always shows it.
    """
    if not _is_postgresql(connection.dialect):
        return True
    driver = connection.connection.driver_connection
    return not getattr(driver, "autocommit", False) and is_query(statement)


def _is_postgresql(dialect: Any) -> bool:
    """True for PostgreSQL and dialects that derive from it.

    It does not import them: without PostgreSQL that takes longer than a short export.
    """
    base = sys.modules.get("sqlalchemy.dialects.postgresql.base")
    return base is not None and isinstance(dialect, base.PGDialect)


_FRACTION = sa.func.current_setting("cursor_tuple_fraction", True)
_PLAN_FOR_ALL = sa.select(sa.func.set_config("cursor_tuple_fraction", "1", True)).where(
    _FRACTION == "0.1"
)


def _plan_for_all_rows(connection: sa.Connection) -> None:
    """Make PostgreSQL plan for all rows, not for the first tenth of them.

    This takes one round trip. The setting lasts until the transaction ends and affects
    only cursors. A value that the application has chosen stays.
    """
    connection.execute(_PLAN_FOR_ALL, execution_options={OWN_STATEMENT: True})


# SQLite.


_warned_engines: WeakSet[Any] = WeakSet()


class BlockedWriterWarning:
    """Warns once per engine when reading an SQLite file blocks writers for long.

    With a rollback journal an open cursor holds a lock that blocks every commit.
    """

    def __init__(self, connections: Sequence[sa.Connection]) -> None:
        self._connections = [
            connection
            for connection in connections
            if connection.dialect.name == "sqlite"
            and connection.engine not in _warned_engines
        ]
        self._started = clock()

    def check(self) -> None:
        """Warn if the cursor has been open for too long. Call it after each batch."""
        seconds = clock() - self._started
        if seconds > BUSY_TIMEOUT:
            while self._connections:
                self._warn(self._connections.pop(), seconds)

    def close(self) -> None:
        """Check at the end too, because a client may have stopped reading."""
        with suppress(sa.exc.SQLAlchemyError):  # the connection may be closed
            self.check()

    def _warn(self, connection: sa.Connection, seconds: float) -> None:
        mode = _journal_mode(connection)
        if mode is None or mode == "wal" or connection.engine in _warned_engines:
            return
        _warned_engines.add(connection.engine)
        log.warning(
            "rows() has been reading from %s for %.0f s. Its journal mode is %r, in "
            "which writers get 'database is locked' until the last row is read. "
            "Switch the file to WAL once (PRAGMA journal_mode=WAL), or use "
            "rows(..., key=...), which holds no lock between its batches",
            connection.engine.url.set(query={}),  # the query may have a password
            seconds,
            mode,
        )


def _journal_mode(connection: sa.Connection) -> str | None:
    """Return the journal mode of an SQLite file, or None for a database in memory."""
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
