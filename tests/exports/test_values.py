"""One value, one text: the table of the page on exports holds on each database."""

from __future__ import annotations

import csv
import enum
import io
import json
import re
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from ipaddress import ip_interface
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import openpyxl
import psycopg2.extras
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from psycopg.types import multirange, range
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.dialects.postgresql.ranges import MultiRange
from sqlalchemy.orm import Session

from tests.model import MakeModel, Model
from tgstream import CSV, NDJSON, XLSX, Parquet, copy, rows

EXPORTS = (Path(__file__).parents[2] / "docs/exports.rst").read_text()


class Status(enum.Enum):
    PAID = "paid"


NAMES = {
    **{"date": date, "datetime": datetime, "time": time, "timedelta": timedelta},
    **{"Decimal": Decimal, "UUID": UUID, "Status": Status, "Range": pg.Range},
    **{"ip_interface": ip_interface, "utc": timezone.utc},
}
"""The names in the first column of the table."""


class Line(NamedTuple):
    """A line of the table: a value, and its text in each format."""

    value: Any
    csv: str
    json: str
    xlsx: str
    parquet: str
    copy_csv: str
    copy_json: str


def read_table() -> dict[str, Line]:
    """The lines of the table by their first cells."""
    _, _, table = EXPORTS.partition("\nHow values are written\n---")
    table, _, _ = table.partition("\n- ")
    lines = {}
    for text in table.split("    * - ")[2:]:
        label, *cells = [cell.strip() for cell in text.strip().split("\n      - ")]
        [expression] = re.findall("^``(.*)``", label)
        cells = ["" if cell == "(empty)" else cell.strip("`") for cell in cells]
        lines[label] = Line(eval(expression, NAMES), *cells)
    assert len(lines) > 15
    return lines


TABLE = read_table()
every_value = pytest.mark.parametrize("label", TABLE)


def read_texts(source: Any) -> tuple[str, str]:
    """The texts of the first value of each row in CSV and in JSON, which are equal."""
    texts = []
    items = list(source)
    for encoded in (CSV(()).encode_batches(source), CSV(()).encode(items)):
        lines = list(csv.reader(io.StringIO("".join(map(str, encoded)))))
        texts.append((lines[0][0], ""))
        assert len({line[0] for line in lines}) == 1
    for encoded in (NDJSON().encode_batches(source), NDJSON().encode(items)):
        documents = b"".join(encoded).decode().splitlines()
        assert len(set(documents)) == 1
        texts.append(("", documents[0].removeprefix('{"v":').removesuffix("}")))
    assert texts[0] == texts[1] and texts[2] == texts[3]
    return texts[0][0], texts[2][1]


class Item(NamedTuple):
    v: Any


class Values:
    """A batched source with one column."""

    fields = ("v",)

    def __init__(self, value: Any) -> None:
        self.item = Item(value)

    def batches(self) -> Iterator[list[Any]]:
        yield [self.item] * 3

    def __iter__(self) -> Iterator[Any]:
        return iter([self.item] * 3)


@every_value
def test_value_of_a_generator_has_the_texts_of_the_table(label: str) -> None:
    """In CSV and in JSON, one by one and in batches."""
    line = TABLE[label]
    assert read_texts(Values(line.value)) == (line.csv, line.json)


def read_xlsx(value: Any) -> tuple[str, Any]:
    """The kind and the value of a cell, as openpyxl reads them."""
    data = b"".join(XLSX().encode(Values(value)))
    book = openpyxl.load_workbook(io.BytesIO(data))
    [sheet] = book.worksheets
    cell = sheet["A2"]
    kinds = {"n": "number", "s": "text", "b": "boolean", "d": "date"}
    kind = "empty cell" if cell.value is None else kinds[cell.data_type]
    book.close()
    return kind, cell.value


@every_value
def test_value_in_xlsx_is_that_of_the_table(label: str) -> None:
    """Dates and numbers have Excel's types, and texts are those of CSV."""
    line = TABLE[label]
    kind, value = read_xlsx(line.value)
    if line.xlsx in ("text", "JSON text", "base64", "its value"):
        assert (kind, value) == ("text", line.csv)
    elif line.xlsx in ("empty cell", "boolean", "number"):
        expected = line.value
        assert (kind, value) == (
            line.xlsx,
            float(expected) if isinstance(expected, Decimal) else expected,
        )
    else:
        expected = line.value
        if line.xlsx == "date":
            value = value.date()
        elif line.xlsx == "date and time in UTC":
            value = value.replace(tzinfo=timezone.utc)
        assert (kind, value) == ("date", expected)
        names = ("date", "date and time", "date and time in UTC", "time", "duration")
        assert line.xlsx in names


ARROW_TYPES = {
    **{"null": pa.null(), "bool": pa.bool_(), "int64": pa.int64()},
    **{"double": pa.float64(), "string": pa.string(), "date32": pa.date32()},
    **{"decimal": pa.decimal128(38, 2), "timestamp": pa.timestamp("us")},
    **{"timestamp in UTC": pa.timestamp("us", "UTC"), "time64": pa.time64("us")},
    **{"duration": pa.duration("us"), "binary": pa.binary()},
    **{"its value": pa.string(), "JSON text": pa.string()},
}


@every_value
def test_value_in_parquet_is_that_of_the_table(label: str) -> None:
    """Types without an Arrow type are the text of CSV."""
    line = TABLE[label]
    data = b"".join(Parquet().encode(Values(line.value)))
    table = pq.read_table(io.BytesIO(data))
    name = line.parquet.removeprefix("list from a statement, else ")
    assert table.schema.field("v").type == ARROW_TYPES[name]
    expected = line.csv if name in ("string", "its value", "JSON text") else line.value
    assert table["v"].to_pylist() == [expected] * 3


@pytest.mark.parametrize(
    "value",
    [
        pg.Range(1, 10),
        range.Range(1, 10),
        psycopg2.extras.NumericRange(1, 10),
        [pg.Range(1, 10)],
        MultiRange([pg.Range(1, 10)]),
        multirange.Multirange([range.Range(1, 10)]),
    ],
    ids=["sqlalchemy", "psycopg", "psycopg2", "list", "multirange", "Multirange"],
)
def test_range_has_the_same_text_with_each_driver(value: Any) -> None:
    """A multirange is a list of ranges."""
    texts = ("[1,10)", '"[1,10)"')
    if not hasattr(value, "lower_inc"):
        texts = ('["[1,10)"]', '["[1,10)"]')
    assert read_texts(Values(value)) == texts


BOUNDS: dict[str, Any] = {
    "int4range(1, 1)": pg.INT4RANGE,
    "int4range(NULL, 5)": pg.INT4RANGE,
    "numrange(1.50, NULL, '(]')": pg.NUMRANGE,
    "int8range(NULL, NULL)": pg.INT8RANGE,
    "daterange('2026-01-01', '2026-02-01', '[]')": pg.DATERANGE,
    "tsrange('2026-01-01', '2026-02-01 12:00')": pg.TSRANGE,
}


@pytest.mark.parametrize("expression", BOUNDS)
def test_range_has_the_text_of_the_database(
    make_model: MakeModel, postgresql: str, expression: str
) -> None:
    """PostgreSQL writes the same, for each kind of bound and both kinds of classes."""
    column = sa.literal_column(expression, BOUNDS[expression])
    with Session(make_model(postgresql).outside) as session:
        expected = session.scalar(sa.text(f"SELECT ({expression})::text"))
        for statement in (
            sa.select(column.label("v")),
            sa.text(f"SELECT {expression} AS v"),
        ):
            texts = read_texts(rows(statement, session=session))
            assert texts == (expected, json.dumps(expected))


POSTGRESQL: dict[str, tuple[str, Any]] = {
    "``None``": ("NULL", sa.Text),
    "``True``": ("true", sa.Boolean),
    "``7``": ("7", sa.Integer),
    "``1.5``": ("1.5::float8", sa.Float),
    '``Decimal("1.50")``': ("1.50", sa.Numeric),
    '``"a"``': ("'a'", sa.Text),
    "``date(2026, 1, 2)``": ("date '2026-01-02'", sa.Date),
    "``datetime(2026, 1, 2, 3, 4)``": ("timestamp '2026-01-02 03:04'", sa.DateTime),
    "``datetime(2026, 1, 2, 3, 4, tzinfo=utc)``": (
        "timestamptz '2026-01-02 03:04+00'",
        sa.DateTime(timezone=True),
    ),
    "``time(3, 4)``": ("time '03:04'", sa.Time),
    "``timedelta(days=1, hours=2)``": ("interval '1 day 2 hours'", sa.Interval),
    "``UUID(int=1)``": ("'00000000-0000-0000-0000-000000000001'::uuid", sa.Uuid),
    "``Status.PAID``": ("'PAID'", sa.Enum(Status, native_enum=False)),
    '``{"a": [1, None]}``': ("""'{"a": [1, null]}'::jsonb""", pg.JSONB),
    '``["a", "b"]``': ("ARRAY['a', 'b']", pg.ARRAY(sa.Text)),
    '``b"\\xfb\\xff"``': (r"'\xfbff'::bytea", sa.LargeBinary),
    "``Range(1, 10)``": ("int4range(1, 10)", pg.INT4RANGE),
    '``ip_interface("10.0.0.1/24")``': ("inet '10.0.0.1/24'", pg.INET),
}
"""The values of the table in SQL, with their types. The server has no HSTORE."""


@pytest.fixture
def utc_session(make_model: MakeModel, postgresql: str) -> Iterator[Session]:
    """A session on PostgreSQL, whose texts are in UTC."""
    engine = make_model(postgresql).outside
    with Session(engine) as session:
        session.execute(sa.text("SET LOCAL TimeZone = 'UTC'"))
        yield session


@pytest.mark.parametrize("label", POSTGRESQL)
def test_value_of_postgresql_has_the_texts_of_the_table(
    utc_session: Session, label: str
) -> None:
    """From ``rows()``, with SQLAlchemy's types and with those of psycopg."""
    expression, type_ = POSTGRESQL[label]
    line = TABLE[label]
    statements: list[Any] = [
        sa.select(sa.literal_column(expression, type_).label("v")),
        sa.text(f"SELECT {expression} AS v"),
    ]
    if label == "``Status.PAID``":  # SQLAlchemy alone knows the class
        del statements[1]
    for statement in statements:
        texts = read_texts(rows(statement, session=utc_session))
        assert texts == (line.csv, line.json)


@pytest.mark.parametrize("label", POSTGRESQL)
def test_value_in_copy_has_the_texts_of_the_database(
    utc_session: Session, label: str
) -> None:
    """``copy()`` as CSV and as JSON."""
    expression, type_ = POSTGRESQL[label]
    line = TABLE[label]
    statement = sa.select(sa.literal_column(expression, type_).label("v"))
    source = copy(statement, session=utc_session)
    data = b"".join(source).decode()
    text = "".join([*csv.reader(io.StringIO(data))][1])
    assert text == line.copy_csv
    documents = b"".join(source.for_format(NDJSON())).decode()
    assert documents == f'{{"v":{line.copy_json}}}\n'


def test_hstore_is_a_dict_of_texts(utc_session: Session) -> None:
    """SQLAlchemy reads the text of an HSTORE, as drivers without its type return it."""
    label = '``{"a": "1"}`` of HSTORE'
    line = TABLE[label]
    parse = pg.HSTORE().result_processor(sa.create_engine("sqlite://").dialect, None)
    assert parse is not None
    value = parse(line.copy_csv)
    assert value == line.value
    assert read_texts(Values(value)) == (line.csv, line.json)


SQLITE: dict[str, Any] = {
    "``True``": sa.Boolean,
    "``7``": sa.Integer,
    "``1.5``": sa.Float,
    '``Decimal("1.50")``': sa.Numeric(10, 2),
    '``"a"``': sa.String,
    "``date(2026, 1, 2)``": sa.Date,
    "``datetime(2026, 1, 2, 3, 4)``": sa.DateTime,
    "``time(3, 4)``": sa.Time,
    "``timedelta(days=1, hours=2)``": sa.Interval,
    "``UUID(int=1)``": sa.Uuid,
    "``Status.PAID``": sa.Enum(Status),
    '``{"a": [1, None]}``': sa.JSON,
    '``["a", "b"]``': sa.JSON,
    '``b"\\xfb\\xff"``': sa.LargeBinary,
}
"""The values of the table that SQLite can store, with their types."""


@pytest.mark.parametrize("label", SQLITE)
def test_value_of_sqlite_has_the_texts_of_the_table(
    sqlite_model: Model, label: str
) -> None:
    """SQLAlchemy's types convert what SQLite stores."""
    line = TABLE[label]
    with Session(sqlite_model.outside) as session:
        table = sa.Table("kinds", sa.MetaData(), sa.Column("v", SQLITE[label]))
        table.create(session.connection())
        session.execute(table.insert(), [{"v": line.value}])
        source = rows(sa.select(table), session=session)
        assert read_texts(source) == (line.csv, line.json)


# rows(convert=).


@pytest.mark.parametrize("key", [None, "id"])
def test_rows_convert_their_values(model: Model, key: Any) -> None:
    """The items stay rows with names, in batches, with a cursor and by key."""
    model.seed(*(f"user {number}" for number in (1, 2, 3)))
    table = sa.table("users", sa.column("id", sa.Integer), sa.column("name", sa.String))
    statement = sa.select(table) if key else sa.select(table).order_by(table.c.id)
    with Session(model.outside) as session:
        source = rows(
            statement,
            batch=2,
            key=table.c.id if key else None,
            session=session,
            convert={int: lambda value: f"#{value}", "name": str.upper},
        )
        items = list(source)
        assert [tuple(row) for row in items] == [
            ("#1", "USER 1"),
            ("#2", "USER 2"),
            ("#3", "USER 3"),
        ]
        assert [row.name for row in items] == ["USER 1", "USER 2", "USER 3"]
        assert items[0]._fields == ("id", "name")
        assert items[0]._mapping["id"] == "#1"
        assert source.fields == ["id", "name"]
        output = "".join(map(str, CSV().encode_batches(source)))
        assert output == "id,name\r\n#1,USER 1\r\n#2,USER 2\r\n#3,USER 3\r\n"
        [first, *_] = NDJSON().encode_batches(source)
        assert first.splitlines()[0] == b'{"id":"#1","name":"USER 1"}'


def test_rows_convert_error_names_the_item_and_the_column(model: Model) -> None:
    """The cursor is closed, and the item is counted over all batches."""
    model.seed(*map(str, (1, 2, 3, 4)))
    with Session(model.outside) as session:
        statement = sa.text("SELECT id, name FROM users ORDER BY id")
        convert = {"name": {"1": 1, "2": 2, "3": 3}.__getitem__}
        source = rows(statement, batch=2, session=session, convert=convert)
        with pytest.raises(
            ValueError, match="item 4, column 'name': convert raised KeyError: '4'"
        ):
            list(source)
        assert session.scalar(sa.text("SELECT count(*) FROM users")) == 4


def test_rows_convert_is_checked_before_the_statement_runs() -> None:
    """The error names the function."""
    with pytest.raises(TypeError, match=r"rows\(\): the keys of convert must be types"):
        rows(sa.text("SELECT 1"), convert={1: str})


def test_closed_rows_that_convert_close_their_cursor(
    make_model: MakeModel, postgresql: str
) -> None:
    """A generator that is closed closes the generator that it reads from."""
    model = make_model(postgresql)
    model.seed(*map(str, (1, 2, 3, 4)))
    with Session(model.outside) as session:
        statement = sa.text("SELECT id FROM users")
        batches = rows(
            statement, batch=1, session=session, convert={int: str}
        ).batches()
        next(batches)
        batches.close()
        cursors = sa.text("SELECT count(*) FROM pg_cursors")
        assert session.scalar(cursors) == 0
