"""``rows(key=...)``: every row comes once, for any type, order and NULLs of the key."""

from __future__ import annotations

import datetime as dt
import enum
import itertools
import random
import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session, aliased
from sqlalchemy.sql.functions import FunctionElement

from tests.model import Model, Note, User
from tgstream import StreamError, rows
from tgstream.exports.keyset_columns import parse_key

Fill = Callable[..., sa.Table]


@pytest.fixture
def fill(model: Model, session: Session) -> Iterator[Fill]:
    """Creates a table whose rows are numbered by ``id``."""
    metadata = sa.MetaData()

    def make(columns: list[sa.Column[Any]], values: list[tuple[Any, ...]]) -> sa.Table:
        metadata.drop_all(model.outside)
        metadata.clear()
        id = sa.Column("id", sa.Integer, primary_key=True)
        table = sa.Table("keyed", metadata, id, *columns)
        metadata.create_all(model.outside)
        names = [column.name for column in columns]
        dicts = [dict(zip(names, row, strict=True)) for row in values]
        session.execute(sa.insert(table), dicts)
        session.commit()
        return table

    yield make
    session.close()
    metadata.drop_all(model.outside)


def assert_same_rows(
    session: Session, statement: Any, key: tuple[Any, ...], batch: int
) -> None:
    """Reading by key gives the same rows as a single ORDER BY in the database."""
    expected = session.execute(statement.order_by(*key)).all()
    actual = list(rows(statement, key=key, batch=batch, session=session))
    assert list(map(repr, actual)) == list(map(repr, expected))
    assert len(actual) > 0


# Order, NULLs and ties.


ORDERS: list[Callable[[Any], Any]] = [
    lambda column: column,
    lambda column: column.desc(),
    lambda column: column.asc().nulls_first(),
    lambda column: column.desc().nulls_last(),
    lambda column: column.nulls_last(),
    lambda column: column.desc().nulls_first(),
]


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_rows_by_key_come_once_in_every_order(
    session: Session, fill: Fill, batch: int
) -> None:
    """All combinations of direction and NULL order, with many equal keys and NULLs."""
    chance = random.Random(1)
    values = [None, 1, 2]
    table = fill(
        [sa.Column("a", sa.Integer), sa.Column("b", sa.Integer)],
        [(chance.choice(values), chance.choice(values)) for _ in range(14)],
    )
    for first, second in itertools.product(ORDERS, ORDERS):
        for third in (table.c.id, table.c.id.desc()):
            key = first(table.c.a), second(table.c.b), third
            assert_same_rows(session, sa.select(table), key, batch)


def test_key_without_nulls_gives_every_row_once(session: Session, fill: Fill) -> None:
    """Such keys can be compared as a tuple, in either direction."""
    column = sa.Column("a", sa.Integer, nullable=False)
    table = fill([column], [(number % 5,) for number in range(30)])
    for key in [
        (table.c.a, table.c.id),
        (table.c.a.desc(), table.c.id.desc()),
        (table.c.a.desc(), table.c.id),
        (table.c.id.desc(),),
    ]:
        for batch in (1, 4, 29, 30, 31):
            assert_same_rows(session, sa.select(table), key, batch)


def test_rows_with_the_same_key_stay_in_a_batch(session: Session, fill: Fill) -> None:
    """A key that is not unique is an error only if its rows do not fit."""
    table = fill([sa.Column("a", sa.Integer)], [(n // 3,) for n in range(100)])
    for batch in (3, 4, 7, 50):
        actual = rows(sa.select(table), key=table.c.a, batch=batch, session=session)
        assert sorted(row.id for row in actual) == list(range(1, 101))
    with pytest.raises(StreamError, match="Add the primary key"):
        list(rows(sa.select(table), key=table.c.a, batch=2, session=session))


def test_rows_with_the_same_key_may_exceed_the_first_batch(
    session: Session, fill: Fill
) -> None:
    """The first batches are small. They grow until the rows fit."""
    table = fill([sa.Column("a", sa.Integer)], [(n // 60,) for n in range(150)])
    actual = rows(sa.select(table), key=table.c.a, session=session, batch=60)
    assert sorted(row.id for row in actual) == list(range(1, 151))


def test_collation_with_equal_strings_loses_no_row(
    session: Session, fill: Fill, model: Model
) -> None:
    """'ada' and 'ADA' may be equal in the database, and then stay together."""
    column_type = sa.String(10, collation="NOCASE") if model.sqlite else sa.String(10)
    texts = ["ada", "ADA", "Ada", "bob", "BOB", "cyd"]
    table = fill([sa.Column("name", column_type)], [(text,) for text in texts])
    for batch in (3, 4):
        actual = rows(sa.select(table), key=table.c.name, batch=batch, session=session)
        assert sorted(row.id for row in actual) == [1, 2, 3, 4, 5, 6]


def test_key_may_be_null_because_of_an_outer_join(
    session: Session, model: Model
) -> None:
    """A NOT NULL column is NULL in the rows without a match."""
    model.seed("ada", "bob", "cyd", "dan", "eve")
    session.add_all([Note(text=str(n), user_id=n % 3 + 1) for n in range(7)])
    session.commit()
    joined = sa.select(User.name, Note.text).outerjoin(Note)
    for key in [(Note.id, User.id), (Note.id.desc(), User.id), (User.id, Note.id)]:
        for batch in (1, 2, 5):
            assert_same_rows(session, joined, key, batch)
    inner = joined.add_columns(Note.id, User.id.label("uid")).subquery()
    assert_same_rows(session, sa.select(inner), (inner.c.id, inner.c.uid), 2)


# Types.


class Colour(enum.Enum):
    RED = "r"
    GREEN = "g"
    BLUE = "b"


class Reversed(sa.types.TypeDecorator[str]):
    """A string that is reversed in Python."""

    impl = sa.String(20)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value[::-1]

    def process_result_value(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value[::-1]


UTC = dt.timezone.utc
EAST = dt.timezone(dt.timedelta(hours=5, minutes=30))
DAY = dt.datetime(2024, 2, 29, 23, 59, 59)
TYPES: dict[str, tuple[Any, list[Any]]] = {
    "datetime": (sa.DateTime(), [DAY.replace(microsecond=n) for n in (0, 1, 999999)]),
    "timestamptz": (
        sa.DateTime(timezone=True),
        [
            DAY.replace(tzinfo=zone, microsecond=n)
            for zone in (UTC, EAST)
            for n in (0, 1)
        ],
    ),
    "date": (sa.Date(), [DAY.date(), dt.date(1, 1, 1), dt.date(9999, 12, 31)]),
    "time": (sa.Time(), [dt.time(1), dt.time(1, 0, 0, 1), dt.time(23)]),
    "interval": (
        sa.Interval(),
        [dt.timedelta(days=n, microseconds=1) for n in (1, 30, 360, 365, 366)],
    ),
    "numeric": (sa.Numeric(10, 2), [Decimal(n) / 100 for n in (10, 11, 12, 1000, -7)]),
    "float": (sa.Float(), [0.1, 0.2, 0.30000000000000004, 1e300, -1.5, 1 / 3]),
    "real": (sa.REAL(), [0.1, 0.2, 0.7, 16777216.0, 1 / 3, 1e-7]),
    "enum": (sa.Enum(Colour), list(Colour)),
    "uuid": (sa.Uuid(), [uuid.UUID(int=n << 90) for n in (1, 5, 255, 256, 70000)]),
    "boolean": (sa.Boolean(), [True, False]),
    "string": (sa.String(20), ["", "a", "A", "é", "z", "日", "a%b", "a'b", "10", "9"]),
    "bytes": (sa.LargeBinary(), [b"", b"\x00", b"\xff", b"a"]),
    "big": (sa.BigInteger(), [2**62, -(2**62), 0, 2**31]),
    "decorated": (Reversed(), ["ab", "ba", "ca", "ac"]),
}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("shown", ["shown", "hidden"])
def test_key_of_any_type_continues_after_the_last_row(
    session: Session, fill: Fill, name: str, shown: str
) -> None:
    """The database compares its own value, not Python's."""
    column_type, values = TYPES[name]
    table = fill(
        [sa.Column("value", column_type)],
        [(value,) for value in [*values, None, *reversed(values)]],
    )
    columns = list(table.c) if shown == "shown" else [table.c.id]
    for key in [(table.c.value, table.c.id), (table.c.value.desc(), table.c.id)]:
        for batch in (1, 2, 3):
            assert_same_rows(session, sa.select(*columns), key, batch)


@pytest.mark.parametrize(
    "name", sorted(TYPES.keys() - {"interval", "bytes", "decorated"})
)
def test_after_takes_the_value_of_a_row(
    session: Session, fill: Fill, name: str
) -> None:
    """A client can continue with the last key that it received."""
    column_type, values = TYPES[name]
    column = sa.Column("value", column_type, nullable=False)
    table = fill([column], [(value,) for value in [*values, *values]])
    statement = sa.select(table)
    key = table.c.value, table.c.id
    all_rows = list(rows(statement, key=key, session=session))
    for index, row in enumerate(all_rows):
        after = row.value, row.id
        rest = rows(statement, key=key, after=after, session=session, batch=2)
        assert list(rest) == all_rows[index + 1 :]


def test_hidden_digits_of_a_numeric_are_compared(
    session: Session, fill: Fill, model: Model
) -> None:
    """SQLite keeps more digits than Numeric(10, 2) returns."""
    table = fill([sa.Column("amount", sa.Numeric(10, 2))], [(None,)] * 20)
    session.execute(sa.text("UPDATE keyed SET amount = 0.1 + id * 0.001"))
    session.commit()
    for key in [(table.c.amount, table.c.id), (table.c.amount.desc(), table.c.id)]:
        assert_same_rows(session, sa.select(table), key, 3)
    if model.sqlite:
        actual = rows(sa.select(table), key=table.c.amount, batch=3, session=session)
        assert [row.id for row in actual] == list(range(1, 21))


def test_interval_of_months_is_compared_by_the_database(
    session: Session, fill: Fill, model: Model
) -> None:
    """PostgreSQL sorts a year as 360 days. psycopg returns 365 days."""
    if model.sqlite:
        with pytest.raises(sa.exc.CompileError):
            sa.select(sa.cast("1 year", pg.INTERVAL())).compile(model.engine)
        return
    table = fill([sa.Column("span", pg.INTERVAL())], [(None,)] * 4)
    spans = ["1 year", "361 days", "364 days", "2 years"]
    for id, span in enumerate(spans, 1):
        statement = sa.text(f"UPDATE keyed SET span = '{span}' WHERE id = {id}")
        session.execute(statement)
    session.commit()
    actual = rows(sa.select(table), key=table.c.span, batch=1, session=session)
    assert [row.id for row in actual] == [1, 2, 3, 4]


def test_nan_can_be_a_key(session: Session, fill: Fill, model: Model) -> None:
    """PostgreSQL sorts NaN last, and NaN equals NaN. In Python it does not."""
    nan = None if model.sqlite else float("nan")
    column = sa.Column("value", sa.Float())
    table = fill([column], [(value,) for value in (1.0, nan, 2.0, nan, nan)])
    assert_same_rows(session, sa.select(table), (table.c.value, table.c.id), 1)
    actual = rows(sa.select(table), key=table.c.value, batch=3, session=session)
    assert sorted(row.id for row in actual) == [1, 2, 3, 4, 5]
    with pytest.raises(StreamError, match="Add the primary key"):
        list(rows(sa.select(table), key=table.c.value, batch=2, session=session))


def test_key_is_the_column_and_not_its_column_expression(
    session: Session, fill: Fill
) -> None:
    """A type may select another expression than the column."""

    class Rounded(sa.types.TypeDecorator[float]):
        impl = sa.Float
        cache_ok = True

        def column_expression(self, column: Any) -> Any:
            return sa.func.round(sa.cast(column, sa.Numeric), type_=sa.Float)

    table = fill([sa.Column("value", sa.Float)], [(1.4,), (2.4,), (3.4,)])
    rounded = sa.type_coerce(table.c.value, Rounded)
    actual = rows(sa.select(table.c.id), key=rounded, batch=1, session=session)
    assert [row.id for row in actual] == [1, 2, 3]


def test_key_that_is_greater_than_itself_is_an_error(
    make_model: Any, postgresql: str
) -> None:
    """A column of another type than declared would be read forever."""
    model = make_model(postgresql)
    span = sa.literal_column("CAST('-1 year' AS interval)", sa.Integer)
    with Session(model.outside) as session:
        model.seed("ada", "bob")
        statement = sa.select(User.id, span.label("span"))
        with pytest.raises(StreamError, match="Choose another key"):
            list(rows(statement, key=(span, User.id), session=session, batch=1))


# The statement.


def test_key_that_is_not_selected_is_not_in_the_rows(
    session: Session, model: Model
) -> None:
    """The column that is added for the key is removed from each row."""
    model.seed("ada", "bob", "cyd")
    source = rows(sa.select(User.name), key=sa.func.length(User.name), session=session)
    assert [tuple(row) for row in source] == [("ada",), ("bob",), ("cyd",)]
    assert source.fields == ["name"]
    by_id = rows(sa.select(User.name), key=User.id.desc(), session=session, batch=1)
    result = list(by_id)
    assert [row._asdict() for row in result] == [
        {"name": name} for name in ("cyd", "bob", "ada")
    ]
    assert [row.name for row in result] == ["cyd", "bob", "ada"]
    assert result[0]._fields == tuple(by_id.fields)


def test_key_may_be_of_a_class_an_alias_or_a_subquery(
    session: Session, model: Model
) -> None:
    """Everything in FROM can be read by key."""
    model.seed(*(f"user{number}" for number in range(10)))
    other = aliased(User)
    inner = sa.select(User.id, User.name).order_by(User.name.desc()).limit(7).subquery()
    cases: list[tuple[Any, Any]] = [
        (sa.select(User), (User.id,)),
        (sa.select(other), (other.name.desc(),)),
        (sa.select(inner), (inner.c.name,)),
        (sa.select(User.__table__), (User.__table__.c.id,)),
        (sa.select(User.name.label("who")), (User.name,)),
        (
            sa.select(User.id, other.id).join(other, other.id > User.id),
            (User.id, other.id),
        ),
    ]
    for statement, key in cases:
        result = list(rows(statement, key=key, batch=3, session=session))
        expected = session.connection().execute(statement.order_by(*key)).all()
        assert [tuple(row) for row in result] == [tuple(row) for row in expected]
    query = session.query(User).filter(User.id > 3)
    assert [row.id for row in rows(query, key=User.id)] == list(range(4, 11))


def test_fields_are_known_without_rows(session: Session, model: Model) -> None:
    """The names of the columns are known, and there is no empty batch."""
    source = rows(sa.select(User), key=User.id, session=session)
    assert list(source.batches()) == []
    assert source.fields == ["id", "name"]
    model.seed("ada")
    assert [len(batch) for batch in source.batches()] == [1]


def test_batches_grow_up_to_their_size(session: Session, model: Model) -> None:
    """The first rows of a slow query are sent early."""
    model.seed(*(f"user{number}" for number in range(100)))
    source = rows(sa.select(User), key=User.id, session=session, batch=40)
    assert [len(batch) for batch in source.batches()] == [16, 32, 40, 12]


@pytest.mark.parametrize(
    ("statement", "clause"),
    [
        (sa.select(User).order_by(User.name), "ORDER BY"),
        (sa.select(User).limit(3), "LIMIT"),
        (sa.select(User).offset(3), "OFFSET"),
        (sa.select(User).fetch(3), "FETCH"),
        (sa.select(User.name).distinct(), "DISTINCT"),
        (sa.select(User.name).group_by(User.name), "GROUP BY"),
        (sa.select(sa.func.row_number().over(order_by=User.id)), "a window function"),
        (sa.union(sa.select(User.id), sa.select(Note.id)), "subquery"),
        (sa.text("SELECT 1"), "subquery"),
    ],
)
def test_statement_that_cannot_continue_after_a_key_is_refused(
    statement: Any, clause: str
) -> None:
    """rows() itself raises the error, which names the clause."""
    with pytest.raises(StreamError, match=rf"{clause}.*subquery\(\)|subquery\(\)"):
        rows(statement, key=User.id)


@pytest.mark.parametrize(
    "attribute",
    [
        *("_order_by_clauses", "_limit_clause", "_offset_clause", "_fetch_clause"),
        *("_distinct", "_group_by_clauses", "_having_criteria", "_with_options"),
        *("_prefixes", "_suffixes", "_hints", "_statement_hints"),
    ],
)
def test_renamed_private_attribute_of_sqlalchemy_is_an_error(
    monkeypatch: pytest.MonkeyPatch, attribute: str
) -> None:
    """A clause or lock in it is not silently accepted with key=."""
    owner = next(base for base in sa.Select.__mro__ if attribute in vars(base))
    monkeypatch.delattr(owner, attribute)
    with pytest.raises(AttributeError, match=attribute):
        rows(sa.select(User), key=User.id)


def test_wrong_key_or_after_is_refused() -> None:
    """key must be columns, and after must have a value per column."""
    statement = sa.select(User)
    for key in ("id", 1, ("id",), User):
        with pytest.raises(TypeError, match="key must be columns such as"):
            rows(statement, key=key)
    with pytest.raises(TypeError, match=r"key must have at least one column, got \(\)"):
        rows(statement, key=())
    with pytest.raises(TypeError, match="got 2 for 1"):
        rows(statement, key=User.id, after=(1, 2))
    with pytest.raises(TypeError, match="after=1 needs key="):
        rows(statement, after=1)


def test_unknown_database_is_refused() -> None:
    """The order of NULLs, and of the type, must be known."""
    statement = sa.select(Note)
    (nullable,) = parse_key(statement, Note.user_id)
    unknown = DefaultDialect()
    unknown.name = "somedb"
    with pytest.raises(StreamError, match=r"nulls_first\(\) or nulls_last\(\)"):
        nullable.for_dialect(unknown)
    (explicit,) = parse_key(statement, Note.user_id.nulls_last())
    assert explicit.for_dialect(unknown).nulls_last
    (never,) = parse_key(statement, Note.id)
    assert never.for_dialect(unknown) is never
    for column_type in (sa.Float(), sa.Enum(Colour)):
        value = sa.column("value", column_type).nulls_first()
        (column,) = parse_key(statement, value)
        with pytest.raises(StreamError, match="does not sort it by the values"):
            column.for_dialect(mysql.dialect())
    (double,) = parse_key(statement, sa.column("value", sa.Double()).nulls_first())
    assert not double.for_dialect(mysql.dialect()).nulls_last


TEXT_LOCK = sa.text("SELECT id FROM users FOR NO KEY UPDATE").columns(User.id)


@pytest.mark.parametrize(
    ("statement", "clause"),
    [
        (sa.select(User).with_for_update(), "with_for_update"),
        (sa.select(User).with_for_update(skip_locked=True), "with_for_update"),
        (sa.select(User).with_for_update(nowait=True, of=User), "with_for_update"),
        (sa.select(User).with_for_update(read=True, key_share=True), "with_for_update"),
        (Session().query(User).with_for_update(), "with_for_update"),
        (sa.select(sa.select(User).with_for_update().subquery()), "with_for_update"),
        (sa.select(sa.select(User).with_for_update().cte()), "with_for_update"),
        (
            sa.select(User.id).where(
                User.id.in_(sa.select(Note.user_id).with_for_update(read=True))
            ),
            "with_for_update",
        ),
        (sa.select(User).suffix_with("FOR  key share"), "FOR  key share"),
        (sa.select(User).suffix_with("LOCK IN SHARE MODE"), "LOCK IN SHARE MODE"),
        (sa.select(User).with_statement_hint("FOR UPDATE"), "FOR UPDATE"),
        (sa.select(User).with_hint(User, "WITH (UPDLOCK)"), "UPDLOCK"),
        (sa.select(TEXT_LOCK.subquery()), "FOR NO KEY UPDATE"),
        (
            sa.select(User).where(sa.func.pg_try_advisory_xact_lock(User.id)),
            "pg_try_advisory_xact_lock",
        ),
    ],
)
def test_statement_that_locks_is_refused_with_key(statement: Any, clause: str) -> None:
    """The locks would end before the first row is used."""
    with pytest.raises(StreamError, match=f"with {clause}") as raised:
        rows(statement, key=User.id)
    assert "Use rows() without key=" in str(raised.value)


def test_quoted_lock_clause_is_allowed_with_key(session: Session, model: Model) -> None:
    """FOR UPDATE in a string or a comment locks nothing."""
    model.seed("ada")
    harmless = sa.select(User).where(sa.text("name <> 'FOR UPDATE' /* FOR SHARE */"))
    assert len(list(rows(harmless, key=User.id, session=session))) == 1


class Today(FunctionElement[dt.date]):
    """A function without a name, as in SQLAlchemy's documentation."""

    type = sa.Date()
    inherit_cache = True


@compiles(Today)
def compile_today(element: Any, compiler: Any, **options: Any) -> str:
    return "CURRENT_DATE"


def test_function_without_a_name_is_allowed_with_key(
    session: Session, model: Model
) -> None:
    """An application can define such a class with its own compiler."""
    model.seed("ada", "bob")
    statement = sa.select(User).where(Today().is_not(None))
    assert len(list(rows(statement, key=User.id, session=session))) == 2


def test_statement_that_writes_is_refused_with_key() -> None:
    """Each batch would write again."""
    added = sa.insert(User).values(name="new").returning(User.id).cte()
    for statement in (sa.select(added), sa.select(User).add_cte(added)):
        with pytest.raises(StreamError, match="run again for each batch"):
            rows(statement, key=User.id)
