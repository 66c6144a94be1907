"""MySQL and MariaDB, where they and their drivers differ from what rows() relies on.

Rule: what would lose rows without a word is refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.types import TypeDecorator

from ..core.errors import StreamError

NAMES = frozenset({"mysql", "mariadb"})

_COMPARED = sa.Integer, sa.Numeric, sa.Uuid, sa.Boolean, sa.Date, sa.DateTime, sa.Time
_LONG = 256  # characters, of up to four bytes


def compares(kind: Any, dialect: Any) -> bool:
    """True for a type whose values sort as they compare with what a driver shows.

    ENUM and SET sort by number, FLOAT is shown rounded, the literal of a BIT is a text;
    and of what is long only the first bytes sort (``max_sort_length``, 1024).
    """
    from sqlalchemy.dialects import mysql  # here it is known that there is one

    while isinstance(kind, TypeDecorator):
        kind = kind.load_dialect_impl(dialect)
    if isinstance(kind, sa.Float):
        return isinstance(kind, sa.Double)
    if (isinstance(kind, sa.Enum) and kind.native_enum) or isinstance(kind, mysql.SET):
        return False
    if isinstance(kind, sa.String | sa.BINARY | sa.VARBINARY):
        return (kind.length or _LONG) < _LONG
    return isinstance(kind, _COMPARED)


@contextmanager
def alone(connections: Sequence[sa.Connection], cursor: Any) -> Iterator[None]:
    """Keep other statements off a connection while ``cursor`` is read from it.

    Its rows are on their way, unbuffered: before another statement PyMySQL reads them
    away, and the cursor then ends as if it had given them all.

    :param connections: the one that it is read from; none, if it is no such cursor.
    :raises StreamError: in place of the other statement.
    """

    def refuse(*args: Any) -> None:
        if not cursor.closed:
            raise StreamError(
                "rows() reads from this connection, which on MySQL and MariaDB takes "
                "no other statement before the last row; use rows(..., key=...), whose "
                "batches are fetched whole, or give rows() a session of its own"
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
                with suppress(sa.exc.InvalidRequestError):  # all this is garbage
                    event.remove(connection, name, listener)
