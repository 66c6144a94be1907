"""Whether something was written in a transaction. The driver or the server knows it."""

from __future__ import annotations

from typing import Any

OWN_STATEMENT = "tgstream_rows"
"""The execution option of the statements that tgstream runs."""


def knows_writes(connection: Any) -> bool:
    """True if :func:`has_written` is exact for the database of ``connection``."""
    return connection.dialect.name in ("postgresql", "sqlite")


def has_written(connection: Any) -> bool:
    """True if something may have been written in the transaction of ``connection``."""
    name = connection.dialect.name
    if name == "postgresql":
        statement = "SELECT txid_current_if_assigned() IS NOT NULL"
        options = {OWN_STATEMENT: True}
        result = connection.exec_driver_sql(statement, execution_options=options)
        return bool(result.scalar())
    if name == "sqlite":
        return bool(connection.connection.driver_connection.in_transaction)
    return True
