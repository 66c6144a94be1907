"""The formats Parquet and Arrow: types, values and row groups, read by four readers."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import gc
import io
import json
import math
import uuid
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
import sqlalchemy.orm
import transaction
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql as pg
from tg import TGController, expose

from tests.conftest import MakeApp, Root, assert_clean
from tests.forks import run_python
from tests.formats.support import Batches, Plain, sqlite_rows
from tests.formats.support import Model as Pydantic
from tests.model import Model, User
from tests.wsgi import Call
from tgstream import CSV, Arrow, Parquet, Report, rows, stream
from tgstream.formats.protocols import ColumnType

UTC = datetime.timezone.utc
ZONE = datetime.timezone(datetime.timedelta(hours=-3, seconds=-7))
NAIVE = datetime.datetime(2026, 1, 2, 3, 4, 5, 6)
FORMATS = [Parquet, Arrow]
both = pytest.mark.parametrize("format_class", FORMATS)


class Status(enum.Enum):
    PAID = "paid"
    OPEN = "open"


class Price(Decimal):
    def __str__(self) -> str:
        return f"{Decimal(self) * 100:.0f}"  # cents


class Level(enum.IntEnum):
    LOW = -1


def encode(format: Any, items: Any) -> bytes:
    """The file with these items, which is the same in batches of any size."""
    items = list(items)
    body = b"".join(format.encode(iter(items)))
    for size in (1, 3, 500):
        batches = Batches(items, (), size)
        assert b"".join(format.encode_batches(batches)) == body
    return body


def read_table(body: bytes) -> Any:
    """The table that pyarrow reads."""
    if body.startswith(b"PAR1"):
        return pq.read_table(io.BytesIO(body))
    return pa.ipc.open_stream(body).read_all()


def read_rows(format: Any, items: Any) -> list[tuple[Any, ...]]:
    table = read_table(encode(format, items))
    return [tuple(row.values()) for row in table.to_pylist()]


def fail_with(format: Any, items: Any) -> str:
    """The error, which is the same in batches of any size."""
    items, errors = list(items), set()
    outputs: list[Callable[[], Any]] = [lambda: format.encode(iter(items))]
    for size in (1, 3, 500):
        batches = Batches(items, (), size)
        outputs.append(lambda batches=batches: format.encode_batches(batches))  # type: ignore[misc]
    for output in outputs:
        with pytest.raises((TypeError, ValueError)) as failure:
            list(output())
        errors.add(str(failure.value))
    assert len(errors) == 1
    return errors.pop()


# The readers.


def with_pyarrow(path: Path) -> Any:
    return read_table(path.read_bytes())


def with_duckdb(path: Path) -> Any:
    """The rows, and the names of the types."""
    with duckdb.connect() as connection:
        if path.suffix == ".parquet":
            relation = connection.sql(f"SELECT * FROM '{path}'")
        else:
            table = with_pyarrow(path)
            relation = connection.from_arrow(table)
        return relation.columns, [*map(str, relation.types)], relation.fetchall()


def with_polars(path: Path) -> Any:
    if path.suffix == ".parquet":
        return pl.read_parquet(path)
    return pl.read_ipc_stream(path)


def with_pandas(path: Path) -> Any:
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    return with_pyarrow(path).to_pandas()


def plain(value: Any) -> Any:
    """The value of a reader as Python's own."""
    if value is None or value is pd.NaT or value is pd.NA:
        return None
    if isinstance(value, pd.Timestamp):
        return plain(value.to_pydatetime())
    if isinstance(value, pd.Timedelta):
        return value.to_pytimedelta()
    if isinstance(value, datetime.datetime) and value.tzinfo is not None:
        return value.astimezone(UTC)
    if hasattr(value, "tolist"):  # of NumPy
        return plain(value.tolist())
    if isinstance(value, list):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def read_with_all(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """The rows that each reader reads."""
    frame = with_pandas(path)
    read: dict[str, list[Any]] = {
        "pyarrow": [[*row.values()] for row in with_pyarrow(path).to_pylist()],
        "duckdb": with_duckdb(path)[2],
        "polars": with_polars(path).rows(),
        "pandas": [*zip(*(frame[name] for name in frame), strict=True)],
    }
    return {
        reader: [tuple(map(plain, row)) for row in table]
        for reader, table in read.items()
    }


def read_equal_rows(path: Path) -> list[tuple[Any, ...]]:
    """The rows, which are the same for all readers.

    Parquet has no type for a duration. DuckDB reads its microseconds.
    """
    read = read_with_all(path)
    if path.suffix == ".parquet":
        types = with_pyarrow(path).schema.types
        durations = {n for n, type_ in enumerate(types) if pa.types.is_duration(type_)}
        read["duckdb"] = [
            tuple(
                datetime.timedelta(microseconds=value)
                if n in durations and value is not None
                else value
                for n, value in enumerate(row)
            )
            for row in read["duckdb"]
        ]
    assert read["duckdb"] == read["polars"] == read["pandas"] == read["pyarrow"]
    return read["pyarrow"]


# Types and values of items without a statement.

VALUES: dict[str, tuple[Any, Any, Any]] = {
    "bool": (True, pa.bool_(), True),
    "int": (-(1 << 63), pa.int64(), -(1 << 63)),
    "huge": (10**37, pa.decimal128(38, 0), Decimal(10**37)),
    "float": (0.1, pa.float64(), 0.1),
    "decimal": (Decimal("12.50"), pa.decimal128(38, 2), Decimal("12.50")),
    "price": (Price("12.50"), pa.decimal128(38, 2), Decimal("12.50")),
    "exponent": (Decimal("1E+3"), pa.decimal128(38, 0), Decimal(1000)),
    "text": ("\u00e9\U0001f600", pa.string(), "\u00e9\U0001f600"),
    "date": (NAIVE.date(), pa.date32(), NAIVE.date()),
    "naive": (NAIVE, pa.timestamp("us"), NAIVE),
    "zoned": (
        NAIVE.replace(tzinfo=ZONE),
        pa.timestamp("us", tz="UTC"),
        NAIVE.replace(tzinfo=ZONE).astimezone(UTC),
    ),
    "last": (datetime.datetime.max, pa.timestamp("us"), datetime.datetime.max),
    "time": (NAIVE.time(), pa.time64("us"), NAIVE.time()),
    "zoned_time": (
        NAIVE.time().replace(tzinfo=UTC),
        pa.string(),
        "03:04:05.000006+00:00",
    ),
    "duration": (datetime.timedelta(-1, 5, 6), pa.duration("us"), None),
    "uuid": (uuid.UUID(int=5), pa.string(), "00000000-0000-0000-0000-000000000005"),
    "enum": (Status.PAID, pa.string(), "paid"),
    "int_enum": (Level.LOW, pa.int64(), -1),
    "dict": ({"a": [1, "\u00e9"]}, pa.string(), '{"a":[1,"\u00e9"]}'),
    "list": ([1, None], pa.string(), "[1,null]"),
    "tuple": ((1, "x"), pa.string(), '[1,"x"]'),
    "bytes": (b"\0\xff", pa.binary(), b"\0\xff"),
    "bytearray": (bytearray(b"x"), pa.binary(), b"x"),
    "memoryview": (memoryview(b"abc")[::2], pa.binary(), b"ac"),
    "none": (None, pa.null(), None),
    "fraction": (Fraction(1, 3), pa.string(), "1/3"),
}


@both
def test_arrow_values_are_equal_for_all_readers(
    format_class: Any, tmp_path: Path
) -> None:
    """Each value has the documented type, and may be None in another row."""
    format = format_class()
    items = [{name: value for name, (value, _, _) in VALUES.items()}]
    items += [dict.fromkeys(VALUES), items[0]]
    path = tmp_path / f"values.{format.suffix}"
    path.write_bytes(encode(format, items))
    schema = with_pyarrow(path).schema
    assert {f.name: f.type for f in schema} == {n: v[1] for n, v in VALUES.items()}
    read = read_equal_rows(path)
    expected = {name: value for name, (_, _, value) in VALUES.items()}
    expected["duration"] = VALUES["duration"][0]
    assert read == [tuple(expected.values()), (None,) * len(VALUES), read[0]]


kinds: dict[str, st.SearchStrategy[Any]] = {
    "bool": st.booleans(),
    "int": st.integers(-(1 << 70), 1 << 70),
    "float": st.floats(allow_nan=False),
    "decimal": st.decimals(allow_nan=False, allow_infinity=False, places=3),
    "any decimal": st.decimals(),
    "text": st.text(st.characters(), max_size=3),
    "date": st.dates(),
    "datetime": st.datetimes(timezones=st.sampled_from([None, UTC, ZONE])),
    "naive": st.datetimes(),
    "time": st.times(timezones=st.sampled_from([None, UTC])),
    "timedelta": st.timedeltas(),
    "bytes": st.binary(max_size=3),
    "json": st.sampled_from([[1, 2], {"a": None}]),
}
columns = st.one_of(
    *(st.lists(st.none() | kind, min_size=1, max_size=12) for kind in kinds.values()),
    st.lists(st.one_of(st.none(), *kinds.values()), min_size=1, max_size=4),
)


@settings(deadline=None, database=None, max_examples=150)
@given(columns, st.sampled_from([1, 5, 100]), st.sampled_from(FORMATS))
def test_arrow_value_is_never_changed(
    values: list[Any], size: int, format_class: Any
) -> None:
    """Values of any types are read as equal values, or are an error for their item."""
    items = [(value,) for value in values]
    format = format_class(size)
    try:
        [column] = read_table(encode(format, items)).columns
    except ValueError as error:
        assert str(error).startswith("item ")
        assert str(error) == fail_with(format, items)
        return
    for value, read in zip(values, column.to_pylist(), strict=True):
        if isinstance(value, list | dict):
            value = json.dumps(value, separators=(",", ":"))
        elif isinstance(value, datetime.time) and value.tzinfo is not None:
            value = str(value)
        assert value == read
        assert type(value) is type(read) or {type(value), type(read)} <= {
            int,
            float,
            Decimal,
        }


def test_arrow_numbers_of_the_first_group_share_a_type() -> None:
    """Integers become floats or decimals, and decimals get all their digits."""
    assert read_rows(Parquet(), [(1,), (None,), (2.5,)]) == [(1,), (None,), (2.5,)]
    digits = [(1,), (Decimal("2.5"),), (1 << 63,), (Decimal("0.125"),)]
    table = read_table(encode(Parquet(), digits))
    assert table.schema.types == [pa.decimal128(38, 3)]
    assert [(n,) for n in table.columns[0].to_pylist()] == digits
    sparse = [(None,)] * 600 + [("x",)]
    assert read_rows(Parquet(), sparse) == sparse
    assert read_rows(Arrow(), sparse) == sparse
    [(first,), second] = read_rows(Parquet(), [(math.nan,), (None,)])
    assert (math.isnan(first), second) == (True, (None,))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, "x"], "'x' of type str cannot be written as int64, the type of the items"),
        (["x", 1], "1 of type int cannot be written as string"),
        ([1, True], "True of type bool cannot be written as int64"),
        ([2**53 + 1, 1.5], "1.5 of type float cannot be written"),
        ([1.5, 2**53 + 1], "9007199254740993 of type int cannot be written as double"),
        ([NAIVE.date(), NAIVE], "of type datetime cannot be written as date32"),
        ([NAIVE, NAIVE.date()], "of type date cannot be written as timestamp"),
        ([NAIVE, NAIVE.replace(tzinfo=UTC)], "cannot be written as timestamp[us], "),
        ([NAIVE.replace(tzinfo=UTC), NAIVE], "written as timestamp[us, tz=UTC], "),
        ([b"x", "x"], "'x' of type str cannot be written as binary"),
        ([1, 10**40], "of type int cannot be written as int64"),
        ([Decimal("0.1"), Decimal(10**38)], "cannot be written"),
        ([Decimal(1), Decimal("NaN")], "'NaN' is not a valid decimal"),
        ([1, Decimal("Infinity")], "cannot be written as int64"),
        ([datetime.timedelta(), datetime.timedelta.max], "too large to fit in 64-bit"),
        (["x", "\ud800"], "surrogates not allowed"),
        (["x", object()], "objects of this class have no text"),
        ([{}, {"a": math.nan}], 'field "a": the value contains NaN or Infinity'),
    ],
)
@both
def test_arrow_value_of_another_type_is_rejected(
    format_class: Any, values: list[Any], message: str
) -> None:
    """The error names the item and the column, whatever the batch has before it."""
    items = [{"n": n, "my column": value} for n, value in enumerate(values)]
    error = fail_with(format_class(), [items[0], items[0], items[1]])
    assert error.startswith("item 3, column 'my column'")
    assert message in error


@pytest.mark.parametrize(
    ("first", "later", "fits"),
    [
        (1, 2.0, False),
        (1.5, 2, True),
        (Decimal("1.50"), Decimal("1.5000"), True),
        (Decimal("1.50"), Decimal("1.505"), False),
        (Decimal("1.50"), 3, True),
        (None, 1, False),
        ("x", Status.OPEN, True),
        ("x", {"a": 1}, True),
        (1, None, True),
    ],
    ids=repr,
)
def test_arrow_type_is_fixed_with_the_first_group(
    first: Any, later: Any, fits: bool
) -> None:
    """A later value that needs another type is an error."""
    items = [(first,), (later,)]
    if fits:
        assert len(read_rows(Parquet(row_group=1), items)) == 2
    else:
        message = fail_with(Parquet(row_group=1), items)
        assert message.startswith("item 2, column 'column_1'")
        assert "the type of the column is already sent" in message


# Kinds of items.

Point = namedtuple("Point", "id name")


@dataclasses.dataclass
class Pair:
    id: int
    name: str | None = "x"


@pytest.mark.parametrize(
    "item",
    [
        {"id": 1, "name": "x"},
        Point(1, "x"),
        Pair(1),
        Plain(1),
        User(id=1, name="x"),
        sqlite_rows("SELECT 1 AS id, 'x' AS name")[0],
        sqlite_rows("SELECT 1 AS id, 'x' AS name", mappings=True)[0],
    ],
    ids=lambda item: type(item).__name__,
)
@both
def test_arrow_column_names_are_those_of_the_items(
    format_class: Any, item: Any
) -> None:
    """A header renames the columns."""
    table = read_table(encode(format_class(), [item]))
    assert table.to_pylist() == [{"id": 1, "name": "x"}]
    if not hasattr(item, "keys"):
        renamed = read_table(encode(format_class(header=["a", "b"]), [item]))
        assert renamed.to_pylist() == [{"a": 1, "b": "x"}]


def test_arrow_items_may_be_models() -> None:
    """A computed field of pydantic is a column."""
    table = read_table(encode(Parquet(), [Pydantic(id=1)]))
    assert table.to_pylist() == [{"id": 1, "name": "x", "twice": 2}]


def test_arrow_columns_of_sequences_have_numbers() -> None:
    """Readers need a name for each column."""
    items = [[1, "a"], (2, "b")]
    names = ["column_1", "column_2"]
    assert read_table(encode(Parquet(), items)).column_names == names
    header = Parquet(header=["id", "name"])
    assert read_table(encode(header, items)).column_names == ["id", "name"]


def test_arrow_missing_key_of_a_mapping_is_null() -> None:
    """A key that the first mapping does not have is an error."""
    assert read_rows(Parquet(), [{"a": 1, "b": 2}, {"a": 3}]) == [(1, 2), (3, None)]
    message = fail_with(Parquet(), [{"a": 1}, {"a": 1, "b": 2}])
    assert message.startswith("item 2 has the key 'b', but the header has 'a'. ")
    header = Parquet(header=["a", "b"])
    assert read_rows(header, [{"a": 1}, {"a": 1, "b": 2}]) == [(1, None), (1, 2)]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(1, 2), (1,)], "item 2 has 1 cells, but there are 2 columns"),
        ([(1,), (1, 2)], "item 2 has 2 cells, but there are 1 columns"),
        ([{"a": 1}, ()], "item 2 has 0 cells, but there are 1 columns"),
        ([()], "item 1 has 0 cells, but there are 0 columns"),
        (["text"], "item 1 must be a row"),
        ([(1,), b"x"], "item 2 must be a row"),
        ([5], "item 1 must be a row"),
    ],
    ids=repr,
)
def test_arrow_item_that_is_not_a_row_is_rejected(
    items: list[Any], message: str
) -> None:
    """The error names the item."""
    assert fail_with(Parquet(), items).startswith(message)


def test_arrow_two_columns_of_one_name_are_rejected() -> None:
    """Polars and DuckDB could not address the second one."""
    message = "Parquet: two columns have the name 'a'. Give each column its own name"
    assert fail_with(Parquet(header=["a", "a"]), [(1, 2)]) == message


# Groups of rows.


def group_sizes(body: bytes) -> list[int]:
    if body.startswith(b"PAR1"):
        metadata = pq.read_metadata(io.BytesIO(body))
        return [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    return [batch.num_rows for batch in pa.ipc.open_stream(body)]


@pytest.mark.parametrize(
    ("size", "sizes"),
    [(100, [100, 100, 50]), (125, [125, 125]), (1, [1] * 250), (1000, [250])],
)
@both
def test_arrow_groups_have_the_declared_number_of_rows(
    format_class: Any, size: int, sizes: list[int]
) -> None:
    """The size of the batches does not matter, and equal rows give equal bytes."""
    items = [(n, f"name {n}", n / 7) for n in range(250)]
    body = encode(format_class(size), items)
    assert group_sizes(body) == sizes
    assert read_table(body).num_rows == 250
    assert encode(format_class(size), items) == body


def test_parquet_of_many_rows_has_the_same_bytes_from_any_batches() -> None:
    """The pages and dictionaries of a row group do not depend on the batches."""
    items = [(n, f"name {n}", n % 7) for n in range(60_000)]
    bodies = {
        b"".join(Parquet(row_group=25_000).encode_batches(Batches(items, (), size)))
        for size in (16, 256, 7000, 60_000)
    }
    assert bodies == {b"".join(Parquet(row_group=25_000).encode(iter(items)))}


@both
def test_arrow_group_is_sent_before_the_next_one_is_made(format_class: Any) -> None:
    """It is complete in the output, in parts of a few MiB at most."""
    made: list[int] = []

    def items() -> Iterator[Any]:
        for n in range(60_000):
            made.append(n)
            yield (n, f"{n:0100}{hash(str(n))}")

    sizes: list[int] = []
    counts: list[int] = []
    for piece in format_class(20_000).encode(items()):
        if piece:
            sizes.append(len(piece))
            counts.append(len(made))
    assert {20_000, 40_000, 60_000} <= {*counts}
    assert max(sizes) <= 3 << 20


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    ("format", "rows_at_most"),
    [(Parquet(), 70), (Arrow(), 6)],
    ids=["parquet", "arrow"],
)
def test_arrow_group_of_large_rows_ends_early(
    format: Any, rows_at_most: int, batched: bool
) -> None:
    """The rows in memory have about 64 MiB for Parquet, and 4 MiB for Arrow."""
    text = "x" * (1 << 20)
    items = [(n, text) for n in range(150)]
    source = Batches(items, (), 1)
    output = format.encode_batches(source) if batched else format.encode(iter(items))
    sizes = group_sizes(b"".join(output))
    assert sum(sizes) == 150
    assert max(sizes) <= rows_at_most


@both
def test_arrow_memory_does_not_grow_with_the_rows(format_class: Any) -> None:
    """Arrow's allocator never holds more than some groups of rows."""
    batch = [(n, f"name {n}", NAIVE) for n in range(250)]
    size, peak, before = 0, 0, pa.total_allocated_bytes()

    class Source(Batches):
        def batches(self) -> Iterator[Sequence[Any]]:
            nonlocal peak
            for _ in range(400):
                peak = max(peak, pa.total_allocated_bytes() - before)
                yield batch

    for piece in format_class(5000).encode_batches(Source([])):
        size += len(piece)
    assert size > 50_000
    assert peak < 2 << 20
    assert pa.total_allocated_bytes() - before < 100_000


@both
def test_arrow_file_without_rows_has_its_columns(format_class: Any) -> None:
    """Readers find the names, and no row."""
    body = b"".join(format_class().encode_batches(Batches([], ["a", "b"])))
    table = read_table(body)
    assert (table.column_names, table.num_rows) == (["a", "b"], 0)
    header = b"".join(format_class(header=["a"]).encode(iter([])))
    assert read_table(header).column_names == ["a"]
    assert read_table(b"".join(format_class().encode(iter([])))).num_columns == 0


# Arguments, and the optional package.


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "10", None])
def test_arrow_invalid_size_is_rejected(value: Any) -> None:
    """A group has at least one row."""
    with pytest.raises(ValueError, match="row_group must be a number of rows, an int"):
        Parquet(row_group=value)
    with pytest.raises(ValueError, match="Arrow: batch must be a number of rows"):
        Arrow(batch=value)
    with pytest.raises(TypeError, match="Parquet: header must be a list of column"):
        Parquet(header="id")


def test_arrow_package_is_imported_for_the_first_stream() -> None:
    """If it is not installed, the error names the command."""
    program = """
import sys, tgstream
format = tgstream.Parquet()
assert "pyarrow" not in sys.modules
[*format.encode([[1]])]
assert "pyarrow" in sys.modules
sys.modules["pyarrow"] = None
for make in (tgstream.Parquet, tgstream.Arrow):
    try:
        make()
    except ImportError as error:
        print(error)
"""
    ran = run_python("-c", program)
    assert ran.stdout.splitlines() == [
        "Parquet needs pyarrow. Install it with: pip install 'tgstream[arrow]'",
        "Arrow needs pyarrow. Install it with: pip install 'tgstream[arrow]'",
    ]


# Types of a statement.


class Base(sa.orm.DeclarativeBase):
    pass


class Everything(Base):
    """A column of each type that SQLite has too."""

    __tablename__ = "everything"
    id = sa.Column(sa.Integer, primary_key=True)
    big = sa.Column(sa.BigInteger)
    price = sa.Column(sa.Numeric(12, 2))
    precise = sa.Column(sa.Numeric)
    ratio = sa.Column(sa.Numeric(12, 2, asdecimal=False))
    real = sa.Column(sa.Float)
    name = sa.Column(sa.String(50))
    flag = sa.Column(sa.Boolean)
    day = sa.Column(sa.Date)
    moment = sa.Column(sa.DateTime)
    clock = sa.Column(sa.Time)
    span = sa.Column(sa.Interval)
    uuid = sa.Column(sa.Uuid)
    status: Any = sa.Column(sa.Enum(Status))
    document = sa.Column(sa.JSON)
    blob = sa.Column(sa.LargeBinary)
    digits = sa.Column(sa.Numeric(50, 2, asdecimal=True))


everything = {
    "big": 1 << 62,
    "price": Decimal("1.00"),
    "precise": Decimal("0.125"),
    "ratio": 1.0,
    "real": 2.0,
    "name": "\u00e9",
    "flag": True,
    "day": NAIVE.date(),
    "moment": NAIVE,
    "clock": NAIVE.time(),
    "span": datetime.timedelta(1, 2, 3),
    "uuid": uuid.UUID(int=5),
    "status": Status.PAID,
    "document": "text",
    "blob": b"\0\xff",
}
EVERYTHING_TYPES = {
    "id": pa.int64(),
    "big": pa.int64(),
    "price": pa.decimal128(12, 2),
    "precise": pa.decimal128(38, 10),
    "ratio": pa.float64(),
    "real": pa.float64(),
    "name": pa.string(),
    "flag": pa.bool_(),
    "day": pa.date32(),
    "moment": pa.timestamp("us"),
    "clock": pa.time64("us"),
    "span": pa.duration("us"),
    "uuid": pa.string(),
    "status": pa.string(),
    "document": pa.string(),
    "blob": pa.binary(),
    "digits": pa.string(),
}


@pytest.fixture
def filled(model: Model) -> Iterator[Model]:
    """The database, with a row of values between two rows of NULL."""
    Base.metadata.drop_all(model.outside)
    Base.metadata.create_all(model.outside)
    with model.outside.begin() as connection:
        for values in ({}, everything, {}):
            connection.execute(sa.insert(Everything).values(**values))
    yield model
    Base.metadata.drop_all(model.outside)


def make_table_app(make_app: MakeApp, model: Model, statement: Any) -> Any:
    """An application that exports a statement, at ``/parquet`` and at ``/arrow``."""

    class RootController(TGController):
        @expose()
        @stream(Parquet, filename="everything")
        def parquet(self) -> Any:
            return statement

        @expose()
        @stream(Arrow, filename="everything")
        def arrow(self) -> Any:
            return rows(statement)

    return make_app(RootController(), model)


def download(app: Any, folder: Path, suffix: str) -> Path:
    """Save the response in a file."""
    call = Call(app, f"/{suffix}")
    assert call.status == "200 OK"
    path = folder / f"download.{suffix}"
    path.write_bytes(call.read())
    disposition = call.headers["Content-Disposition"]
    assert disposition == f'attachment; filename="everything.{suffix}"'
    kind = {"parquet": "parquet", "arrow": "arrow.stream"}[suffix]
    assert call.headers["Content-Type"] == f"application/vnd.apache.{kind}"
    return path


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_arrow_types_are_those_of_the_statement(
    make_app: MakeApp, filled: Model, tmp_path: Path, suffix: str
) -> None:
    """The values are equal for all readers, on SQLite and on PostgreSQL."""
    statement = sa.select(Everything).order_by(Everything.id)
    path = download(make_table_app(make_app, filled, statement), tmp_path, suffix)
    types = {field.name: field.type for field in with_pyarrow(path).schema}
    expected = dict(EVERYTHING_TYPES)
    if not filled.sqlite:
        expected["precise"] = pa.decimal128(38, 3)  # SQLite returns ten digits
    assert types == expected
    [_, row, last] = read_equal_rows(path)
    texts = {"uuid": str(everything["uuid"]), "status": "paid", "document": '"text"'}
    assert row == (2, *{**everything, **texts}.values(), None)
    assert last == (3,) + (None,) * (len(row) - 1)
    assert_clean(filled)


@both
def test_arrow_format_is_chosen_by_extension_or_accept(
    make_app: MakeApp, format_class: Any
) -> None:
    """A controller may have both formats, and others."""

    class RootController(TGController):
        @expose()
        @stream([CSV, Parquet, Arrow], filename="users")
        def users(self) -> Any:
            return [{"id": 1}]

    app = make_app(RootController())
    suffix, content_type = format_class.suffix, format_class.content_type
    for call in (
        Call(app, f"/users.{suffix}"),
        Call(app, "/users", HTTP_ACCEPT=content_type),
    ):
        assert call.headers["Content-Type"] == content_type
        assert f'filename="users.{suffix}"' in call.headers["Content-Disposition"]
        assert read_table(call.read()).to_pylist() == [{"id": 1}]


@both
def test_arrow_types_of_a_statement_need_no_values(
    make_app: MakeApp, filled: Model, format_class: Any
) -> None:
    """A table without rows, and columns of NULL, have the types of the statement."""
    none = sa.false()
    for condition in (none, Everything.id == 1):
        statement = sa.select(Everything).where(condition)
        app = make_table_app(make_app, filled, statement)
        body = Call(app, f"/{format_class.suffix}").read()
        table = read_table(body)
        expected = {**EVERYTHING_TYPES, "precise": pa.decimal128(38, 18)}
        assert {field.name: field.type for field in table.schema} == expected
        assert table.to_pylist() == [
            {"id": 1, **dict.fromkeys([*EVERYTHING_TYPES][1:])}
        ] * (condition is not none)


def test_arrow_values_of_computed_columns_keep_their_digits(
    make_app: MakeApp, filled: Model
) -> None:
    """A sum has more digits than its column, and a product more after the point."""
    price: Any = Everything.price
    statement: Any = sa.select(
        sa.func.sum(price * 10_000_000_000_000).label("total"),
        sa.func.count(price).label("count"),
        sa.func.sum(price * sa.literal(Decimal("0.125"), sa.Numeric(8, 4))).label(
            "product"
        ),
    )
    body = Call(make_table_app(make_app, filled, statement), "/arrow").read()
    table = read_table(body)
    assert table.schema.field("total").type == pa.decimal128(38, 2)
    assert table.schema.field("count").type == pa.int64()
    [row] = table.to_pylist()
    assert row["total"] == 10_000_000_000_000
    if not filled.sqlite:  # SQLAlchemy rounds the numbers of SQLite
        assert row["product"] == Decimal("0.125")


def test_arrow_types_of_postgresql_are_read(
    make_app: MakeApp, postgresql: str, make_model: Any, tmp_path: Path
) -> None:
    """Arrays are lists. Ranges, addresses and times with a zone are text."""
    model = make_model(postgresql)
    zoned = NAIVE.replace(tzinfo=UTC)
    columns: dict[str, tuple[str, Any, Any]] = {
        "numbers": ("ARRAY[1, NULL, 3]", pg.ARRAY(sa.Integer), [1, None, 3]),
        "table": (
            "ARRAY[ARRAY['a'], ARRAY['b']]",
            pg.ARRAY(sa.Text, dimensions=2),
            [["a"], ["b"]],
        ),
        "moment": (
            "timestamptz '2026-01-02 03:04:05.000006+00'",
            sa.DateTime(timezone=True),
            zoned,
        ),
        "clock": (
            "timetz '03:04:05+02'",
            sa.Time(timezone=True),
            "03:04:05+02:00",
        ),
        "range": ("int4range(1, 5)", pg.INT4RANGE(), "[1,5)"),
        "address": ("inet '10.0.0.1'", pg.INET(), "10.0.0.1"),
        "jsonb": ("jsonb '{\"a\": [1]}'", pg.JSONB(), '{"a":[1]}'),
        "average": ("avg(n)", sa.types.NullType(), Decimal("1.5000000000000000")),
        "sum": ("sum(n::bigint)", sa.BigInteger(), 3),
        "digits": (f"{'9' * 45}.25::numeric", sa.Numeric(50, 2), f"{'9' * 45}.25"),
    }
    statement = sa.select(
        *(
            sa.literal_column(sql, type_).label(name)
            for name, (sql, type_, _) in columns.items()
        )
    ).select_from(sa.text("generate_series(1, 2) AS n"))
    app = make_table_app(make_app, model, statement)
    for suffix in ("parquet", "arrow"):
        path = download(app, tmp_path, suffix)
        [row] = read_equal_rows(path)
        assert row == tuple(value for _, _, value in columns.values())
    schema = with_pyarrow(path).schema
    assert schema.field("numbers").type == pa.list_(pa.int64())
    assert schema.field("sum").type == pa.int64()


def test_arrow_datetimes_of_sqlite_have_no_zone(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """SQLite drops the zone, so tgstream does not invent one."""
    zoned = sa.DateTime(timezone=True)
    statement = sa.select(
        sa.literal_column("'2026-01-02 03:04:05.000006'", zoned).label("moment"),
        sa.literal_column("NULL", zoned).label("none"),
    )
    body = Call(make_table_app(make_app, sqlite_model, statement), "/parquet").read()
    table = read_table(body)
    assert table.schema.types == [pa.timestamp("us"), pa.timestamp("us", tz="UTC")]
    assert table.to_pylist() == [{"moment": NAIVE, "none": None}]


class Declared(Batches):
    """A source whose fields have types."""

    types: Sequence[Any] = ()


@pytest.mark.parametrize(
    ("python_type", "value", "read"),
    [
        (int, 2.0, 2),
        (int, Decimal("2.00"), 2),
        (int, True, 1),
        (bool, 1, True),
        (float, 1, 1.0),
        (str, 5, "5"),
        (str, {"a": 1}, '{"a":1}'),
        (datetime.date, "2026-01-02", NAIVE.date()),
        (datetime.date, datetime.datetime(2026, 1, 2), NAIVE.date()),
        (datetime.datetime, "2026-01-02 03:04:05.000006", NAIVE),
        (datetime.datetime, NAIVE.date(), datetime.datetime(2026, 1, 2)),
        (datetime.time, "03:04:05.000006", NAIVE.time()),
        (Decimal, 2, Decimal("2.00")),
        (Decimal, 0.25, Decimal("0.25")),
        (Status, Status.PAID, "paid"),
        (dict, 5, "5"),
        (int, 2.5, "it is not an integer"),
        (int, "x", "it is not an integer"),
        (int, 1 << 63, "it has more than 64 bits"),
        (bool, 2, "only 0 and 1 are booleans"),
        (float, "1.5", "it is not a float"),
        (str, b"x", "it is not text"),
        (datetime.date, NAIVE, "a date would lose its time"),
        (datetime.date, "2026-99-01", "month must be in 1..12"),
        (datetime.date, 5, "argument must be str"),
        (datetime.time, "03:04:05+02:00", "the times of the column have no zone"),
        (Decimal, 0.125, "value would cause data loss"),
        (Decimal, "x", "it is not a number"),
        (Decimal, Decimal(10**9), "Decimal type with precision"),
        (bytes, "x", "it is not bytes"),
        (datetime.timedelta, 5.5, "it is not a timedelta"),
    ],
    ids=repr,
)
def test_arrow_value_gets_the_declared_type(
    python_type: Any, value: Any, read: Any
) -> None:
    """SQLite returns other types than those of its columns, for example."""
    digits = (5, 2) if python_type is Decimal else (None, None)
    source = Declared([(None,), (value,)], ["my column"], 1)
    source.types = [ColumnType(python_type, *digits)]
    output = Parquet(row_group=1).encode_batches(source)
    if isinstance(read, str) and " " in read:
        with pytest.raises(ValueError) as failure:
            list(output)
        message = str(failure.value)
        assert message.startswith("item 2, column 'my column': ")
        assert read in message
        assert "the type of the statement" in message
        assert message.endswith("Use cast() in the statement")
    else:
        table = read_table(b"".join(output))
        [_, item] = table.to_pylist()
        assert item == {"my column": read}
        assert type(item["my column"]) is type(read)


def test_arrow_decimals_have_at_least_the_declared_scale() -> None:
    """The values of a computed column may have more digits after the point."""
    for values, scale in ([1, 2], 2), ([Decimal("1.5"), Decimal("0.125")], 3):
        source = Declared([(value,) for value in values], ["n"], 1)
        source.types = [ColumnType(Decimal, None, 2)]
        table = read_table(b"".join(Parquet().encode_batches(source)))
        assert table.schema.types == [pa.decimal128(38, scale)]
        assert table.columns[0].to_pylist() == values


class Mixed(enum.Enum):
    NAME = "name"
    NUMBER = 7


def test_arrow_array_of_values_of_several_types_is_json() -> None:
    """An Enum in an array of PostgreSQL may have such values."""
    source = Declared([(None,), ([Mixed.NAME, None, Mixed.NUMBER],)], ["moods"], 1)
    source.types = [ColumnType(list, item=ColumnType(Mixed))]
    table = read_table(b"".join(Parquet().encode_batches(source)))
    assert table.to_pylist() == [{"moods": None}, {"moods": '["name",null,7]'}]


def test_arrow_unsigned_integers_have_64_bits() -> None:
    """MySQL has them."""
    source = Declared([(2**64 - 1,), (None,)], ["n"])
    source.types = [ColumnType(int, unsigned=True)]
    table = read_table(b"".join(Parquet().encode_batches(source)))
    assert table.schema.types == [pa.uint64()]
    assert table.columns[0].to_pylist() == [2**64 - 1, None]


# Transactions, failures and clients.


def readers_of(path: Path) -> dict[str, Callable[[], Any]]:
    return {
        "pyarrow": lambda: with_pyarrow(path),
        "duckdb": lambda: with_duckdb(path),
        "polars": lambda: with_polars(path),
        "pandas": lambda: with_pandas(path),
    }


def test_parquet_file_that_was_cut_opens_nowhere(tmp_path: Path) -> None:
    """It is cut at each byte of the end, and at 300 other places."""
    items = [(n, f"name {n}", n / 7) for n in range(900)]
    pieces = [*Parquet(row_group=300).encode(iter(items))]
    body = b"".join(pieces)
    path = tmp_path / "cut.parquet"
    ends = {sum(map(len, pieces[:n])) for n in range(len(pieces))}
    length = len(body)
    cuts = {*range(0, length, length // 300), *range(length - 64, length), *ends}
    for cut in sorted(cuts):
        path.write_bytes(body[:cut])
        readers = readers_of(path)
        if cut % 16 and cut < length - 16:
            readers = {"pyarrow": lambda cut=cut: read_table(b"PAR1" + body[4:cut])}  # type: ignore[misc]
        for name, read in readers.items():
            with pytest.raises(Exception):  # noqa: B017
                read()
                pytest.fail(f"{name} opens the first {cut} bytes")
    path.write_bytes(body)
    assert len(read_equal_rows(path)) == 900


def test_arrow_stream_that_was_cut_between_batches_looks_complete() -> None:
    """The documentation warns of it. A cut inside a batch is an error."""
    items = [(n, f"name {n}") for n in range(300)]
    pieces = [*Arrow(batch=100).encode(iter(items))]
    body = b"".join(pieces)
    assert body.endswith(b"\xff\xff\xff\xff\0\0\0\0")  # the end of the stream
    assert read_table(body[:-8]).num_rows == 300
    with pytest.raises((pa.ArrowInvalid, OSError)):
        read_table(body[:-100])


def read_until_error(call: Call) -> tuple[bytes, BaseException]:
    sent = []
    with pytest.raises(Exception) as failure:
        for chunk in call:
            sent.append(chunk)
    call.close()
    return b"".join(sent), failure.value


@pytest.mark.parametrize("batched", [True, False])
@both
def test_arrow_end_is_sent_after_the_last_commit(
    make_app: MakeApp, reports: list[Report], format_class: Any, batched: bool
) -> None:
    """If the commit fails, the footer or the end marker is missing."""

    def fail() -> None:
        raise LookupError("at the end")

    class Watched(Batches):
        def batches(self) -> Iterator[Any]:
            transaction.get().addBeforeCommitHook(fail)
            yield from super().batches()

    def generate() -> Iterator[Any]:
        transaction.get().addBeforeCommitHook(fail)
        yield from items

    items = [(n, f"name {n}") for n in range(500)]
    root = Root(
        lambda: Watched(items) if batched else generate(),
        format=format_class(100),
        chunk_size=1,
    )
    sent, error = read_until_error(Call(make_app(root, tm__enabled=True)))
    assert isinstance(error, LookupError)
    assert b"name 399" in sent
    assert not sent.endswith((b"PAR1", b"\xff\xff\xff\xff\0\0\0\0"))
    assert [report.reason for report in reports] == ["failed"]


@pytest.mark.parametrize("batched", [True, False])
@both
def test_arrow_last_item_fails_before_the_last_commit(
    make_app: MakeApp, format_class: Any, batched: bool
) -> None:
    """A value that does not fit is an error page, and nothing is committed."""
    committed: list[bool] = []

    class Watched(Batches):
        def batches(self) -> Iterator[Any]:
            transaction.get().addAfterCommitHook(committed.append)
            yield from super().batches()

    def generate() -> Iterator[Any]:
        transaction.get().addAfterCommitHook(committed.append)
        yield from items

    items = [(n,) for n in range(500)] + [("x",)]
    root = Root(lambda: Watched(items) if batched else generate(), format=format_class)
    call = Call(make_app(root, tm__enabled=True))
    call.read()
    assert call.status.startswith("500")
    assert "item 501, column 'column_1'" in call.errors.getvalue()
    assert True not in committed


@both
def test_arrow_stream_commits_although_no_bytes_are_sent(
    make_app: MakeApp, model: Model, format_class: Any
) -> None:
    """With ``commit=2``, at most one item is not committed yet."""
    seen: list[list[str]] = []

    def generate() -> Iterator[Any]:
        for name in "abcde":
            model.DBSession.add(User(name=name))
            yield (name,)
            seen.append(model.names())

    root = Root(generate, format=format_class, commit=2)
    assert read_table(Call(make_app(root, model)).read()).num_rows == 5
    assert [*map(len, seen)] == [0, 2, 2, 4, 4]
    assert len(model.names()) == 5


@pytest.mark.parametrize("way", ["close", "drop"])
@both
def test_arrow_stream_of_a_client_that_disconnects_ends(
    make_app: MakeApp,
    filled: Model,
    reports: list[Report],
    format_class: Any,
    way: str,
) -> None:
    """The writer is released without an end, and the connection is returned."""
    numbers = sa.select(sa.literal(1).label("n")).cte("numbers", recursive=True)
    numbers = numbers.union_all(sa.select(numbers.c.n + 1).where(numbers.c.n < 50_000))
    allocated = pa.total_allocated_bytes()
    root = Root(lambda: rows(sa.select(numbers.c.n)), format=format_class(1000))
    call = Call(make_app(root, filled), checked=way == "close")
    assert next(iter(call))
    getattr(call, way)()
    del call
    gc.collect()
    assert [report.reason for report in reports] == ["disconnected"]
    assert 0 < reports[0].items < 50_000
    assert pa.total_allocated_bytes() <= allocated
    assert_clean(filled)


@both
def test_arrow_encoder_that_is_closed_sends_no_end(format_class: Any) -> None:
    """Neither its output nor its finaliser has an error."""
    output = format_class(1).encode((n,) for n in range(10))
    assert next(output)
    output.close()
    assert list(output) == []
    dropped = format_class(1).encode((n,) for n in range(10))
    assert next(dropped)
    del dropped
