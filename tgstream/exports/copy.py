"""``copy()``: what a statement selects, as the CSV that the database itself writes.

Rule: the statement that is copied is, to the byte and with its parameters, the one that
SQLAlchemy would have run, with all that an application adds to it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from ..core.errors import StreamError
from ..database.cursors import Sizes, close_with_transaction, refuse_automatic_commits
from ..formats.csv import CSV
from ..formats.protocols import Passed
from .rows import Rows, check_session, session_of

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.orm import Session

    from .statement import Prepared

LINES = 256
"""Lines of a block, at most: psycopg gives one at a time; more leave a CPU's cache."""


def copy(statement: Any, *, header: bool = True, session: Any = None) -> Copy:
    """The rows of a statement as CSV that PostgreSQL writes itself, to be sent by CSV.

    With psycopg 3 these are the bytes of ``COPY ... TO STDOUT``, which takes a fraction
    of the time of :func:`rows`; the texts of some values differ. With any other driver
    they are what ``CSV`` makes of ``rows(statement)``. It runs when it is iterated, and
    holds the stream's transaction as :func:`rows` without ``key`` does. Do not use its
    session for another statement before its end: with psycopg 3 that is refused.

    :param statement: ``select()``, a union, ``text()``, or a ``Query``.
    :param header: whether the first line has the names of the columns.
    :param session: a session or scoped session in place of the stream's own.
    :raises TypeError: when an argument is of a wrong kind.
    :raises StreamError: when the statement has run already.
    """
    from .statement import prepared

    return Copy(prepared("copy", statement), header, check_session("copy", session))


class Copy:
    """What :func:`copy` returns: an iterable of blocks of CSV, which are bytes."""

    fields: Sequence[str] = ()

    def __init__(self, prepared: Prepared, header: bool, session: Any) -> None:
        self._prepared = prepared
        self._header = header
        self._session = session

    def __iter__(self) -> Iterator[bytes]:
        with closing(self.batches()) as batches:
            for batch in batches:
                yield from batch

    def batches(self) -> Generator[Sequence[bytes], None, None]:
        """The blocks, one at a time; close it to end the copying."""
        from ..database.effects import is_query
        from .statement import compiled

        session = session_of("copy", self._session, self._prepared.session)
        refuse_automatic_commits("copy", session)
        statement, found = self._prepared.statement, None
        if is_query(statement):
            found = compiled(session, statement, "postgresql", "psycopg")
        if found is not None:
            blocks = self._by_database(*found)
            with close_with_transaction(session, blocks):
                for block in blocks:
                    if not block:
                        return
                    yield [block]
            raise _ended()  # by who closes cursors: with the transaction
        else:
            yield from self._by_rows(session)

    def _by_rows(self, session: Session) -> Generator[Sequence[bytes], None, None]:
        rows = Rows(self._prepared, LINES, None, session)
        format = CSV(header=None if self._header else ())
        with closing(rows.batches()) as batches:
            for piece in format.encode_batches(Passed(rows, batches)):
                if piece:
                    yield [piece if isinstance(piece, bytes) else piece.encode()]

    def _by_database(
        self, connection: sa.Connection, statement: str, parameters: Any
    ) -> Generator[bytes, None, None]:
        """The blocks, and an empty one when that was all."""
        options = f"FORMAT csv, HEADER {bool(self._header)}, ENCODING 'UTF8'"
        command = f"COPY (\n{statement}\n) TO STDOUT ({options})"
        driver: Any = connection.connection.driver_connection
        # To end it early cancels it, and a canceled statement takes what was done in
        # its transaction with it, but for a savepoint.
        nested = nullcontext() if driver.autocommit else connection.begin_nested()
        # Without a parameter psycopg would leave the percent signs doubled.
        parameters = parameters or {"none": None}
        with nested, _copying(connection, driver, command, parameters) as lines:
            yield from _blocks(driver, lines)
        yield b""


def _ended() -> StreamError:
    return StreamError(
        "the transaction was ended before copy() was at its end; take all of it first, "
        "or give it a session of its own"
    )


def _busy() -> StreamError:
    return StreamError(
        "a statement or a commit came while copy() was reading over the same "
        "connection; take all of it first, or give it a session of its own"
    )


@contextmanager
def _copying(
    connection: Any, driver: Any, command: str, parameters: Any
) -> Iterator[Any]:
    """The lines of a command; what else is asked of its connection does not wait.

    It would wait for ever: psycopg locks a connection that copies, against its own
    thread, too.
    """
    import psycopg
    from sqlalchemy import event

    stack = ExitStack()
    ended: list[StreamError] = []

    def refuse(*args: Any) -> None:
        if not ended:
            raise _busy()

    def end(*args: Any) -> None:
        if not ended:
            ended.append(error := _ended())
            stack.__exit__(StreamError, error, None)

    listeners = {"before_cursor_execute": refuse, "commit": refuse, "rollback": end}
    try:
        with stack:
            cursor = stack.enter_context(driver.cursor())
            lines = stack.enter_context(cursor.copy(command, parameters))
            for name, listener in listeners.items():
                event.listen(connection, name, listener)
            yield lines
        if ended:
            raise ended[0]
    except psycopg.Error:  # there is nothing more to read
        if ended:
            raise ended[0] from None
        raise
    finally:
        for name, listener in listeners.items():
            if event.contains(connection, name, listener):
                event.remove(connection, name, listener)
        if driver.closed and not connection.closed:
            connection.invalidate()  # or to roll back would fail, and hide why


def _blocks(driver: Any, lines: Any) -> Generator[bytes, None, None]:
    """The lines, gathered: a call of psycopg's own for each costs as much as the rest.

    psycopg waits for the first of a block; then what has come already is taken.
    """
    take = driver.pgconn.get_copy_data
    sizes = Sizes(LINES)
    while True:
        block, count = [lines.read()], 1
        while block[0] and len(block) < sizes.size and count > 0:
            count, line = take(1)  # do not wait
            if count > 0:
                block.append(line)
        if not block[0]:
            return
        sizes.grow(block)
        if count < 0:  # it was the end, which psycopg has then not seen
            driver.wait(_end(driver.pgconn))
        yield b"".join(block)
        if count < 0:
            return


def _end(pgconn: Any) -> Generator[Any, Any, None]:
    """Take what the server says of its command: an error may come after all lines."""
    from psycopg.errors import error_from_result
    from psycopg.pq import ExecStatus
    from psycopg.waiting import Wait

    said = []
    while True:
        while pgconn.is_busy():
            yield Wait.R
            pgconn.consume_input()
        if (result := pgconn.get_result()) is None:
            break
        said.append(result)
    for result in said:
        if result.status != ExecStatus.COMMAND_OK:
            raise error_from_result(result)
