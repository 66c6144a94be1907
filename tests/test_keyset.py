"""rows() by key: no row lost, none twice, whatever the key's type, order and NULLs."""

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
import transaction
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.orm import Session, aliased

import tgstream
from tests.conftest import MakeApp, Root, assert_clean, pool
from tests.model import Model, Note, User
from tests.wsgi import Call, get
from tgstream import StreamError, rows
from tgstream._key import terms_of

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
