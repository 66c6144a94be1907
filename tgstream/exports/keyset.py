"""Keyset pagination: each batch is a query that starts after the last row's key.

No row is lost and no row comes twice. A statement or key for which this cannot be
certain is refused. So a key's value is sent back to the database exactly as the driver
returned it, whatever type Python has for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import visitors

from ..core.errors import StreamError
from ..database.effects import find_lock, writes
from .batch_sizes import BatchSizes
from .keyset_columns import (
    bind_driver_value,
    find_position,
    is_same_key,
    may_be_equal,
    parse_key,
    selected_columns,
    to_driver_value,
)
from .statement import make_rows

FetchRows = Callable[[Any], tuple[list[str], Sequence[Any]]]
"""Executes a statement, and returns the names of its columns and its rows."""

_LABEL = "_tgstream_key_"


class Keyset:
    """A statement that is read by key.

    :raises TypeError: if ``key`` has no columns, or ``after`` does not match it.
    :raises StreamError: if the statement cannot continue after a key.
    """

    def __init__(self, statement: Any, key: Any, after: Any) -> None:
        _check_statement(statement)
        self.statement: sa.Select[Any] = statement
        self.columns = parse_key(statement, key)
        self.after: tuple[Any, ...] | None = None
        if after is not None:
            self.after = after if isinstance(after, tuple) else (after,)
            if len(self.after) != len(self.columns):
                raise TypeError(
                    f"rows(): after must have a value per column of key=, got "
                    f"{len(self.after)} for {len(self.columns)}: {after!r}. Pass a "
                    "tuple"
                )

    def read(self, dialect: Any, batch: int, fetch_rows: FetchRows) -> KeysetReader:
        """Return an iterator of batches.

        :param dialect: the dialect of the database.
        :param batch: maximum number of rows in a batch.
        """
        return KeysetReader(self, dialect, batch, fetch_rows)


def _check_statement(statement: Any) -> None:
    if not isinstance(statement, sa.Select):
        raise StreamError(
            "rows(key=...) adds a WHERE clause, which a union or text() cannot take. "
            "Make the statement a subquery() and select() from it"
        )
    clauses = _own_clauses(statement)
    _check_effects(statement)
    columns = [column["expr"] for column in statement.column_descriptions]
    if any(_has_window(column) for column in columns):
        clauses.append("a window function")
    if clauses:
        raise StreamError(
            "rows(key=...) adds its own ORDER BY and LIMIT, but the statement has "
            f"{' and '.join(clauses)}. Remove that, or make the statement a subquery() "
            "and select() from it"
        )


def _own_clauses(statement: sa.Select[Any]) -> list[str]:
    """The clauses of a statement that would change which rows come after a key.

    These attributes of SQLAlchemy are private. If one is renamed, reading it must fail:
    a default value would accept the clause, and rows would be lost.
    """
    clauses: dict[str, Any] = {
        "ORDER BY": statement._order_by_clauses,
        "LIMIT": statement._limit_clause,
        "OFFSET": statement._offset_clause,
        "FETCH": statement._fetch_clause,
        "DISTINCT": statement._distinct,
        "GROUP BY": statement._group_by_clauses,
        "HAVING": statement._having_criteria,
    }
    return [name for name, clause in clauses.items() if _is_set(clause)]


def _is_set(clause: Any) -> bool:
    """True for a flag, a tuple of clauses or a clause, which has no truth value."""
    return bool(clause) if isinstance(clause, bool | tuple) else clause is not None


def _check_effects(statement: sa.Select[Any]) -> None:
    if (lock := find_lock(statement)) is not None:
        raise StreamError(
            f"rows(key=...) cannot read a statement with {lock}. Its transaction ends "
            "after each batch, and its locks with it, before the rows are used. Use "
            "rows() without key=, or lock each row where you change it"
        )
    if writes(statement):
        raise StreamError(
            "rows(key=...) cannot read a statement that contains INSERT, UPDATE or "
            "DELETE, because it would run again for each batch. Use rows() without key="
        )


def _has_window(column: Any) -> bool:
    clause = getattr(column, "expression", column)
    return isinstance(clause, sa.ClauseElement) and any(
        isinstance(part, sa.Over) for part in visitors.iterate(clause)
    )


class KeysetReader:
    """Reads the rows of a keyset once, in batches. The first batch may be empty.

    ``fields`` are the names of the columns. They are known after the first batch.
    """

    def __init__(
        self, keyset: Keyset, dialect: Any, batch: int, fetch_rows: FetchRows
    ) -> None:
        self.fields: Sequence[str] = ()
        self._columns = tuple(column.for_dialect(dialect) for column in keyset.columns)
        self._dialect = dialect
        self._batch = batch
        self._fetch_rows = fetch_rows
        self._after_key: tuple[Any, ...] | None = None
        if keyset.after is not None:
            self._after_key = tuple(
                to_driver_value(column, value, dialect)
                for column, value in zip(self._columns, keyset.after, strict=True)
            )
        self._last_key: tuple[Any, ...] | None = None
        self._prepare(keyset.statement)

    def _prepare(self, statement: sa.Select[Any]) -> None:
        """Order by the key, and select its columns that the rows do not have."""
        selected, dialect = selected_columns(statement), self._dialect
        positions = [
            find_position(column, selected, dialect) for column in self._columns
        ]
        hidden = [n for n, position in enumerate(positions) if position is None]
        self._hidden = len(hidden)
        for number, index in enumerate(hidden):
            expression = self._columns[index].exact_expression(dialect)
            statement = statement.add_columns(expression.label(f"{_LABEL}{number}"))
            positions[index] = number - len(hidden)  # from the end
        self._key_positions = positions
        self._statement = statement.order_by(
            *(order for column in self._columns for order in column.order)
        )

    def __iter__(self) -> Iterator[Sequence[Any]]:
        sizes = BatchSizes(self._batch)
        while True:
            size = sizes.size
            rows = self._fetch(size + 1)
            is_last = len(rows) <= size
            end = len(rows) if is_last else self._complete_groups(rows, size)
            if end or is_last:
                if end:
                    self._last_key = self._after_key = self._key_of(rows[end - 1])
                sizes.grow(rows)
                yield self._without_hidden(rows[:end])
                if is_last:
                    return
            elif size == self._batch:
                raise StreamError(
                    f"rows(key=...): more than batch={size} rows have the same key "
                    f"{self._key_of(rows[-1])}. Add the primary key to key="
                )
            else:  # all rows have the same key: fetch more, however large they are
                sizes.grow()

    def _fetch(self, limit: int) -> Sequence[Any]:
        statement = self._statement
        if self._after_key is not None:
            statement = statement.where(self._after(self._after_key))
        fields, rows = self._fetch_rows(statement.limit(limit))
        self.fields = fields[: len(fields) - self._hidden]
        last_key = self._last_key
        if (
            rows
            and last_key is not None
            and is_same_key(self._key_of(rows[0]), last_key)
        ):
            raise StreamError(
                f"rows(key=...): the database returned the key {last_key} as greater "
                "than itself, so reading would never end. It does not compare this "
                "type by the values that it returns. Choose another key"
            )
        return rows

    def _key_of(self, row: Any) -> tuple[Any, ...]:
        return tuple([row[position] for position in self._key_positions])

    def _complete_groups(self, rows: Sequence[Any], size: int) -> int:
        """The number of rows to return, so that rows with equal keys stay together."""
        end, next_key = size, self._key_of(rows[size])
        if may_be_equal(self._columns, self._key_of(rows[end - 1]), next_key):
            equal_keys = self._equal_keys(next_key)
            if len(equal_keys) > self._batch:
                return 0
            distinct_keys = set(equal_keys)
            while end and (
                (key := self._key_of(rows[end - 1])) in distinct_keys
                or is_same_key(key, next_key)
            ):
                end -= 1
        return end

    def _equal_keys(self, key: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """The keys that equal ``key`` in the database, up to batch + 1 keys.

        The database must compare them: its collation may consider strings equal.
        """
        conditions = (
            column.equals(bind_driver_value(value, self._dialect))
            for column, value in zip(self._columns, key, strict=True)
        )
        statement = self._statement.where(*conditions).limit(self._batch + 1)
        return [self._key_of(row) for row in self._fetch_rows(statement)[1]]

    def _without_hidden(self, rows: Sequence[Any]) -> Sequence[Any]:
        if not self._hidden:
            return rows
        width = len(self.fields)
        return make_rows(self.fields, (row[:width] for row in rows))

    # The condition.

    def _after(self, key: tuple[Any, ...]) -> sa.ColumnElement[bool]:
        """True for the rows that sort after ``key``."""
        values = tuple(bind_driver_value(value, self._dialect) for value in key)
        columns = self._columns
        if self._can_compare_tuples(key):
            left = sa.tuple_(*(column.untyped for column in columns))
            right = sa.tuple_(*values)
            return left < right if columns[0].descending else left > right
        branches: list[sa.ColumnElement[bool]] = []
        equal: list[sa.ColumnElement[bool]] = []
        for column, value in zip(columns, values, strict=True):
            branches.append(sa.and_(*equal, column.after(value)))
            equal.append(column.equals(value))
        condition = sa.or_(*branches)
        first, value = columns[0], values[0]
        if len(columns) > 1 and value is not None and not first.nullable:
            # Redundant, but the database can use it to find the start in an index.
            bound = (
                first.untyped <= value if first.descending else first.untyped >= value
            )
            return sa.and_(bound, condition)
        return condition

    def _can_compare_tuples(self, key: tuple[Any, ...]) -> bool:
        """True if the database can compare the whole key as one tuple."""
        return (
            len(self._columns) > 1
            and self._dialect.name in ("postgresql", "sqlite")
            and not any(column.nullable for column in self._columns)
            and None not in key
            and len({column.descending for column in self._columns}) == 1
        )
