"""``rows()``: the rows of a statement as items for any format, in constant memory.

Nothing is executed before the rows are iterated. Closing the iterator, by whomever,
closes the cursor.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import tg

from ..core.errors import StreamError
from ..database.cursors import (
    close_with_transaction,
    end_read_transaction,
    find_database,
    refuse_automatic_commits,
    track_connections,
)
from ..database.registry import scoped_sessions
from ..formats.convert import Converter, Function, make_converter
from ..formats.protocols import BATCH_SIZE, ColumnType
from .batch_sizes import BatchSizes

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.orm import Session

    from ..database.database import StreamDatabase
    from .keyset import Keyset
    from .statement import PreparedStatement


def rows(
    statement: Any,
    *,
    batch: int = 1000,
    key: Any = None,
    after: Any = None,
    session: Any = None,
    convert: Mapping[Any, Function] | None = None,
) -> Rows:
    """Return the rows of a statement as items for any format, fetched in batches.

    Mapped classes are replaced by their columns, except deferred ones. Each item is a
    ``Row`` of SQLAlchemy. The statement is executed each time the rows are iterated, in
    the stream's own session, so that the event handlers of your application apply.

    Without ``key`` one cursor reads one snapshot in the stream's transaction. Until the
    last row, a commit or rollback is an error, and so are automatic commits. On MySQL
    and MariaDB any other statement of the session is an error too. If PostgreSQL cannot
    use a cursor (AUTOCOMMIT, INSERT ... RETURNING, SHOW), the driver fetches all rows
    at once.

    With ``key`` each batch is a separate query that continues after the last row's key.
    Between batches the transaction is over and the connection is back in the pool,
    unless there are uncommitted changes. A transaction that the generator began stays
    open if it may hold more than reads: a lock, a ``SET LOCAL``, an open cursor. You
    can commit at any time. Rows that are added or changed meanwhile are included if
    they sort after the rows that were already read.

    :param statement: a ``select()`` or a ``Query``. Without ``key`` also a union or
        ``text()``.
    :param batch: maximum number of rows that are fetched at once.
    :param key: columns that identify a row and order the rows: a column or a tuple of
        columns, each with ``desc()``, ``nulls_first()`` or ``nulls_last()`` if needed.
    :param after: start after this key: a value, or a tuple with a value per column.
    :param session: a session or scoped session to use instead of the stream's own. Its
        owner must end its transaction.
    :param convert: maps a type or the name of a column to a function of one value, such
        as ``{Decimal: str}``. The function gets the values of the column, or those of
        the type and its subclasses, and never None. A name outranks a type, and the
        nearest base class wins. The items stay rows with the same names.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if ``batch`` is not an integer >= 1.
    :raises StreamError: if the statement was already executed, or cannot be read by key
        because it locks rows, writes, or has its own order or limit.
    """
    from .statement import prepare

    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise ValueError(f"rows(): batch must be an integer >= 1, got {batch!r}")
    prepared = prepare("rows", statement)
    keyset = None
    if key is not None:
        from .keyset import Keyset

        keyset = Keyset(prepared.statement, key, after)
    elif after is not None:
        raise TypeError(
            f"rows(): after={after!r} needs key=, the columns of its values. Pass both"
        )
    converter = make_converter("rows()", convert)
    return Rows(prepared, batch, keyset, check_session("rows", session), converter)


def is_statement(value: Any) -> bool:
    """True for a statement that :func:`rows` takes. It does not import SQLAlchemy."""
    if "sqlalchemy.orm" not in sys.modules:
        return False
    from .statement import STATEMENT_TYPES

    return isinstance(value, STATEMENT_TYPES)


class Rows:
    """The result of :func:`rows`: an iterable of ``Row`` that comes in batches."""

    def __init__(
        self,
        prepared: PreparedStatement,
        batch: int,
        keyset: Keyset | None,
        session: Any,
        converter: Converter | None = None,
    ) -> None:
        self.fields: Sequence[str] = ()
        self._prepared = prepared
        self._batch = batch
        self._keyset = keyset
        self._session = session
        self._converter = converter

    @property
    def types(self) -> Sequence[ColumnType | None]:
        """The types of the columns. None for an unknown type, () if all are unknown.

        They are known when the first batch has been requested.
        """
        from .column_types import column_types

        types, converter = column_types(self._prepared.statement), self._converter
        if converter is None:
            return types
        return [
            None if type_ is None or _is_converted(converter, name, type_) else type_
            for name, type_ in zip(self.fields, types, strict=False)
        ]

    def __iter__(self) -> Iterator[Any]:
        with closing(self.batches()) as batches:
            for batch in batches:
                yield from batch

    def batches(self) -> Generator[Sequence[Any], None, None]:
        """The rows, a batch at a time. Close the generator to close the cursor."""
        session = find_session("rows", self._session, self._prepared.session)
        batches = (
            self._read_by_cursor(session)
            if self._keyset is None
            else self._read_by_key(session, self._keyset)
        )
        if self._converter is None:
            yield from batches
        else:
            with closing(batches):
                yield from self._convert_batches(batches, self._converter)

    def _convert_batches(
        self, batches: Iterator[Sequence[Any]], converter: Converter
    ) -> Iterator[Sequence[Any]]:
        """Yield the batches with converted values, as rows with the same names."""
        from .statement import make_rows

        number = 0

        def name_value(name: str, index: int) -> str:
            return f"item {number + index + 1}, column {name!r}"

        for batch in batches:
            columns = [
                converter.convert_column(
                    column, converter.find_function(name), partial(name_value, name)
                )
                for name, column in zip(
                    self.fields, zip(*batch, strict=True), strict=True
                )
            ]
            yield make_rows(self.fields, zip(*columns, strict=True))
            number += len(batch)

    def _read_by_cursor(self, session: Session) -> Generator[Sequence[Any], None, None]:
        from .mysql import DIALECT_NAMES, refuse_other_statements
        from .server_side_cursor import BlockedWriterWarning, cursor_options
        from .statement import execute

        refuse_automatic_commits("rows", session)
        connections: list[sa.Connection] = []

        def choose_options(
            connection: sa.Connection, statement: Any
        ) -> Mapping[str, Any]:
            connections.append(connection)
            return cursor_options(connection, statement, self._batch)

        result = execute(session, self._prepared.statement, choose_options)
        unbuffered = [
            connection
            for connection in connections
            if connection.dialect.name in DIALECT_NAMES
        ]
        warning = BlockedWriterWarning(connections)
        with (
            close_with_transaction(session, result),
            refuse_other_statements(unbuffered, result),
            closing(warning),
        ):
            self.fields = self._get_fields(result)
            sizes = BatchSizes(min(self._batch, BATCH_SIZE))
            # A server-side cursor of SQLAlchemy has already fetched the first row. Its
            # size shows how many rows can be fetched at once.
            batch = result.fetchmany(1)
            if room := sizes.room_after(batch):
                batch = [*batch, *result.fetchmany(room)]
            while batch:
                sizes.grow(batch)
                yield batch
                warning.check()
                batch = result.fetchmany(sizes.size)

    def _read_by_key(
        self, session: Session, keyset: Keyset
    ) -> Generator[Sequence[Any], None, None]:
        from .statement import OtherEngineError, find_dialect

        database = find_database(session)
        if database is not None:
            track_connections(session, database)
        dialect = find_dialect(session, self._prepared.statement)
        batches = self._read_on_dialect(dialect, session, keyset, database)
        try:
            first = next(batches, None)
        except OtherEngineError as other:
            batches = self._read_on_dialect(other.dialect, session, keyset, database)
            first = next(batches, None)
        if first is not None:
            yield first
            yield from batches

    def _read_on_dialect(
        self,
        dialect: sa.Dialect,
        session: Session,
        keyset: Keyset,
        database: StreamDatabase | None,
    ) -> Iterator[Sequence[Any]]:
        """The batches by key.

        :raises OtherEngineError: if the session uses an engine of another dialect,
            before the first batch if possible.
        """
        from ..database.effects import only_reads
        from .statement import OtherEngineError, execute

        expected = f"{dialect.name}+{dialect.driver}"
        may_write = not only_reads(keyset.statement)

        def fetch_rows(statement: Any) -> tuple[list[str], Sequence[Any]]:
            began = not session.in_transaction()
            connections: list[sa.Connection] = []

            def choose_options(
                connection: sa.Connection, statement: Any
            ) -> Mapping[str, Any]:
                actual = connection.dialect
                if connections or expected != f"{actual.name}+{actual.driver}":
                    raise OtherEngineError("rows", actual, expected)
                connections.append(connection)
                return {"stream_results": False}

            result = execute(session, statement, choose_options)
            fetched = self._get_fields(result), result.all()
            if database is not None:
                end_read_transaction(
                    session, database, began, connections if may_write else ()
                )
            return fetched

        reader = keyset.read(dialect, self._batch, fetch_rows)
        for batch in reader:
            self.fields = reader.fields
            if batch:
                yield batch

    def _get_fields(self, result: sa.Result[Any]) -> list[str]:
        from .statement import get_fields

        return get_fields("rows", result)


def _is_converted(converter: Converter, name: str, type_: ColumnType) -> bool:
    """Whether the values of a column may have another type than the statement's."""
    if converter.find_function(name) is not None:
        return True
    classes = [type_.python_type]
    while type_.item is not None:
        type_ = type_.item
        classes.append(type_.python_type)
    if dict in classes:  # JSON, which remains JSON if its parts are converted
        classes.append(list)
    return any(map(converter.converts, classes))


# The session of rows() and copy().


def check_session(function: str, session: Any) -> Any:
    """Return ``session`` if it is a session, a scoped session or None.

    :param function: the name for the error message, ``rows`` or ``copy``.
    :raises TypeError: if it is something else.
    """
    if session is not None and not (
        hasattr(session, "execute") and hasattr(session, "get_bind")
    ):
        raise TypeError(
            f"{function}(): session must be a Session or a scoped_session, got "
            f"{session!r}. Leave it out to use the stream's own session"
        )
    return session


def find_session(function: str, given: Any, of_query: Session | None) -> Session:
    """The session to use: the given one, the Query's, or the application's first.

    :raises StreamError: if there is no session.
    """
    session = given if given is not None else of_query
    if session is None:
        scoped = scoped_sessions(tg.config)
        if not scoped:
            raise StreamError(
                f"{function}() has no session, because the application has no "
                f"DBSession. Pass a session: {function}(statement, session=...)"
            )
        session = scoped[0]
    return session() if callable(session) else session
