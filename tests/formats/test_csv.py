"""The format CSV: it writes the bytes of Python's ``csv``, for any kind of row."""

from __future__ import annotations

import base64
import csv
import datetime
import enum
import io
import json
import re
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import sqlalchemy as sa
import tg
from babel import localedata
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
from tests.formats.support import (
    Batches,
    Model,
    OldModel,
    Plain,
    join,
    outcome,
    query_duckdb,
    sqlite_rows,
)
from tests.model import Base, Note, User
from tests.wsgi import Call, get
from tgstream import CSV, Stream, stream

quick = settings(deadline=None, database=None, max_examples=100)


def encode_csv(format: CSV, items: Sequence[Any], fields: Sequence[str] = ()) -> str:
    """The output of the format, which is the same in batches of any size."""
    output = outcome(lambda: format.encode(items))
    for size in (1, 2, 500):
        batches = Batches(items, fields, size)
        in_batches = outcome(lambda batches=batches: format.encode_batches(batches))  # type: ignore[misc]
        assert in_batches == output
    return output


def write_with_python(rows: Sequence[Any], dialect: Any = "excel") -> str:
    """The output of Python's own writer."""
    file = io.StringIO(newline="")
    csv.writer(file, dialect).writerows([map(simplify, row) for row in rows])
    return file.getvalue()


def simplify(cell: Any) -> Any:
    """The value that CSV writes for a cell of which ``str`` is not the text."""
    if isinstance(cell, enum.Enum):
        return cell.value
    if isinstance(cell, (list, dict)):
        return json.dumps(cell, separators=(",", ":"))
    return base64.b64encode(cell).decode() if isinstance(cell, bytes) else cell


class Text(str):
    """Text whose ``str()`` is another text."""

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
    """A number whose text is a formula."""

    def __str__(self) -> str:
        return "=1+1"


zone = datetime.timezone(datetime.timedelta(hours=-3, seconds=-7))
# Before Python 3.11, the csv module handles NUL as an escape character.
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


# The same bytes as Python's csv.


@quick
@given(tables)
def test_csv_writes_the_bytes_of_the_csv_module(rows: list[list[Any]]) -> None:
    """The bytes are the same row by row and in batches, for any cells and any width."""
    assert encode_csv(CSV(header=()), rows) == write_with_python(rows)


@pytest.mark.parametrize("name", DIALECTS)
def test_csv_writes_every_dialect_as_the_csv_module_does(name: str) -> None:
    """Dialects for which a column cannot be written at once are included."""

    @settings(quick, max_examples=40)
    @given(tables)
    def holds(rows: list[list[Any]]) -> None:
        output = encode_csv(CSV(header=(), dialect=dialect_of(name)), rows)
        try:
            expected = write_with_python(rows, dialect_of(name))
        except csv.Error as error:
            assert str(error) in output
        else:
            assert output == expected

    holds()


@pytest.mark.parametrize("dialect", ["excel", "excel-tab", "unix", csv.unix_dialect()])
def test_csv_dialect_is_a_name_a_class_or_an_object(dialect: Any) -> None:
    """The result of ``csv.get_dialect()`` is accepted too."""
    rows = [["a\tb", 'c"d', ""], ["e\nf", None, 1.5]]
    assert encode_csv(CSV(dialect=dialect), rows) == write_with_python(rows, dialect)
    dialect_object = csv.get_dialect("excel-tab")
    assert encode_csv(CSV(dialect=dialect_object), rows) == write_with_python(
        rows, "excel-tab"
    )


@pytest.mark.parametrize(
    "dialect",
    ["exel", 5, None, {"delimiter": ";"}, type("D", (csv.excel,), {"delimiter": "ab"})],
)
def test_csv_invalid_dialect_is_rejected(dialect: Any) -> None:
    """``csv.writer`` would use its defaults for most of these values."""
    with pytest.raises(ValueError, match="CSV: dialect must be the name of a dialect"):
        CSV(dialect=dialect)


def test_csv_error_of_a_dialect_names_the_item() -> None:
    """The error has the number of the item, or names the header."""
    dialect = type("D", (csv.excel,), {"quoting": csv.QUOTE_NONE})
    rows = [["a", "b"], ["c,d", "e"]]
    assert "the dialect cannot write item 2: " in encode_csv(CSV((), dialect), rows)
    assert "the dialect cannot write the header: " in encode_csv(
        CSV(["a,b", "c"], dialect), rows
    )


@settings(quick, max_examples=60)
@given(
    st.lists(st.lists(texts.filter(lambda t: "\0" not in t), min_size=2, max_size=2))
)
def test_csv_reader_reads_the_same_texts(rows: list[list[str]]) -> None:
    """Python's reader reads the texts that were written."""
    output = encode_csv(CSV(header=["x", "y"]), rows)
    assert list(csv.reader(io.StringIO(output, newline=""))) == [["x", "y"], *rows]


NASTY = [
    ["1", "plain", "é\u2028\U0001f600"],
    ["2", 'say "yes", and "no"', "one\ntwo"],
    ["3", "carriage\rreturn\r\n", "  spaces  "],
    ["4", "'quoted'", "tab\tand;semicolon|pipe"],
    ["5", "=1+1", '"'],
    ["6", ",", "\\"],
]


def get_stream(make_app: MakeApp, items: Any, format: Any, **options: Any) -> Call:
    """The response of an application that streams the items."""

    class RootController(TGController):
        @expose()
        def index(self) -> Stream:
            return Stream(items, format, **options)

    return Call(make_app(RootController()))


@pytest.mark.parametrize("in_batches", [True, False])
def test_csv_is_read_by_duckdb(
    make_app: MakeApp, tmp_path: Path, in_batches: bool
) -> None:
    """DuckDB reads the same texts, under the names of the header."""
    items = NASTY * 300 if in_batches else iter(NASTY * 300)
    path = tmp_path / "rows.csv"
    path.write_bytes(get_stream(make_app, items, CSV(header=["id", "b", "c"])).read())
    names, rows = query_duckdb(
        f"SELECT * FROM read_csv('{path}', header=true, delim=',', quote='\"', "
        "escape='\"', auto_detect=false, "
        "columns={'id': 'VARCHAR', 'b': 'VARCHAR', 'c': 'VARCHAR'})"
    )
    assert names == ["id", "b", "c"]
    assert list(map(list, rows)) == NASTY * 300


def test_csv_types_are_detected_by_duckdb(make_app: MakeApp, tmp_path: Path) -> None:
    """Without options, DuckDB reads names, numbers, dates and empty cells."""
    day = datetime.datetime(2026, 1, 2, 3, 4, 5)
    rows = [(n, f"name, {n}", day, None if n % 2 else n / 4) for n in range(5000)]
    path = tmp_path / "rows.csv"
    path.write_bytes(get_stream(make_app, rows, CSV(["id", "name", "at", "x"])).read())
    assert (
        query_duckdb(f"SELECT id, name, \"at\", x FROM read_csv('{path}')")[1] == rows
    )


# Delimiter, decimal separator and convert.


@pytest.mark.parametrize("dialect", ["excel", "excel-tab", "unix"])
@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_csv_delimiter_replaces_that_of_the_dialect(
    dialect: str, delimiter: str
) -> None:
    """Everything else of the dialect stays."""
    rows: list[list[Any]] = [["a;b", "c,d", 'e"f', None, 1.5], ["\t", "|", "", "x", 2]]
    output = encode_csv(CSV(dialect=dialect, delimiter=delimiter), rows)
    file = io.StringIO(newline="")
    csv.writer(file, dialect, delimiter=delimiter).writerows(rows)
    assert output == file.getvalue()
    assert encode_csv(CSV(dialect=dialect), rows) == write_with_python(rows, dialect)


@pytest.mark.parametrize("delimiter", ["", ";;", 5, "\n", '"', b";"], ids=repr)
def test_csv_invalid_delimiter_is_rejected(delimiter: Any) -> None:
    """It is one character that the dialect does not use for something else."""
    with pytest.raises(ValueError, match="CSV: delimiter must be one character"):
        CSV(delimiter=delimiter)


@pytest.mark.parametrize("decimal", ["", ";", 5, None, "..", "1"], ids=repr)
def test_csv_invalid_decimal_separator_is_rejected(decimal: Any) -> None:
    """It is a point or a comma."""
    with pytest.raises(ValueError, match=r"CSV: decimal must be '\.' or ','"):
        CSV(decimal=decimal)


class Price(float):
    """A subclass of float, like numpy.float64."""


class Ratio(float, enum.Enum):
    HALF = 0.5


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (1.5, "1,5"),
        (-0.25, "-0,25"),
        (2.0, "2,0"),
        (1e300, "1e+300"),
        (1.5e-7, "1,5e-07"),
        (float("-inf"), "-inf"),
        (Decimal("-1234.50"), "-1234,50"),
        (Decimal("1.5E+30"), "1,5E+30"),
        (Decimal("sNaN"), "sNaN"),
        (Price(1.5), "1,5"),
        (Ratio.HALF, "0,5"),
        ("1.5", "1.5"),
        (7, "7"),
        (True, "True"),
        (None, ""),
        (datetime.timedelta(seconds=1.5), "0:00:01.500000"),
        ([1.5], "[1.5]"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("escapes", [False, True])
def test_csv_decimal_separator_is_used_for_floats_and_decimals(
    cell: Any, text: str, escapes: bool
) -> None:
    """In a column of one type, among other types, and row by row."""
    format = CSV(delimiter=";", decimal=",", escape_formulas=escapes)
    assert encode_csv(format, [[cell, 1]]) == f"{text};1\r\n"
    assert encode_csv(format, [[cell, 1], ["x", 2]]) == f"{text};1\r\nx;2\r\n"
    dialect = type("D", (csv.excel,), {"quoting": csv.QUOTE_NONNUMERIC})
    if isinstance(cell, (float, Decimal)):  # a number stays without quotes
        format = CSV(dialect=dialect, delimiter=";", decimal=",")
        assert encode_csv(format, [[cell, 1]]) == f"{text};1\r\n"


numbers = st.one_of(st.floats(), st.decimals(), st.none(), st.integers(), texts)


@quick
@given(st.lists(st.lists(numbers, min_size=2, max_size=2), max_size=8))
def test_csv_decimal_separator_changes_nothing_else(rows: list[list[Any]]) -> None:
    """The same cells are read as with a point."""
    output = encode_csv(CSV((), delimiter=";", decimal=","), rows)
    expected = [
        [
            str(cell).replace(".", ",") if isinstance(cell, (float, Decimal)) else cell
            for cell in row
        ]
        for row in rows
    ]
    dialect = type("D", (csv.excel,), {"delimiter": ";"})
    assert output == write_with_python(expected, dialect)


@pytest.mark.parametrize("cell", ["-1.234,50", "+1.234.567", "-1234,5e-3", "+49 30 1"])
def test_csv_number_of_the_locale_is_not_escaped(cell: str) -> None:
    """A text that is a number with this decimal separator is not a formula."""
    format = CSV(delimiter=";", decimal=",", escape_formulas=True)
    assert encode_csv(format, [[cell, 1]]) == f"{cell};1\r\n"
    for other in ("-1,234.50", f"{cell}+1", f"{cell}\n", f"\n{cell}", f"\ufeff{cell}"):
        line = encode_csv(format, [[other, 1]])
        assert line.lstrip('"').startswith("'")


def test_csv_converts_values_by_type_and_by_name() -> None:
    """The results are written like any other values, and formulas are escaped."""
    convert: Any = {
        Decimal: lambda value: f"{value:.1f} €",
        datetime.date: datetime.date.isoformat,
        "name": str.upper,
        "kind": lambda value: Colour.RED,
    }
    format = CSV(convert=convert, escape_formulas=True)
    Item = namedtuple("Item", "name price day kind")
    rows = [
        Item("a,b", Decimal("-1.25"), datetime.date(2026, 1, 2), 1),
        Item("=x", None, None, None),
    ]
    assert encode_csv(format, rows, Item._fields) == (
        "name,price,day,kind\r\n\"A,B\",'-1.2 €,2026-01-02,'=red\r\n'=X,,,\r\n"
    )
    mappings = [row._asdict() for row in rows]
    assert encode_csv(format, mappings) == encode_csv(format, rows, Item._fields)
    single = CSV(convert={int: lambda value: value or None})
    assert encode_csv(single, [[0], [1], [None]]) == '""\r\n1\r\n""\r\n'


def test_csv_convert_is_called_once_for_each_value() -> None:
    """A function may count, also in the only column and with any dialect."""
    for width in (1, 2):
        for dialect in ("excel", "unix"):
            calls: list[int] = []
            format = CSV((), dialect, convert={int: calls.append})
            rows = [[n] * width for n in range(3)]
            join(format.encode_batches(Batches(rows, (), 500)))
            assert sorted(calls) == sorted([0, 1, 2] * width)


def test_csv_convert_error_names_the_item_and_the_column() -> None:
    """Also when a later batch fails."""
    format = CSV(convert={"y": {1: "one"}.__getitem__})
    output = encode_csv(format, [Point(1, 1)] * 7 + [Point(1, 2)])
    assert output.startswith("ValueError")
    assert "item 8, column 'y': convert raised KeyError: 2" in output.replace("\\", "")


@pytest.mark.parametrize("rows", [[(1, 2)], [[1, 2]], [range(2)], [iter((1, 2))]])
def test_csv_header_of_a_wrong_length_is_an_error_at_the_first_row(
    rows: list[Any],
) -> None:
    """The error has both counts."""
    for header, names in ((["a"], "1 name: a"), (["a", "b", "c"], "3 names: a, b, c")):
        format = CSV(header=header)
        message = f"item 1 has 2 cells, but the header has {names}. Pass a name for"
        source = Batches([*rows], ["x", "y"], 500)
        if not isinstance(rows[0], Iterator):
            assert message in outcome(lambda: format.encode_batches(source))  # noqa: B023
        assert message in outcome(lambda: format.encode([*rows]))  # noqa: B023
        rows = [iter((1, 2))] if isinstance(rows[0], Iterator) else rows


def test_csv_later_row_of_a_wrong_length_is_an_error() -> None:
    """A row beside the header would shift the cells of its columns."""
    for row, count in (((1, 2, 3), "3 cells"), ((1,), "1 cell")):
        output = encode_csv(CSV(header=["a", "b"]), [(0, 0), (1, 1), row, (4, 4)])
        assert f"item 3 has {count}, but the header has 2 names" in output


# Excel.


@pytest.mark.parametrize(
    ("locale", "line"),
    [
        ("de_DE", "-1234,5;02.01.2026;02.01.2026 03:04:05;03:04:05"),
        ("de-DE", "-1234,5;02.01.2026;02.01.2026 03:04:05;03:04:05"),
        ("de", "-1234,5;02.01.2026;02.01.2026 03:04:05;03:04:05"),
        ("fr_FR", "-1234,5;02/01/2026;02/01/2026 03:04:05;03:04:05"),
        ("en_US", "-1234.5,1/2/2026,1/2/2026 03:04:05,03:04:05"),
        ("en_GB", "-1234.5,02/01/2026,02/01/2026 03:04:05,03:04:05"),
        ("sv_SE", "-1234,5;2026-01-02;2026-01-02 03:04:05;03:04:05"),
        ("ja_JP", "-1234.5,2026/01/02,2026/01/02 03:04:05,03:04:05"),
        ("sk_SK", "-1234,5;2026-01-02;2026-01-02 03:04:05;03:04:05"),
        ("ko_KR", "-1234.5,2026-01-02,2026-01-02 03:04:05,03:04:05"),
    ],
)
def test_csv_for_excel_writes_numbers_and_dates_of_the_locale(
    locale: str, line: str
) -> None:
    """A byte order mark is first, and years have four digits."""
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 678)
    row = [-1234.5, moment.date(), moment, moment.time()]
    assert encode_csv(CSV.for_excel(locale), [row]) == f"\ufeff{line}\r\n"
    assert CSV.for_excel(locale=locale).charset == "utf-8"


def test_csv_for_excel_writes_a_datetime_with_an_offset_in_utc() -> None:
    """Excel reads no offsets. XLSX does the same."""
    offset = datetime.timezone(datetime.timedelta(hours=2))
    moment = datetime.datetime(2026, 1, 2, 1, 0, 0, tzinfo=offset)
    output = encode_csv(CSV.for_excel("de_DE"), [[moment, None]])
    assert output == "\ufeff01.01.2026 23:00:00;\r\n"


def test_csv_for_excel_keeps_the_offset_of_a_time() -> None:
    """Without a date it cannot be converted. XLSX does the same."""
    offset = datetime.timezone(datetime.timedelta(hours=2))
    moment = datetime.time(1, 2, 3)
    row = [moment, moment.replace(tzinfo=offset)]
    output = encode_csv(CSV.for_excel("de_DE"), [row])
    assert output == "\ufeff01:02:03;01:02:03+02:00\r\n"


def test_csv_for_excel_may_have_other_parameters() -> None:
    """A function for date replaces that for datetime, its subclass."""
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5)
    format = CSV.for_excel(
        "fr_FR",
        ["a", "b", "c"],
        escape_formulas=True,
        convert={datetime.date: lambda value: value.year, "c": str.upper},
    )
    row = [moment, "-1\u202f234,5", "=x"]
    assert encode_csv(format, [row, [moment.date(), "-1\xa0234,5", None]]) == (
        "\ufeffa;b;c\r\n2026;-1\u202f234,5;'=X\r\n2026;-1\xa0234,5;\r\n"
    )
    swiss = CSV.for_excel("de_CH", escape_formulas=True)
    assert "'" not in encode_csv(swiss, [["-1\u2019234.50", 1.5, moment]])


@pytest.mark.parametrize("locale", ["xx_XX", "", "german", "de_DE_de_DE"])
def test_csv_for_excel_unknown_locale_is_rejected(locale: str) -> None:
    """The error shows the form of a name."""
    with pytest.raises(ValueError, match=r"such as 'de_DE', got '"):
        CSV.for_excel(locale)
    with pytest.raises(TypeError, match="such as 'de_DE', got NoneType"):
        CSV.for_excel(None)  # type: ignore[arg-type]


def test_csv_for_excel_works_for_every_locale_of_babel() -> None:
    """Each has a date with the four digits of the year."""
    row = [datetime.date(2026, 1, 2), 1.5]
    for locale in localedata.locale_identifiers():
        date, number = re.split(
            "[;,]", encode_csv(CSV.for_excel(locale), [row])[1:-2], maxsplit=1
        )
        assert "2026" in date and re.fullmatch(r"[0-9./-]+", date), locale
        assert number in ("1,5", "1.5", "1\u066b5"), locale


def test_csv_for_excel_without_babel_names_the_command() -> None:
    """Babel is not imported for anything else."""
    program = """if True:
        import sys
        sys.modules["babel"] = None
        import tgstream
        assert "".join(tgstream.CSV(decimal=",").encode([[1.5, 1]])) == '"1,5",1\\r\\n'
        try:
            tgstream.CSV.for_excel("de_DE")
        except ImportError as error:
            print(error)
    """
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    )
    expected = "CSV.for_excel() needs Babel. Install it with: pip install Babel\n"
    assert (process.stderr, process.stdout) == ("", expected)


# Kinds of rows.

Point = namedtuple("Point", "x y")


@dataclass(slots=True)
class Spot:
    x: int
    y: Any


class Lazy:
    """An iterable that is not a sequence."""

    def __init__(self, cells: Sequence[Any] = (1, 2)) -> None:
        self.cells = cells

    def __iter__(self) -> Iterator[Any]:
        return iter(self.cells)


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([(1, 2)], ""),
        ([[1, 2]], ""),
        ([range(1, 3)], ""),
        ([Lazy()], ""),
        ([Point(1, 2)], "x,y\r\n"),
        (sqlite_rows("SELECT 1 AS x, 2 AS y"), "x,y\r\n"),
        (sqlite_rows("SELECT 1 AS x, 2 AS y", mappings=True), "x,y\r\n"),
        ([Spot(1, 2)], "x,y\r\n"),
        ([{"x": 1, "y": 2}], "x,y\r\n"),
        ([MappingProxyType({"x": 1, "y": 2})], "x,y\r\n"),
        ([MultiDict(x=1, y=2)], "x,y\r\n"),
    ],
)
def test_csv_header_has_the_names_of_the_first_row(rows: list[Any], names: str) -> None:
    """A header that is given, also ``()``, replaces these names."""
    assert encode_csv(CSV(), rows * 3) == names + "1,2\r\n" * 3
    assert encode_csv(CSV(header=()), rows * 3) == "1,2\r\n" * 3
    assert encode_csv(CSV(header=["x", "y"]), rows * 3) == "x,y\r\n" + "1,2\r\n" * 3


@pytest.mark.parametrize(
    "rows",
    [[(1, 2)], [Point(1, 2)], [Spot(1, 2)], sqlite_rows("SELECT 1 AS x, 2 AS y")],
    ids=str,
)
def test_csv_header_may_rename_the_columns(rows: list[Any]) -> None:
    """Any names are possible for rows that are not read by name."""
    assert encode_csv(CSV(header=("Über", "=b")), rows) == "Über,=b\r\n1,2\r\n"


def test_csv_mapping_is_read_by_the_names_of_the_header() -> None:
    """The header sets the order, and a cell without a value is empty."""
    assert encode_csv(CSV(header=["y", "x"]), [{"x": 1, "y": 2}]) == "y,x\r\n2,1\r\n"
    assert encode_csv(CSV(), [{"x": 1, "y": 2}, {"y": 3}]) == "x,y\r\n1,2\r\n,3\r\n"
    assert encode_csv(CSV(header=()), [{"y": 2}, {}, {"y": 3}]) == '2\r\n""\r\n3\r\n'


@pytest.mark.parametrize("header", [None, ["x"], ()])
def test_csv_mapping_with_an_unknown_key_is_rejected(header: Any) -> None:
    """No cell is lost: the error names the item, the key and the columns."""
    output = encode_csv(CSV(header=header), [{"x": 1}, {"x": 1, "z": 2}])
    assert "item 2 has the key 'z', but the header has 'x'. List all" in output


def test_csv_multidict_has_one_column_for_each_name() -> None:
    """The cell is the last value of a name, like ``params['name']``."""
    form = MultiDict([("a", 1), ("b", 2), ("a", 3)])
    assert encode_csv(CSV(), [form]) == "a,b\r\n3,2\r\n"


def test_csv_object_with_more_fields_than_the_header_is_rejected() -> None:
    """Otherwise a field that the header does not name would be sent."""
    output = encode_csv(CSV(header=["x"]), [Spot(1, "secret")])
    assert "item 1 has the fields x, y, but the header has x. Yield a tuple" in output


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
def test_csv_item_that_is_not_a_row_is_rejected(item: Any) -> None:
    """A ``str`` is not a row: its letters would become the cells."""
    output = encode_csv(CSV(header=["a"]), [["fine"], item])
    assert "TypeError('item 2 must be a row (a sequence, a mapping, or" in output
    assert f"got {type(item).__name__}')" in output


def test_csv_header_has_the_fields_of_a_batched_source() -> None:
    """There is a header without rows too, and a header that is given replaces it."""
    assert join(CSV().encode_batches(Batches([], ["x", "y"]))) == "x,y\r\n"
    assert join(CSV(header=["a"]).encode_batches(Batches([], ["x"]))) == "a\r\n"
    assert join(CSV(header=()).encode_batches(Batches([], ["x"]))) == ""
    assert join(CSV().encode_batches(Batches([(1, 2)], ["x", "y"]))) == "x,y\r\n1,2\r\n"
    assert encode_csv(CSV(header=["a"]), []) == "a\r\n"
    assert encode_csv(CSV(), []) == ""


def test_csv_rows_may_differ_in_length_and_have_empty_cells() -> None:
    """None and '' are empty cells, with quotes if a line has no other cell."""
    ragged = [[1, 2, 3], [4], [], ["", None]]
    assert encode_csv(CSV(), ragged) == write_with_python(ragged)
    single = [[""], [None], ["x"], [0]]
    assert (
        encode_csv(CSV(), single)
        == write_with_python(single)
        == '""\r\n""\r\nx\r\n0\r\n'
    )


def test_csv_bytes_are_sent_unchanged() -> None:
    """There is no header before bytes, unless a header is given."""
    items = [b"a,b\r\n", bytearray(b"1,"), memoryview(b"2\r\n"), [3, "x,y"]]
    assert encode_csv(CSV(), items) == 'a,b\r\n1,2\r\n3,"x,y"\r\n'
    assert encode_csv(CSV(header=["h"]), items[:1]) == "h\r\na,b\r\n"
    assert encode_csv(CSV(), [[1, 2], b"\xc3\xa9"]) == "1,2\r\né"


@pytest.mark.parametrize("header", ["name", b"name", 5, [1], [["a"]]])
def test_csv_invalid_header_is_rejected(header: Any) -> None:
    """A header is a sequence of names, and a text is not."""
    with pytest.raises(TypeError, match="CSV: header must be a list of column names"):
        CSV(header=header)


def test_csv_header_is_copied_when_the_format_is_created() -> None:
    """The list may change later, and an iterator is read only once."""
    names = ["a"]
    changed, drawn = CSV(header=names), CSV(header=iter(["a"]))  # type: ignore[arg-type]
    names.append("b")
    for _ in range(2):
        assert encode_csv(changed, [[1]]) == encode_csv(drawn, [[1]]) == "a\r\n1\r\n"


# Mapped objects of SQLAlchemy.


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


def test_csv_mapped_object_is_written_as_its_columns(things: Session) -> None:
    """Relationships and deferred columns are omitted, also of a mapped dataclass."""
    assert encode_csv(CSV(), list(things.query(Thing))) == (
        "id,name,owner_id\r\n1,a,1\r\n2,=b,1\r\n"
    )
    assert encode_csv(CSV(), list(things.query(Owner))) == "id\r\n1\r\n"


def test_csv_expired_objects_are_loaded(things: Session) -> None:
    """Attributes that a commit has expired are not written as empty cells."""
    objects = list(things.query(Thing))
    things.expire_all()
    assert (
        encode_csv(CSV(header=["n", "o", "p"]), objects)
        == "n,o,p\r\n1,a,1\r\n2,=b,1\r\n"
    )


def test_csv_declarative_object_is_a_row() -> None:
    """Objects of a plain declarative base are rows, not only mapped dataclasses."""
    notes = [Note(id=1, text="a,b"), Note(id=2, text="", user_id=3)]
    assert encode_csv(CSV(), notes) == 'id,text,user_id\r\n1,"a,b",\r\n2,,3\r\n'


def test_csv_row_of_one_entity_is_written_as_its_columns(things: Session) -> None:
    """``session.execute(select(Thing))`` gives the same as ``session.scalars()``."""
    rows = things.execute(sa.select(Thing).order_by(Thing.id)).all()
    expected = "id,name,owner_id\r\n1,a,1\r\n2,=b,1\r\n"
    assert encode_csv(CSV(), rows) == expected


def test_csv_entity_beside_other_columns_is_rejected() -> None:
    """The error names the column."""
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Note(id=1, text="a", user=User(name="ada")))
        session.flush()
        rows = session.execute(sa.select(Note.id, User).join(User)).all()
        output = encode_csv(CSV(), rows)
        assert "item 1 has a User in column 'User', which would be written as" in output
        output = encode_csv(CSV(), [(rows[0].User,)])  # the entity is a cell of a tuple
        assert "item 1 has a User in column 1, which would be written as" in output
    engine.dispose()


@pytest.mark.parametrize(
    ("model", "computed"),
    [(Model, [",twice", ",2"]), (OldModel, ["", ""]), (Plain, ["", ""])],
)
def test_csv_pydantic_or_attrs_object_is_written_as_its_fields(
    model: Any, computed: list[str]
) -> None:
    """Computed fields of pydantic are included."""
    expected = f"id,name{computed[0]}\r\n1,x{computed[1]}\r\n"
    assert encode_csv(CSV(), [model(id=1)]) == expected


@pytest.mark.parametrize(
    "cell",
    [
        *(object(), lambda: 1, (n for n in [1]), map(str, []), [].append),
        *({object()}, frozenset([memoryview(b"x")])),
    ],
    ids=["object", "function", "generator", "map", "method", "set", "frozenset"],
)
@pytest.mark.parametrize("escapes", [False, True])
def test_csv_cell_without_a_text_is_rejected(cell: Any, escapes: bool) -> None:
    """No address of an object is written, and the error names the item and column."""
    format, type_name = CSV(escape_formulas=escapes), type(cell).__name__
    rows: list[tuple[str, Any]] = [
        ("column 2", [1, cell]),
        ("column 2", Lazy([1, cell])),
        ("column 'y'", {"x": 1, "y": cell}),
        ("column 'y'", Point(1, cell)),
        ("column 'y'", Spot(1, cell)),
    ]
    for column, row in rows:
        fine = type(row)([0, "<at 0x1>"]) if column == "column 2" else Point(0, "a")
        if isinstance(row, dict):
            fine = {"x": 0, "y": "a"}
        output = encode_csv(format, [fine, row, fine])
        expected = f"item 2 has a {type_name} in {column}, which would be written as"
        assert expected in output
    assert "item 1 has" in encode_csv(CSV(dialect="unix"), [[cell]])


def test_csv_text_may_look_like_an_address() -> None:
    """Only the text of other objects is checked."""
    rows = [["<X object at 0x7f00>", 1], ["a", Text("<b at 0x1>")]]
    assert encode_csv(CSV(header=()), rows) == write_with_python(rows)


@pytest.mark.parametrize(
    "cell", [[object()], {"a": (2, object())}], ids=["list", "dict"]
)
@pytest.mark.parametrize("dialect", ["excel", "unix"])
def test_csv_list_or_dict_that_json_does_not_support_is_rejected(
    cell: Any, dialect: str
) -> None:
    """The error names the item, the column and the field."""
    output = encode_csv(CSV(dialect=dialect), [Point(0, [1]), Point(1, cell)])
    where = "item 2, column 'y'"
    if isinstance(cell, dict):
        where += ', field "a": the value'
    expected = f"{where} cannot be encoded as JSON: Object of type object is"
    assert expected in output.replace("\\'", "'")


@pytest.mark.parametrize(
    "cell",
    [
        {"error": "no <X object at 0x7f00> here"},
        {"<X object at 0x7f00>": 1},
        ["<X object at 0x7f00>", ("<X at 0x7f00>",)],
        {"<X object at 0x7f00>"},
    ],
    ids=["value", "key", "list", "set"],
)
def test_csv_text_in_a_container_may_look_like_an_address(cell: Any) -> None:
    """A JSON column may contain an error message."""
    rows = [[cell, 1], [None, 2]]
    assert encode_csv(CSV(header=()), rows) == write_with_python(rows)


def test_csv_cell_of_bytes_is_written_as_base64() -> None:
    """psycopg2 returns a memoryview for a ``bytea``, and psycopg returns bytes."""
    expected = "1,YSxi\r\n2,PQ==\r\n,\r\n"
    for of_bytes in (bytes, bytearray, memoryview):
        rows = [[1, of_bytes(b"a,b")], [2, of_bytes(b"=")], [None, None]]
        for format in (CSV(), CSV(dialect="excel-tab"), CSV(escape_formulas=True)):
            assert encode_csv(format, rows).replace("\t", ",") == expected
        assert encode_csv(CSV(), [[of_bytes(b"x")]]) == "eA==\r\n"


# Formulas.

FORMULAS = ["=1", "+x", "-x", "@x", "\tx", "\rx", "=", "-", Text("=1"), "+", "-1 2"]
FORMULAS += ["+49-30-1234567", "+49 (30) 1234567", "+49/30", "-1+1", "+1\n", "+1\t2"]
FORMULAS += ["-1,234.50.1", "-1.234,50", "-12,34", "-1,2345", "-1e", "+\u0661", "-1%"]
FORMULAS += ["\n=1+1", "\nx", "\ufeff=HYPERLINK(1)", "\xa0=1", "\u200b \x1b-1"]
FORMULAS += ["\U0001d173=1", "\U0001bca0=1", "\U000e01f0=1"]
FORMULAS += ["\u3000@x", "\uff1d1", "\uff0b1", "\uff0d1", "\uff20x", "\xad\uff1d1"]
FORMULAS += [NUL + "=1"]


@pytest.mark.parametrize("cell", FORMULAS, ids=repr)
def test_csv_formula_is_escaped(cell: str) -> None:
    """A ' is put before the text, inside the quotes, and in the header too."""
    text = str.__str__(cell)
    expected = write_with_python([["'" + text, 1]])
    assert encode_csv(CSV(escape_formulas=True), [[cell, 1]]) == expected
    format = CSV(header=[cell, "n"], escape_formulas=True)
    assert encode_csv(format, []) == write_with_python([["'" + text, "n"]])
    format = CSV(escape_formulas=True)
    assert encode_csv(format, [{cell: cell}]) == write_with_python([["'" + text]]) * 2


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        pytest.param(Formula(), "'=formula()", id="Formula"),
        (datetime.timedelta(seconds=-1), "'-1 day, 23:59:59"),
        (Signed(3), "'=1+1"),
        (Colour.RED, "'=red"),
        (Word.SUM, "'=sum"),
        (["=1"], '["=1"]'),
        (b"\xfb", "'+w=="),
        ("-1", "-1"),
        ("-1,234.50", "-1,234.50"),
        ("+1.5e-7", "+1.5e-7"),
        ("-12,34,567", "-12,34,567"),
        ("+49 30 1234567", "+49 30 1234567"),
        (-1, "-1"),
        (-1.5, "-1.5"),
        (Decimal("-1.50"), "-1.50"),
        (Decimal("-Infinity"), "-Infinity"),
        (float("-inf"), "-inf"),
        (Fraction(-1, 2), "-1/2"),
        (-1 + 0j, "(-1+0j)"),
        (Level.LOW, "-1"),
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
def test_csv_only_formulas_are_escaped(cell: Any, text: str) -> None:
    """Numbers are not changed, and the text of any other object is checked."""
    rows = [[cell, "x"], [cell, "=y"]]
    expected = write_with_python([[text, "x"], [text, "'=y"]])
    assert encode_csv(CSV(escape_formulas=True), rows) == expected
    assert encode_csv(
        CSV(escape_formulas=True, dialect="unix"), rows
    ) == write_with_python([[text, "x"], [text, "'=y"]], "unix")


@quick
@given(tables)
def test_csv_escaped_cells_are_harmless_or_numbers(rows: list[list[Any]]) -> None:
    """A reader finds no cell that begins with a sign and is not a number."""
    output = encode_csv(CSV(header=(), escape_formulas=True), rows).replace("\0", "0")
    for line in csv.reader(io.StringIO(output, newline="")):
        for cell in line:
            if cell[:1] in ("=", "+", "-", "@", "\t", "\r"):
                Decimal(cell)


def test_csv_escaping_leaves_numbers_unquoted() -> None:
    """A dialect that quotes texts still recognizes numbers."""
    dialect = type("D", (csv.excel,), {"quoting": csv.QUOTE_NONNUMERIC})
    format = CSV(dialect=dialect, escape_formulas=True)
    assert encode_csv(format, [[-1, "-1", Decimal("-2")]]) == '-1,"-1",-2\r\n'


@pytest.mark.parametrize(
    ("option", "value"),
    [("escape_formulas", True), ("decimal", ","), ("convert", {int: str})],
)
def test_csv_bytes_are_rejected_with_an_option_for_cells(
    option: str, value: Any
) -> None:
    """The option would have no effect on them."""
    output = encode_csv(CSV(**{option: value}), [[1], b"=1\r\n"])
    assert f"item 2 is bytes, in which {option} cannot find the cells" in output


# One format for many streams.


class Interleaved:
    """A cell whose text is made by writing a row of another stream."""

    def __init__(self, other: Iterator[Any]) -> None:
        self.other = other

    def __str__(self) -> str:
        return f"<{next(self.other).strip()}>"


def test_csv_streams_that_share_a_format_do_not_mix() -> None:
    """Another stream may write a row while this stream is in the middle of a row."""
    format = CSV(header=())
    other = format.encode([["first", "row"], ["secret", "row"]])
    assert next(other) == "first,row\r\n"
    lines = list(format.encode([["a", "b"], ["c", Interleaved(other)]]))
    assert lines == ["a,b\r\n", 'c,"<secret,row>"\r\n']


def test_csv_threads_that_share_a_format_do_not_mix() -> None:
    """Two threads wait for each other in the middle of a row."""
    format, barrier = CSV(header=()), threading.Barrier(2)

    class Waits:
        def __str__(self) -> str:
            barrier.wait(10)
            return "w"

    outputs: dict[str, str] = {}

    def run(name: str) -> None:
        outputs[name] = join(format.encode([[name, Waits(), name]] * 20))

    threads = [threading.Thread(target=run, args=[name]) for name in "xy"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {name: f"{name},w,{name}\r\n" * 20 for name in "xy"}


# In a response.


def test_csv_is_given_as_class_or_object(make_app: MakeApp) -> None:
    """The decorator and ``Stream`` accept both."""

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
    ("format", "charset", "body", "header"),
    [
        (CSV, None, "é\r\n".encode(), "utf-8"),
        (CSV, "latin-1", b"\xe9\r\n", "latin-1"),
        (CSV(bom=True), None, b"\xef\xbb\xbf\xc3\xa9\r\n", "utf-8"),
        (CSV(bom=True), "latin-1", b"\xef\xbb\xbf\xc3\xa9\r\n", "utf-8"),
        (CSV(dialect="excel-tab"), "utf-16", "é\r\n".encode("utf-16"), "utf-16"),
    ],
)
def test_csv_charset_is_used_unless_there_is_a_byte_order_mark(
    make_app: MakeApp, format: Any, charset: str | None, body: bytes, header: str
) -> None:
    """A byte order mark means UTF-8, in the body and in the header."""
    for items in ([["é"]], iter([["é"]])):
        call = get_stream(make_app, items, format, charset=charset)
        assert call.read() == body
        assert call.headers["Content-Type"] == f"text/csv; charset={header}"


def test_csv_byte_order_mark_comes_once_and_first(make_app: MakeApp) -> None:
    """It stands before the header, also without rows, and before bytes."""
    assert encode_csv(CSV(["a"], bom=True), [[1], [2]]) == "\ufeffa\r\n1\r\n2\r\n"
    assert encode_csv(CSV(bom=True), []) == "\ufeff"
    assert encode_csv(CSV(bom=True), [b"a,b\r\n", b"1,2\r\n"]) == "\ufeffa,b\r\n1,2\r\n"
    format = CSV(["\ufeff=1"], bom=True, escape_formulas=True)
    assert encode_csv(format, []) == "\ufeff'\ufeff=1\r\n"
    response = get_stream(make_app, iter([]), CSV(["ä"], bom=True))
    assert response.read() == b"\xef\xbb\xbf\xc3\xa4\r\n"


def test_csv_content_type_of_the_controller_replaces_that_of_the_format(
    make_app: MakeApp,
) -> None:
    """``tg.response`` comes before ``@expose``, and ``@expose`` before the format."""

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
def test_csv_error_of_the_first_row_is_an_ordinary_error_response(
    make_app: MakeApp, options: dict[str, Any]
) -> None:
    """The header has not been sent by then, however small the chunks are."""
    for items in (["text"], iter(["text"])):
        call = get_stream(make_app, items, CSV(header=["a"]), **options)
        call.read()
        assert call.status.startswith("500")
        assert "item 1 must be a row" in call.errors.getvalue()


def test_csv_list_with_chunk_size_0_is_sent_item_by_item(make_app: MakeApp) -> None:
    """The header is sent with the first row."""
    for items in ([[1], [2], [3]], iter([[1], [2], [3]])):
        call = get_stream(make_app, items, CSV(header=["a"]), chunk_size=0)
        assert list(call) == [b"a\r\n1\r\n", b"2\r\n", b"3\r\n"]
        call.close()


def test_csv_batched_source_keeps_its_header_with_automatic_commits(
    make_app: MakeApp,
) -> None:
    """The field names are known item by item too."""
    source = Batches([], ["x", "y"])
    assert get_stream(make_app, source, CSV, commit="each").read() == b"x,y\r\n"
    source = Batches([(1, 2)], ["x", "y"])
    assert get_stream(make_app, source, CSV, commit=2).read() == b"x,y\r\n1,2\r\n"


def test_csv_empty_batch_is_skipped(make_app: MakeApp) -> None:
    """A source may give a batch without items."""

    class Sparse(Batches):
        def batches(self) -> Iterator[Sequence[Any]]:
            yield []
            yield from super().batches()
            yield []

    assert get_stream(make_app, Sparse([[1]]), CSV(["a"])).read() == b"a\r\n1\r\n"
