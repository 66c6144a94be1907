"""``rows(key=...)`` on MariaDB: NULLs, collations, types and transactions."""

from __future__ import annotations

import datetime as dt
import itertools
import random
import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
import transaction
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import Session

import tgstream
from tests.conftest import MakeApp, Root, assert_clean, pool

# This test runs here unchanged.
from tests.exports.test_keyset_transaction import (  # noqa: F401
    test_reading_by_key_does_not_commit_changes,
)
from tests.mariadb.conftest import MariaModel
from tests.model import Note, User
from tests.wsgi import Call, get
from tgstream import StreamError, rows

Fill = Callable[..., sa.Table]


@pytest.fixture
def fill(model: MariaModel, session: Session) -> Iterator[Fill]:
    """Creates a table whose rows are numbered by ``id``."""
    metadata = sa.MetaData()

    def make(types: dict[str, Any], values: list[tuple[Any, ...]]) -> sa.Table:
        columns = [sa.Column(name, type_) for name, type_ in types.items()]
        id = sa.Column("id", sa.Integer, primary_key=True)
        table = sa.Table("keyed", metadata, id, *columns)
        metadata.drop_all(model.outside)
        metadata.create_all(model.outside)
        dicts = [dict(zip(types, row, strict=True)) for row in values]
        session.execute(sa.insert(table), dicts)
        session.commit()
        return table

    yield make
    session.close()
    metadata.drop_all(model.outside)


# Order and NULLs.


ORDERS: dict[str, tuple[Callable[[Any], Any], bool, bool]] = {
    "asc": (lambda column: column, False, False),
    "desc": (lambda column: column.desc(), True, True),
    "asc nulls_first": (lambda column: column.asc().nulls_first(), False, False),
    "desc nulls_last": (lambda column: column.desc().nulls_last(), True, True),
    "asc nulls_last": (lambda column: column.nulls_last(), False, True),
    "desc nulls_first": (lambda column: column.desc().nulls_first(), True, False),
}


def sort_key(value: int | None, descending: bool, nulls_last: bool) -> tuple[bool, int]:
    """A key with which Python sorts like a column with this order."""
    if value is None:
        return nulls_last, 0
    return not nulls_last, -value if descending else value


@pytest.mark.parametrize("batch", [1, 3, 1000])
@pytest.mark.parametrize("first", ORDERS)
def test_rows_by_key_come_once_in_every_order(
    session: Session, fill: Fill, first: str, batch: int
) -> None:
    """The expected rows are sorted in Python. MariaDB has no NULLS FIRST or LAST."""
    chance = random.Random(1)
    values = [None, 1, 2, 3]
    pairs = [(chance.choice(values), chance.choice(values)) for _ in range(40)]
    table = fill({"a": sa.Integer, "b": sa.Integer}, pairs)
    for second, down in itertools.product(ORDERS, (False, True)):
        modify_a, *order_a = ORDERS[first]
        modify_b, *order_b = ORDERS[second]
        expected = [
            (
                sort_key(a, *order_a),
                sort_key(b, *order_b),
                -id if down else id,
                id,
            )
            for id, (a, b) in enumerate(pairs, 1)
        ]
        id = table.c.id.desc() if down else table.c.id
        key = modify_a(table.c.a), modify_b(table.c.b), id
        actual = rows(sa.select(table), key=key, batch=batch, session=session)
        assert [row.id for row in actual] == [keys[-1] for keys in sorted(expected)]


def test_order_of_nulls_is_ignored_in_a_column_without_nulls(
    session: Session, model: MariaModel
) -> None:
    """The rows are sorted by the column alone."""
    model.seed("ada", "bob", "cyd")
    for key in (User.id.nulls_last(), User.id.asc().nulls_first()):
        result = rows(sa.select(User), key=key, batch=1, session=session)
        assert [row.id for row in result] == [1, 2, 3]
    result = rows(sa.select(User), key=User.id.desc().nulls_first(), session=session)
    assert [row.id for row in result] == [3, 2, 1]


# Collations.


@pytest.mark.parametrize(
    ("collation", "texts"),
    [
        ("utf8mb4_general_ci", ["a", "A", "á", "Á"]),
        ("utf8mb4_general_ci", ["s", "ß", "S", "ś"]),
        ("utf8mb4_general_ci", ["🍣", "🍺", "😀"]),
        ("utf8mb4_unicode_ci", ["ss", "ß", "SS"]),
        ("utf8mb4_unicode_ci", ["1", "\u0661", "¹"]),
        ("utf8mb4_unicode_ci", ["a", "a\x01", "A\x02"]),
        ("utf8mb4_unicode_ci", ["か", "カ", "ｶ"]),
        ("utf8mb4_general_ci", ["a", "a ", "a  "]),
    ],
)
def test_strings_that_are_equal_in_a_collation_stay_together(
    session: Session, fill: Fill, collation: str, texts: list[str]
) -> None:
    """The database compares them, because Python has no collations."""
    column_type = sa.String(10, collation=collation)
    table = fill(
        {"name": column_type}, [(text,) for text in ["zz", *texts, "!", *texts]]
    )
    equal = len(texts) * 2
    count = sa.select(sa.func.count(sa.distinct(table.c.name)))
    assert session.scalar(count) == 3
    for key in (table.c.name, table.c.name.desc()):
        for batch in (equal, equal + 1):
            actual = rows(sa.select(table), key=key, batch=batch, session=session)
            assert sorted(row.id for row in actual) == list(range(1, equal + 3))
        with pytest.raises(StreamError, match="Add the primary key"):
            few = equal - 1
            list(rows(sa.select(table), key=key, batch=few, session=session))
    both = table.c.name, table.c.id
    actual = rows(sa.select(table), key=both, batch=1, session=session)
    assert list(actual) == list(session.execute(sa.select(table).order_by(*both)))


def test_different_strings_need_not_stay_together(session: Session, fill: Fill) -> None:
    """A unique key of strings is read in batches of any size."""
    texts = ["東京", "京都", "大阪", "a", "b", "Ż", "100%", "it's", "back\\slash", ""]
    column_type = sa.String(10, collation="utf8mb4_bin")
    table = fill({"name": column_type}, [(text,) for text in texts])
    actual = rows(sa.select(table), key=table.c.name, batch=1, session=session)
    assert [row.name for row in actual] == sorted(texts)


# Types.


DAY = dt.datetime(2024, 2, 29, 23, 59, 59)
TYPES: dict[str, tuple[Any, list[Any]]] = {
    "datetime": (
        mysql.DATETIME(fsp=6),
        [DAY.replace(microsecond=n) for n in (0, 1, 999999)],
    ),
    "datetime of seconds": (sa.DateTime(), [DAY, DAY.replace(hour=1)]),
    "timestamp": (mysql.TIMESTAMP(fsp=6), [DAY, DAY.replace(microsecond=1)]),
    "date": (sa.Date(), [DAY.date(), dt.date(1000, 1, 1), dt.date(9999, 12, 31)]),
    "time": (mysql.TIME(fsp=6), [dt.time(1), dt.time(1, 0, 0, 1), dt.time(23)]),
    "decimal": (
        sa.Numeric(30, 10),
        [Decimal("1234567890123456789.0000000001") + n for n in (0, 1, -1)],
    ),
    "decimal, rounded in Python": (
        sa.Numeric(30, 10, asdecimal=False),
        [Decimal("1234567890123456789.0000000001") + n for n in (0, 1, -1)],
    ),
    "double": (sa.Double(), [0.1, 0.30000000000000004, 1e300, -1.5, 1 / 3]),
    "big": (sa.BigInteger(), [2**62, -(2**62), 0, 2**31]),
    "unsigned": (mysql.BIGINT(unsigned=True), [2**64 - 1, 2**63, 0]),
    "boolean": (sa.Boolean(), [True, False]),
    "uuid": (sa.Uuid(), [uuid.UUID(int=n << 90) for n in (1, 5, 255, 256, 70000)]),
    "string": (sa.String(20), ["", "a", "é", "日", "a%b", "a'b", "\\", "10", "9"]),
    "trailing blanks": (sa.String(20), ["a ", "a", "a  b", "a b "]),
    "char": (sa.CHAR(5), ["a", "ab", ""]),
    "binary": (sa.BINARY(4), [b"\x00\x01\x02\x03", b"\xff\xfe\x00\x80"]),
    "varbinary": (sa.VARBINARY(9), [b"", b"\x00", b"\xff", b"a'\\"]),
    "interval": (sa.Interval(), [dt.timedelta(days=n) for n in (1, 30, 400)]),
    "enum of strings": (sa.Enum("b", "a", native_enum=False, length=5), ["b", "a"]),
}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("shown", [True, False])
def test_key_of_any_type_continues_after_the_last_row(
    session: Session, fill: Fill, name: str, shown: bool
) -> None:
    """The database compares its own value, not Python's."""
    column_type, values = TYPES[name]
    repeated = [(value,) for value in [*values, None, *reversed(values)]]
    table = fill({"value": sa.types.to_instance(column_type)}, repeated)
    statement = sa.select(table) if shown else sa.select(table.c.id)
    for key in [(table.c.value, table.c.id), (table.c.value.desc(), table.c.id)]:
        expected = session.execute(statement.order_by(*key)).all()
        for batch in (1, 2, 3):
            actual = list(rows(statement, key=key, batch=batch, session=session))
            assert list(map(repr, actual)) == list(map(repr, expected))


@pytest.mark.parametrize("name", TYPES.keys() - {"interval", "binary", "varbinary"})
def test_after_takes_the_value_of_a_row(
    session: Session, fill: Fill, name: str
) -> None:
    """A client can continue with the last key that it received."""
    column_type, values = TYPES[name]
    if name == "decimal, rounded in Python":
        values = [1, 2, 3]
    table = fill({"value": column_type}, [(value,) for value in [*values, *values]])
    key = table.c.value, table.c.id
    all_rows = list(rows(sa.select(table), key=key, session=session))
    for index, row in enumerate(all_rows):
        after = row.value, row.id
        rest = rows(sa.select(table), key=key, after=after, session=session, batch=2)
        assert list(rest) == all_rows[index + 1 :]


class Wrapped(sa.types.TypeDecorator[Any]):
    """A custom type of an application."""

    impl = sa.Enum
    cache_ok = True


@pytest.mark.parametrize(
    "column_type",
    [
        sa.Float(),
        sa.REAL(),
        sa.Enum("b", "a", name="letters"),
        Wrapped("b", "a", name="letters"),
        mysql.SET("b", "a"),
        sa.Text(),
        sa.LargeBinary(),
        sa.String(500),
        sa.JSON(),
        sa.types.NullType(),
    ],
    ids=repr,
)
def test_type_that_is_not_sorted_as_returned_is_refused(
    session: Session, column_type: Any
) -> None:
    """The error comes before anything is executed."""
    value = sa.column("value", column_type)
    source = rows(sa.select(value).select_from(User), key=value, session=session)
    with pytest.raises(StreamError, match=r"cannot use value.*cast\(\)"):
        list(source)


# In a stream.


def free(model: MariaModel) -> bool:
    """True if no connection is in use, no transaction open and no table locked."""
    model.fetch("LOCK TABLES users WRITE NOWAIT")  # until the connection is closed
    return pool(model).checkedout() == 0 and model.idle_in_transaction() == 0


def test_open_transaction_is_detected(model: MariaModel) -> None:
    """The checks of the tests below detect a transaction that has only read."""
    with Session(model.outside) as session:
        session.execute(sa.select(User))
        assert model.idle_in_transaction() == 1
        with pytest.raises(sa.exc.OperationalError), model.outside.begin() as other:
            other.exec_driver_sql("LOCK TABLES users WRITE NOWAIT")
    assert model.idle_in_transaction() == 0


@pytest.mark.parametrize("commit", ["end", "each", "manual", 2])
def test_no_connection_is_held_between_batches(
    make_app: MakeApp, model: MariaModel, commit: Any
) -> None:
    """While the client reads a batch, the connection is free."""
    model.seed(*(f"user{number}" for number in range(9)))

    def body() -> Iterator[str]:
        for row in rows(sa.select(User), key=User.id, batch=3):
            assert free(model)
            yield row.name[-1]

    call = Call(make_app(Root(body, commit=commit), model))
    for number in range(9):
        assert next(call) == str(number).encode()
        assert free(model)
    call.close()
    assert_clean(model)


def test_earlier_transaction_stays_open_over_the_batches(
    make_app: MakeApp, model: MariaModel
) -> None:
    """MariaDB does not report whether it has writes, so a batch does not end it."""
    model.seed(*(f"user{number}" for number in range(6)))

    def body(ends: bool) -> Iterator[str]:
        model.DBSession.query(User).first()
        if ends:
            tgstream.rollback()
        for row in rows(sa.select(User), key=User.id, batch=1):
            yield row.name[-1]

    for ends in (True, False):
        call = Call(make_app(Root(partial(body, ends)), model))
        assert next(call) == b"0"
        assert (pool(model).checkedout() == 0) is ends
        assert call.read() == b"12345"
        assert_clean(model)


@pytest.mark.parametrize("commit", [tgstream.commit, transaction.commit])
def test_commit_and_other_statements_between_rows_keep_the_rows(
    make_app: MakeApp, model: MariaModel, commit: Callable[[], None]
) -> None:
    """With key= no cursor is open, so a generator can commit after each row."""
    model.seed(*(f"user{number}" for number in range(5)))

    def body() -> Iterator[str]:
        for row in rows(sa.select(User), key=User.id, batch=2):
            assert model.DBSession.get_one(User, row.id).name == row.name
            model.DBSession.add(Note(text=row.name))
            commit()
            assert free(model)
            yield row.name[-1]

    assert get(make_app(Root(body, commit="manual"), model)).text == "01234"
    assert model.texts() == [f"user{number}" for number in range(5)]
    assert_clean(model)


def test_disconnect_between_batches_rolls_back(
    make_app: MakeApp, model: MariaModel
) -> None:
    """Uncommitted changes are rolled back."""
    model.seed(*(f"user{number}" for number in range(5)))

    def body() -> Iterator[str]:
        for row in rows(sa.select(User), key=User.id, batch=2):
            model.DBSession.add(Note(text=row.name))
            yield row.name

    call = Call(make_app(Root(body), model))
    assert next(call) == b"user0"
    call.close()
    assert model.texts() == []
    assert_clean(model)
