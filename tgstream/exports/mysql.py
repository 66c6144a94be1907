"""MySQL and MariaDB, where they or their drivers cannot do what ``rows()`` needs.

Everything that would lose rows silently is refused with an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.types import TypeDecorator

from ..core.errors import StreamError

DIALECT_NAMES = frozenset({"mysql", "mariadb"})

_SORTABLE = sa.Integer, sa.Numeric, sa.Uuid, sa.Boolean, sa.Date, sa.DateTime, sa.Time
_TOO_LONG = 256  # characters, each of up to four bytes


def sorts_as_returned(column_type: Any, dialect: Any) -> bool:
    """True for a type that is sorted by the values which the driver returns.

    ENUM and SET are sorted by number. FLOAT is returned rounded. The literal of a BIT
    is a string. Long values are sorted by their first bytes only (``max_sort_length``,
    1024). The answer for an unknown type is False.
    """
    # Imported here, where the dialect is in use: it takes longer than a short export.
    from sqlalchemy.dialects import mysql

    while isinstance(column_type, TypeDecorator):
        column_type = column_type.load_dialect_impl(dialect)
    if isinstance(column_type, sa.Float):
        return isinstance(column_type, sa.Double)
    if isinstance(column_type, sa.Enum) and column_type.native_enum:
        return False
    if isinstance(column_type, mysql.SET):
        return False
    if isinstance(column_type, sa.String | sa.BINARY | sa.VARBINARY):
        return (column_type.length or _TOO_LONG) < _TOO_LONG
    return isinstance(column_type, _SORTABLE)


@contextmanager
def refuse_other_statements(
    connections: Sequence[sa.Connection], cursor: Any
) -> Iterator[None]:
    """Refuse other statements on a connection while ``cursor`` is read from it.

    The rows of an unbuffered cursor arrive while they are read. Before another
    statement PyMySQL discards the rest of them, and the cursor then ends as if it were
    complete.

    :param connections: the connection of the cursor, or nothing if the cursor is not
        unbuffered.
    :raises StreamError: in place of the other statement.
    """

    def refuse(*args: Any) -> None:
        if not cursor.closed:
            raise StreamError(
                "rows() is reading from this connection, on which MySQL and MariaDB "
                "execute no other statement before the last row. Use rows(..., "
                "key=...), which fetches whole batches, or pass rows() a separate "
                "session"
            )

    def close(*args: Any) -> None:
        cursor.close()

    listeners = {"before_cursor_execute": refuse, "commit": close, "rollback": close}
    for connection in connections:
        for name, listener in listeners.items():
            event.listen(connection, name, listener)
    try:
        yield
    finally:
        for connection in connections:
            for name, listener in listeners.items():
                # Garbage collection may have removed the listener already.
                with suppress(sa.exc.InvalidRequestError):
                    event.remove(connection, name, listener)
