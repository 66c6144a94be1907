"""The format XLSX: other programs read its workbooks with equal values and types."""

from __future__ import annotations

import datetime as dt
import enum
import io
import itertools
import re
import sys
import uuid
import xml.etree.ElementTree as ET
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import openpyxl
import pandas as pd
import pytest
import python_calamine
import sqlalchemy as sa
import transaction
from hypothesis import given, settings
from hypothesis import strategies as st
from openpyxl.utils.escape import unescape
from tg import TGController, expose

from tests.conftest import MakeApp, Root, assert_clean
from tests.formats.support import Batches, Model, Plain, sqlite_rows
from tests.model import Model as Database
from tests.model import User
from tests.wsgi import Call
from tgstream import XLSX, ZIP, Report, Stream, current_stream, rows, stream

quick = settings(deadline=None, database=None, max_examples=30)
UTC = dt.timezone.utc
CEST = dt.timezone(dt.timedelta(hours=2))


# Writers and readers.


def encode_xlsx(
    format: XLSX, items: Sequence[Any], fields: Sequence[str] = ()
) -> bytes:
    """The workbook, whose bytes are the same in batches of any size.

    :raises Exception: the error of the format, which is the same for each size, too.
    """
    outcomes = [_outcome(partial(format.encode, items))] if not fields else []
    for size in (1, 2, 7, 500):
        batches = Batches(items, fields, size)
        outcomes.append(_outcome(partial(format.encode_batches, batches)))
    assert len(set(map(str, outcomes))) == 1
    outcome = outcomes[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _outcome(encode: Callable[[], Iterator[bytes]]) -> bytes | Exception:
    try:
        return b"".join(encode())
    except (TypeError, ValueError) as error:
        return error


def encode_values(*values: Any) -> bytes:
    """A workbook of one column, which has the values."""
    return encode_xlsx(XLSX(header=["v"]), [(value,) for value in values])


def open_workbook(body: bytes) -> Any:
    return openpyxl.load_workbook(io.BytesIO(body))


def read_openpyxl(body: bytes, sheet: int = 0) -> list[list[Any]]:
    """The rows that openpyxl reads. It does not decode escapes, but has a function."""
    cells = open_workbook(body).worksheets[sheet].iter_rows(values_only=True)
    return [[unescape(v) if isinstance(v, str) else v for v in row] for row in cells]


def read_calamine(body: bytes, sheet: int = 0) -> list[list[Any]]:
    """The rows that calamine reads. An empty cell is ``''``."""
    workbook = python_calamine.CalamineWorkbook.from_filelike(io.BytesIO(body))
    return workbook.get_sheet_by_index(sheet).to_python()


def read_column(body: bytes) -> tuple[list[Any], list[Any]]:
    """The values of the first column below the header, by openpyxl and by calamine."""
    first, second = read_openpyxl(body)[1:], read_calamine(body)[1:]
    return [row[0] for row in first], [row[0] for row in second]


def read_sheet_xml(body: bytes, number: int = 1) -> str:
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        return archive.read(f"xl/worksheets/sheet{number}.xml").decode()


def open_stream(
    make_app: MakeApp, items: Callable[[], Any], format: Any = XLSX, **options: Any
) -> Call:
    """The response of an application that streams the items."""
    return Call(make_app(Root(items, format=format, **options)))


def read_until_error(call: Call) -> tuple[bytes, BaseException]:
    """The bytes that were sent, and the error that aborted them."""
    sent = bytearray()
    try:
        for chunk in call:
            sent += chunk
    except Exception as error:
        call.close()
        return bytes(sent), error
    raise AssertionError(f"the body was complete: {len(sent)} bytes")


# Values and their types.

DATETIME = dt.datetime(2026, 11, 29, 13, 14, 15)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (None, None),
        (True, True),
        (False, False),
        (0, 0),
        (-17, -17),
        (1.5, 1.5),
        (-0.1, -0.1),
        (1e-300, 1e-300),
        (1e300, 1e300),
        (0.1 + 0.2, 0.30000000000000004),
        (10**14 + 1, 10**14 + 1),
        (Decimal("12345.67"), 12345.67),
        (Decimal("-1E+3"), -1000),
        (Decimal("0.000"), 0),
        (Fraction(1, 4), 0.25),
        (dt.date(2026, 11, 29), dt.datetime(2026, 11, 29)),
        (DATETIME, DATETIME),
        (DATETIME.replace(microsecond=123000), DATETIME.replace(microsecond=123000)),
        (DATETIME.replace(tzinfo=UTC), DATETIME),
        (DATETIME.replace(tzinfo=CEST), DATETIME - dt.timedelta(hours=2)),
        (dt.time(0), dt.time(0)),
        (dt.time(23, 59, 59), dt.time(23, 59, 59)),
        (dt.timedelta(hours=30, minutes=5), dt.timedelta(hours=30, minutes=5)),
        (dt.timedelta(days=1), dt.timedelta(days=1)),
        (dt.timedelta(hours=-1), dt.timedelta(hours=-1)),
        ("text", "text"),
        ("=1+1", "=1+1"),
        ("0049", "0049"),
    ],
    ids=repr,
)
def test_xlsx_readers_get_the_value_and_its_type(value: Any, read: Any) -> None:
    """openpyxl and calamine agree. calamine reads all numbers as floats."""
    (first,), (second,) = map(
        lambda rows: rows[:1], read_column(encode_values(value, 1))
    )
    assert (first, type(first) is bool) == (read, type(read) is bool)
    if isinstance(second, dt.date) and not isinstance(second, dt.datetime):
        second = dt.datetime.combine(second, dt.time())
    assert second == ("" if read is None else read)


def test_xlsx_cells_of_a_date_have_a_number_format() -> None:
    """A spreadsheet shows dates, times and hours beyond 24, and not the numbers."""
    row = [dt.date(2026, 1, 2), DATETIME, dt.time(1), dt.timedelta(hours=30), 5]
    sheet = open_workbook(encode_xlsx(XLSX(header=()), [row])).active
    formats = [cell.number_format.replace("\\", "") for cell in sheet[1]]
    shown = ["yyyy-mm-dd", "yyyy-mm-dd hh:mm:ss", "hh:mm:ss", "[h]:mm:ss", "General"]
    assert formats == shown


@pytest.mark.parametrize(
    "day", ["1900-01-01", "1900-02-28", "1900-03-01", "9999-12-31"]
)
def test_xlsx_first_and_last_dates_are_read(day: str) -> None:
    """Excel counts a 29 February 1900, so that the days before have a lower number."""
    date = dt.date.fromisoformat(day)
    midnight, noon = dt.datetime.combine(date, dt.time()), dt.time(12)
    values = [date, midnight, dt.datetime.combine(date, noon)]
    for first, second in zip(*read_column(encode_values(*values)), strict=True):
        assert first in values and second in values
        assert first.strftime("%F %T") == f"{second}"[:19].ljust(19, " ").replace(
            day + " " * 9, f"{day} 00:00:00"
        )


def test_xlsx_last_moment_is_a_date() -> None:
    """``datetime.max``, which stands for "no end", is rounded down to milliseconds."""
    last = dt.datetime(9999, 12, 31, 23, 59, 59, 999000)
    assert read_column(encode_values(dt.datetime.max)) == ([last], [last])


@given(
    st.lists(
        st.datetimes(dt.datetime(1900, 1, 1), dt.datetime(9999, 12, 31, 23)),
        min_size=1,
    )
)
@quick
def test_xlsx_datetimes_are_read_to_the_millisecond(values: list[dt.datetime]) -> None:
    """Readers round the number of days to milliseconds."""
    for read in read_column(encode_values(*values)):
        for value, written in zip(read, values, strict=True):
            if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
                value = dt.datetime.combine(value, dt.time())
            assert abs(value - written) <= dt.timedelta(milliseconds=1)


NUMBERS = st.one_of(
    st.integers(),
    st.integers(-(10**15), 10**15),
    st.floats(allow_nan=False, allow_infinity=False),
    st.decimals(allow_nan=False, allow_infinity=False),
    st.decimals(-(10**6), 10**6, places=2),
)


@given(st.lists(NUMBERS, min_size=1))
@quick
def test_xlsx_number_has_the_same_value_or_is_a_text(values: list[Any]) -> None:
    """Excel keeps 15 digits. A number that has more is a text, so none is lost."""
    for value, read in zip(values, read_column(encode_values(*values))[0], strict=True):
        if isinstance(read, str):
            digits = Decimal(value).as_tuple().digits
            assert Decimal(read) == Decimal(value)
            is_tiny = 0 < abs(Decimal(value)) < Decimal("2.3e-308")
            assert len(digits) > 15 or is_tiny or abs(Decimal(value)) > 10**300
        else:
            assert read == (value if isinstance(value, float) else float(value))
            assert isinstance(value, float) or Decimal(repr(read)) == value


@pytest.mark.parametrize(
    "value",
    [10**15 + 1, 2**53 + 1, -(10**18) - 7, Decimal("0.1234567890123456"), 10**400 + 1],
)
def test_xlsx_number_with_more_than_15_digits_is_a_text(value: Any) -> None:
    """Its digits stay, in a batch of small numbers too."""
    body = encode_values(1, value, 2)
    assert read_column(body)[0] == [1, str(value), 2]


class Status(enum.Enum):
    PAID = "paid"
    DUE = 7


class Word(str):
    def __str__(self) -> str:
        return "=other"


class Number(int):
    def __str__(self) -> str:
        return "=1+1"


class Money(Decimal):
    def __str__(self) -> str:
        return f"<b>{float(self)} & more</b>"


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (Status.PAID, "paid"),
        (Status.DUE, 7),
        (Word("word"), "word"),
        (Number(3), 3),
        (Money("1.5"), 1.5),
        (Money("0.1234567890123456"), "0.1234567890123456"),
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (b"\0\xff", "AP8="),
        pytest.param(memoryview(b"ab"), "YWI=", id="memoryview"),
        ({"a": [1, None]}, '{"a":[1,null]}'),
        (["x", 1.5], '["x",1.5]'),
        (dt.time(1, 2, 3, tzinfo=UTC), "01:02:03+00:00"),
    ],
    ids=repr,
)
def test_xlsx_other_values_have_the_text_of_all_formats(value: Any, read: Any) -> None:
    """An Enum is its value, a dict is JSON, and bytes are base64."""
    assert read_column(encode_values(value)) == ([read], [read])


def test_xlsx_convert_is_applied_by_type_and_by_name() -> None:
    """The result is a cell of its own type."""
    format = XLSX(header=["id", "name"], convert={int: str, "name": len})
    body = encode_xlsx(format, [(1, "abc"), (2, None)])
    assert read_openpyxl(body)[1:] == [["1", 3], ["2", None]]


# Texts.

CHARACTERS = (
    "a_x0041B;&<>\"' \t\r\n\0\x0b\x1f\x7f\x85\xa0\u2028\ufeff\ufffe\uffff\U0001f600"
)
ESCAPES = ["_x0041_", "_x000B_", "_x005F_", "_x0041", "_x", "\x0b", "\r\n", "_xD83D_"]
TEXTS = st.one_of(
    st.text(max_size=20),
    st.text(st.sampled_from(CHARACTERS), max_size=12),
    st.lists(st.sampled_from(ESCAPES), max_size=4).map("".join),
).filter(lambda text: text.isascii() or text.encode("utf-8", "ignore").decode() == text)


@given(st.lists(TEXTS, min_size=1))
@quick
def test_xlsx_texts_are_read_as_they_were_written(texts: list[str]) -> None:
    """Control characters and texts that look like escapes are included."""
    first, second = read_column(encode_values(*texts))
    assert first == texts
    # calamine leaves the two characters that are not characters of Unicode escaped.
    escaped = {"\ufffe": "_xFFFE_", "\uffff": "_xFFFF_"}
    assert second == [
        re.sub("[\ufffe\uffff]", lambda match: escaped[match[0]], text)
        for text in texts
    ]


def test_xlsx_control_characters_are_escaped_as_excel_does() -> None:
    """The escapes are those of ST_Xstring, in ECMA-376, part 1, section 22.9.2.19."""
    xml = read_sheet_xml(
        encode_values("\x0b", "_x0041_", "\r", "_x0041\x0b", "_X0041_")
    )
    texts = re.findall("<t[^>]*>([^<]*)</t>", xml)[1:]
    assert texts == [
        *("_x000B_", "_x005F_x0041_", "_x000D_"),
        *("_x005F_x0041_x000B_", "_X0041_"),
    ]


@pytest.mark.parametrize("text", [" a", "a ", "a\nb", "\t", "  "])
def test_xlsx_white_space_is_preserved(text: str) -> None:
    """Only a text that needs the attribute has it."""
    xml = read_sheet_xml(encode_values("plain", text))
    assert xml.count('xml:space="preserve"') == 1
    assert read_column(encode_values("plain", text))[0] == ["plain", text]


FORMULAS = [
    "=1+1",
    "+A1",
    "-A1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    '=HYPERLINK("x")',
    "\uff1d1",
]


def test_xlsx_text_is_never_a_formula() -> None:
    """Every text is an inline string, in the header too."""
    body = encode_xlsx(XLSX(header=FORMULAS), [FORMULAS])
    for row in open_workbook(body).active:
        assert {cell.data_type for cell in row} == {"s"}
    root = ET.fromstring(read_sheet_xml(body))
    assert not [element for element in root.iter() if element.tag.endswith("}f")]


# Errors.

LONE = "\ud800"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "Excel does not support the number nan. Convert it to None"),
        (float("-inf"), "Excel does not support the number -inf. "),
        (Decimal("NaN"), "Excel does not support the number NaN. "),
        (Decimal("sNaN"), "Excel does not support the number sNaN. "),
        (Decimal("Infinity"), "Excel does not support the number Infinity. "),
        (dt.date(1899, 12, 31), "Excel supports dates from 1900-01-01 to 9999-12-31"),
        (dt.datetime(1, 1, 1), "Excel supports dates from 1900-01-01"),
        (dt.datetime(1900, 1, 1, tzinfo=CEST), "Excel supports dates from 1900-01-01"),
        (
            dt.datetime.max.replace(tzinfo=dt.timezone(dt.timedelta(hours=-5))),
            "in UTC, got 9999-12-31 23:59:59.999999-05:00. Convert it to None",
        ),
        ("x" * 32_768, "the text has 32,768 characters, but Excel allows 32,767 in a"),
        ("\U0001f600" * 16_384, "the text has 32,768 characters, but Excel allows"),
        (f"a{LONE}", "the text has the lone surrogate '\\ud800', which is half a"),
        (
            object(),
            "a cell cannot be a value of type object, whose text would be '<obj",
        ),
        (
            (n for n in [1]),
            "a cell cannot be a value of type generator, whose text would be '<gen",
        ),
        (lambda: 1, "a cell cannot be a value of type function, whose text would be"),
        ({object()}, "a cell cannot be a value of type set, whose text would be '{<o"),
    ],
)
@pytest.mark.parametrize("others", [[(1, "x")], [(None, 1), (2, None)]])
def test_xlsx_value_that_excel_does_not_support_is_rejected(
    value: Any, message: str, others: list[Any]
) -> None:
    """The error names the item and the column, wherever the value is."""
    items = [*others, (1, value)]
    with pytest.raises((TypeError, ValueError)) as caught:
        encode_xlsx(XLSX(header=["a", "b"]), items)
    assert str(caught.value).startswith(f"item {len(items)}, column 'b': ")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["x" * 32_767, "\U0001f600" * 16_383, "&" * 32_767])
def test_xlsx_longest_text_is_accepted(text: str) -> None:
    """Excel counts the code units of UTF-16, and no escapes."""
    assert read_column(encode_values("a", text))[0] == ["a", text]


def test_xlsx_sheet_has_1048576_rows_at_most() -> None:
    """The header is one of them. The error names the item that does not fit."""

    class Many(Batches):
        def batches(self) -> Iterator[Any]:
            for size in [*[65_536] * 15, 65_535, 1]:
                yield [(None,)] * size

    output = XLSX(header=["n"]).encode_sources({"a": Batches([(1,)]), "b": Many([])})
    with pytest.raises(ValueError, match=r"^sheet 'b', item 1048576: a sheet of Excel"):
        for _ in output:
            pass


def test_xlsx_sheet_has_16384_columns_at_most() -> None:
    """A row of that many cells is read, and a longer one is an error."""
    row = list(range(16_384))
    assert read_openpyxl(encode_xlsx(XLSX(), [row]))[0] == row
    with pytest.raises(ValueError, match=r"^item 2 has 16,385 columns, but a sheet of"):
        encode_xlsx(XLSX(), [row, [*row, 1]])
    with pytest.raises(ValueError, match=r"^the header has 16,385 columns"):
        encode_xlsx(XLSX(header=["x"] * 16_385), [])


def test_xlsx_error_names_the_sheet_of_several() -> None:
    """A single sheet needs no name in a message."""
    sources = {"Users": Batches([(1,)]), "Orders": Batches([{"n": 1}, {"n": 1e999}])}
    with pytest.raises(ValueError, match=r"^sheet 'Orders', item 2, column 'n': Excel"):
        b"".join(XLSX().encode_sources(sources))
    with pytest.raises(TypeError, match=r"^sheet 'Users', item 1 must be a row"):
        b"".join(XLSX().encode_sources({"Users": Batches(["no row"])}))


# Names of sheets.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "the name must not be empty"),
        (" ", "the name must not be empty"),
        ("x" * 32, "the name must have at most 31 characters"),
        ("\U0001f600" * 16, "the name must have at most 31 characters"),
        ("a/b:c", "the name must not contain / :"),
        ("[a]", "the name must not contain [ ]"),
        ("a*?\\", "the name must not contain * ? \\"),
        ("'a", "the name must not begin or end with an apostrophe"),
        ("a'", "the name must not begin or end with an apostrophe"),
        ("history", "Excel reserves the name"),
        ("a\0", "the name must not contain control characters"),
        ("a\nb", "the name must not contain control characters"),
        (LONE, "the text has the lone surrogate"),
    ],
)
def test_xlsx_invalid_name_of_a_sheet_is_rejected(name: str, message: str) -> None:
    """The rules are Excel's. The error comes before the first byte."""
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        XLSX(sheet=name)
    assert str(caught.value).startswith("XLSX: sheet ")
    with pytest.raises(ValueError, match=re.escape(message)):
        XLSX().encode_sources({"Users": Batches([]), name: Batches([])})


def test_xlsx_names_of_sheets_are_compared_without_case() -> None:
    """Excel would repair the file."""
    with pytest.raises(ValueError, match="'Users' is the name of another sheet"):
        XLSX().encode_sources({"Users": Batches([]), "USERS": Batches([])})
    with pytest.raises(ValueError, match="got an empty mapping"):
        XLSX().encode_sources({})
    wrong: Any = {1: Batches([])}
    with pytest.raises(TypeError, match="name of a sheet must be a str, got int: 1"):
        XLSX().encode_sources(wrong)


@pytest.mark.parametrize("name", ["x" * 31, 'a "b" & <c>', "Ü_x0041_", "it's", "表"])
def test_xlsx_valid_name_of_a_sheet_is_read(name: str) -> None:
    """openpyxl and calamine read it, and openpyxl does not decode escapes."""
    body = encode_xlsx(XLSX(sheet=name), [(1,)])
    assert [unescape(title) for title in open_workbook(body).sheetnames] == [name]
    if "_x" not in name:
        file = io.BytesIO(body)
        workbook = python_calamine.CalamineWorkbook.from_filelike(file)
        assert workbook.sheet_names == [name]


# Headers and widths.


def test_xlsx_header_is_bold_and_stays_in_view() -> None:
    """A sheet without a header has no frozen row."""
    sheet = open_workbook(encode_xlsx(XLSX(), [{"a": 1}])).active
    assert (sheet.freeze_panes, sheet["A1"].font.b, sheet["A2"].font.b) == (
        "A2",
        True,
        False,
    )
    sheet = open_workbook(encode_xlsx(XLSX(header=()), [{"a": 1}])).active
    assert (sheet.freeze_panes, sheet["A1"].value) == (None, 1)


def get_widths(body: bytes) -> list[float]:
    """The widths of the columns, in the order of the columns."""
    columns = re.findall(
        '<col min="([0-9]+)"[^>]* width="([^"]*)"', read_sheet_xml(body)
    )
    assert [int(number) for number, _ in columns] == [*range(1, len(columns) + 1)]
    return [float(width) for _, width in columns]


def test_xlsx_widths_are_those_given() -> None:
    """A list is in the order of the columns. None is a width that fits."""
    items = [{"id": 1, "name": "x" * 30, "note": ""}]
    assert get_widths(encode_xlsx(XLSX(widths=[5, None, 7.5]), items)) == [5, 32, 7.5]
    assert get_widths(encode_xlsx(XLSX(widths=[5]), items)) == [5, 32, 10]
    assert get_widths(encode_xlsx(XLSX(widths={"note": 9}), items)) == [10, 32, 9]


def test_xlsx_widths_fit_the_first_50_rows() -> None:
    """The longest line of a text counts, and an East Asian character is two wide."""
    items = [("ab" * 6 + "\n" + "c", "表" * 8, DATETIME, None, "h" * 500, 123.0)]
    later = [("x" * 50,) * 6]
    body = encode_xlsx(XLSX(), [*items * 50, *later])
    assert get_widths(body) == [14, 18, 21, 10, 62, 10]
    assert get_widths(encode_xlsx(XLSX(), [*items * 49, *later]))[0] == 52
    assert get_widths(encode_xlsx(XLSX(header=["x" * 20]), [])) == [22]


@pytest.mark.parametrize(
    ("widths", "error", "message"),
    [
        ("abc", TypeError, "widths must be a list of numbers, or a mapping"),
        (5, TypeError, "widths must be a list of numbers, or a mapping"),
        (["5"], TypeError, "a width must be a number of characters or None, got str"),
        ([True], TypeError, "a width must be a number of characters or None, got bool"),
        ({"a": 0}, ValueError, "a width must be more than 0 and at most 255, got 0"),
        ([float("nan")], ValueError, "at most 255, got nan"),
        ([256], ValueError, "at most 255, got 256"),
    ],
)
def test_xlsx_invalid_widths_are_rejected(
    widths: Any, error: type[Exception], message: str
) -> None:
    """The error comes when the format is made."""
    with pytest.raises(error, match=message):
        XLSX(widths=widths)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"nme": 5}, "XLSX: widths has the column 'nme', but the columns are 'name'"),
        ([5, 6], "XLSX: widths must have at most 1 widths, one for each column, got 2"),
    ],
)
@pytest.mark.parametrize("count", [1, 5000])
def test_xlsx_width_without_a_column_is_rejected_before_the_first_byte(
    make_app: MakeApp,
    sqlite_model: Database,
    reports: list[Report],
    widths: Any,
    message: str,
    count: int,
) -> None:
    """The response is an error page, and nothing was committed."""

    def generate() -> Iterator[Any]:
        sqlite_model.DBSession.add(User(name="ada"))
        yield from ({"name": f"name {n}"} for n in range(count))

    root = Root(generate, format=XLSX(widths=widths))
    call = Call(make_app(root, sqlite_model))
    assert call.status.startswith("500")
    call.read()
    assert [str(report.error) for report in reports] == [message]
    assert sqlite_model.names() == []


def test_xlsx_widths_of_several_sheets_may_belong_to_one_of_them() -> None:
    """A mapping of sources has one format for all of its sheets."""
    sources = {"a": Batches([{"x": 1}]), "b": Batches([{"y": 1, "z": 2}])}
    body = b"".join(XLSX(widths={"y": 5}).encode_sources(sources))
    assert re.findall('width="([0-9]+)"', read_sheet_xml(body, 1)) == ["10"]
    assert re.findall('width="([0-9]+)"', read_sheet_xml(body, 2)) == ["5", "10"]


# Kinds of rows.


class Pair(NamedTuple):
    id: int
    name: str


@dataclass
class Spot:
    id: int
    name: str


@pytest.mark.parametrize(
    "items",
    [
        [Pair(1, "x")],
        [Spot(1, "x")],
        [Model(id=1)],
        [Plain(1)],
        [{"id": 1, "name": "x"}],
        sqlite_rows("SELECT 1 AS id, 'x' AS name"),
        sqlite_rows("SELECT 1 AS id, 'x' AS name", mappings=True),
    ],
    ids=lambda items: type(items[0]).__name__,
)
def test_xlsx_row_may_be_of_any_kind(items: list[Any]) -> None:
    """The header has the names of its fields."""
    names, cells = read_openpyxl(encode_xlsx(XLSX(), items * 2))[::2]
    assert cells[:2] == [1, "x"]
    assert names[:2] == ["id", "name"]


def test_xlsx_names_of_a_mapping_may_be_numbers() -> None:
    """The header has their texts, as in CSV."""
    names, cells = read_openpyxl(encode_xlsx(XLSX(), [{1: "x", 2.5: "y"}] * 2))[::2]
    assert (names, cells) == (["1", "2.5"], ["x", "y"])


def test_xlsx_rows_of_different_lengths_are_written() -> None:
    """A cell is where its row has it. A missing value of a mapping is an empty cell."""
    body = encode_xlsx(XLSX(), [(1,), (), (None, 2, 3), [None, None, None, 4]])
    read = [[1, *[None] * 3], [None] * 4, [None, 2, 3, None], [None, None, None, 4]]
    assert read_openpyxl(body) == read
    body = encode_xlsx(XLSX(header=["a", "b"]), [{"b": 1}, {"a": 2}])
    assert read_openpyxl(body)[1:] == [[None, 1], [2, None]]
    assert read_sheet_xml(body).count("<c ") == 4


def test_xlsx_sheet_without_rows_has_the_header_of_its_source() -> None:
    """Nor is a sheet without any column an error."""
    body = b"".join(XLSX().encode_batches(Batches([], ["id", "name"])))
    assert read_openpyxl(body) == [["id", "name"]]
    assert read_openpyxl(encode_xlsx(XLSX(), [])) == []
    assert read_calamine(encode_xlsx(XLSX(), [])) == []


# The files of the workbook.


def test_xlsx_elements_are_in_the_order_of_the_schema() -> None:
    """Excel repairs a sheet whose elements have another order."""
    root = ET.fromstring(read_sheet_xml(encode_xlsx(XLSX(), [{"a": 1}])))
    assert [e.tag.partition("}")[2] for e in root] == [
        "sheetViews",
        "cols",
        "sheetData",
    ]
    references = [cell.get("r") for row in root[2] for cell in row]
    assert [row.get("r") for row in root[2]] == ["1", "2"]
    assert references == ["A1", "A2"]


def test_xlsx_every_file_is_listed_and_related() -> None:
    """The content types have the path of each file, and the relations have files."""
    sources = {"a": Batches([(1,)]), "b": Batches([(2,)])}
    file = io.BytesIO(b"".join(XLSX().encode_sources(sources)))
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        types = ET.fromstring(archive.read("[Content_Types].xml"))
        listed = {e.get("PartName", "")[1:] for e in types} - {""}
        assert names[0] == "[Content_Types].xml"
        assert listed == {name for name in names if name.startswith("xl/")} - {
            "xl/_rels/workbook.xml.rels"
        }
        relations = ET.fromstring(archive.read("xl/_rels/workbook.xml.rels"))
        assert {f"xl/{e.get('Target')}" for e in relations} == listed - {
            "xl/workbook.xml"
        }
    assert read_openpyxl(file.getvalue(), 1) == [[2]]


def test_xlsx_columns_have_the_letters_of_a_spreadsheet() -> None:
    """``Z`` is followed by ``AA``, and the last column is ``XFD``."""
    xml = read_sheet_xml(encode_xlsx(XLSX(), [list(range(16_384))]))
    letters = re.findall('<c r="([A-Z]+)1"', xml)
    indexes = map(openpyxl.utils.column_index_from_string, letters)
    assert [*indexes] == [*range(1, 16_385)]
    assert letters[25:28] == ["Z", "AA", "AB"] and letters[-1] == "XFD"


def test_xlsx_same_rows_give_the_same_bytes() -> None:
    """From a list, a generator and batches of any size: ``encode_xlsx`` compares them.

    Mixed columns, empty cells and texts that need escapes are included.
    """
    items = [
        (n, n / 7, f"<{n}>" if n % 3 else None, n % 2 or "x", DATETIME, Decimal(n))
        for n in range(3000)
    ]
    assert encode_xlsx(XLSX(), items) == encode_xlsx(XLSX(), items)


# Streams.


def test_xlsx_response_has_its_type_and_its_suffix(make_app: MakeApp) -> None:
    """A browser saves it as a workbook."""

    class RootController(TGController):
        @expose()
        @stream(XLSX, filename="users")
        def index(self) -> Any:
            return [(1,)]

    call = Call(make_app(RootController()))
    assert read_openpyxl(call.read()) == [[1]]
    assert call.headers["Content-Type"] == (
        "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
    )
    assert call.headers["Content-Disposition"] == 'attachment; filename="users.xlsx"'


def test_xlsx_statement_is_a_sheet(
    make_app: MakeApp, model: Database, reports: list[Report]
) -> None:
    """``rows()``, a statement and mapped objects have the same columns."""
    model.seed("ada", "bob")
    users = sa.select(User).order_by(User.id)
    sources: dict[str, Callable[[], Any]] = {
        "rows": lambda: rows(users),
        "statement": lambda: users,
        "objects": lambda: iter(model.DBSession.scalars(users)),
    }

    class RootController(TGController):
        @expose()
        @stream(XLSX)
        def index(self, source: str) -> Any:
            return sources[source]()

    app = make_app(RootController(), model)
    for source in ("rows", "statement"):
        body = Call(app, f"/?source={source}").read()
        assert read_openpyxl(body) == [["id", "name"], [1, "ada"], [2, "bob"]]
    assert [report.reason for report in reports] == ["completed"] * 2
    assert_clean(model)


def test_xlsx_mapping_of_sources_has_a_sheet_for_each(
    make_app: MakeApp, model: Database, reports: list[Report]
) -> None:
    """A controller returns it, or gives it to Stream. The sheets are read in order."""
    model.seed("ada", "bob")

    def make_sources() -> dict[str, Any]:
        def generate() -> Iterator[Any]:
            yield from model.DBSession.scalars(sa.select(User).order_by(User.id))

        return {
            "Users": rows(sa.select(User.name).order_by(User.id)),
            "Objects": generate(),
            "Numbers": [(n, n / 2) for n in range(1000)],
            "Nobody": sa.select(User.name).where(User.id < 0),
        }

    class RootController(TGController):
        @expose()
        @stream(XLSX, filename="all")
        def decorated(self) -> Any:
            return make_sources()

        @expose()
        def returned(self) -> Stream:
            return Stream(make_sources(), XLSX, filename="all")

    app = make_app(RootController(), model)
    bodies = [Call(app, path).read() for path in ("/decorated", "/returned")]
    assert bodies[0] == bodies[1]
    assert open_workbook(bodies[0]).sheetnames == [
        *("Users", "Objects", "Numbers", "Nobody"),
    ]
    assert read_openpyxl(bodies[0], 0) == [["name"], ["ada"], ["bob"]]
    assert read_openpyxl(bodies[0], 1) == [["id", "name"], [1, "ada"], [2, "bob"]]
    assert read_calamine(bodies[0], 2)[-1] == [999, 499.5]
    assert read_openpyxl(bodies[0], 3) == [["name"]]
    assert [report.items for report in reports] == [1004] * 2
    assert_clean(model)


def test_xlsx_is_read_by_pandas(make_app: MakeApp) -> None:
    """pandas reads every sheet with equal values, by both of its readers."""
    items = [
        {"n": n, "x": n / 4, "at": DATETIME + dt.timedelta(hours=n), "t": f"text {n}"}
        for n in range(300)
    ]
    file = io.BytesIO(open_stream(make_app, lambda: {"a": items, "b": items}).read())
    expected = pd.DataFrame(items)
    for engine in ("openpyxl", "calamine"):
        for frame in pd.read_excel(file, sheet_name=None, engine=engine).values():
            pd.testing.assert_frame_equal(frame, expected, check_dtype=False)
            assert frame["at"].dtype.kind == "M"


def test_xlsx_is_a_member_of_an_archive(make_app: MakeApp) -> None:
    """Several workbooks are sent in one ZIP archive, in constant memory."""
    items = [(n, f"name {n}") for n in range(3000)]

    def generate() -> Iterator[Any]:
        yield "list.xlsx", Stream(items, XLSX)
        yield "sheets.xlsx", Stream({"a": iter(items), "b": [(1,)]}, XLSX)

    body = open_stream(make_app, generate, ZIP).read()
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert archive.read("list.xlsx") == b"".join(XLSX().encode(items))
        assert read_openpyxl(archive.read("sheets.xlsx"), 0)[-1] == [2999, "name 2999"]


@pytest.mark.parametrize("commit", ["end", "each", 3])
def test_xlsx_items_are_committed_as_the_stream_requires(
    make_app: MakeApp, sqlite_model: Database, commit: Any
) -> None:
    """With ``commit='each'`` an item is committed before the next one is taken."""
    committed: list[int] = []

    def generate() -> Iterator[Any]:
        for number in range(9):
            sqlite_model.DBSession.add(User(name=f"name {number}"))
            yield (number,)
            committed.append(len(sqlite_model.names()))

    root = Root(generate, format=XLSX, commit=commit)
    Call(make_app(root, sqlite_model)).read()
    assert committed == {"end": [0] * 9, "each": [*range(1, 10)]}.get(
        str(commit), [0, 0, 3, 3, 3, 6, 6, 6, 9]
    )
    assert len(sqlite_model.names()) == 9


# The first and the last bytes.


def decompress_sheet(data: bytes) -> bytes:
    """The XML of the first sheet that a reader has from the data so far."""
    start = data.find(b"PK\3\4", data.find(b"xl/styles.xml"))
    if start < 0:
        return b""
    name, extra = data[start + 26 : start + 28], data[start + 28 : start + 30]
    start += 30 + int.from_bytes(name, "little") + int.from_bytes(extra, "little")
    return zlib.decompressobj(-15).decompress(data[start:])


@pytest.mark.parametrize("in_batches", [True, False])
def test_xlsx_first_rows_are_sent_before_row_1000_is_made(
    make_app: MakeApp, in_batches: bool
) -> None:
    """A row of one digit is the smallest, so that other rows are sent even earlier."""
    made = 0

    def generate() -> Iterator[Any]:
        nonlocal made
        for _ in range(5000):
            made += 1
            yield (1,)

    class Watched(Batches):
        def batches(self) -> Iterator[Any]:
            items = generate()
            while batch := list(itertools.islice(items, 256)):
                yield batch

    items = (lambda: Watched([])) if in_batches else generate
    call = open_stream(make_app, items)
    data, sheet = b"", b""
    while b"<row " not in sheet:
        data += next(call)
        sheet = decompress_sheet(data)
    assert made < 1000
    assert len(read_openpyxl(data + call.read())) == 5000


def test_xlsx_error_in_the_first_rows_is_an_error_page(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """No byte was sent then, also if the item is not the first one."""
    items = [(1,)] * 40 + [(float("nan"),)]
    call = open_stream(make_app, lambda: iter(items))
    assert call.status.startswith("500")
    call.read()
    assert str(reports[0].error).startswith("item 41, column 1: Excel does not support")


def assert_unreadable(body: bytes) -> None:
    """Check that neither reader opens the file."""
    with pytest.raises((zipfile.BadZipFile, OSError, KeyError)):
        open_workbook(body)
    with pytest.raises((python_calamine.CalamineError, OSError)):
        read_calamine(body)


def test_xlsx_that_is_cut_is_opened_by_no_reader(make_app: MakeApp) -> None:
    """Cut at 100 places, at each of the last 120 bytes, and between all chunks."""
    items = [(n, f"name {n}") for n in range(2000)]
    call = open_stream(make_app, lambda: {"a": items, "b": items})
    chunks = list(call)
    call.close()
    body = b"".join(chunks)
    cuts = {*range(0, len(body), len(body) // 100), *range(len(body) - 120, len(body))}
    cuts |= {*itertools.accumulate(map(len, chunks[:-1]))}
    assert len(read_openpyxl(body, 1)) == 2000
    for cut in sorted(cuts):
        assert_unreadable(body[:cut])


@pytest.mark.parametrize("in_batches", [True, False])
def test_xlsx_is_unreadable_if_the_last_commit_fails(
    make_app: MakeApp, reports: list[Report], in_batches: bool
) -> None:
    """The central directory comes after the final commit."""

    def fail() -> None:
        raise LookupError("the commit failed")

    def generate() -> Iterator[Any]:
        transaction.get().addBeforeCommitHook(fail)
        yield from ((n, f"name {n}") for n in range(20_000))

    class Watched(Batches):
        def batches(self) -> Iterator[Any]:
            items = generate()
            while batch := list(itertools.islice(items, 256)):
                yield batch

    items = (lambda: Watched([])) if in_batches else generate
    app = make_app(Root(items, format=XLSX), tm__enabled=True)
    sent, error = read_until_error(Call(app))
    assert isinstance(error, LookupError)
    assert b"name 19000" not in sent and len(decompress_sheet(sent)) > 1_000_000
    assert_unreadable(sent)
    assert [report.reason for report in reports] == ["failed"]


def test_xlsx_sources_are_closed_when_the_client_disconnects(
    make_app: MakeApp, model: Database, reports: list[Report]
) -> None:
    """The connection of ``rows()`` is returned, and generators are closed."""
    model.seed(*[f"name {n}" for n in range(500)])
    closed: list[str] = []

    def generate() -> Iterator[Any]:
        try:
            yield from ((n,) for n in range(100_000))
        finally:
            closed.append(current_stream()._options.format.__class__.__name__)

    first = generate()
    root = Root(
        lambda: {"a": first, "b": rows(sa.select(User)), "c": generate()}, format=XLSX
    )
    call = Call(make_app(root, model))
    assert len(next(call)) > 1000
    call.close()
    assert closed == ["XLSX"]
    assert first.gi_frame is None  # type: ignore[attr-defined]
    assert [report.reason for report in reports] == ["disconnected"]
    assert_clean(model)


# The package.


def test_xlsx_without_its_package_names_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """zipstream-ng is imported only where it is used."""
    monkeypatch.setitem(sys.modules, "zipstream", None)
    with pytest.raises(ImportError, match=r"pip install 'tgstream\[xlsx\]'"):
        XLSX()
