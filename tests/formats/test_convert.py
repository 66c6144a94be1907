"""``convert``: functions for the values of a type or a column, in every format."""

from __future__ import annotations

import datetime
import enum
import json
import numbers
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import attrs
import pytest
import tg
from webob.multidict import MultiDict

from tests.formats.support import Batches, Model, Plain, sqlite_rows
from tests.model import Note
from tgstream import NDJSON, JSONArray
from tgstream.formats import json_encoder
from tgstream.formats.convert import Converter, make_converter
from tgstream.formats.table import Table

DAY = datetime.date(2026, 1, 2)
MOMENT = datetime.datetime(2026, 1, 2, 3, 4, 5)
Point = namedtuple("Point", "x y")


def mark(name: str) -> Any:
    """A function that shows that it converted a value."""
    return lambda value: f"{name}({value})"


def convert_cells(convert: Any, *cells: Any, header: Any = None) -> list[Any]:
    """The cells of a row, which are the same one by one and in a batch."""
    names = [f"c{index}" for index in range(len(cells))]
    results = []
    for batched in (True, False):
        table = Table("CSV", header, Converter("CSV", convert))
        table.start([cells], names)
        columns = table.get_columns([cells]) if batched else None
        row = table.get_cells(cells) if columns is None else [c[0] for c in columns]
        results.append(list(row))
    assert results[0] == results[1]
    return results[0]


def test_convert_type_includes_its_subclasses() -> None:
    """The function of the nearest base class is called."""
    convert = {datetime.date: mark("date"), int: mark("int")}
    assert convert_cells(convert, DAY, MOMENT, True, "x") == [
        f"date({DAY})",
        f"date({MOMENT})",
        "int(True)",
        "x",
    ]
    convert |= {datetime.datetime: mark("datetime"), bool: mark("bool")}
    assert convert_cells(convert, DAY, MOMENT, True, 2) == [
        f"date({DAY})",
        f"datetime({MOMENT})",
        "bool(True)",
        "int(2)",
    ]


def test_convert_type_may_be_an_abstract_base_class() -> None:
    """``Number`` includes Decimal, and ``object`` every value but None."""
    convert: Any = {numbers.Number: mark("number")}
    assert convert_cells(convert, Decimal(1), 1.5, "x") == [
        "number(1)",
        "number(1.5)",
        "x",
    ]
    assert convert_cells({object: mark("any")}, "x", None, [1]) == [
        "any(x)",
        None,
        "any([1])",
    ]


def test_convert_name_outranks_a_type() -> None:
    """The function of a type is not called for a column that has its own."""
    convert = {"c1": mark("name"), Decimal: mark("type")}
    assert convert_cells(convert, Decimal(1), Decimal(2)) == ["type(1)", "name(2)"]


def test_convert_none_is_not_passed() -> None:
    """An empty cell stays empty, whichever functions there are."""
    convert = {"c0": mark("name"), object: mark("type")}
    assert convert_cells(convert, None, None, 1) == [None, None, "type(1)"]


def test_convert_name_is_that_of_the_header_or_of_the_field() -> None:
    """A header may rename the columns. Its own names come first."""
    header = ("Price", "c0")
    assert convert_cells({"Price": mark("f")}, 1, 2, header=header) == ["f(1)", 2]
    assert convert_cells({"c1": mark("f")}, 1, 2, header=header) == [1, "f(2)"]
    assert convert_cells({"c0": mark("f")}, 1, 2, header=header) == [1, "f(2)"]
    assert convert_cells({"other": mark("f")}, 1, 2, header=header) == [1, 2]


def test_convert_type_is_found_inside_lists_and_dicts() -> None:
    """A list that has a function of its own is not searched."""
    value = {"a": [Decimal(1), (Decimal(2), None)], "b": "x"}
    assert convert_cells({Decimal: str}, value) == [{"a": ["1", ("2", None)], "b": "x"}]
    convert: Any = {Decimal: str, list: len}
    assert convert_cells(convert, value, [Decimal(1)]) == [{"a": 2, "b": "x"}, 1]
    convert = {Decimal: str, Mapping: mark("mapping")}
    assert convert_cells(convert, {"a": 1}) == ["mapping({'a': 1})"]


def test_convert_result_is_not_converted_again() -> None:
    """A function may return a value of its own type."""
    convert: Any = {int: lambda value: value + 1, "c1": lambda value: [value]}
    assert convert_cells(convert, 1, 2) == [2, [2]]


def test_convert_applies_to_every_kind_of_row() -> None:
    """Also to mappings, whose cells without a value are not passed."""
    converter = Converter("CSV", {"y": mark("f")})
    for item in (Point(1, 2), {"x": 1, "y": 2}):
        table = Table("CSV", None, converter)
        table.start([item])
        assert table.get_cells(item) == [1, "f(2)"]
    assert table.get_cells({"x": 1}) == [1, None]


def test_convert_column_without_matching_values_is_not_copied() -> None:
    """A batch costs no more than the types of its values."""
    values = [1, 2, None]
    converter = Converter("CSV", {Decimal: str})
    assert converter.convert_column(values, None, str) is values


class Failure(Exception):
    pass


@pytest.mark.parametrize("error", [KeyError, Failure, StopIteration, TypeError])
def test_convert_error_names_the_item_and_the_column(error: Any) -> None:
    """The error of the function is its cause."""

    def fail(value: Any) -> Any:
        if value == 3:
            raise error("broken")
        return value

    for convert in ({int: fail}, {"y": fail}):
        table = Table("CSV", None, Converter("CSV", convert))
        batch = [Point(None, None), Point(None, 1), Point(1, 3)]
        table.start(batch)
        expected = f"item 3, column 'y': convert raised {error.__name__}: '?broken"
        with pytest.raises(ValueError, match=expected) as caught:
            table.get_columns(batch)
        assert isinstance(caught.value.__cause__, error)
        table.number = 3
        with pytest.raises(ValueError, match=expected):
            table.get_cells(batch[2])
    table = Table("CSV", (), Converter("CSV", {int: fail}))
    table.start([(1, 3)])
    with pytest.raises(ValueError, match="item 1, column 2: convert raised"):
        table.get_columns([(1, 3)])


def test_convert_function_may_abort() -> None:
    """The status of ``abort()`` reaches the client."""
    table = Table("CSV", (), Converter("CSV", {int: lambda value: tg.abort(404)}))
    with pytest.raises(tg.exceptions.HTTPNotFound):
        table.get_columns([(1,)])


class Status(enum.Enum):
    PAID = "paid"


@pytest.mark.parametrize(
    ("convert", "error", "message"),
    [
        ([str], TypeError, "X: convert must be a mapping such as {Decimal: str}, got"),
        ({1: str}, TypeError, "X: the keys of convert must be types or column names"),
        ({list[int]: str}, TypeError, "got list\\[int\\]"),
        ({Status.PAID: str}, TypeError, "got <Status.PAID: 'paid'>"),
        ({"name": "upper"}, TypeError, "must map 'name' to a function of one value"),
        ({int: None}, TypeError, "must map <class 'int'> to a function"),
        ({type(None): str}, ValueError, "None is not converted"),
    ],
    ids=repr,
)
def test_convert_invalid_mapping_is_rejected(
    convert: Any, error: type[Exception], message: str
) -> None:
    """It is checked when the format is created."""
    with pytest.raises(error, match=message):
        make_converter("X", convert)


def test_convert_mapping_is_copied() -> None:
    """A later change of the mapping has no effect. An empty one converts nothing."""
    convert = {int: mark("int")}
    converter = Converter("X", convert)
    convert[str] = mark("str")  # type: ignore[index]
    assert converter.convert_value("x") == "x"
    assert make_converter("X", {}) is make_converter("X", None) is None


# In JSON.


@pytest.fixture(params=["orjson", "json"])
def encoders(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With orjson, and as if it were not installed."""
    if request.param == "json":
        monkeypatch.setattr(json_encoder, "orjson", None)


def get_documents(
    convert: Any, items: Sequence[Any], fields: Sequence[str] = ()
) -> list[Any]:
    """The documents of some items, which are the same in batches and both formats."""
    lines, array = NDJSON(convert=convert), JSONArray(convert=convert)
    output = b"".join(lines.encode(items))
    for size in (1, 2, 500):
        batches = Batches(items, fields, size)
        assert b"".join(lines.encode_batches(batches)) == output
        assert [*map(json.loads, output.splitlines())] == json.loads(
            b"".join(array.encode_batches(batches))
        )
    return [*map(json.loads, output.splitlines())]


@dataclass
class Line:
    price: Any


@attrs.define
class Spot:
    id: int
    name: Any


class Order:
    def __json__(self) -> dict[str, Any]:
        return {"line": Line(Decimal("1.50"))}


@pytest.mark.usefixtures("encoders")
def test_convert_keeps_the_digits_of_a_numeric_column() -> None:
    """Without it, TG's encoder converts a Decimal to a float."""
    rows = [Point(Decimal("1.50"), 1), Point(None, None), Point(Decimal("1E+2"), 1.5)]
    documents = get_documents({Decimal: str}, rows, ["x", "y"])
    assert documents == [
        {"x": "1.50", "y": 1},
        {"x": None, "y": None},
        {"x": "1E+2", "y": 1.5},
    ]
    assert get_documents(None, rows, ["x", "y"])[0] == {"x": 1.5, "y": 1}


@pytest.mark.usefixtures("encoders")
@pytest.mark.parametrize(
    ("item", "document"),
    [
        (
            {"a": {"b": [Decimal("1.50"), (Decimal("2.0"),)]}},
            {"a": {"b": ["1.50", ["2.0"]]}},
        ),
        (MappingProxyType({"a": Decimal("1.50")}), {"a": "1.50"}),
        (MultiDict([("a", Decimal("1.50")), ("a", 1)]), {"a": ["1.50", 1]}),
        (Line(Line(Decimal("1.50"))), {"price": {"price": "1.50"}}),
        ({"a": Order()}, {"a": {"line": {"price": "1.50"}}}),
        (Order(), {"line": {"price": "1.50"}}),
        (Spot(1, Decimal("1.50")), {"id": 1, "name": "1.50"}),
        (Note(id=1, text=Decimal("1.50")), {"id": 1, "text": "1.50"}),
        (
            Point(Spot(1, [Decimal("1.50")]), 1),
            {"x": {"id": 1, "name": ["1.50"]}, "y": 1},
        ),
        ([Decimal("1.50"), [Line(Decimal("1.50"))]], ["1.50", [{"price": "1.50"}]]),
        (Decimal("1.50"), "1.50"),
        ("x", "x"),
        (None, None),
    ],
)
def test_convert_finds_a_type_at_any_depth_of_a_document(
    item: Any, document: Any
) -> None:
    """In mappings, lists, dataclasses, mapped objects and results of ``__json__``."""
    assert get_documents({Decimal: str}, [item, item], ["x", "y"]) == [document] * 2


@pytest.mark.usefixtures("encoders")
def test_convert_name_is_that_of_a_field_of_the_item() -> None:
    """Not of a field within another value. Each kind of item with names has them."""
    convert = {"name": str.upper}
    items: list[Any] = [
        {"name": "a", "in": {"name": "a"}},
        Model(id=1, name="a"),
        Plain(1, "a"),
        *sqlite_rows("SELECT 'a' AS name"),
    ]
    for item, document in zip(items, get_documents(convert, items), strict=True):
        assert document["name"] == "A", item
    assert get_documents(convert, items[:1]) == [{"name": "A", "in": {"name": "a"}}]


@pytest.mark.usefixtures("encoders")
def test_convert_generator_in_a_document_is_iterated_once() -> None:
    """Its items are converted."""

    def generate() -> Iterator[Any]:
        yield Decimal("1.50")

    output = b"".join(NDJSON(convert={Decimal: str}).encode([{"a": generate()}]))
    assert output == b'{"a":["1.50"]}\n'


@pytest.mark.usefixtures("encoders")
def test_convert_error_in_json_names_the_item_and_the_field() -> None:
    """For a function of a type and of a name, alone and in batches."""

    def fail(value: Any) -> Any:
        return {1: 1}[value]

    for convert in ({int: fail}, {"y": fail}):
        rows = [Point(None, 1), Point(None, 1), Point("x", 2)]
        for items in (rows, [row._asdict() for row in rows]):
            format = NDJSON(convert=convert)
            batches = Batches(items, ["x", "y"], 500)
            for encoded in (format.encode(items), format.encode_batches(batches)):
                message = 'item 3, field "y": convert raised KeyError: 2'
                with pytest.raises(ValueError, match=message):
                    list(encoded)
    with pytest.raises(ValueError, match="item 1: convert raised KeyError"):
        list(NDJSON(convert={int: fail}).encode([2]))


@pytest.mark.usefixtures("encoders")
def test_convert_leaves_the_error_of_an_unsupported_value() -> None:
    """It has the same text as without convert."""
    rows = [Point(1, 1), Point(1, [object()])]
    for convert in (None, {Decimal: str}):
        for encode in (
            NDJSON(convert=convert).encode(rows),
            NDJSON(convert=convert).encode_batches(Batches(rows, ["x", "y"])),
        ):
            with pytest.raises(TypeError, match='item 2, field "y": the value cannot'):
                list(encode)


def test_convert_is_checked_by_each_format() -> None:
    """The error has the name of the format."""
    for format in (NDJSON, JSONArray):
        with pytest.raises(TypeError, match=f"{format.__name__}: convert must be a m"):
            format(convert=[])  # type: ignore[arg-type]
