"""The columns of Parquet and Arrow: their Arrow types, and values converted to them.

A column has the type that the statement declares. If no type is declared, or only a
part of it (a ``Numeric`` without a scale), the type comes from the values before the
first output, and fits all of them. It does not change after that.

pyarrow converts a batch of values at once, but it cuts some silently: 1.5 in a column
of integers, the time of a datetime in a column of dates, the zone of a time. So it gets
only classes of values that it converts exactly. It reports no item if a value does not
fit. The values of that batch are then converted one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from numbers import Integral, Rational, Real
from typing import Any, NamedTuple
from uuid import UUID

import pyarrow as pa

from .cells import CellSimplifier
from .json_encoder import Encoder
from .protocols import ColumnType
from .values import BYTES_TYPES, has_address

MAX_DIGITS = 38
"""Digits of a number that DuckDB and Polars can read as a decimal."""

_UNKNOWN_SCALE = 18
"""Digits after the point of a decimal column whose values are all NULL."""

_VALUE_ERRORS = (pa.ArrowException, ArithmeticError, ValueError, TypeError)


class Kind(NamedTuple):
    """A type of columns, and how values are converted to it.

    :param type: the Arrow type.
    :param exact: the classes whose values pyarrow converts exactly, or rejects.
    :param convert: converts one value to a value that pyarrow accepts. It raises one of
        ``_VALUE_ERRORS`` for a value that does not fit.
    :param zoned: whether datetimes and times must have a zone, None for other types.
    """

    type: Any
    exact: frozenset[type]
    convert: Callable[[Any], Any]
    zoned: bool | None = None


# Values one by one.


def _to_bool(value: Any) -> bool:
    if value in (0, 1):
        return bool(value)
    raise ValueError("only 0 and 1 are booleans")


def _to_int(value: Any, first: int = -(1 << 63), last: int = (1 << 63) - 1) -> int:
    if type(value) is int and first <= value <= last:
        return value
    number = int(value) if isinstance(value, int | float | Decimal) else None
    if number is None or number != value:
        raise ValueError("it is not an integer")
    if not first <= number <= last:
        raise ValueError("it has more than 64 bits")
    return number


def _to_float(value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("it is not a float")
    if float(value) != value and value == value:
        raise ValueError("it has more digits than a float")
    return float(value)


def _to_decimal(value: Any) -> Any:
    if isinstance(value, float):
        return Decimal(repr(value))
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise ValueError("it is not a number")
    # pyarrow reads the text of a Decimal, and a subclass may have another one.
    return value if type(value) in (int, Decimal) else Decimal(value)


def _to_date(value: Any) -> date:
    if isinstance(value, datetime):
        if value.tzinfo is not None or value.time() != time():
            raise ValueError("a date would lose its time")
        return value.date()
    return value if isinstance(value, date) else date.fromisoformat(value)


def _to_datetime(value: Any) -> datetime:
    if isinstance(value, datetime):
        return value
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day)
    return datetime.fromisoformat(value)


def _to_naive(value: Any) -> datetime:
    moment = _to_datetime(value)
    if moment.tzinfo is not None:
        raise ValueError("the datetimes of the column have no zone")
    return moment


def _to_zoned(value: Any) -> datetime:
    moment = _to_datetime(value)
    if moment.tzinfo is None:
        raise ValueError("the datetimes of the column have a zone")
    return moment


def _to_time(value: Any) -> time:
    moment = value if isinstance(value, time) else time.fromisoformat(value)
    if moment.tzinfo is not None:
        raise ValueError("the times of the column have no zone")
    return moment


def _to_duration(value: Any) -> Any:
    if not isinstance(value, timedelta):
        raise ValueError("it is not a timedelta")
    pa.scalar(value, _DURATION)
    return value


def _to_binary(value: Any) -> bytes:
    if not isinstance(value, BYTES_TYPES):
        raise ValueError("it is not bytes")
    return bytes(value)


def _to_text(value: Any) -> str:
    if isinstance(value, BYTES_TYPES):
        raise ValueError("it is not text")
    text = value if isinstance(value, str) else str(value)
    if not text.isascii():
        text.encode()  # fails for a lone surrogate
    if has_address(value):
        raise ValueError("objects of this class have no text")
    return text


# Kinds.

_DURATION = pa.duration("us")
_BOOL = Kind(pa.bool_(), frozenset({bool}), _to_bool)
_INT = Kind(pa.int64(), frozenset({int}), _to_int)
_UNSIGNED = Kind(
    pa.uint64(), frozenset({int}), lambda value: _to_int(value, 0, (1 << 64) - 1)
)
_FLOAT = Kind(pa.float64(), frozenset({float, int}), _to_float)
_TEXT = Kind(pa.string(), frozenset({str}), _to_text)
_BINARY = Kind(pa.binary(), frozenset(BYTES_TYPES), _to_binary)
_DATE = Kind(pa.date32(), frozenset({date}), _to_date)
_NAIVE = Kind(pa.timestamp("us"), frozenset({datetime}), _to_naive, False)
_ZONED = Kind(pa.timestamp("us", tz="UTC"), frozenset({datetime}), _to_zoned, True)
_TIME = Kind(pa.time64("us"), frozenset({time}), _to_time, False)
_INTERVAL = Kind(_DURATION, frozenset({timedelta}), _to_duration)
_NULL = Kind(pa.null(), frozenset(), lambda value: value)


@lru_cache
def _decimal_kind(precision: int, scale: int) -> Kind:
    arrow_type = pa.decimal128(max(precision, scale), scale)

    def convert(value: Any) -> Any:
        number = _to_decimal(value)
        pa.scalar(number, arrow_type)  # fails if it would lose a digit
        return number

    return Kind(arrow_type, frozenset({Decimal, int}), convert)


def _json_kind() -> Kind:
    encoder = Encoder()
    return Kind(
        pa.string(), frozenset(), lambda value: encoder.encode(value, "it").decode()
    )


def _list_kind(item: Kind) -> Kind:
    def convert(value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError("it is not a list")
        return [None if part is None else convert_item(part) for part in value]

    def convert_item(part: Any) -> Any:
        return item.convert(part.value if isinstance(part, Enum) else part)

    return Kind(pa.list_(item.type), frozenset(), convert)


_KINDS: dict[Any, Kind] = {
    bool: _BOOL,
    int: _INT,
    float: _FLOAT,
    str: _TEXT,
    UUID: _TEXT,
    bytes: _BINARY,
    date: _DATE,
    time: _TIME,
    timedelta: _INTERVAL,
}


def _declared_kind(declared: ColumnType | None) -> Kind | None:
    """The kind of a declared type, None if the type depends on the values."""
    if declared is None:
        return None
    cls = declared.python_type
    if cls is int and declared.unsigned:
        return _UNSIGNED
    if cls is time and declared.timezone:
        return _TEXT
    if cls is Decimal and declared.precision is not None and declared.scale is not None:
        if max(declared.precision, declared.scale) > MAX_DIGITS:
            return _TEXT
        return _decimal_kind(declared.precision, declared.scale)
    if cls is dict:
        return _json_kind()
    if cls is list:
        item = _declared_kind(declared.item) or _null_kind(declared.item)
        # The values of an Enum may have several types, which only JSON can have.
        return _json_kind() if item is _NULL else _list_kind(item)
    if issubclass(cls, Enum):
        kinds = {_kind_of(member.value).type: _kind_of(member.value) for member in cls}
        return kinds.popitem()[1] if len(kinds) == 1 else None
    return _KINDS.get(cls)


def _null_kind(declared: ColumnType | None) -> Kind:
    """The kind of a column whose values are all NULL."""
    if declared is not None and declared.python_type is datetime:
        return _ZONED if declared.timezone else _NAIVE
    if declared is not None and declared.python_type is Decimal:
        scale = _UNKNOWN_SCALE if declared.scale is None else declared.scale
        return _decimal_kind(MAX_DIGITS, scale)
    return _NULL


def _plain_number(value: Any) -> Any:
    """Replace a number of another package, such as NumPy, by Python's."""
    if isinstance(value, Integral) and not isinstance(value, int):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, float | Rational):
        return float(value)
    return value


def _kind_of(value: Any) -> Kind:
    """The kind that a value has by itself."""
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        fits = -(1 << 63) <= value < 1 << 63
        return _INT if fits else _decimal_kind(MAX_DIGITS, 0)
    if isinstance(value, Decimal):
        exponent = value.as_tuple().exponent
        scale = -exponent if isinstance(exponent, int) else 0  # "n" of NaN
        return _decimal_kind(MAX_DIGITS, min(max(scale, 0), MAX_DIGITS))
    if isinstance(value, datetime):
        return _NAIVE if value.tzinfo is None else _ZONED
    if isinstance(value, time):
        return _TIME if value.tzinfo is None else _TEXT
    if isinstance(value, BYTES_TYPES):
        return _BINARY
    for cls in (float, date, timedelta):
        if isinstance(value, cls):
            return _KINDS[cls]
    return _TEXT


def _unify(first: Kind, second: Kind) -> Kind | None:
    """The kind for the values of both, None if there is none."""
    if first.type == second.type or second is _NULL:
        return first
    types = first.type, second.type
    if first is _NULL or types == (_INT.type, _FLOAT.type):
        return second
    if types == (_FLOAT.type, _INT.type):
        return first
    if all(pa.types.is_decimal(each) or each == _INT.type for each in types):
        scales = [each.scale for each in types if pa.types.is_decimal(each)]
        return _decimal_kind(MAX_DIGITS, max(scales))
    return None


_COERCIONS: dict[Any, Callable[[Any], Any]] = {
    datetime: _to_datetime,
    Decimal: _to_decimal,
}
"""Convert a value to a declared type of which the Arrow type is not known yet."""


class Column:
    """One column: its type, and its values that were not written yet.

    :param name: for error messages.
    :param declared: the type that the statement declares, None if it declares none.
    :param simplifier: replaces values that have no Arrow type by text.
    """

    def __init__(
        self, name: str, declared: ColumnType | None, simplifier: CellSimplifier
    ) -> None:
        self.bytes = 0
        """The bytes of its values in memory."""
        self._name = name
        self._declared = declared
        self._simplifier = simplifier
        kind = _declared_kind(declared)
        self._complete = kind is not None  # the declared type is the whole type
        self._simplifies = declared is None or declared.python_type not in (dict, list)
        self._fixed = False
        if kind is None and declared is not None and declared.scale is not None:
            kind = _null_kind(declared)  # values may have more digits
        self._kind = kind or _NULL
        self._arrays: list[Any] = []
        self._values: list[Any] = []  # converted one by one

    @property
    def type(self) -> Any:
        """Its Arrow type. Call :meth:`fix` first."""
        return self._kind.type

    def fix(self) -> None:
        """Keep the type from now on, because the output has it."""
        if self._kind is _NULL:
            self._widen(_null_kind(self._declared))
        self._fixed = True

    def add(self, value: Any, number: int) -> None:
        """Add the value of one item.

        :param number: the item's.
        :raises ValueError: when the value does not fit.
        """
        if value is not None:
            value = self._convert(value, number)  # may make an array of the values
        self._values.append(value)

    def add_batch(self, values: Sequence[Any], first: int) -> None:
        """Add the values of several items.

        :param first: the number of the first item.
        :raises ValueError: when a value does not fit.
        """
        self.pack()
        array = self._convert_at_once(values)
        if array is None and self._simplifies:
            simple = self._simplifier.simplify_column(
                values, lambda index: f"item {first + index}, column {self._name}"
            )
            array = self._convert_at_once(simple)
        if array is not None:
            self._append(array)
            return
        for number, value in enumerate(values, first):
            self.add(value, number)
        self.pack()

    def pack(self) -> None:
        """Make an array of the values that were added one by one."""
        if self._values:
            values, self._values = self._values, []
            self._append(pa.array(values, self._kind.type))

    def take(self) -> Any:
        """Return the values as a chunked array, and let go of them."""
        self.pack()
        arrays, self._arrays, self.bytes = self._arrays, [], 0
        return pa.chunked_array(arrays, self._kind.type)

    def _append(self, array: Any) -> None:
        self._arrays.append(array)
        self.bytes += array.nbytes

    def _convert_at_once(self, values: Sequence[Any]) -> Any:
        """The values as an array, None if they must be converted one by one."""
        kind = self._kind
        types = set(map(type, values))
        types.discard(type(None))
        if not types <= kind.exact:
            return None
        if kind.zoned is not None and any(
            value is not None and (value.tzinfo is not None) is not kind.zoned
            for value in values
        ):
            return None
        try:
            return pa.array(values, kind.type)
        except _VALUE_ERRORS:
            return None  # _convert() finds a wider type, or raises it for the item

    def _convert(self, value: Any, number: int) -> Any:
        """Convert a value that is not None."""
        kind = self._kind
        if type(value) in kind.exact:
            try:
                return kind.convert(value)
            except _VALUE_ERRORS:
                pass  # _fit() finds a wider type, or raises it again
        simple = self._simplify(value, number) if self._simplifies else value
        try:
            return None if simple is None else self._fit(simple)
        except _VALUE_ERRORS as error:
            raise ValueError(self._describe(value, number, error)) from error

    def _simplify(self, value: Any, number: int) -> Any:
        """Replace a value that has no Arrow type. An Enum may be replaced by None."""
        where = f"item {number}, column {self._name}"
        return _plain_number(
            self._simplifier.simplify_column([value], lambda _: where)[0]
        )

    def _fit(self, value: Any) -> Any:
        """Convert a value to the type of the column. Widen the type if necessary."""
        if self._complete:
            return self._kind.convert(value)
        if self._declared is not None:
            coerce = _COERCIONS.get(self._declared.python_type)
            value = value if coerce is None else coerce(value)
        kind = _unify(self._kind, _kind_of(value))
        if kind is None:
            raise ValueError("it has another type")
        if kind.type == self._kind.type:
            return self._kind.convert(value)
        converted = kind.convert(value)
        if self._fixed:
            raise ValueError("the type of the column is already sent")
        self._widen(kind)
        return converted

    def _widen(self, kind: Kind) -> None:
        self.pack()
        self._kind = kind
        self._arrays = [array.cast(kind.type) for array in self._arrays]

    def _describe(self, value: Any, number: int, error: BaseException) -> str:
        source, advice = "the items before it", "Convert the values of the column"
        if self._declared is not None:
            source, advice = "the statement", "Use cast() in the statement"
        known = self._fixed or self._kind is not _NULL
        target = f" as {self._kind.type}, the type of {source}" if known else ""
        return (
            f"item {number}, column {self._name}: {value!r:.80} of type "
            f"{type(value).__name__} cannot be written{target}: {error}. {advice}"
        )
