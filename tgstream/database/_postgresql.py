"""PostgreSQL, where it and its drivers differ from what a commit relies on.

Rule: what would lose rows without a word is refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..core.errors import StreamError

_INERROR = 3
"""What libpq, and so psycopg 3 and 2, calls a transaction that has failed."""


def refuse_failed(connections: Iterable[Any]) -> None:
    """Refuse to commit what PostgreSQL would undo, and would say that it has committed.

    :raises StreamError: when a statement has failed, and its error was caught.
    """
    for connection in connections:
        if connection.closed or connection.invalidated:
            continue
        info = getattr(connection.connection.driver_connection, "info", None)
        if getattr(info, "transaction_status", None) == _INERROR:
            raise StreamError(
                "a statement has failed in this transaction, and PostgreSQL would undo "
                "all of it and say nothing: where you catch a database's error call "
                "rollback(), or run the statement in DBSession.begin_nested()"
            )
