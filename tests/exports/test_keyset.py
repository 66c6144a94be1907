"""rows() by key: no row lost, none twice, whatever the key's type, order and NULLs."""

from __future__ import annotations

import datetime as dt
import enum
import itertools
import random
import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import transaction
from sqlalchemy import event
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column

import tgstream
from tests.conftest import MakeApp, Root, assert_clean, pool
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import Call, get
from tgstream import StreamError, copy, rows
from tgstream.exports.keyset_columns import terms_of

Fill = Callable[..., sa.Table]


@pytest.fixture
def fill(model: Model, session: Session) -> Iterator[Fill]:
    """Makes a table of rows that are numbered by ``id``."""
    metadata = sa.MetaData()

    def make(columns: list[sa.Column[Any]], values: list[tuple[Any, ...]]) -> sa.Table:
        metadata.drop_all(model.outside)
        metadata.clear()
        id = sa.Column("id", sa.Integer, primary_key=True)
        table = sa.Table("keyed", metadata, id, *columns)
        metadata.create_all(model.outside)
        names = [column.name for column in columns]
        dicts = [dict(zip(names, each, strict=True)) for each in values]
        session.execute(sa.insert(table), dicts)
        session.commit()
        return table

    yield make
    session.close()
    metadata.drop_all(model.outside)


def assert_same_rows(
    session: Session, statement: Any, key: tuple[Any, ...], batch: int
) -> None:
    """By key come the rows that the database gives at once, in its own order."""
    expected = session.execute(statement.order_by(*key)).all()
    got = list(rows(statement, key=key, batch=batch, session=session))
    assert list(map(repr, got)) == list(map(repr, expected))
    assert len(got) > 0


# Order, NULLs and ties.


SENSES: list[Callable[[Any], Any]] = [
    lambda column: column,
    lambda column: column.desc(),
    lambda column: column.asc().nulls_first(),
    lambda column: column.desc().nulls_last(),
    lambda column: column.nulls_last(),
    lambda column: column.desc().nulls_first(),
]


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_every_order_gives_every_row_once(
    session: Session, fill: Fill, batch: int
) -> None:
    """Each mix of directions and places of NULL, over many ties and NULLs."""
    chance = random.Random(1)
    values = [None, 1, 2, 3]
    table = fill(
        [sa.Column("a", sa.Integer), sa.Column("b", sa.Integer)],
        [(chance.choice(values), chance.choice(values)) for _ in range(24)],
    )
    for first, second in itertools.product(SENSES, SENSES):
        for third in (table.c.id, table.c.id.desc()):
            key = first(table.c.a), second(table.c.b), third
            assert_same_rows(session, sa.select(table), key, batch)


def test_key_of_columns_that_are_never_null_is_one_comparison(
    session: Session, fill: Fill
) -> None:
    """Rows of values compare at once, and so do single columns, up and down."""
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


def test_rows_of_one_key_are_not_parted(session: Session, fill: Fill) -> None:
    """A key that is not unique loses nothing, as long as its rows fit in a batch."""
    table = fill([sa.Column("a", sa.Integer)], [(n // 3,) for n in range(100)])
    for batch in (3, 4, 7, 50):
        got = rows(sa.select(table), key=table.c.a, batch=batch, session=session)
        assert sorted(row.id for row in got) == list(range(1, 101))
    with pytest.raises(StreamError, match="add the primary key"):
        list(rows(sa.select(table), key=table.c.a, batch=2, session=session))


def test_group_larger_than_the_first_batch_comes_whole(
    session: Session, fill: Fill
) -> None:
    """The first batches are small; what does not fit waits for a larger one."""
    table = fill([sa.Column("a", sa.Integer)], [(n // 60,) for n in range(150)])
    got = rows(sa.select(table), key=table.c.a, session=session, batch=60)
    assert sorted(row.id for row in got) == list(range(1, 151))


def test_collation_that_takes_two_texts_for_one_loses_nothing(
    session: Session, fill: Fill, model: Model
) -> None:
    """'ada' and 'ADA' may be equal to the database, and then stay together."""
    kind = sa.String(10, collation="NOCASE") if model.sqlite else sa.String(10)
    texts = ["ada", "ADA", "Ada", "bob", "BOB", "cyd"]
    table = fill([sa.Column("name", kind)], [(text,) for text in texts])
    for batch in (3, 4):
        got = rows(sa.select(table), key=table.c.name, batch=batch, session=session)
        assert sorted(row.id for row in got) == [1, 2, 3, 4, 5, 6]


def test_outer_join_may_make_any_column_null(session: Session, model: Model) -> None:
    """A column that is never NULL in its table is, where there is no row of it."""
    model.seed("ada", "bob", "cyd", "dan", "eve")
    session.add_all([Note(text=str(n), user_id=n % 3 + 1) for n in range(7)])
    session.commit()
    joined = sa.select(User.name, Note.text).outerjoin(Note)
    for key in [(Note.id, User.id), (Note.id.desc(), User.id), (User.id, Note.id)]:
        for batch in (1, 2, 5):
            assert_same_rows(session, joined, key, batch)
    inner = joined.add_columns(Note.id, User.id.label("uid")).subquery()
    assert_same_rows(session, sa.select(inner), (inner.c.id, inner.c.uid), 2)


# Types that the driver changes.


class Colour(enum.Enum):
    RED = "r"
    GREEN = "g"
    BLUE = "b"


class Reversed(sa.types.TypeDecorator[str]):
    """A text that Python sees the other way round."""

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
def test_key_of_any_type_goes_on_where_it_stopped(
    session: Session, fill: Fill, name: str, shown: str
) -> None:
    """A key's value is compared as the database has it, not as Python shows it."""
    kind, values = TYPES[name]
    table = fill(
        [sa.Column("value", kind)],
        [(value,) for value in [*values, None, *reversed(values)]],
    )
    columns = list(table.c) if shown == "shown" else [table.c.id]
    for key in [(table.c.value, table.c.id), (table.c.value.desc(), table.c.id)]:
        for batch in (1, 2, 3):
            assert_same_rows(session, sa.select(*columns), key, batch)


@pytest.mark.parametrize(
    "name", sorted(TYPES.keys() - {"interval", "bytes", "decorated"})
)
def test_after_begins_behind_a_value_that_a_row_showed(
    session: Session, fill: Fill, name: str
) -> None:
    """What a client saw last is where it goes on, in the type that it saw."""
    kind, values = TYPES[name]
    column = sa.Column("value", kind, nullable=False)
    table = fill([column], [(value,) for value in [*values, *values]])
    statement = sa.select(table)
    key = table.c.value, table.c.id
    whole = list(rows(statement, key=key, session=session))
    for index, row in enumerate(whole):
        after = row.value, row.id
        rest = rows(statement, key=key, after=after, session=session, batch=2)
        assert list(rest) == whole[index + 1 :]


def test_digits_that_a_numeric_hides_are_compared(
    session: Session, fill: Fill, model: Model
) -> None:
    """SQLite keeps more digits than Numeric(10, 2) shows; none is taken for another."""
    table = fill([sa.Column("amount", sa.Numeric(10, 2))], [(None,)] * 20)
    session.execute(sa.text("UPDATE keyed SET amount = 0.1 + id * 0.001"))
    session.commit()
    for key in [(table.c.amount, table.c.id), (table.c.amount.desc(), table.c.id)]:
        assert_same_rows(session, sa.select(table), key, 3)
    if model.sqlite:
        got = rows(sa.select(table), key=table.c.amount, batch=3, session=session)
        assert [row.id for row in got] == list(range(1, 21))


def test_interval_of_months_is_compared_as_the_database_does(
    session: Session, fill: Fill, model: Model
) -> None:
    """Python has no months; PostgreSQL's year is 360 days to sort by, psycopg's 365."""
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
    got = rows(sa.select(table), key=table.c.span, batch=1, session=session)
    assert [row.id for row in got] == [1, 2, 3, 4]


def test_not_a_number_is_a_key_as_any(
    session: Session, fill: Fill, model: Model
) -> None:
    """PostgreSQL sorts NaN last and equal to itself, which Python does not."""
    nan = None if model.sqlite else float("nan")
    column = sa.Column("value", sa.Float())
    table = fill([column], [(value,) for value in (1.0, nan, 2.0, nan, nan)])
    assert_same_rows(session, sa.select(table), (table.c.value, table.c.id), 1)
    got = rows(sa.select(table), key=table.c.value, batch=3, session=session)
    assert sorted(row.id for row in got) == [1, 2, 3, 4, 5]
    with pytest.raises(StreamError, match="add the primary key"):
        list(rows(sa.select(table), key=table.c.value, batch=2, session=session))


def test_key_is_not_what_a_type_selects_in_its_place(
    session: Session, fill: Fill
) -> None:
    """A type may select an expression; what is compared is the column."""

    class Rounded(sa.types.TypeDecorator[float]):
        impl = sa.Float
        cache_ok = True

        def column_expression(self, column: Any) -> Any:
            return sa.func.round(sa.cast(column, sa.Numeric), type_=sa.Float)

    table = fill([sa.Column("value", sa.Float)], [(1.4,), (2.4,), (3.4,)])
    rounded = sa.type_coerce(table.c.value, Rounded)
    got = rows(sa.select(table.c.id), key=rounded, batch=1, session=session)
    assert [row.id for row in got] == [1, 2, 3]


def test_key_that_is_behind_itself_is_no_endless_loop(
    make_model: Any, postgresql: str
) -> None:
    """A column of another type than declared shows less than it is: said, and ended."""
    model = make_model(postgresql)
    span = sa.literal_column("CAST('-1 year' AS interval)", sa.Integer)
    with Session(model.outside) as session:
        model.seed("ada", "bob")
        statement = sa.select(User.id, span.label("span"))
        with pytest.raises(StreamError, match="choose another key"):
            list(rows(statement, key=(span, User.id), session=session, batch=1))


# The statement.


def test_key_need_not_be_selected_and_does_not_show(
    session: Session, model: Model
) -> None:
    """What was added to know the key is no field of a row."""
    model.seed("ada", "bob", "cyd")
    source = rows(sa.select(User.name), key=sa.func.length(User.name), session=session)
    assert [tuple(row) for row in source] == [("ada",), ("bob",), ("cyd",)]
    assert source.fields == ["name"]
    by_id = rows(sa.select(User.name), key=User.id.desc(), session=session, batch=1)
    found = list(by_id)
    assert [row._asdict() for row in found] == [
        {"name": name} for name in ("cyd", "bob", "ada")
    ]
    assert [row.name for row in found] == ["cyd", "bob", "ada"]
    assert found[0]._fields == tuple(by_id.fields)


def test_key_of_an_entity_an_alias_or_a_subquery(
    session: Session, model: Model
) -> None:
    """Whatever can be selected from can be read by its key."""
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
        found = list(rows(statement, key=key, batch=3, session=session))
        expected = session.connection().execute(statement.order_by(*key)).all()
        assert [tuple(row) for row in found] == [tuple(row) for row in expected]
    query = session.query(User).filter(User.id > 3)
    assert [row.id for row in rows(query, key=User.id)] == list(range(4, 11))


def test_no_row_still_has_fields(session: Session, model: Model) -> None:
    """The columns are known, also where there is nothing in them."""
    source = rows(sa.select(User), key=User.id, session=session)
    assert list(source.batches()) == []
    assert source.fields == ["id", "name"]
    model.seed("ada")
    assert [len(batch) for batch in source.batches()] == [1]


def test_batches_grow_up_to_their_size(session: Session, model: Model) -> None:
    """A slow query's first rows come soon."""
    model.seed(*(f"user{number}" for number in range(100)))
    source = rows(sa.select(User), key=User.id, session=session, batch=40)
    assert [len(batch) for batch in source.batches()] == [16, 32, 40, 12]


@pytest.mark.parametrize(
    ("statement", "what"),
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
def test_statement_that_cannot_go_on_behind_a_key_is_refused(
    statement: Any, what: str
) -> None:
    """It says what is in the way, where rows() is called."""
    with pytest.raises(StreamError, match=rf"{what}.*subquery\(\)|subquery\(\)"):
        rows(statement, key=User.id)


def test_key_that_makes_no_sense_is_refused() -> None:
    """A key is of columns, and after has a value for each."""
    statement = sa.select(User)
    for key in ("id", 1, ("id",), User):
        with pytest.raises(TypeError, match="is no column"):
            rows(statement, key=key)
    with pytest.raises(TypeError, match="names no column"):
        rows(statement, key=())
    with pytest.raises(TypeError, match="has 2 values, and its key has 1"):
        rows(statement, key=User.id, after=(1, 2))
    with pytest.raises(TypeError, match="has no key"):
        rows(statement, after=1)


def test_database_that_is_not_known_is_not_guessed() -> None:
    """Where NULLs sort, and what compares with what it shows, is known or refused."""
    statement = sa.select(Note)
    (nullable,) = terms_of(statement, Note.user_id)
    unknown = DefaultDialect()
    unknown.name = "somedb"
    with pytest.raises(StreamError, match=r"nulls_first\(\) or nulls_last\(\)"):
        nullable.on(unknown)
    (said,) = terms_of(statement, Note.user_id.nulls_last())
    assert said.on(unknown).nulls_last
    (never,) = terms_of(statement, Note.id)
    assert never.on(unknown) is never
    for kind in (sa.Float(), sa.Enum(Colour)):
        (term,) = terms_of(statement, sa.column("value", kind).nulls_first())
        with pytest.raises(StreamError, match="does not compare"):
            term.on(mysql.dialect())
    (double,) = terms_of(statement, sa.column("value", sa.Double()).nulls_first())
    assert not double.on(mysql.dialect()).nulls_last


# In a stream.


def free(model: Model) -> bool:
    return pool(model).checkedout() == 0 and model.idle_in_transaction() == 0


@pytest.mark.parametrize("zope", [True, False])
@pytest.mark.parametrize("commit", ["end", "each", "manual", 2])
def test_nothing_is_held_between_batches(
    make_app: MakeApp, make_model: Any, url: str, commit: Any, zope: bool
) -> None:
    """While the client reads a batch, its connection serves others."""
    model = make_model(url, zope=zope)
    model.seed(*(f"user{number}" for number in range(9)))
    expired: list[User] = []

    def body() -> Iterator[str]:
        first = model.DBSession.query(User).first()
        assert first is not None
        for row in rows(sa.select(User), key=User.id, batch=3):
            assert free(model)
            assert "name" in sa.inspect(first).dict
            yield row.name[-1]
        expired.extend([] if "name" in sa.inspect(first).dict else [first])

    app = make_app(Root(body, commit=commit), model)
    call = Call(app)
    for number in range(9):
        assert next(call) == str(number).encode()
        assert free(model)
    call.close()
    assert expired == []
    assert_clean(model)


WRITES: dict[str, Callable[[Session], Any]] = {
    "flushed": lambda session: session.bulk_save_objects([Note(text="new")]),
    "pending": lambda session: session.add(Note(text="new")),
    "orm": lambda session: session.execute(sa.insert(Note).values(text="new")),
    "connection": lambda session: session.connection().execute(
        sa.insert(Note).values(text="new")
    ),
    "driver": lambda session: session.connection().exec_driver_sql(
        "INSERT INTO notes (text) VALUES ('new')"
    ),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("when", ["before", "between"])
def test_what_was_written_is_not_committed_by_reading(
    make_app: MakeApp, model: Model, write: Any, when: str
) -> None:
    """A stream that fails undoes what it wrote, whichever batches it read after."""
    model.seed(*(f"user{number}" for number in range(6)))

    def body() -> Iterator[str]:
        if when == "before":
            write(model.DBSession())
        for number, row in enumerate(rows(sa.select(User), key=User.id, batch=1)):
            if when == "between" and number == 2:
                write(model.DBSession())
            yield row.name
        raise ValueError("too late")

    app = make_app(Root(body), model)
    with pytest.raises(ValueError, match="too late"):
        get(app)
    assert model.texts() == []
    assert_clean(model)


@pytest.mark.parametrize("commit", [tgstream.commit, transaction.commit])
def test_commit_between_rows_is_safe(
    make_app: MakeApp, model: Model, commit: Callable[[], None]
) -> None:
    """With a key, what was written can be committed row by row."""
    model.seed(*(f"user{number}" for number in range(5)))

    def body() -> Iterator[str]:
        for row in rows(sa.select(User), key=User.id, batch=2):
            model.DBSession.add(Note(text=row.name))
            commit()
            assert free(model)
            yield row.name[-1]

    assert get(make_app(Root(body, commit="manual"), model)).text == "01234"
    assert model.texts() == [f"user{number}" for number in range(5)]
    assert_clean(model)


def test_doom_outlives_the_batches(make_app: MakeApp, model: Model) -> None:
    """Reading on does not make a doomed transaction one that commits."""
    model.seed("ada", "bob", "cyd")

    def body() -> Iterator[str]:
        transaction.doom()
        for row in rows(sa.select(User), key=User.id, batch=1):
            yield row.name
        model.DBSession.add(Note(text="doomed"))

    assert get(make_app(Root(body), model)).text == "adabobcyd"
    assert model.texts() == []
    assert_clean(model)


def test_foreign_session_is_left_to_its_owner(make_app: MakeApp, model: Model) -> None:
    """A session that is not the stream's is read in, and its transaction goes on."""
    model.seed("ada", "bob")

    def body() -> Iterator[str]:
        with Session(model.outside) as session:
            for row in rows(sa.select(User), key=User.id, batch=1, session=session):
                assert session.in_transaction()
                yield row.name

    assert get(make_app(Root(body), model)).text == "adabob"
    assert_clean(model)


def test_rows_that_come_meanwhile_are_seen_if_they_sort_behind(
    session: Session, model: Model
) -> None:
    """Each batch is a query of its own; what is deleted does not disturb."""
    model.seed("a", "c", "e", "g")
    source = iter(rows(sa.select(User.name), key=User.name, batch=2, session=session))
    got = [next(source).name, next(source).name]
    session.rollback()
    with Session(model.outside) as other:
        other.execute(sa.delete(User).where(User.name == "c"))
        other.add_all([User(name="b"), User(name="f")])
        other.commit()
    assert [*got, *(row.name for row in source)] == ["a", "c", "e", "f", "g"]


# The transaction that was there before.


@pytest.fixture
def tenants(make_model: MakeModel, postgresql: str) -> Iterator[Model]:
    """A model whose role sees the users of the tenant that its transaction names."""
    admin = make_model(postgresql)
    admin.seed(*(f"a{number}" for number in range(40)))
    with admin.outside.begin() as connection:
        for statement in (
            "CREATE ROLE tenant",
            "GRANT ALL ON ALL TABLES IN SCHEMA public TO tenant",
            "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO tenant",
            "ALTER TABLE users ENABLE ROW LEVEL SECURITY",
            "CREATE POLICY own ON users USING (left(name, 1) = "
            "current_setting('app.tenant', true))",
        ):
            connection.exec_driver_sql(statement)
    yield make_model(f"{postgresql}&options=-c%20role%3Dtenant", create=False)
    with admin.outside.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE users DISABLE ROW LEVEL SECURITY")
        connection.exec_driver_sql("DROP POLICY own ON users")
        connection.exec_driver_sql("DROP OWNED BY tenant")
        connection.exec_driver_sql("DROP ROLE tenant")


SET_CONFIG = sa.select(sa.func.set_config("app.tenant", "a", True))
SET_LOCAL = "SET LOCAL app.tenant = 'a'"


def query_then_set(session: Any) -> None:
    session.query(Note).first()
    session.connection().exec_driver_sql(SET_LOCAL)


def query_then_set_config(session: Any) -> None:
    session.query(Note).first()
    session.execute(SET_CONFIG)


SETS: dict[str, Callable[[Any], Any]] = {
    "function": lambda session: session.execute(SET_CONFIG),
    "query": lambda session: session.query(sa.func.set_config("app.tenant", "a", True)),
    "text": lambda session: session.execute(sa.text(SET_LOCAL)),
    "connection": lambda session: session.connection().execute(SET_CONFIG),
    "driver": lambda session: session.connection().exec_driver_sql(SET_LOCAL),
    "later": query_then_set_config,
    "later, driver": query_then_set,
}


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("set_tenant", SETS.values(), ids=SETS)
def test_setting_of_the_transaction_lasts_over_the_batches(
    make_app: MakeApp, tenants: Model, set_tenant: Callable[[Any], Any], when: str
) -> None:
    """Row-level security reads SET LOCAL, and each batch must see the same rows."""

    def body() -> Iterator[str]:
        if when == "between":
            assert not list(rows(sa.select(User), key=User.id))
        done = set_tenant(tenants.DBSession)
        if isinstance(done, sa.orm.Query):
            done.all()
        for row in rows(sa.select(User), key=User.id, batch=5):
            yield f"{row.name} "

    got = get(make_app(Root(body), tenants)).text.split()
    assert got == [f"a{number}" for number in range(40)]
    assert_clean(tenants)


def test_setting_made_at_each_begin_holds_nothing(
    make_app: MakeApp, tenants: Model
) -> None:
    """A handler of after_begin names the tenant again for each batch."""

    @event.listens_for(tenants.maker.class_, "after_begin")
    def name_tenant(session: Any, begun: Any, connection: Any) -> None:
        connection.execute(SET_CONFIG)

    def body() -> Iterator[str]:
        tenants.DBSession.query(Note).first()
        source = rows(sa.select(User), key=User.id, batch=5)
        for number, row in enumerate(source):
            assert number % 5 or free(tenants)
            tenants.DBSession.get(User, row.id)
            yield f"{row.name} "

    got = get(make_app(Root(body), tenants)).text.split()
    assert got == [f"a{number}" for number in range(40)]
    assert_clean(tenants)


LOCK = sa.func.pg_advisory_xact_lock(7)
LOCKS: dict[str, Callable[[Session], Any]] = {
    "advisory": lambda session: session.execute(sa.select(LOCK)),
    "rows": lambda session: session.scalars(sa.select(User).with_for_update()).all(),
    "Query": lambda session: session.query(User).with_for_update(read=True).all(),
    "hint": lambda session: session.execute(
        sa.select(User.id).suffix_with("FOR SHARE")
    ).all(),
}


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("lock", LOCKS.values(), ids=LOCKS)
def test_lock_lasts_over_the_batches(
    make_app: MakeApp,
    make_model: MakeModel,
    postgresql: str,
    lock: Callable[[Session], Any],
    when: str,
) -> None:
    """A lock that the generator took is its own until it commits."""
    model = make_model(postgresql)
    model.seed(*(f"user{number}" for number in range(6)))
    free_rows = "SELECT count(*) FROM (SELECT FROM users FOR UPDATE SKIP LOCKED) AS r"
    free_lock = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    held: list[bool] = []

    def body() -> Iterator[str]:
        if when == "before":
            lock(model.DBSession())
        for number, row in enumerate(rows(sa.select(User), key=User.id, batch=1)):
            if when == "between" and number == 1:
                lock(model.DBSession())
            if number > 1:
                ((rows_left,),), ((locks,),) = map(model.look, (free_rows, free_lock))
                held.append(rows_left == 0 or locks == 1)
            yield row.name
        tgstream.commit()
        assert model.look(free_rows) == [(6,)]

    get(make_app(Root(body), model))
    assert held == [True] * 4
    assert_clean(model)


def test_transaction_that_the_generator_began_is_ended_by_it(
    make_app: MakeApp, make_model: MakeModel, url: str
) -> None:
    """``with DBSession.begin()`` ends at the end of its block, and not in it."""
    model = make_model(url, zope=False)
    model.seed(*(f"user{number}" for number in range(6)))

    def body() -> Iterator[str]:
        with model.DBSession.begin():
            for row in rows(sa.select(User), key=User.id, batch=1):
                assert model.DBSession().in_transaction()
                yield row.name
        assert free(model)

    assert get(make_app(Root(body), model)).text == "".join(model.names())
    assert_clean(model)


def test_transaction_begun_after_rows_by_key_is_ended_by_the_generator(
    make_app: MakeApp, make_model: MakeModel, url: str
) -> None:
    """``with DBSession.begin()`` lasts also if the session was read by key before."""
    model = make_model(url, zope=False)
    model.seed(*(f"user{number}" for number in range(6)))

    def body() -> Iterator[str]:
        assert len(list(rows(sa.select(User), key=User.id))) == 6
        with model.DBSession.begin():
            begun = model.DBSession().get_transaction()
            for row in rows(sa.select(User), key=User.id, batch=1):
                assert model.DBSession().get_transaction() is begun
                yield row.name
        assert free(model)

    assert get(make_app(Root(body), model)).text == "".join(model.names())
    assert_clean(model)


def test_connection_of_the_application_works_after_rows_by_key(
    make_app: MakeApp, model: Model
) -> None:
    """A session on a connection, as in tests, leaves no broken handler on it."""
    model.seed("ada")

    def body() -> Iterator[str]:
        yield from (row.name for row in rows(sa.select(User), key=User.id))

    app = make_app(Root(body), model)
    with model.engine.connect() as connection:
        model.DBSession.configure(bind=connection)
        assert get(app).text == "ada"
        replaced = sa.select(sa.func.replace("a", "a", "b"))
        assert connection.execute(replaced).scalar() == "b"


@pytest.mark.parametrize("outer", ["rows", "yield_per"])
def test_cursor_outlives_rows_by_key_that_are_read_in_its_loop(
    make_app: MakeApp, model: Model, outer: str
) -> None:
    """A loop over a cursor of the same session is not cut by a batch inside of it."""
    model.seed(*(f"user{number}" for number in range(50)))
    options = sa.select(User).execution_options(yield_per=5)

    def users() -> Iterator[Any]:
        if outer == "rows":
            return iter(rows(sa.select(User), batch=5))
        return iter(model.DBSession.scalars(options))

    def body() -> Iterator[str]:
        for user in users():
            for row in rows(sa.select(User.id), key=User.id, batch=20):
                if row.id == user.id:
                    yield user.name

    assert get(make_app(Root(body), model)).text == "".join(model.names())
    assert_clean(model)


def test_two_keysets_that_take_turns_hold_nothing(
    make_app: MakeApp, model: Model
) -> None:
    """Each ends the transactions of its own batches."""
    model.seed(*(f"user{number}" for number in range(9)))

    def body() -> Iterator[str]:
        up = rows(sa.select(User), key=User.id, batch=2)
        down = rows(sa.select(User), key=User.id.desc(), batch=3)
        for first, second in zip(up, down, strict=True):
            assert free(model)
            yield f"{first.name[-1]}{second.name[-1]} "

    assert get(make_app(Root(body), model)).text == "08 17 26 35 44 53 62 71 80 "
    assert_clean(model)


def test_function_that_writes_is_not_committed_by_reading(
    make_app: MakeApp, make_model: MakeModel, postgresql: str
) -> None:
    """A select() may call a function that writes; a stream that fails undoes it."""
    model = make_model(postgresql)
    model.seed(*(f"user{number}" for number in range(6)))
    with model.outside.begin() as connection:
        connection.exec_driver_sql(
            "CREATE OR REPLACE FUNCTION mark(id int) RETURNS int LANGUAGE sql AS "
            "$$ INSERT INTO notes (text) VALUES (id) RETURNING id $$"
        )
    marked = sa.select(User.id, sa.func.mark(User.id).label("mark"))

    def body() -> Iterator[str]:
        for row in rows(marked, key=User.id, batch=2):
            yield str(row.id)
        raise ValueError("too late")

    with pytest.raises(ValueError, match="too late"):
        get(make_app(Root(body), model))
    assert model.texts() == []
    assert_clean(model)


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
def test_statement_that_locks_is_refused_by_key(statement: Any, clause: str) -> None:
    """Its locks would be gone before the first row is worked on."""
    with pytest.raises(StreamError, match=f"with {clause}") as raised:
        rows(statement, key=User.id)
    assert "Use rows() without key=" in str(raised.value)


def test_words_that_lock_nothing_are_allowed_by_key(
    session: Session, model: Model
) -> None:
    """In a quoted text or a comment they are no clause."""
    model.seed("ada")
    harmless = sa.select(User).where(sa.text("name <> 'FOR UPDATE' /* FOR SHARE */"))
    assert len(list(rows(harmless, key=User.id, session=session))) == 1


def test_statement_that_writes_is_refused_by_key() -> None:
    """It would write again for each batch."""
    added = sa.insert(User).values(name="new").returning(User.id).cte()
    for statement in (sa.select(added), sa.select(User).add_cte(added)):
        with pytest.raises(StreamError, match="run again for each batch"):
            rows(statement, key=User.id)


# The engine.


class Elsewhere(DeclarativeBase):
    pass


class Other(Elsewhere):
    """A class whose table a session has in another database."""

    __tablename__ = "others"
    id: Mapped[int] = mapped_column(primary_key=True)
    size: Mapped[int | None]


@pytest.fixture(params=["get_bind", "get_bind, mapper only", "binds", "execution"])
def routed(
    request: pytest.FixtureRequest, model: Model, postgresql: str, tmp_path: Path
) -> Iterator[Session]:
    """A session with ``Other`` in PostgreSQL if the rest is in SQLite, or reversed."""
    there = postgresql if model.sqlite else f"sqlite:///{tmp_path}/other.db"
    engine = sa.create_engine(there, poolclass=sa.NullPool)
    Other.__table__.drop(engine, checkfirst=True)  # type: ignore[attr-defined]
    Other.__table__.create(engine)  # type: ignore[attr-defined]

    class Routed(Session):
        def get_bind(self, mapper: Any = None, **arguments: Any) -> Any:
            if mapper is None and request.param == "get_bind, mapper only":
                raise sa.exc.UnboundExecutionError("a mapper is needed")
            if request.param.startswith("get_bind"):
                is_other = mapper is not None and mapper.class_ is Other
                return engine if is_other else model.outside
            if request.param == "execution" and arguments.pop("there", False):
                return engine
            return super().get_bind(mapper, **arguments)

    def to_other(state: Any) -> None:
        if "others" in str(state.statement):
            state.bind_arguments["there"] = True

    both: dict[Any, Any] = {User: model.outside, Other: engine}
    binds = both if request.param == "binds" else None
    with Routed(bind=None if binds else model.outside, binds=binds) as session:
        if request.param == "execution":
            event.listen(session, "do_orm_execute", to_other)
        session.add_all([Other(size=n % 3 or None) for n in range(50)])
        if request.param != "execution":
            session.commit()
        else:
            session.rollback()
            with Session(engine) as outside:
                outside.add_all([Other(size=n % 3 or None) for n in range(50)])
                outside.commit()
        yield session
    Other.__table__.drop(engine)  # type: ignore[attr-defined]
    engine.dispose()


def test_engine_that_runs_the_statement_decides_where_nulls_are(
    routed: Session,
) -> None:
    """A class that is routed elsewhere loses no row for the dialect of another one."""
    for key in [(Other.size, Other.id), (Other.size.desc(), Other.id)]:
        for batch in (3, 7, 1000):
            assert_same_rows(routed, sa.select(Other.id, Other.size), key, batch)


def test_copy_is_written_by_the_engine_that_runs_the_statement(
    routed: Session,
) -> None:
    """COPY is for PostgreSQL, whichever engine the session has for other classes."""
    statement = sa.select(Other.id).order_by(Other.id)
    lines = b"".join(copy(statement, session=routed)).split()
    assert lines == [
        b"id",
        *(str(row.id).encode() for row in rows(statement, session=routed)),
    ]


def test_statement_that_runs_on_two_engines_is_refused_by_key(
    model: Model, postgresql: str, tmp_path: Path
) -> None:
    """The batches of two shards have no order in common."""
    shards = {"one": model.outside, "two": model.outside}

    def all_shards(*args: Any, **options: Any) -> list[str]:
        return list(shards)

    with ShardedSession(
        shard_chooser=lambda *args, **options: "one",
        identity_chooser=all_shards,
        execute_chooser=all_shards,
        shards=shards,
    ) as session:
        with pytest.raises(StreamError, match="one engine"):
            list(rows(sa.select(User), key=User.id, session=session))
        if not model.sqlite:
            with pytest.raises(StreamError, match="one engine"):
                list(copy(sa.select(User), session=session))


def test_write_past_sqlalchemy_between_batches_is_undone_with_the_stream(
    make_app: MakeApp, model: Model
) -> None:
    """Nobody sees what a driver's own cursor does, so that no batch ends it."""
    model.seed("ada", "bob", "eve", "zoe")

    def items() -> Iterator[str]:
        for number, row in enumerate(rows(sa.select(User.name), key=User.id, batch=1)):
            if number == 1:
                driver: Any = model.DBSession.connection().connection
                driver.cursor().execute("INSERT INTO users (name) VALUES ('new')")
            if number == 3:
                raise LookupError
            yield row.name

    with pytest.raises(LookupError):
        get(make_app(Root(items), model, trace_errors__enable=False))
    assert model.names() == ["ada", "bob", "eve", "zoe"]
    assert_clean(model)
