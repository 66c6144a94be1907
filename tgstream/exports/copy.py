"""``copy()``: the rows of a statement as CSV or JSON that the database itself writes.

The statement that is copied has exactly the text and the parameters with which
SQLAlchemy would have executed it, including everything that the application adds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from ..core.errors import StreamError
from ..database.cursors import close_with_transaction, refuse_automatic_commits
from ..formats.csv import CSV, joins_lines
from ..formats.json import joins_documents
from ..formats.protocols import Batched, CountedBatches
from .batch_sizes import BatchSizes
from .copy_commands import (
    Buffer,
    read_documents,
    write_csv_command,
    write_documents_command,
)
from .rows import Rows, check_session, find_session

if TYPE_CHECKING:
    import sqlalchemy as sa

    from ..formats.protocols import Format
    from .statement import DriverStatement, PreparedStatement

BLOCK_LINES = 256
"""Maximum lines in a block. More would not stay in a processor's cache."""


def copy(statement: Any, *, header: bool = True, session: Any = None) -> Copy:
    """Return the rows of a statement as CSV or JSON that PostgreSQL writes.

    Send it with ``CSV`` or without a format, or as JSON with ``NDJSON`` or
    ``JSONArray``. With psycopg 3 the bytes come from ``COPY ... TO STDOUT``, which
    takes a fraction of the time of :func:`rows`. Some values are written differently.
    With any other driver, with any other format, and with a ``CSV`` that has another
    dialect or an option that changes cells, a stream sends the same bytes as with
    ``rows(statement)``.

    The statement is executed when the result is iterated, in the stream's transaction,
    like :func:`rows` without ``key``. Do not use the same session for another statement
    before the last row: with psycopg 3 that is an error.

    :param statement: a ``select()``, a union, ``text()`` or a ``Query``.
    :param header: whether the first line that PostgreSQL writes has the names of the
        columns.
    :param session: a session or scoped session to use instead of the stream's own.
    :raises TypeError: if an argument has the wrong type.
    :raises StreamError: if the statement was already executed.
    """
    from .statement import prepare

    return Copy(prepare("copy", statement), header, check_session("copy", session))


class _CopySource(ABC):
    """The base of the sources that read from COPY, or from ``rows()`` if they must."""

    def __init__(self, prepared: PreparedStatement, session: Any) -> None:
        self.fields: Sequence[str] = ()
        self._prepared = prepared
        self._session = session

    def __iter__(self) -> Iterator[Any]:
        with closing(self.batches()) as batches:
            for batch in batches:
                yield from batch

    def batches(self) -> Generator[Sequence[Any], None, None]:
        """The items, a batch at a time. Close the generator to end the copying."""
        from ..database.effects import is_query
        from .statement import compile_for_driver

        session = find_session("copy", self._session, self._prepared.session)
        refuse_automatic_commits("copy", session)
        statement, compiled = self._prepared.statement, None
        if is_query(statement):
            compiled = compile_for_driver(session, statement, "postgresql", "psycopg")
        if compiled is None:
            rows = Rows(self._prepared, BLOCK_LINES, None, session)
            with closing(rows.batches()) as batches:
                yield from self._convert_rows(CountedBatches(rows, batches))
            return
        blocks = _copy_lines(compiled, self._write_command(compiled))
        with close_with_transaction(session, blocks):
            for lines in blocks:
                if not lines:
                    return
                yield self._convert_lines(lines)
        # The end of the transaction has closed the generator of blocks.
        raise _transaction_ended()

    @abstractmethod
    def _write_command(self, compiled: DriverStatement) -> str:
        """Return the COPY command of a statement."""

    @abstractmethod
    def _convert_lines(self, lines: Sequence[Buffer]) -> Sequence[Buffer]:
        """Return a batch of items for lines of the COPY command."""

    @abstractmethod
    def _convert_rows(self, rows: Batched) -> Iterator[Sequence[Any]]:
        """Yield batches of items for rows that were not copied."""


class Copy(_CopySource):
    """The result of :func:`copy`: an iterable of blocks of CSV, each of type bytes."""

    def __init__(self, prepared: PreparedStatement, header: bool, session: Any) -> None:
        super().__init__(prepared, session)
        self._header = header

    def __iter__(self) -> Iterator[bytes]:
        return super().__iter__()

    def encode_member(self) -> Iterator[bytes]:
        """The blocks, which are encoded already, as a member of a ZIP."""
        return iter(self)

    def for_format(self, format: Format | None) -> Batched:
        """The blocks of CSV, the JSON documents or the rows that a format encodes."""
        if format is None or joins_lines(format):
            return self
        if joins_documents(format):
            return CopiedDocuments(self._prepared, self._session)
        return Rows(self._prepared, BLOCK_LINES, None, self._session)

    def _write_command(self, compiled: DriverStatement) -> str:
        return write_csv_command(compiled.text, bool(self._header))

    def _convert_lines(self, lines: Sequence[Buffer]) -> Sequence[bytes]:
        return [b"".join(lines)]

    def _convert_rows(self, rows: Batched) -> Iterator[Sequence[bytes]]:
        format = CSV(header=None if self._header else ())
        for output in format.encode_batches(rows):
            if output:
                yield [output if isinstance(output, bytes) else output.encode()]


class CopiedDocuments(_CopySource):
    """The rows of :func:`copy` as encoded JSON documents, or as rows."""

    documents = False
    """Whether the items are encoded documents. Known with the first batch."""

    def _write_command(self, compiled: DriverStatement) -> str:
        driver: Any = compiled.connection.connection.driver_connection
        version = driver.info.server_version
        return write_documents_command(
            compiled.text, compiled.fields, compiled.types, version
        )

    def _convert_lines(self, lines: Sequence[Buffer]) -> Sequence[Buffer]:
        self.documents = True
        return read_documents(lines)

    def _convert_rows(self, rows: Batched) -> Iterator[Sequence[Any]]:
        for batch in rows.batches():
            self.fields = rows.fields
            yield batch


def _copy_lines(
    compiled: DriverStatement, command: str
) -> Generator[Sequence[Buffer], None, None]:
    """The lines that a COPY command writes, in blocks. The last block is empty."""
    connection = compiled.connection
    driver: Any = connection.connection.driver_connection
    # Ending a COPY early cancels it, which undoes the whole transaction unless it runs
    # in a savepoint.
    nested = nullcontext() if driver.autocommit else connection.begin_nested()
    # Without any parameter psycopg would keep the percent signs doubled.
    parameters = compiled.parameters or {"unused": None}
    with nested, _open_copy(connection, driver, command, parameters) as lines:
        yield from _read_blocks(driver, lines)
    yield ()


def _transaction_ended() -> StreamError:
    return StreamError(
        "copy(): the transaction ended before the last row was read. Read all rows "
        "first, or pass copy() a separate session"
    )


def _connection_in_use() -> StreamError:
    return StreamError(
        "cannot execute a statement or commit on the connection from which copy() is "
        "reading. Read all rows first, or pass copy() a separate session"
    )


@contextmanager
def _open_copy(
    connection: sa.Connection, driver: Any, command: str, parameters: Any
) -> Iterator[Any]:
    """Open the lines of a COPY command, and refuse other uses of its connection.

    Without the refusal another use would wait forever, because psycopg locks a
    connection that copies, even against its own thread.
    """
    import psycopg
    from sqlalchemy import event

    stack = ExitStack()
    errors: list[StreamError] = []

    def refuse(*args: Any) -> None:
        if not errors:
            raise _connection_in_use()

    def end(*args: Any) -> None:
        if not errors:
            errors.append(error := _transaction_ended())
            stack.__exit__(StreamError, error, None)

    listeners = {"before_cursor_execute": refuse, "commit": refuse, "rollback": end}
    try:
        with stack:
            cursor = stack.enter_context(driver.cursor())
            lines = stack.enter_context(cursor.copy(command, parameters))
            for name, listener in listeners.items():
                event.listen(connection, name, listener)
            yield lines
        if errors:
            raise errors[0]
    except psycopg.Error:
        if errors:  # a read after the end of the transaction
            raise errors[0] from None
        raise
    finally:
        for name, listener in listeners.items():
            if event.contains(connection, name, listener):
                event.remove(connection, name, listener)
        if driver.closed and not connection.closed:
            # A rollback would fail, and hide the error that is being raised.
            connection.invalidate()


def _read_blocks(driver: Any, lines: Any) -> Generator[Sequence[Buffer], None, None]:
    """Collect the lines in blocks.

    ``lines.read()`` waits for the first line of a block. The other lines are those that
    have arrived by then, taken from libpq. With ``lines.read()`` for each line, copy()
    takes 1.3 times as long (``python -m tests.benchmarks driver``, 100,000 rows).
    """
    get_line = driver.pgconn.get_copy_data
    sizes = BatchSizes(BLOCK_LINES)
    while True:
        block, length = [lines.read()], 1
        while block[0] and len(block) < sizes.size and length > 0:
            length, line = get_line(1)  # 1: do not wait
            if length > 0:
                block.append(line)
        if not block[0]:
            return
        sizes.grow(block)
        if length < 0:  # the end of the data, which psycopg has not seen
            driver.wait(_finish_command(driver.pgconn))
        yield block
        if length < 0:
            return


def _finish_command(pgconn: Any) -> Generator[Any, Any, None]:
    """Fetch the results of the command. An error may follow all of its lines."""
    from psycopg.errors import error_from_result
    from psycopg.pq import ExecStatus
    from psycopg.waiting import Wait

    results = []
    while True:
        while pgconn.is_busy():
            yield Wait.R
            pgconn.consume_input()
        if (result := pgconn.get_result()) is None:
            break
        results.append(result)
    for result in results:
        if result.status != ExecStatus.COMMAND_OK:
            raise error_from_result(result)
