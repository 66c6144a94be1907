"""The errors of a cursor whose transaction ends."""

from __future__ import annotations

from ..core.errors import StreamError


def open_cursor_error() -> StreamError:
    """The error of a commit or rollback while a cursor of tgstream is open."""
    return StreamError(
        "cannot commit or roll back while rows() or copy() is reading: it would close "
        "the cursor. Use rows(..., key=...), or finish reading first"
    )


def automatic_commit_error(controller: str, hook: str) -> StreamError:
    """The error of a cursor in a stream that commits after its items."""
    return StreamError(
        f"{controller} commits after its items, which would close the cursor of "
        f"{hook}(). Use rows(..., key=...), or commit='end'"
    )


def closed_cursor_error(controller: str, cause: BaseException) -> StreamError:
    """The error of a generator that reads from a cursor that a commit has closed.

    :param cause: the error of the driver or of SQLAlchemy.
    """
    error = StreamError(
        f"{controller}: a commit closed the cursor that the generator was reading "
        "from. Use rows(..., key=...), fetch all rows first, or commit after reading"
    )
    error.__cause__ = cause
    return error
