"""The errors of a cursor whose transaction ends."""

from __future__ import annotations

from ..core.errors import StreamError


def cursor_open(where: str = "") -> StreamError:
    """Why a transaction cannot end now, or an open cursor cannot be had."""
    return StreamError(
        f"{where}a commit or rollback ends the transaction, and with it the cursor "
        "that rows() or copy() reads from; use rows(..., key=...), whose batches "
        "outlive it, or end reading before"
    )


def cursor_ended(controller: str, cause: BaseException) -> StreamError:
    """What a driver means when it says that a cursor is gone."""
    error = StreamError(
        f"{controller}: a commit ended the transaction, and with it the cursor that "
        "the generator was reading from; read with rows(..., key=...), fetch the rows "
        "first, or choose another commit"
    )
    error.__cause__ = cause
    return error
