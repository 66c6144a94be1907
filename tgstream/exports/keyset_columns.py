"""A key to read rows by: its columns, how they sort, and what their values are.

Rule: what is not known of a database is refused, never assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import operators, visitors
from sqlalchemy.types import NullType

from ..core.errors import StreamError
from . import mysql as mysql

NULLS_ARE_LARGE = frozenset({"postgresql", "oracle"})
NULLS_ARE_SMALL = frozenset({"sqlite", "mysql", "mariadb", "mssql"})
NULLS_ARE_NOT_PLACED = frozenset({"mysql", "mariadb", "mssql"})
"""Those that have no NULLS FIRST and NULLS LAST."""


@dataclass(frozen=True)
class Term:
    """A column of a key, and how it sorts; ``nulls_last`` is None if nobody said."""

    expression: Any
    descending: bool
    nulls_last: bool | None
    nullable: bool
    order: tuple[Any, ...]

    @property
    def raw(self) -> Any:
        """The column, compared with a driver's values as they are."""
        return sa.type_coerce(self.expression, NullType())

    def exactly(self, dialect: Any) -> Any:
        """The column, such that its value compares equal when it comes back.

        What Python makes of PostgreSQL's intervals, or of its real, does not; its text
        does, of each type.
        """
        if dialect.name == "postgresql":
            return sa.cast(self.expression, sa.Text())
        return self.raw

    def on(self, dialect: Any) -> Term:
        """The term, knowing where NULLs sort, and that its values can be compared.

        :raises StreamError: when they cannot, or it is not known.
        """
        kind, name = self.expression.type, dialect.name
        if name in mysql.NAMES and not mysql.compares(kind, dialect):
            raise StreamError(
                f"rows(key=...): {name} does not compare {self.expression}, which is "
                f"{kind!r}, with the values that it shows as it sorts it; choose "
                "another key, or cast() it"
            )
        if self.nulls_last is not None and name in NULLS_ARE_NOT_PLACED:
            return self._placing_nulls()
        if self.nulls_last is not None or not self.nullable:
            return self
        if name not in NULLS_ARE_LARGE | NULLS_ARE_SMALL:
            raise StreamError(
                f"rows(key=...): {self.expression} may be NULL, and it is not known "
                f"where {name} sorts NULLs; say so with nulls_first() or nulls_last()"
            )
        return replace(
            self, nulls_last=(name in NULLS_ARE_LARGE) is not self.descending
        )

    def _placing_nulls(self) -> Term:
        """The term, ordered as ``nulls_first()`` says where SQL has no word for it."""
        order = self.expression.desc() if self.descending else self.expression.asc()
        if not self.nullable or self.nulls_last is self.descending:
            return replace(self, order=(order,))
        null = self.expression.is_(None)
        return replace(
            self, order=(null.asc() if self.nulls_last else null.desc(), order)
        )

    def behind(self, value: Any) -> sa.ColumnElement[bool]:
        """True where the column sorts behind ``value``, None for NULL."""
        column: sa.ColumnElement[Any] = self.raw
        if value is None:
            return sa.false() if self.nulls_last else column.is_not(None)
        found: sa.ColumnElement[bool] = (
            column < value if self.descending else column > value
        )
        if self.nullable and self.nulls_last:
            return sa.or_(found, column.is_(None))
        return found

    def equals(self, value: Any) -> sa.ColumnElement[bool]:
        """True where the column is ``value``, None for NULL."""
        column: sa.ColumnElement[Any] = self.raw
        return column.is_(None) if value is None else column == value


def terms_of(statement: sa.Select[Any], key: Any) -> tuple[Term, ...]:
    """The columns of a key.

    :raises TypeError: when it has none, or something else.
    """
    parts = key if isinstance(key, tuple | list) else (key,)
    if not parts:
        raise TypeError("rows(key=()) names no column; give one, or a tuple of them")
    optional = _has_outer_join(statement)
    return tuple(_term(part, optional) for part in parts)


_MODIFIERS = {
    operators.desc_op: ("descending", True),
    operators.asc_op: ("descending", False),
    operators.nulls_first_op: ("nulls_last", False),
    operators.nulls_last_op: ("nulls_last", True),
}


def _term(part: Any, optional: bool) -> Term:
    said: dict[str, bool] = {}
    element = getattr(part, "expression", part)
    while isinstance(element, sa.UnaryExpression) and element.modifier in _MODIFIERS:
        name, value = _MODIFIERS[element.modifier]
        said.setdefault(name, value)
        element = element.element
    while isinstance(element, sa.Label):
        element = element.element
    if not isinstance(element, sa.ColumnElement):
        raise TypeError(
            f"rows(key={part!r}) is no column; give one as User.id, or User.id.desc()"
        )
    descending, nulls_last = said.get("descending", False), said.get("nulls_last")
    order = element.desc() if descending else element.asc()
    if nulls_last is not None:
        order = order.nulls_last() if nulls_last else order.nulls_first()
    nullable = optional or not _is_never_null(element)
    return Term(element, descending, nulls_last, nullable, (order,))


def _is_never_null(element: Any) -> bool:
    """True for a column that a table says is not; a subquery's may come of a join."""
    table = getattr(element, "table", None)
    if isinstance(table, sa.Alias):
        table = table.element
    return (
        isinstance(element, sa.Column)
        and isinstance(table, sa.Table)
        and not element.nullable
    )


def _has_outer_join(statement: sa.Select[Any]) -> bool:
    return any(
        isinstance(part, sa.Join) and (part.isouter or part.full)
        for each in statement.get_final_froms()
        for part in visitors.iterate(each)
    )


# The values.


def selected(statement: sa.Select[Any]) -> list[Any]:
    """The columns that a statement selects, one for each of its rows' values."""
    exprs = [each["expr"] for each in statement.column_descriptions]
    columns = [getattr(expr, "expression", expr) for expr in exprs]
    if all(isinstance(column, sa.ColumnElement) for column in columns):
        return columns
    return []  # a composite is several: nothing can be said of places


def in_selection(term: Term, columns: list[Any], dialect: Any) -> int | None:
    """Where rows show the values of a term as the driver gives them, if they do."""
    if not _is_shown_raw(term.expression, dialect):
        return None
    for place, column in enumerate(columns):
        if isinstance(column, sa.Label):
            column = column.element
        # The ORM's annotated columns have the hash of what they were made from.
        if hash(column) == hash(term.expression):
            return place
    return None


_NEVER_TIE = sa.Integer, sa.Date, sa.DateTime, sa.Uuid, sa.Boolean
_EXACT = *_NEVER_TIE, sa.String


def _is_shown_raw(expression: Any, dialect: Any) -> bool:
    kind = expression.type
    if dialect.name == "postgresql" and not isinstance(kind, _EXACT):
        return False
    impl = kind.dialect_impl(dialect)
    if impl.column_expression(expression) is not None:
        return False
    try:
        return impl.result_processor(dialect, 0) is None
    except sa.exc.InvalidRequestError:  # it depends on what the column turns out to be
        return False


def raw_of(term: Term, value: Any, dialect: Any) -> Any:
    """What the driver gets for a value of the column, as its type has it."""
    if value is None:
        return None
    process = term.expression.type.dialect_impl(dialect).bind_processor(dialect)
    return value if process is None else process(value)


def bind(value: Any, dialect: Any) -> Any:
    """A driver's value, to be compared with the column that it came from."""
    if value is None:
        return None
    if dialect.name == "postgresql" and isinstance(value, float):
        value = repr(value)  # a real 0.1 is less than the double of that name
    return sa.bindparam(None, value, type_=NullType())


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """True if two keys are one; also where they hold what is not equal to itself."""
    return all(x == y or (x != x and y != y) for x, y in zip(a, b, strict=True))


def may_tie(terms: Sequence[Term], a: Sequence[Any], b: Sequence[Any]) -> bool:
    """True if a database may take two keys for equal, that differ in texts at most.

    Whether it does is for its collation to say: 'a' and 'A', 'ß' and 's', 'x' and 'x '.
    """
    pairs = zip(terms, a, b, strict=True)
    differ = [(term, x, y) for term, x, y in pairs if not same((x,), (y,))]
    return all(
        isinstance(x, str)
        and isinstance(y, str)
        and not isinstance(term.expression.type, _NEVER_TIE)
        for term, x, y in differ
    )
