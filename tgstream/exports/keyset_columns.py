"""The columns of a key: their order, their NULLs, and how their values compare.

An unknown database is refused, because a wrong assumption would lose rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import operators, visitors
from sqlalchemy.types import NullType

from ..core.errors import StreamError
from .mysql import DIALECT_NAMES as MYSQL
from .mysql import sorts_as_returned

NULLS_ARE_LARGE = frozenset({"postgresql", "oracle"})
NULLS_ARE_SMALL = frozenset({"sqlite", "mysql", "mariadb", "mssql"})
WITHOUT_NULLS_FIRST = frozenset({"mysql", "mariadb", "mssql"})
"""Dialects without NULLS FIRST and NULLS LAST."""


@dataclass(frozen=True)
class KeyColumn:
    """A column of a key, and its order.

    ``nulls_last`` is None if the application did not choose it.
    """

    expression: Any
    descending: bool
    nulls_last: bool | None
    nullable: bool
    order: tuple[Any, ...]

    @property
    def untyped(self) -> Any:
        """The column, to compare with values as the driver returns them."""
        return sa.type_coerce(self.expression, NullType())

    def exact_expression(self, dialect: Any) -> Any:
        """The column as an expression whose value compares equal when it is sent back.

        For an interval or a real of PostgreSQL, Python's value does not compare equal.
        The text does, for every type.
        """
        if dialect.name == "postgresql":
            return sa.cast(self.expression, sa.Text())
        return self.untyped

    def for_dialect(self, dialect: Any) -> KeyColumn:
        """Return the column with the position of NULLs in this dialect.

        :raises StreamError: if the position of NULLs is unknown, or the column is not
            sorted by the values that the driver returns.
        """
        column_type, name = self.expression.type, dialect.name
        if name in MYSQL and not sorts_as_returned(column_type, dialect):
            raise StreamError(
                f"rows(): cannot use {self.expression} ({column_type!r}) in key=, "
                f"because {name} does not sort it by the values that it returns. "
                "Choose another key, or cast() the column"
            )
        if self.nulls_last is not None and name in WITHOUT_NULLS_FIRST:
            return self._emulate_nulls_first()
        if self.nulls_last is not None or not self.nullable:
            return self
        if name not in NULLS_ARE_LARGE | NULLS_ARE_SMALL:
            raise StreamError(
                f"rows(): {self.expression} in key= can be NULL, and the position of "
                f"NULL is unknown for {name}. Add nulls_first() or nulls_last()"
            )
        return replace(
            self, nulls_last=(name in NULLS_ARE_LARGE) is not self.descending
        )

    def _emulate_nulls_first(self) -> KeyColumn:
        """Return the column with an order that needs no NULLS FIRST or NULLS LAST."""
        order = self.expression.desc() if self.descending else self.expression.asc()
        if not self.nullable or self.nulls_last is self.descending:
            return replace(self, order=(order,))
        null = self.expression.is_(None)
        return replace(
            self, order=(null.asc() if self.nulls_last else null.desc(), order)
        )

    def after(self, value: Any) -> sa.ColumnElement[bool]:
        """True where the column sorts after ``value``, which is None for NULL."""
        column: sa.ColumnElement[Any] = self.untyped
        if value is None:
            return sa.false() if self.nulls_last else column.is_not(None)
        condition: sa.ColumnElement[bool] = (
            column < value if self.descending else column > value
        )
        if self.nullable and self.nulls_last:
            return sa.or_(condition, column.is_(None))
        return condition

    def equals(self, value: Any) -> sa.ColumnElement[bool]:
        """True where the column is ``value``, which is None for NULL."""
        column: sa.ColumnElement[Any] = self.untyped
        return column.is_(None) if value is None else column == value


def parse_key(statement: sa.Select[Any], key: Any) -> tuple[KeyColumn, ...]:
    """Return the columns of ``key=``.

    :raises TypeError: if there is no column, or something that is not a column.
    """
    parts = key if isinstance(key, tuple | list) else (key,)
    if not parts:
        raise TypeError(f"rows(): key must have at least one column, got {key!r}")
    has_outer_join = _has_outer_join(statement)
    return tuple(_parse_column(part, has_outer_join) for part in parts)


_MODIFIERS = {
    operators.desc_op: ("descending", True),
    operators.asc_op: ("descending", False),
    operators.nulls_first_op: ("nulls_last", False),
    operators.nulls_last_op: ("nulls_last", True),
}


def _parse_column(part: Any, has_outer_join: bool) -> KeyColumn:
    modifiers: dict[str, bool] = {}
    element = getattr(part, "expression", part)
    while isinstance(element, sa.UnaryExpression) and element.modifier in _MODIFIERS:
        name, value = _MODIFIERS[element.modifier]
        modifiers.setdefault(name, value)
        element = element.element
    while isinstance(element, sa.Label):
        element = element.element
    if not isinstance(element, sa.ColumnElement):
        raise TypeError(
            "rows(): key must be columns such as User.id or User.id.desc(), got "
            f"{part!r}"
        )
    descending = modifiers.get("descending", False)
    nulls_last = modifiers.get("nulls_last")
    order = element.desc() if descending else element.asc()
    if nulls_last is not None:
        order = order.nulls_last() if nulls_last else order.nulls_first()
    nullable = has_outer_join or not _is_never_null(element)
    return KeyColumn(element, descending, nulls_last, nullable, (order,))


def _is_never_null(element: Any) -> bool:
    """True for a NOT NULL column of a table. A subquery may contain an outer join."""
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
        for source in statement.get_final_froms()
        for part in visitors.iterate(source)
    )


# The values.


def selected_columns(statement: sa.Select[Any]) -> list[Any]:
    """The columns of a statement in the order of a row's values.

    The list is empty if there are others, such as a composite, which is several values.
    """
    exprs = [column["expr"] for column in statement.column_descriptions]
    columns = [getattr(expr, "expression", expr) for expr in exprs]
    if all(isinstance(column, sa.ColumnElement) for column in columns):
        return columns
    return []


def find_position(
    key_column: KeyColumn, columns: list[Any], dialect: Any
) -> int | None:
    """The index of a key's column in a row, if the row has it as the driver returns it.

    :param columns: the result of :func:`selected_columns`.
    """
    if not _is_returned_raw(key_column.expression, dialect):
        return None
    for index, column in enumerate(columns):
        if isinstance(column, sa.Label):
            column = column.element
        # The ORM's annotated column has the hash of the column that it annotates.
        if hash(column) == hash(key_column.expression):
            return index
    return None


_NEVER_EQUAL = sa.Integer, sa.Date, sa.DateTime, sa.Uuid, sa.Boolean
_EXACT_ON_POSTGRESQL = *_NEVER_EQUAL, sa.String


def _is_returned_raw(expression: Any, dialect: Any) -> bool:
    column_type = expression.type
    if dialect.name == "postgresql" and not isinstance(
        column_type, _EXACT_ON_POSTGRESQL
    ):
        return False
    impl = column_type.dialect_impl(dialect)
    if impl.column_expression(expression) is not None:
        return False
    try:
        return impl.result_processor(dialect, 0) is None
    except sa.exc.InvalidRequestError:  # it depends on the type that the driver reports
        return False


def to_driver_value(key_column: KeyColumn, value: Any, dialect: Any) -> Any:
    """Convert a value of the column's type to the value that the driver gets."""
    if value is None:
        return None
    process = key_column.expression.type.dialect_impl(dialect).bind_processor(dialect)
    return value if process is None else process(value)


def bind_driver_value(value: Any, dialect: Any) -> Any:
    """A parameter with a value of the driver, to compare with its column."""
    if value is None:
        return None
    if dialect.name == "postgresql" and isinstance(value, float):
        value = repr(value)  # as a real, 0.1 is less than the double 0.1
    return sa.bindparam(None, value, type_=NullType())


def is_same_key(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """True if two keys are equal, where a NaN equals a NaN."""
    return all(x == y or (x != x and y != y) for x, y in zip(a, b, strict=True))


def may_be_equal(
    columns: Sequence[KeyColumn], a: Sequence[Any], b: Sequence[Any]
) -> bool:
    """True if the two keys are equal, or differ only in strings.

    The database may consider different strings equal, which depends on the collation:
    'a' and 'A', 'ß' and 's', 'x' and 'x '.
    """
    values = zip(columns, a, b, strict=True)
    different = [
        (column, x, y) for column, x, y in values if not is_same_key((x,), (y,))
    ]
    return all(
        isinstance(x, str)
        and isinstance(y, str)
        and not isinstance(column.expression.type, _NEVER_EQUAL)
        for column, x, y in different
    )
