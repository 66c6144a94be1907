"""``convert``: functions for the values of a type or a column, in every format."""

from __future__ import annotations

import datetime
import enum
import numbers
from collections import namedtuple
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import pytest
import tg

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
