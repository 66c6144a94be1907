"""The types of the columns of ``rows()``, as a statement declares them."""

from __future__ import annotations

import datetime
import enum
import uuid
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.orm import Bundle, DeclarativeBase, Mapped, mapped_column

from tgstream import rows
from tgstream.formats.protocols import ColumnType


class Shape(enum.Enum):
    ROUND = "round"


class Doubled(sa.types.TypeDecorator[Any]):
    """Its values are of another class than those of its type."""

    impl = sa.Integer
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return f"{value}{value}"


class Trimmed(sa.types.TypeDecorator[Any]):
    """It changes only the values that are stored."""

    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return value.strip()


class Derived(Doubled):
    cache_ok = True


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    price: Mapped[Decimal] = mapped_column(sa.Numeric(10, 2))
    quantity: Mapped[int]


orders = Order.__table__.c


def types_of(statement: Any) -> list[ColumnType | None]:
    return list(rows(statement).types)


@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        (sa.Integer(), ColumnType(int)),
        (mysql.BIGINT(unsigned=True), ColumnType(int, unsigned=True)),
        (sa.Numeric(12, 2), ColumnType(Decimal, 12, 2)),
        (sa.Numeric(), ColumnType(Decimal)),
        (sa.Numeric(12, 2, asdecimal=False), ColumnType(float, 12, 2)),
        (sa.Float(), ColumnType(float)),
        (sa.String(5), ColumnType(str)),
        (sa.LargeBinary(), ColumnType(bytes)),
        (sa.Boolean(), ColumnType(bool)),
        (sa.Date(), ColumnType(datetime.date)),
        (sa.DateTime(timezone=True), ColumnType(datetime.datetime, timezone=True)),
        (sa.Time(), ColumnType(datetime.time)),
        (sa.Interval(), ColumnType(datetime.timedelta)),
        (postgresql.INTERVAL(), ColumnType(datetime.timedelta)),
        (sa.Uuid(), ColumnType(uuid.UUID)),
        (sa.Enum(Shape), ColumnType(Shape)),
        (sa.Enum("a", "b"), ColumnType(str)),
        (sa.JSON(), ColumnType(dict)),
        (postgresql.JSONB(), ColumnType(dict)),
        (sa.ARRAY(sa.Integer), ColumnType(list, item=ColumnType(int))),
        (
            postgresql.ARRAY(sa.Text, dimensions=2),
            ColumnType(list, item=ColumnType(list, item=ColumnType(str))),
        ),
        (postgresql.ARRAY(postgresql.INET), None),
        (postgresql.INET(), None),
        (postgresql.INT4RANGE(), None),
        (sa.PickleType(), None),
        (sa.types.NullType(), None),
        (Doubled(), None),
        (Derived(), None),
        (Trimmed(), ColumnType(str)),
    ],
    ids=repr,
)
def test_column_type_is_that_of_the_values(type_: Any, expected: Any) -> None:
    """A type whose values may be of any class is not known."""
    [found] = types_of(sa.select(sa.Column("c", type_)))
    assert found is None or expected is not None
    if found is not None and found.python_type not in (Decimal, float):
        found = found._replace(precision=None, scale=None)
    assert found == expected


def test_column_type_has_the_precision_of_a_column_only() -> None:
    """A sum has more digits than its column, a cast those that it names."""
    price = orders.price
    inner = sa.select(price, (price * price).label("square")).subquery()
    statement = sa.select(
        price.label("p"),
        sa.func.sum(price),
        price * price,
        sa.cast(price, sa.Numeric(20, 4)),
        sa.type_coerce(price, sa.Numeric(20, 4)),
        inner.c.price,
        inner.c.square,
        sa.func.avg(price),
    )
    assert types_of(statement) == [
        ColumnType(Decimal, 10, 2),
        ColumnType(Decimal, None, 2),
        ColumnType(Decimal, None, 2),
        ColumnType(Decimal, 20, 4),
        ColumnType(Decimal, 20, 4),
        ColumnType(Decimal, 10, 2),
        ColumnType(Decimal, None, 2),
        None,
    ]


def test_column_types_are_in_the_order_of_the_columns() -> None:
    """A mapped class has those of its columns, text() those that it declares."""
    money = ColumnType(Decimal, 10, 2)
    expected = [ColumnType(int), money, ColumnType(int)]
    assert types_of(sa.select(Order)) == expected
    assert types_of(sa.select(orders.id, sa.text("now()"), orders.price)) == [
        ColumnType(int),
        None,
        money,
    ]
    text = sa.text("SELECT 1 AS a, 2 AS b")
    assert types_of(text) == []
    declared = text.columns(a=sa.Integer, b=sa.Numeric(10, 2))
    assert types_of(declared) == [ColumnType(int), money]


def test_column_type_of_a_union_is_known_if_all_parts_agree() -> None:
    """SQLAlchemy itself gives the types of the first part."""
    parts = [
        sa.select(orders.id, orders.price),
        sa.select(orders.quantity, orders.id),
    ]
    assert types_of(sa.union_all(*parts)) == [ColumnType(int), None]
    limited = sa.union_all(*(part.limit(1) for part in parts))
    assert types_of(limited) == [ColumnType(int), None]
    assert types_of(sa.union_all(limited, parts[0])) == [ColumnType(int), None]


def test_column_types_of_entities_in_a_union_are_those_of_their_columns() -> None:
    """rows() replaces entities by columns only in a select()."""

    expected = [ColumnType(int), ColumnType(Decimal, 10, 2), ColumnType(int)]
    entities = sa.select(Order)
    assert types_of(sa.union_all(entities, entities)) == expected
    bundle: Any = sa.select(Bundle("bundle", Order.id, Order.price), Order.quantity)
    assert types_of(sa.union_all(bundle, entities.limit(1))) == expected


def test_column_type_of_converted_values_is_not_known() -> None:
    """The function of a column or of a type may return any type."""
    columns: dict[str, Any] = {
        "id": sa.Integer(),
        "flag": sa.Boolean(),
        "price": sa.Numeric(10, 2),
        "prices": sa.ARRAY(sa.Numeric(10, 2)),
        "document": sa.JSON(),
        "shape": sa.Enum(Shape),
    }
    statement = sa.select(*(sa.Column(name, type_) for name, type_ in columns.items()))

    def unknown(convert: Any) -> set[str]:
        source = rows(statement, convert=convert)
        source.fields = [*columns]
        return {
            name
            for name, type_ in zip(columns, source.types, strict=True)
            if type_ is None
        }

    assert unknown({}) == set()
    assert unknown({"shape": str}) == {"shape"}
    assert unknown({Decimal: str}) == {"price", "prices"}
    assert unknown({int: str}) == {"id", "flag"}
    assert unknown({dict: str}) == {"document"}
    assert unknown({list: str}) == {"prices", "document"}
    assert unknown({object: str}) == {*columns}
    assert unknown({str: str.upper}) == set()
    assert unknown({enum.Enum: str, "document": str}) == {"shape", "document"}
