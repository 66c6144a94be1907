"""MySQL's peculiarities, as far as they need no server; tests/mariadb has one."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from tests.model import Model
from tgstream import StreamError
from tgstream.exports.keyset_columns import terms_of
from tgstream.exports.mysql import alone, compares


class Letters(sa.types.TypeDecorator[Any]):
    """A type of an application's own."""

    impl = sa.Enum
    cache_ok = True


@pytest.mark.parametrize(
    ("kind", "expected"),
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
def test_types_that_sort_as_they_compare_are_known(kind: Any, expected: bool) -> None:
    """Others are refused, and with them what is not known."""
    assert compares(kind, mysql.dialect()) is expected


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
def test_place_of_nulls_is_said_in_its_words(key: Any, sql: str) -> None:
    """It has no NULLS FIRST; where NULLs sort by themselves an index can serve."""
    dialect = mysql.dialect()
    (term,) = terms_of(sa.select(VALUE), key)
    found = sa.select(VALUE).order_by(*term.on(dialect).order).compile(dialect=dialect)
    assert str(found).partition("ORDER BY ")[2].replace("`", "") == sql


def test_connection_of_an_unbuffered_cursor_is_kept_to_it(sqlite_model: Model) -> None:
    """Refused until it is closed, and closed by the end of its transaction."""
    with sqlite_model.outside.connect() as connection:
        result = connection.exec_driver_sql("SELECT 1 UNION SELECT 2")
        with alone([connection], result):
            with pytest.raises(StreamError, match=r"use rows\(\.\.\., key=\.\.\.\)"):
                connection.exec_driver_sql("SELECT 1")
            assert result.fetchone() == (1,)
            connection.rollback()
            assert result.closed
            connection.exec_driver_sql("SELECT 1").close()
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
