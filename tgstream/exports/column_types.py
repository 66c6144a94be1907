"""The types of a statement's columns, for formats whose columns have types.

Only types whose Python values are certain are given. ``TypeDecorator`` may return
anything, and SQLAlchemy knows no type for the result of most functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import QueryableAttribute
from sqlalchemy.types import TypeDecorator

from ..formats.protocols import ColumnType

_VALUE_TYPES = (
    *(bool, int, float, Decimal, str, bytes, Enum),
    *(date, datetime, time, timedelta, UUID),
)

_COLUMNS = sa.ColumnElement, QueryableAttribute, sa.TextClause


def column_types(statement: Any) -> tuple[ColumnType | None, ...]:
    """Return the type of each column that a prepared statement selects.

    :returns: () for ``text()`` without columns. None for a column of unknown type.
    """
    if isinstance(statement, sa.CompoundSelect):
        # A part in parentheses is the element of a grouping.
        parts = [getattr(part, "element", part) for part in statement.selects]
        return tuple(
            types[0] if len({*types}) == 1 else None
            for types in zip(*map(column_types, parts), strict=False)
        )
    return tuple(map(_column_type, _selected(statement)))


def _selected(statement: Any) -> Sequence[Any]:
    if isinstance(statement, sa.Select):
        selected = [column["expr"] for column in statement.column_descriptions]
        if all(isinstance(expr, _COLUMNS) for expr in selected):
            return selected
        return list(statement.selected_columns)  # those of entities in a union
    if isinstance(statement, sa.TextualSelect):
        return list(statement.selected_columns)
    return ()


def _column_type(column: Any) -> ColumnType | None:
    if isinstance(column, sa.TextClause):
        return None
    found = _to_column_type(column.type)
    if found is None or found.python_type is not Decimal or _is_declared(column):
        return found
    # The sum of a column has more digits than the column, and a product more of them
    # after the point. SQLAlchemy gives both the type of the column.
    return found._replace(precision=None)


def _is_declared(column: Any) -> bool:
    """Whether the values of a column have the precision of its type."""
    column = getattr(column, "expression", column)  # the column of a mapped attribute
    while isinstance(column, sa.Label):
        column = column.element
    if isinstance(column, sa.ColumnClause) and column.table is None:
        return True  # of text().columns()
    return isinstance(column, sa.Column | sa.Cast | sa.TypeCoerce)


def _to_column_type(type_: Any) -> ColumnType | None:
    """Convert a type of SQLAlchemy."""
    type_ = _undecorated(type_)
    if isinstance(type_, sa.JSON):
        return ColumnType(dict)
    if isinstance(type_, sa.ARRAY):
        found = _to_column_type(type_.item_type)
        for _ in range(type_.dimensions or 1):
            found = None if found is None else ColumnType(list, item=found)
        return found
    python_type: Any = object
    with suppress(NotImplementedError):  # before SQLAlchemy 2.1
        python_type = type_.python_type
    if not issubclass(python_type, _VALUE_TYPES):
        return None
    return ColumnType(
        python_type,
        precision=getattr(type_, "precision", None),
        scale=getattr(type_, "scale", None),
        timezone=bool(getattr(type_, "timezone", False)),
        unsigned=bool(getattr(type_, "unsigned", False)),
    )


def _undecorated(type_: Any) -> Any:
    """The type that makes the values: without decorators that do not change them."""
    while isinstance(type_, TypeDecorator) and not isinstance(type_, sa.Interval):
        if any(_defines_result(cls) for cls in _own_classes(type(type_))):
            return sa.types.NullType()
        type_ = type_.impl_instance
    return type_


def _own_classes(cls: Any) -> Iterator[Any]:
    return (base for base in cls.__mro__ if not issubclass(TypeDecorator, base))


def _defines_result(cls: Any) -> bool:
    return not vars(cls).keys().isdisjoint(("process_result_value", "result_processor"))
