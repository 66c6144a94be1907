"""The rules for MySQL and MariaDB that need no server. tests/mariadb uses a server."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from tests.model import Model
from tgstream import StreamError
from tgstream.exports.keyset_columns import parse_key
from tgstream.exports.mysql import refuse_other_statements, sorts_as_returned


class Letters(sa.types.TypeDecorator[Any]):
    """A custom type of an application."""

    impl = sa.Enum
    cache_ok = True


@pytest.mark.parametrize(
    ("column_type", "expected"),
    [
        (sa.BigInteger(), True),
        (sa.Numeric(10, 2), True),
        (sa.Double(), True),
        (sa.Float(), False),
        (sa.String(255), True),
        (sa.String(256), False),
        (sa.String(), False),
        (sa.Text(), False),
        (sa.VARBINARY(16), True),
        (sa.LargeBinary(), False),
        (sa.Enum("b", "a"), False),
        (sa.Enum("b", "a", native_enum=False, length=5), True),
        (Letters("b", "a"), False),
        (mysql.SET("b", "a"), False),
        (sa.Interval(), True),
        (sa.JSON(), False),
        (sa.types.NullType(), False),
    ],
    ids=repr,
)
def test_type_is_sorted_as_returned_or_refused(
    column_type: Any, expected: bool
) -> None:
    """An unknown type is refused too."""
    assert sorts_as_returned(column_type, mysql.dialect()) is expected


VALUE = sa.column("value", sa.Integer)


@pytest.mark.parametrize(
    ("key", "sql"),
    [
        (VALUE, "value ASC"),
        (VALUE.nulls_first(), "value ASC"),
        (VALUE.desc().nulls_last(), "value DESC"),
        (VALUE.nulls_last(), "value IS NULL ASC, value ASC"),
        (VALUE.desc().nulls_first(), "value IS NULL DESC, value DESC"),
    ],
    ids=str,
)
def test_nulls_first_is_emulated(key: Any, sql: str) -> None:
    """MySQL has no NULLS FIRST. The natural order needs no expression, so an index."""
    dialect = mysql.dialect()
    (column,) = parse_key(sa.select(VALUE), key)
    order = column.for_dialect(dialect).order
    statement = sa.select(VALUE).order_by(*order).compile(dialect=dialect)
    assert str(statement).partition("ORDER BY ")[2].replace("`", "") == sql


def test_connection_of_an_unbuffered_cursor_refuses_other_statements(
    sqlite_model: Model,
) -> None:
    """The cursor is closed with its transaction. Then other statements are allowed."""
    with sqlite_model.outside.connect() as connection:
        result = connection.exec_driver_sql("SELECT 1 UNION SELECT 2")
        with refuse_other_statements([connection], result):
            with pytest.raises(StreamError, match=r"Use rows\(\.\.\., key=\.\.\.\)"):
                connection.exec_driver_sql("SELECT 1")
            assert result.fetchone() == (1,)
            connection.rollback()
            assert result.closed
            connection.exec_driver_sql("SELECT 1").close()
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
