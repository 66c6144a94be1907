"""Rows in batches by key: each batch is a query that begins behind the last one's key.

Rule: no row is lost and none comes twice, or it is refused; so a value of the key goes
back to the database exactly as the driver gave it, whatever Python makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import result_tuple
from sqlalchemy.sql import visitors

from ..core.errors import StreamError
from ..database.cursors import Sizes
from ..database.effects import find_lock, writes
from .keyset_columns import (
    bind,
    in_selection,
    may_tie,
    raw_of,
    same,
    selected,
    terms_of,
)

Fetch = Callable[[Any], tuple[list[str], Sequence[Any]]]

_LABEL = "_tgstream_key_"

_CLAUSES = {
    "_order_by_clauses": "ORDER BY",
    "_limit_clause": "LIMIT",
    "_offset_clause": "OFFSET",
    "_fetch_clause": "FETCH",
    "_distinct": "DISTINCT",
    "_group_by_clauses": "GROUP BY",
    "_having_criteria": "HAVING",
}


class Keyset:
    """A statement that is read by key.

    :raises TypeError: when the key is none, or ``after`` no value of it.
    :raises StreamError: when the statement cannot be continued behind a key.
    """

    def __init__(self, statement: Any, key: Any, after: Any) -> None:
        _check_statement(statement)
        self.statement: sa.Select[Any] = statement
        self.terms = terms_of(statement, key)
        self.after: tuple[Any, ...] | None = None
        if after is not None:
            self.after = after if isinstance(after, tuple) else (after,)
            if len(self.after) != len(self.terms):
                raise TypeError(
                    f"rows(after={after!r}) has {len(self.after)} values, and its key "
                    f"has {len(self.terms)} columns; give one for each, in a tuple"
                )

    def run(self, dialect: Any, batch: int, fetch: Fetch) -> Run:
        """An iterator of batches.

        :param dialect: that of the database.
        :param batch: how many rows a batch has, at most.
        :param fetch: runs a statement, and gives its fields and its rows.
        """
        return Run(self, dialect, batch, fetch)


def _check_statement(statement: Any) -> None:
    if not isinstance(statement, sa.Select):
        raise StreamError(
            "rows(key=...) adds a WHERE to its statement, which a union and text() "
            "cannot take; make it a subquery() and select() from that"
        )
    found = [name for slot, name in _CLAUSES.items() if _is_set(statement, slot)]
    _check_effects(statement)
    columns = [each["expr"] for each in statement.column_descriptions]
    if any(_has_window(column) for column in columns):
        found.append("a window function")
    if found:
        raise StreamError(
            f"rows(key=...) orders and limits its statement, which has "
            f"{' and '.join(found)} of its own: leave that out, or make the statement "
            "a subquery() and select() from that"
        )


def _check_effects(statement: sa.Select[Any]) -> None:
    if (lock := find_lock(statement)) is not None:
        raise StreamError(
            f"rows(key=...) cannot read a statement with {lock}: the transaction ends "
            "after each batch, and its locks with it, before the rows are used. Use "
            "rows() without key=, or lock each row where you work on it"
        )
    if writes(statement):
        raise StreamError(
            "rows(key=...) cannot read a statement with an INSERT, UPDATE or DELETE "
            "in it, because it would run again for each batch. Use rows() without key="
        )


def _is_set(statement: Any, slot: str) -> bool:
    value = getattr(statement, slot, None)
    return value is not None and value is not False and value != ()


def _has_window(column: Any) -> bool:
    clause = getattr(column, "expression", column)
    return isinstance(clause, sa.ClauseElement) and any(
        isinstance(part, sa.Over) for part in visitors.iterate(clause)
    )


class Run:
    """One reading of a keyset's rows: the batches, one after the other.

    ``fields`` are the names of the columns, known once a batch was asked for; the first
    batch may be empty.
    """

    def __init__(self, keyset: Keyset, dialect: Any, batch: int, fetch: Fetch) -> None:
        self.fields: Sequence[str] = ()
        self._terms = tuple(term.on(dialect) for term in keyset.terms)
        self._dialect = dialect
        self._batch = batch
        self._fetch = fetch
        self._position: tuple[Any, ...] | None = None
        if keyset.after is not None:
            pairs = zip(self._terms, keyset.after, strict=True)
            self._position = tuple(raw_of(term, v, dialect) for term, v in pairs)
        self._last: tuple[Any, ...] | None = None
        self._prepare(keyset.statement)

    def _prepare(self, statement: sa.Select[Any]) -> None:
        """Order by the key, and have the columns of the key that rows do not show."""
        columns, dialect = selected(statement), self._dialect
        places = [in_selection(term, columns, dialect) for term in self._terms]
        hidden = [each for each, place in enumerate(places) if place is None]
        self._hidden = len(hidden)
        for number, each in enumerate(hidden):
            column = self._terms[each].exactly(dialect)
            statement = statement.add_columns(column.label(f"{_LABEL}{number}"))
            places[each] = number - len(hidden)  # from the end
        self._places = places
        self._statement = statement.order_by(
            *(each for term in self._terms for each in term.order)
        )

    def __iter__(self) -> Iterator[Sequence[Any]]:
        sizes = Sizes(self._batch)
        while True:
            size = sizes.size
            rows = self._more(size + 1)
            end = len(rows) if len(rows) <= size else self._cut(rows, size)
            if end or len(rows) <= size:
                if end:
                    self._last = self._position = self._key(rows[end - 1])
                sizes.grow(rows)
                yield self._shown(rows[:end])
                if len(rows) <= size:
                    return
            elif size == self._batch:
                raise StreamError(
                    f"rows(key=...): more than {size} rows have the same key, "
                    f"{self._key(rows[-1])}, which is too many to come at once; add "
                    "the primary key to key="
                )
            else:  # all have one key: what they take does not matter
                sizes.grow()

    def _more(self, limit: int) -> Sequence[Any]:
        statement = self._statement
        if self._position is not None:
            statement = statement.where(self._behind(self._position))
        fields, rows = self._fetch(statement.limit(limit))
        self.fields = fields[: len(fields) - self._hidden]
        if rows and self._last is not None and same(self._key(rows[0]), self._last):
            raise StreamError(
                f"rows(key=...): the database gave a row with the key {self._last} as "
                "one behind that key, and would for ever; its type cannot be compared "
                "with what it shows, so choose another key"
            )
        return rows

    def _key(self, row: Any) -> tuple[Any, ...]:
        return tuple([row[place] for place in self._places])

    def _cut(self, rows: Sequence[Any], size: int) -> int:
        """How many rows can go: those of one key are not parted."""
        end, following = size, self._key(rows[size])
        if may_tie(self._terms, self._key(rows[end - 1]), following):
            tied = self._tied(following)
            if len(tied) > self._batch:
                return 0
            alike = set(tied)
            while end and (
                (key := self._key(rows[end - 1])) in alike or same(key, following)
            ):
                end -= 1
        return end

    def _tied(self, key: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """The keys that the database takes for ``key``; a batch and one at most."""
        equals = (
            term.equals(bind(value, self._dialect))
            for term, value in zip(self._terms, key, strict=True)
        )
        statement = self._statement.where(*equals).limit(self._batch + 1)
        return [self._key(row) for row in self._fetch(statement)[1]]

    def _shown(self, rows: Sequence[Any]) -> Sequence[Any]:
        if not self._hidden:
            return rows
        width = len(self.fields)
        make = result_tuple(list(self.fields))
        return [make(row[:width]) for row in rows]

    # The condition.

    def _behind(self, position: tuple[Any, ...]) -> sa.ColumnElement[bool]:
        """True for the rows whose key sorts behind ``position``."""
        values = tuple(bind(value, self._dialect) for value in position)
        terms = self._terms
        if self._by_row(position):
            left, right = sa.tuple_(*(t.raw for t in terms)), sa.tuple_(*values)
            return left < right if terms[0].descending else left > right
        branches: list[sa.ColumnElement[bool]] = []
        equal: list[sa.ColumnElement[bool]] = []
        for term, value in zip(terms, values, strict=True):
            branches.append(sa.and_(*equal, term.behind(value)))
            equal.append(term.equals(value))
        condition = sa.or_(*branches)
        first, value = terms[0], values[0]
        if len(terms) > 1 and value is not None and not first.nullable:
            # It says nothing new, and lets the database find the place in an index.
            bound = first.raw <= value if first.descending else first.raw >= value
            return sa.and_(bound, condition)
        return condition

    def _by_row(self, position: tuple[Any, ...]) -> bool:
        return (
            len(self._terms) > 1
            and self._dialect.name in ("postgresql", "sqlite")
            and not any(term.nullable for term in self._terms)
            and None not in position
            and len({term.descending for term in self._terms}) == 1
        )
