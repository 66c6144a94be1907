"""CSV: the bytes of Python's ``csv``, whatever the rows are and whoever reads them."""

from __future__ import annotations

import csv
import datetime
import enum
import io
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import duckdb
import pydantic
import pydantic.v1 as pydantic_v1
import pytest
import sqlalchemy as sa
import tg
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    mapped_column,
    relationship,
)
from tg import TGController, expose
from webob.multidict import MultiDict

from tests.conftest import MakeApp
from tests.model import Base, Note, User
from tests.wsgi import Call, get
from tgstream import CSV, Stream, stream

quick = settings(deadline=None, database=None, max_examples=100)


class Batches:
    """A source of batches."""

    def __init__(
        self, items: Sequence[Any], fields: Sequence[str] = (), size: int = 3
    ) -> None:
        self.items, self.fields, self.size = items, fields, size

    def batches(self) -> Iterator[Sequence[Any]]:
        for start in range(0, len(self.items), self.size):
            yield self.items[start : start + self.size]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def whole(pieces: Iterator[str | bytes]) -> str:
    """The pieces of a format as one text."""
    return "".join(p if isinstance(p, str) else bytes(p).decode() for p in pieces)


def outcome(encode: Callable[[], Iterator[str | bytes]]) -> str:
    """What a format makes, or how it fails."""
    try:
        return whole(encode())
    except (TypeError, ValueError) as error:
        return repr(error)


def csv_of(format: CSV, items: Sequence[Any], fields: Sequence[str] = ()) -> str:
    """What the format makes of the items, which is the same in batches."""
    made = outcome(lambda: format.encode(items))
    for size in (1, 2, 500):
        batches = Batches(items, fields, size)
        in_batches = outcome(lambda batches=batches: format.encode_batches(batches))  # type: ignore[misc]
        assert in_batches == made
    return made


def by_python(rows: Sequence[Any], dialect: Any = "excel") -> str:
    """What Python's own writer makes of the rows."""
    file = io.StringIO(newline="")
    csv.writer(file, dialect).writerows(rows)
    return file.getvalue()


class Text(str):
    """A kind of text whose ``str()`` is another text, as its repr is."""

    def __str__(self) -> str:
        return "=other"


class Colour(enum.Enum):
    RED = "=red"


class Word(str, enum.Enum):
    SUM = "=sum"
    PLAIN = "a,b"


class Level(enum.IntEnum):
    LOW = -1


class Formula:
    def __str__(self) -> str:
        return "=formula()"


class Signed(int):
    """A number whose text is none."""

    def __str__(self) -> str:
        return "=1+1"


zone = datetime.timezone(datetime.timedelta(hours=-3, seconds=-7))
# Before Python 3.11 the module csv takes NUL for an escape character that it has not.
NUL = "\0" if sys.version_info >= (3, 11) else ""
CHARACTERS = "a,;\"'\r\n\t =+-@\\é\u2028\U0001f600" + NUL
texts = st.text(st.sampled_from(CHARACTERS), max_size=5)
cells = st.one_of(
    texts,
    texts.map(Text),
    st.integers(),
    st.floats(),
    st.decimals(),
    st.booleans(),
    st.none(),
    st.datetimes(timezones=st.sampled_from([None, datetime.timezone.utc, zone])),
    st.timedeltas(),
    st.sampled_from([Colour.RED, *Word, Level.LOW, Signed(3), b"a,b", [1, "x"], 1j]),
)
tables = st.integers(0, 4).flatmap(
    lambda width: st.lists(st.lists(cells, min_size=width, max_size=width), max_size=8)
)
DIALECTS: dict[str, dict[str, Any]] = {
    "excel": {},
    "semicolon": {"delimiter": ";"},
    "caret": {"delimiter": "^", "quotechar": "]"},
    "quote all": {"quoting": csv.QUOTE_ALL},
    "quote text": {"quoting": csv.QUOTE_NONNUMERIC},
    "escaped": {"doublequote": False, "escapechar": "\\"},
    "unquoted": {"quoting": csv.QUOTE_NONE, "escapechar": "\\"},
    "lines": {"lineterminator": "\n"},
    "records": {"delimiter": "\x1f", "lineterminator": "\x1e"},
    "spaces": {"delimiter": " "},
    "skipping": {"skipinitialspace": True},
    "unquotable": {"quoting": csv.QUOTE_NONE, "quotechar": None, "escapechar": "\\"},
}


def dialect_of(name: str) -> Any:
    return type("Dialect", (csv.excel,), DIALECTS[name])


# Python's csv, to the byte.


@quick
@given(tables)
def test_bytes_are_those_of_the_csv_module(rows: list[list[Any]]) -> None:
    """Row by row and in batches, for any cells and any width."""
    assert csv_of(CSV(header=()), rows) == by_python(rows)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_is_that_of_the_csv_module(name: str) -> None:
    """Also those for which a column cannot be written at once."""

    @settings(quick, max_examples=40)
    @given(tables)
    def holds(rows: list[list[Any]]) -> None:
        try:
            expected = by_python(rows, dialect_of(name))
        except csv.Error as error:
            assert str(error) in csv_of(CSV(header=(), dialect=dialect_of(name)), rows)
        else:
            assert csv_of(CSV(header=(), dialect=dialect_of(name)), rows) == expected

    holds()


@pytest.mark.parametrize("dialect", ["excel", "excel-tab", "unix", csv.unix_dialect()])
def test_dialect_is_a_name_or_a_class(dialect: Any) -> None:
    """Names of the module, classes and objects are taken, and what it has made."""
    rows = [["a\tb", 'c"d', ""], ["e\nf", None, 1.5]]
    assert csv_of(CSV(dialect=dialect), rows) == by_python(rows, dialect)
    made = csv.get_dialect("excel-tab")
    assert csv_of(CSV(dialect=made), rows) == by_python(rows, "excel-tab")


@pytest.mark.parametrize(
    "dialect",
    ["exel", 5, None, {"delimiter": ";"}, type("D", (csv.excel,), {"delimiter": "ab"})],
)
def test_dialect_that_is_none_is_refused(dialect: Any) -> None:
    """The module ``csv`` would take most things for its own default."""
    with pytest.raises(ValueError, match=r"CSV: dialect=.* is none of the module csv"):
        CSV(dialect=dialect)


def test_row_that_a_dialect_cannot_write_is_named() -> None:
    """The error has the number of the item, or says that it is the header."""
    dialect = type("D", (csv.excel,), {"quoting": csv.QUOTE_NONE})
    rows = [["a", "b"], ["c,d", "e"]]
    assert "item 2 cannot be a row of this dialect" in csv_of(CSV((), dialect), rows)
    assert "the header cannot be" in csv_of(CSV(["a,b"], dialect), rows)


@settings(quick, max_examples=60)
@given(
    st.lists(st.lists(texts.filter(lambda t: "\0" not in t), min_size=2, max_size=2))
)
def test_csv_reader_gives_the_texts_back(rows: list[list[str]]) -> None:
    """What Python's reader reads is what was written."""
    made = csv_of(CSV(header=["x", "y"]), rows)
    assert list(csv.reader(io.StringIO(made, newline=""))) == [["x", "y"], *rows]


def duck(query: str) -> tuple[list[str], list[Any]]:
    """The names and the rows that DuckDB finds."""
    with duckdb.connect() as connection:
        found = connection.sql(query)
        assert found is not None
        return found.columns, found.fetchall()


NASTY = [
    ["1", "plain", "é\u2028\U0001f600"],
    ["2", 'say "yes", and "no"', "one\ntwo"],
    ["3", "carriage\rreturn\r\n", "  spaces  "],
    ["4", "'quoted'", "tab\tand;semicolon|pipe"],
    ["5", "=1+1", '"'],
    ["6", ",", "\\"],
]


def served(make_app: MakeApp, items: Any, format: Any, **options: Any) -> Call:
    """The response of an application that streams the items."""

    class RootController(TGController):
        @expose()
        def index(self) -> Stream:
            return Stream(items, format, **options)

    return Call(make_app(RootController()))


@pytest.mark.parametrize("in_batches", [True, False])
def test_duckdb_reads_the_stream(
    make_app: MakeApp, tmp_path: Path, in_batches: bool
) -> None:
    """Another reader finds the same texts, under the header's names."""
    items = NASTY * 300 if in_batches else iter(NASTY * 300)
    path = tmp_path / "rows.csv"
    path.write_bytes(served(make_app, items, CSV(header=["id", "b", "c"])).read())
    names, rows = duck(
        f"SELECT * FROM read_csv('{path}', header=true, delim=',', quote='\"', "
        "escape='\"', auto_detect=false, "
        "columns={'id': 'VARCHAR', 'b': 'VARCHAR', 'c': 'VARCHAR'})"
    )
    assert names == ["id", "b", "c"]
    assert list(map(list, rows)) == NASTY * 300


def test_duckdb_finds_out_by_itself(make_app: MakeApp, tmp_path: Path) -> None:
    """A reader that is told nothing reads names, numbers, dates and empty cells."""
    day = datetime.datetime(2026, 1, 2, 3, 4, 5)
    rows = [(n, f"name, {n}", day, None if n % 2 else n / 4) for n in range(5000)]
    path = tmp_path / "rows.csv"
    path.write_bytes(served(make_app, rows, CSV(["id", "name", "at", "x"])).read())
    assert duck(f"SELECT id, name, \"at\", x FROM read_csv('{path}')")[1] == rows


# Kinds of rows.

Point = namedtuple("Point", "x y")


@dataclass(slots=True)
class Spot:
    x: int
    y: Any


class Lazy:
    """An iterable that is no sequence."""

    def __init__(self, cells: Sequence[Any] = (1, 2)) -> None:
        self.cells = cells

    def __iter__(self) -> Iterator[Any]:
        return iter(self.cells)


def sqlite_rows(mappings: bool = False) -> list[Any]:
    engine = sa.create_engine("sqlite://", poolclass=sa.NullPool)
    with engine.connect() as connection:
        result = connection.execute(sa.text("SELECT 1 AS x, 2 AS y"))
        return list(result.mappings() if mappings else result)


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([(1, 2)], ""),
        ([[1, 2]], ""),
        ([range(1, 3)], ""),
        ([Lazy()], ""),
        ([Point(1, 2)], "x,y\r\n"),
        (sqlite_rows(), "x,y\r\n"),
        (sqlite_rows(mappings=True), "x,y\r\n"),
        ([Spot(1, 2)], "x,y\r\n"),
        ([{"x": 1, "y": 2}], "x,y\r\n"),
        ([MappingProxyType({"x": 1, "y": 2})], "x,y\r\n"),
        ([MultiDict(x=1, y=2)], "x,y\r\n"),
    ],
)
def test_header_is_that_of_the_first_row(rows: list[Any], names: str) -> None:
    """Names that the row has; one that is given, or (), is put in their place."""
    assert csv_of(CSV(), rows * 3) == names + "1,2\r\n" * 3
    assert csv_of(CSV(header=()), rows * 3) == "1,2\r\n" * 3
    assert csv_of(CSV(header=["x", "y"]), rows * 3) == "x,y\r\n" + "1,2\r\n" * 3


@pytest.mark.parametrize(
    "rows", [[(1, 2)], [Point(1, 2)], [Spot(1, 2)], sqlite_rows()], ids=str
)
def test_header_may_name_the_columns_anew(rows: list[Any]) -> None:
    """Of what is not found by its name, any names can stand above."""
    assert csv_of(CSV(header=("Über", "=b")), rows) == "Über,=b\r\n1,2\r\n"


def test_mapping_is_found_by_the_names_of_the_header() -> None:
    """In their order; what a mapping lacks is empty."""
    assert csv_of(CSV(header=["y", "x"]), [{"x": 1, "y": 2}]) == "y,x\r\n2,1\r\n"
    assert csv_of(CSV(), [{"x": 1, "y": 2}, {"y": 3}]) == "x,y\r\n1,2\r\n,3\r\n"
    assert csv_of(CSV(header=()), [{"y": 2}, {}, {"y": 3}]) == '2\r\n""\r\n3\r\n'


@pytest.mark.parametrize("header", [None, ["x"], ()])
def test_mapping_with_an_unknown_key_is_refused(header: Any) -> None:
    """A cell is never lost: the error names the item, the key and the columns."""
    made = csv_of(CSV(header=header), [{"x": 1}, {"x": 1, "z": 2}])
    assert "item 2 has 'z', for which the header has no column: it has 'x'" in made


def test_multidict_has_a_column_a_name() -> None:
    """The last value of a name, as ``params['name']`` has it."""
    form = MultiDict([("a", 1), ("b", 2), ("a", 3)])
    assert csv_of(CSV(), [form]) == "a,b\r\n3,2\r\n"


def test_object_with_other_fields_than_the_header_is_refused() -> None:
    """Names above the wrong cells would show what nobody asked for."""
    made = csv_of(CSV(header=["x"]), [Spot(1, "secret")])
    assert "item 1 has the fields x, y, and the header x" in made


@pytest.mark.parametrize(
    "item",
    [
        "text",
        Text("text"),
        1,
        None,
        pytest.param(object(), id="object"),
        Spot,
        Point,
        User,
    ],
    ids=repr,
)
def test_item_that_is_no_row_is_named(item: Any) -> None:
    """A ``str`` is one above all: its letters would be the cells."""
    made = csv_of(CSV(header=["a"]), [["fine"], item])
    assert f"TypeError('item 2 is {type(item).__name__}, which is no row" in made


def test_fields_of_a_source_are_the_header() -> None:
    """Also where there is no row; but names that were given come first."""
    assert whole(CSV().encode_batches(Batches([], ["x", "y"]))) == "x,y\r\n"
    assert whole(CSV(header=["a"]).encode_batches(Batches([], ["x"]))) == "a\r\n"
    assert whole(CSV(header=()).encode_batches(Batches([], ["x"]))) == ""
    assert (
        whole(CSV().encode_batches(Batches([(1, 2)], ["x", "y"]))) == "x,y\r\n1,2\r\n"
    )
    assert csv_of(CSV(header=["a"]), []) == "a\r\n"
    assert csv_of(CSV(), []) == ""


def test_ragged_rows_and_empty_cells_are_as_csv_has_them() -> None:
    """None and '' are empty; alone in a line they are quoted, not to be no line."""
    ragged = [[1, 2, 3], [4], [], ["", None]]
    assert csv_of(CSV(), ragged) == by_python(ragged)
    single = [[""], [None], ["x"], [0]]
    assert csv_of(CSV(), single) == by_python(single) == '""\r\n""\r\nx\r\n0\r\n'


def test_bytes_go_out_as_they_are() -> None:
    """Whatever kind of bytes; without a header, unless one is given."""
    items = [b"a,b\r\n", bytearray(b"1,"), memoryview(b"2\r\n"), [3, "x,y"]]
    assert csv_of(CSV(), items) == 'a,b\r\n1,2\r\n3,"x,y"\r\n'
    assert csv_of(CSV(header=["h"]), items[:1]) == "h\r\na,b\r\n"
    assert csv_of(CSV(), [[1, 2], b"\xc3\xa9"]) == "1,2\r\né"


@pytest.mark.parametrize("header", ["name", b"name", 5, [1], [["a"]]])
def test_header_that_is_no_names_is_refused(header: Any) -> None:
    """A text is no sequence of names."""
    with pytest.raises(TypeError, match=r"CSV: header=.* is no sequence of names"):
        CSV(header=header)


def test_header_is_as_it_was_when_the_format_was_made() -> None:
    """A list that changes later, or an iterator, makes no other header."""
    names = ["a"]
    changed, drawn = CSV(header=names), CSV(header=iter(["a"]))  # type: ignore[arg-type]
    names.append("b")
    for _ in range(2):
        assert csv_of(changed, [[1]]) == csv_of(drawn, [[1]]) == "a\r\n1\r\n"


# Objects that SQLAlchemy maps.


class Table(MappedAsDataclass, DeclarativeBase):
    pass


class Owner(Table):
    __tablename__ = "owners"
    id: Mapped[int] = mapped_column(primary_key=True)
    things: Mapped[list[Thing]] = relationship(default_factory=list)


class Thing(Table):
    __tablename__ = "things"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    secret: Mapped[str] = mapped_column(deferred=True)
    owner_id: Mapped[int | None] = mapped_column(
        sa.ForeignKey("owners.id"), default=None
    )


@pytest.fixture
def things() -> Iterator[Session]:
    """A session with two things of one owner."""
    engine = sa.create_engine("sqlite://")
    Table.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Owner(1, [Thing(1, "a", "s"), Thing(2, "=b", "t")]))
        session.commit()
        yield session
    engine.dispose()


def test_objects_are_their_mapped_columns(things: Session) -> None:
    """Without relationships and deferred columns, also of a mapped dataclass."""
    assert csv_of(CSV(), list(things.query(Thing))) == (
        "id,name,owner_id\r\n1,a,1\r\n2,=b,1\r\n"
    )
    assert csv_of(CSV(), list(things.query(Owner))) == "id\r\n1\r\n"


def test_expired_objects_are_loaded(things: Session) -> None:
    """What a commit has expired is not empty."""
    found = list(things.query(Thing))
    things.expire_all()
    assert csv_of(CSV(header=["n", "o", "p"]), found) == "n,o,p\r\n1,a,1\r\n2,=b,1\r\n"


def test_objects_of_the_models_base_are_rows(things: Session) -> None:
    """The plain declarative base is as good as a dataclass."""
    notes = [Note(id=1, text="a,b"), Note(id=2, text="", user_id=3)]
    assert csv_of(CSV(), notes) == 'id,text,user_id\r\n1,"a,b",\r\n2,,3\r\n'


def test_row_of_one_entity_is_its_columns(things: Session) -> None:
    """``session.execute(select(Thing))`` is as good as ``session.scalars()``."""
    rows = things.execute(sa.select(Thing).order_by(Thing.id)).all()
    expected = "id,name,owner_id\r\n1,a,1\r\n2,=b,1\r\n"
    assert csv_of(CSV(), rows) == expected


def test_entity_among_other_columns_is_refused() -> None:
    """Its columns could not be told from the others; the error names the field."""
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Note(id=1, text="a", user=User(name="ada")))
        session.flush()
        found = session.execute(sa.select(Note.id, User).join(User)).all()
        made = csv_of(CSV(), found)
        assert "item 1 has a User in 'User', and its text would be" in made
        made = csv_of(CSV(), [(found[0].User,)])  # a plain tuple is its cells
        assert "item 1 has a User in column 1" in made
    engine.dispose()


class Model(pydantic.BaseModel):
    id: int
    name: str = "x"

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        return self.id * 2


class OldModel(pydantic_v1.BaseModel):
    id: int
    name: str = "x"


@attrs.define
class Plain:
    id: int
    name: str = "x"


@pytest.mark.parametrize(
    ("kind", "more"),
    [(Model, [",twice", ",2"]), (OldModel, ["", ""]), (Plain, ["", ""])],
)
def test_object_of_a_library_of_models_is_its_fields(
    kind: Any, more: list[str]
) -> None:
    """As a dataclass is; tgstream knows the library by what its classes carry."""
    assert csv_of(CSV(), [kind(id=1)]) == f"id,name{more[0]}\r\n1,x{more[1]}\r\n"


@pytest.mark.parametrize(
    "cell",
    [
        *(object(), lambda: 1, (n for n in [1]), [object()], map(str, []), [].append),
        *({1: (2, object())}, [memoryview(b"x")]),
    ],
    ids=["object", "function", "generator", "list", "map", "method", "dict", "view"],
)
@pytest.mark.parametrize("escapes", [False, True])
def test_cell_without_a_text_of_its_own_is_refused(cell: Any, escapes: bool) -> None:
    """No address of an object is in a file; the error names item and field."""
    format, kind = CSV(escape_formulas=escapes), type(cell).__name__
    rows: list[tuple[str, Any]] = [
        ("column 2", [1, cell]),
        ("column 2", Lazy([1, cell])),
        ("'y'", {"x": 1, "y": cell}),
        ("'y'", Point(1, cell)),
        ("'y'", Spot(1, cell)),
    ]
    for name, row in rows:
        fine = type(row)([0, "<at 0x1>"]) if "column" in name else Point(0, "a")
        if isinstance(row, dict):
            fine = {"x": 0, "y": "a"}
        made = csv_of(format, [fine, row, fine])
        assert f"item 2 has a {kind} in {name}, and its text would be" in made
    assert "item 1 has" in csv_of(CSV(dialect="unix"), [[cell]])


def test_text_that_looks_like_an_address_is_a_text() -> None:
    """Only the text of an object is looked at."""
    rows = [["<X object at 0x7f00>", 1], ["a", Text("<b at 0x1>")]]
    assert csv_of(CSV(header=()), rows) == by_python(rows)


@pytest.mark.parametrize(
    "cell",
    [
        {"error": "no <X object at 0x7f00> here"},
        {"<X object at 0x7f00>": 1},
        ["<X object at 0x7f00>", ("<X at 0x7f00>", {"<X at 0x7f00>"})],
    ],
    ids=["value", "key", "list"],
)
def test_text_inside_a_container_may_look_like_an_address(cell: Any) -> None:
    """A JSON column may contain the message of an error."""
    rows = [[cell, 1], [None, 2]]
    assert csv_of(CSV(header=()), rows) == by_python(rows)


def test_memoryview_is_the_bytes_in_it() -> None:
    """psycopg2 gives one for a ``bytea``, and psycopg gives bytes."""
    for rows in ([[1, b"a,b"], [2, b"="]], [[b"x"]]):
        seen = [
            [memoryview(cell) if isinstance(cell, bytes) else cell for cell in row]
            for row in rows
        ]
        for format in (CSV(header=()), CSV(header=(), dialect="excel-tab")):
            assert csv_of(format, seen) == csv_of(format, rows)
        assert csv_of(CSV(escape_formulas=True), seen) == csv_of(CSV(), rows)


# Formulas.

FORMULAS = ["=1", "+1", "-1", "@x", "\tx", "\rx", "=", "-", Text("=1"), Word.SUM]
FORMULAS += ["\n=1+1", "\nx", "\ufeff=HYPERLINK(1)", "\xa0=1", "\u200b \x1b-1"]
FORMULAS += ["\U0001d173=1", "\U0001bca0=1", "\U000e01f0=1"]
FORMULAS += ["\u3000@x", "\uff1d1", "\uff0b1", "\uff0d1", "\uff20x", "\xad\uff1d1"]
FORMULAS += [NUL + "=1"]


@pytest.mark.parametrize("cell", FORMULAS, ids=repr)
def test_text_that_a_spreadsheet_would_run_is_guarded(cell: str) -> None:
    """A ' stands in front, inside of the quotes; and in the header too."""
    text = str.__str__(cell)
    expected = by_python([["'" + text, 1]])
    assert csv_of(CSV(escape_formulas=True), [[cell, 1]]) == expected
    format = CSV(header=[cell, "n"], escape_formulas=True)
    assert csv_of(format, []) == by_python([["'" + text, "n"]])
    of_mapping = CSV(escape_formulas=True)
    assert csv_of(of_mapping, [{cell: cell}]) == by_python([["'" + text]]) * 2


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        pytest.param(Formula(), "'=formula()", id="Formula"),
        (datetime.timedelta(seconds=-1), "'-1 day, 23:59:59"),
        (Signed(3), "'=1+1"),
        (Colour.RED, "Colour.RED"),
        (["=1"], "['=1']"),
        (b"=1", "b'=1'"),
        (-1, "-1"),
        (-1.5, "-1.5"),
        (Decimal("-1.50"), "-1.50"),
        (Decimal("-Infinity"), "-Infinity"),
        (float("-inf"), "-inf"),
        (Fraction(-1, 2), "-1/2"),
        (-1 + 0j, "(-1+0j)"),
        (Level.LOW, str(Level.LOW)),  # its name, before Python 3.11
        (True, "True"),
        (None, ""),
        ("", ""),
        (" =1", " =1"),
        ("a=1", "a=1"),
        ("'=1", "'=1"),
        ("\xa0x", "\xa0x"),
        ("\ufeffx=1", "\ufeffx=1"),
        ("\x1b", "\x1b"),
    ],
    ids=repr,
)
def test_only_what_runs_is_guarded(cell: Any, text: str) -> None:
    """Numbers stay numbers; the text of any other object is looked at."""
    rows = [[cell, "x"], [cell, "=y"]]
    expected = by_python([[text, "x"], [text, "'=y"]])
    assert csv_of(CSV(escape_formulas=True), rows) == expected
    assert csv_of(CSV(escape_formulas=True, dialect="unix"), rows) == by_python(
        [[text, "x"], [text, "'=y"]], "unix"
    )


@quick
@given(tables)
def test_no_cell_runs_that_is_not_a_number(rows: list[list[Any]]) -> None:
    """Whatever the cells are, what a reader finds is harmless or a number."""
    made = csv_of(CSV(header=(), escape_formulas=True), rows).replace("\0", "0")
    for line in csv.reader(io.StringIO(made, newline="")):
        for cell in line:
            if cell[:1] in ("=", "+", "-", "@", "\t", "\r"):
                Decimal(cell)


def test_numbers_are_not_quoted_where_texts_are() -> None:
    """Guarding leaves a number a number for the dialect as well."""
    dialect = type("D", (csv.excel,), {"quoting": csv.QUOTE_NONNUMERIC})
    format = CSV(dialect=dialect, escape_formulas=True)
    assert csv_of(format, [[-1, "-1", Decimal("-2")]]) == '-1,"\'-1",-2\r\n'


def test_bytes_cannot_be_guarded() -> None:
    """They are refused, in one sentence."""
    made = csv_of(CSV(escape_formulas=True), [[1], b"=1\r\n"])
    assert "item 2 is bytes, in which escape_formulas cannot find the cells" in made


# One format, many streams.


class Meeting:
    """A cell whose text is made while another stream writes a row."""

    def __init__(self, other: Iterator[Any]) -> None:
        self.other = other

    def __str__(self) -> str:
        return f"<{next(self.other).strip()}>"


def test_streams_of_one_format_do_not_mix() -> None:
    """A format serves all requests, also while a row of another is half written."""
    format = CSV(header=())
    other = format.encode([["first", "row"], ["secret", "row"]])
    assert next(other) == "first,row\r\n"
    lines = list(format.encode([["a", "b"], ["c", Meeting(other)]]))
    assert lines == ["a,b\r\n", 'c,"<secret,row>"\r\n']


def test_threads_of_one_format_do_not_mix() -> None:
    """The same on two threads, that wait for each other in the middle of a row."""
    format, together = CSV(header=()), threading.Barrier(2)

    class Waits:
        def __str__(self) -> str:
            together.wait(10)
            return "w"

    made: dict[str, str] = {}

    def run(name: str) -> None:
        made[name] = whole(format.encode([[name, Waits(), name]] * 20))

    threads = [threading.Thread(target=run, args=[name]) for name in "xy"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == {name: f"{name},w,{name}\r\n" * 20 for name in "xy"}


# As a response.


def test_every_way_to_name_the_format_is_the_same(make_app: MakeApp) -> None:
    """The class or an object, by the decorator or the helper."""

    class RootController(TGController):
        @expose()
        @stream(CSV)
        def by_class(self) -> Iterator[Point]:
            yield Point(1, "é")

        @stream(CSV())
        @expose()
        def by_object(self) -> list[Point]:
            return [Point(1, "é")]

        @expose()
        def by_helper(self) -> Stream:
            return Stream((Point(1, "é") for _ in range(1)), CSV)

    app = make_app(RootController())
    for name in ("by_class", "by_object", "by_helper"):
        call = get(app, f"/{name}")
        assert call.text == "x,y\r\n1,é\r\n"
        assert call.headers["Content-Type"] == "text/csv; charset=utf-8"


@pytest.mark.parametrize(
    ("format", "charset", "body", "said"),
    [
        (CSV, None, "é\r\n".encode(), "utf-8"),
        (CSV, "latin-1", b"\xe9\r\n", "latin-1"),
        (CSV(bom=True), None, b"\xef\xbb\xbf\xc3\xa9\r\n", "utf-8"),
        (CSV(bom=True), "latin-1", b"\xef\xbb\xbf\xc3\xa9\r\n", "utf-8"),
        (CSV(dialect="excel-tab"), "utf-16", "é\r\n".encode("utf-16"), "utf-16"),
    ],
)
def test_charset_is_honoured_but_with_a_mark(
    make_app: MakeApp, format: Any, charset: str | None, body: bytes, said: str
) -> None:
    """A byte order mark means UTF-8, in the bytes and in the header alike."""
    for items in ([["é"]], iter([["é"]])):
        call = served(make_app, items, format, charset=charset)
        assert call.read() == body
        assert call.headers["Content-Type"] == f"text/csv; charset={said}"


def test_mark_comes_once_and_first(make_app: MakeApp) -> None:
    """Before the header, also without rows, and before bytes."""
    assert csv_of(CSV(["a"], bom=True), [[1], [2]]) == "\ufeffa\r\n1\r\n2\r\n"
    assert csv_of(CSV(bom=True), []) == "\ufeff"
    assert csv_of(CSV(bom=True), [b"a,b\r\n", b"1,2\r\n"]) == "\ufeffa,b\r\n1,2\r\n"
    twice = CSV(["\ufeff=1"], bom=True, escape_formulas=True)
    assert csv_of(twice, []) == "\ufeff'\ufeff=1\r\n"
    mark = served(make_app, iter([]), CSV(["ä"], bom=True))
    assert mark.read() == b"\xef\xbb\xbf\xc3\xa4\r\n"


def test_content_type_is_what_was_set_nearest(make_app: MakeApp) -> None:
    """The response's before that of ``@expose`` before the format's."""

    class RootController(TGController):
        @expose(content_type="text/plain")
        @stream(CSV)
        def exposed(self) -> Iterator[list[int]]:
            yield [1]

        @expose(content_type="text/plain")
        @stream(CSV)
        def chosen(self) -> Iterator[list[int]]:
            tg.response.content_type = "text/x-mine"
            yield [1]

    app = make_app(RootController())
    assert get(app, "/exposed").headers["Content-Type"].startswith("text/plain")
    assert get(app, "/chosen").headers["Content-Type"].startswith("text/x-mine")


@pytest.mark.parametrize("options", [{}, {"chunk_size": 0}, {"commit": "each"}])
def test_first_row_that_is_none_is_an_ordinary_error(
    make_app: MakeApp, options: dict[str, Any]
) -> None:
    """No header has left then, however small the chunks are."""
    for items in (["text"], iter(["text"])):
        call = served(make_app, items, CSV(header=["a"]), **options)
        call.read()
        assert call.status.startswith("500")
        assert "item 1 is str" in call.errors.getvalue()


def test_chunk_an_item_holds_for_lists_too(make_app: MakeApp) -> None:
    """With ``chunk_size=0`` the header comes with the first row; each leaves alone."""
    for items in ([[1], [2], [3]], iter([[1], [2], [3]])):
        call = served(make_app, items, CSV(header=["a"]), chunk_size=0)
        assert list(call) == [b"a\r\n1\r\n", b"2\r\n", b"3\r\n"]
        call.close()


def test_source_of_batches_keeps_its_header_with_automatic_commits(
    make_app: MakeApp,
) -> None:
    """The names of its fields are known item by item as well."""
    source = Batches([], ["x", "y"])
    assert served(make_app, source, CSV, commit="each").read() == b"x,y\r\n"
    source = Batches([(1, 2)], ["x", "y"])
    assert served(make_app, source, CSV, commit=2).read() == b"x,y\r\n1,2\r\n"


def test_empty_batch_is_none(make_app: MakeApp) -> None:
    """A source may hand over a batch without items."""

    class Sparse(Batches):
        def batches(self) -> Iterator[Sequence[Any]]:
            yield []
            yield from super().batches()
            yield []

    assert served(make_app, Sparse([[1]]), CSV(["a"])).read() == b"a\r\n1\r\n"
