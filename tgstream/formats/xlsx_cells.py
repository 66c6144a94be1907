"""The cells of a sheet as XML, by the rules of SpreadsheetML (ECMA-376, part 1).

The cells of a column are encoded at once if their types allow it, else one by one. Both
ways give the same text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import lru_cache
from math import isfinite
from numbers import Integral, Real
from typing import Any, NamedTuple
from unicodedata import east_asian_width

from .json_encoder import COLUMN_SEPARATOR, encode_column
from .values import has_address

HEADER, DATE, DATETIME, TIME, DURATION = range(1, 6)
"""The styles of cells: indexes of :data:`NUMBER_FORMATS`. 0 is the general style."""

NUMBER_FORMATS = (
    *("General", "General", "yyyy\\-mm\\-dd", "yyyy\\-mm\\-dd\\ hh:mm:ss"),
    *("hh:mm:ss", "[h]:mm:ss"),
)


class Kind(NamedTuple):
    """The XML around the text of a cell, behind the reference of the cell."""

    start: str
    end: str
    width: int = 0
    """Characters that a value has on the screen. 0 for as many as its text has."""


Encoded = tuple[Kind, str]
"""The kind of a cell, and its text."""

EncodedColumn = tuple[Kind, Sequence[str]]
"""The kind of the cells of a column, and their texts."""

_TEXT = Kind(' t="inlineStr"><is><t>', "</t></is></c>")
_SPACED_TEXT = Kind(' t="inlineStr"><is><t xml:space="preserve">', "</t></is></c>")
_ANY_TEXT = Kind(' t="inlineStr"><is><t', "</t></is></c>")
_NUMBER = Kind("><v>", "</v></c>")
_BOOLEAN = Kind(' t="b"><v>', "</v></c>", 5)
_DATE = Kind(f' s="{DATE}"><v>', "</v></c>", 10)
_DATETIME = Kind(f' s="{DATETIME}"><v>', "</v></c>", 19)
_TIME = Kind(f' s="{TIME}"><v>', "</v></c>", 8)
_DURATION = Kind(f' s="{DURATION}"><v>', "</v></c>", 12)


def encode_cell(value: Any) -> Encoded | None:
    """Return the kind and the text of a cell, None for an empty cell.

    :raises TypeError: when the value has no text of its own.
    :raises ValueError: when no cell can have the value.
    """
    cls: Any = type(value)
    return _find_encoder(cls)(value)


def encode_cells(values: Sequence[Any]) -> EncodedColumn | None:
    """Return the kind of the cells of a column, and their texts.

    :return: None if the cells must be encoded one by one.
    """
    types = set(map(type, values))
    if types == {int, float}:  # a column of numbers on SQLite
        return _encode_numbers(values)
    encode = _COLUMN_ENCODERS.get(types.pop()) if len(types) == 1 else None
    return None if encode is None else encode(values)


def encode_header(name: Any) -> str:
    """Return the XML of a cell of the header, behind the reference of the cell.

    :param name: a key of a mapping may be a number, for example.
    :raises ValueError: when no cell can have the name.
    """
    kind, text = _encode_text(name if isinstance(name, str) else str(name))
    return f' s="{HEADER}"{kind.start}{text}{kind.end}'


@lru_cache
def _find_encoder(cls: Any) -> Callable[[Any], Encoded | None]:
    for base, encode in _ENCODERS.items():
        if issubclass(cls, base):
            return encode
    return _encode_object


# Texts.

MAX_TEXT = 32_767
"""Characters of a cell, in code units of UTF-16."""

_CONTROLS = "\x00-\x08\x0b-\x1f\ufffe\uffff"
"""Characters that XML forbids, and CR, which XML parsers convert to LF."""

_find_control = re.compile(f"[{_CONTROLS}]").search
_replace_controls = re.compile(f"[{_CONTROLS}]").sub
_replace_underscores = re.compile(f"_(?=x[0-9A-Fa-f]{{4}}[_{_CONTROLS}])").sub
"""Replaces the ``_`` that would begin an escape like ``_x0041_``."""

_format_escape = "_x{:04X}_".format


def escape_text(text: str) -> str:
    """Return a text as it is written between two tags.

    The escapes are those of ST_Xstring (ECMA-376, part 1, section 22.9.2.19).
    """
    if "_" in text:
        text = _replace_underscores(_escape_character, text)
    if not text.isprintable():
        text = _replace_controls(_escape_character, text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _escape_character(match: re.Match[str]) -> str:
    return _format_escape(ord(match[0]))


def count_characters(text: str) -> int:
    """Return the length of a text as Excel counts it, in code units of UTF-16.

    :raises ValueError: when the text has a lone surrogate.
    """
    try:
        return len(text) if text.isascii() else len(text.encode("utf-16-le")) // 2
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has the lone surrogate {text[error.start]!a}, which is half a "
            "character. Remove it"
        ) from None


def _encode_text(value: str) -> Encoded:
    text = str.__str__(value)
    count = count_characters(text)
    if count > MAX_TEXT:
        raise ValueError(
            f"the text has {count:,} characters, but Excel allows {MAX_TEXT:,} in a "
            "cell. Shorten it"
        )
    return (_SPACED_TEXT if _is_spaced(text) else _TEXT), escape_text(text)


def _is_spaced(text: str) -> bool:
    """Whether readers would change the white space of a text."""
    return "\n" in text or text.strip() != text


def _encode_texts(values: Sequence[str]) -> EncodedColumn | None:
    joined = "".join(values)
    if 2 * max(map(len, values)) > MAX_TEXT:
        return None
    if not joined.isascii():
        try:
            joined.encode()
        except UnicodeEncodeError:
            return None
    texts = values
    # Four searches take a tenth of the time of one search for a class of characters.
    if any(special in joined for special in "&<>_") or (
        not joined.isprintable() and _find_control(joined)
    ):
        texts = list(map(escape_text, values))
    if "\n" not in joined and list(map(str.strip, values)) == list(values):
        return _TEXT, texts
    spaces = (' xml:space="preserve"' if _is_spaced(v) else "" for v in values)
    return _ANY_TEXT, [f"{s}>{t}" for s, t in zip(spaces, texts, strict=True)]


# Numbers.

MAX_DIGITS = 15
"""Digits of a number that Excel keeps."""

_MOST = 10**MAX_DIGITS

_SMALLEST = 2.3e-308
"""Excel has no numbers that are nearer to 0."""


def _encode_none(value: None) -> None:
    return None


def _encode_boolean(value: bool) -> Encoded:
    return _BOOLEAN, "1" if value else "0"


def _encode_booleans(values: Sequence[Any]) -> EncodedColumn:
    return _BOOLEAN, ["1" if value else "0" for value in values]


def _encode_integer(value: Any) -> Encoded:
    if -_MOST < value < _MOST:
        return _NUMBER, str(int(value))
    return _encode_decimal(Decimal(int(value)))


def _encode_integers(values: Sequence[Any]) -> EncodedColumn | None:
    if min(values) <= -_MOST or max(values) >= _MOST:
        return None
    return _NUMBER, list(map(str, values))


def _encode_decimal(value: Decimal) -> Encoded:
    """A number whose digits Excel would drop is a text."""
    _check_finite(value, value.is_finite())
    digits = "".join(map(str, value.as_tuple().digits)).strip("0")
    is_number = not digits or (
        len(digits) <= MAX_DIGITS and _SMALLEST <= abs(float(value)) < float("inf")
    )
    text = Decimal.__str__(value)  # a subclass may have another text
    return (_NUMBER, text) if is_number else _encode_text(text)


def _encode_decimals(values: Sequence[Decimal]) -> EncodedColumn | None:
    texts = list(map(str, values))
    # Few digits, and neither an exponent nor NaN.
    if max(map(len, texts)) > MAX_DIGITS or not _is_plain("".join(texts)):
        return None
    return _NUMBER, texts


_is_plain = re.compile("[-.0-9]*").fullmatch


def _encode_float(value: Any) -> Encoded:
    number = float(value)
    _check_finite(number, isfinite(number))
    return _NUMBER, repr(number)


def _encode_floats(values: Sequence[float]) -> EncodedColumn | None:
    if not all(map(isfinite, values)):
        return None
    # orjson writes other exponents. '0.0000' may begin a number that has one.
    data = encode_column(values)
    if data is None or b"e" in data or b"0.0000" in data:
        return _NUMBER, list(map(repr, values))
    return _NUMBER, data.decode().split(COLUMN_SEPARATOR.decode())


def _encode_numbers(values: Sequence[float]) -> EncodedColumn | None:
    integers = [value for value in values if type(value) is int]
    is_small = min(integers) > -_MOST and max(integers) < _MOST
    return _encode_floats(values) if is_small else None


def _check_finite(value: Any, is_finite: bool) -> None:
    if not is_finite:
        raise ValueError(
            f"Excel does not support the number {value}. Convert it to None or a string"
        )


# Dates and times: numbers of days.

_EPOCH = datetime(1899, 12, 30)
_EPOCH_UTC = _EPOCH.replace(tzinfo=timezone.utc)
_EPOCH_DAY = _EPOCH.toordinal()
_DAY = timedelta(days=1)
_MARCH_1900 = 61
"""The first serial that readers agree on. Excel has a 29 February 1900, so the serials
of the days before it are one less."""
_END = date.max.toordinal() + 1 - _EPOCH_DAY
_LAST = _END - 1 / 86_400_000  # readers round to milliseconds


def _make_serial(value: date, days: float) -> str:
    """Return the serial of a date.

    :param days: since the epoch.
    :raises ValueError: when Excel has no such date.
    """
    if days < _MARCH_1900:
        days -= 1
    elif days == _END:  # the last microsecond of 9999, rounded up
        days = _LAST
    if not 1 <= days < _END:
        raise ValueError(
            f"Excel supports dates from 1900-01-01 to 9999-12-31 in UTC, got {value}. "
            "Convert it to None or a string"
        )
    return repr(days)


def _encode_date(value: date) -> Encoded:
    return _DATE, _make_serial(value, value.toordinal() - _EPOCH_DAY)


def _encode_dates(values: Sequence[date]) -> EncodedColumn | None:
    days = [value.toordinal() - _EPOCH_DAY for value in values]
    return (_DATE, list(map(str, days))) if min(days) >= _MARCH_1900 else None


def _encode_datetime(value: datetime) -> Encoded:
    """A datetime with a zone is converted to UTC."""
    epoch = _EPOCH if value.utcoffset() is None else _EPOCH_UTC
    return _DATETIME, _make_serial(value, float((value - epoch) / _DAY))


def _encode_datetimes(values: Sequence[datetime]) -> EncodedColumn | None:
    epoch = _EPOCH if values[0].utcoffset() is None else _EPOCH_UTC
    try:
        days = [(value - epoch) / _DAY for value in values]
    except TypeError:  # only some of them have a zone
        return None
    if min(days) < _MARCH_1900 or max(days) >= _END:
        return None
    data = encode_column(days)  # numbers without exponents
    if data is None:
        return _DATETIME, list(map(repr, days))
    return _DATETIME, data.decode().split(COLUMN_SEPARATOR.decode())


def _encode_time(value: time) -> Encoded:
    if value.tzinfo is not None:  # without a date it cannot be converted to UTC
        return _encode_text(str(value))
    since_midnight = timedelta(
        hours=value.hour,
        minutes=value.minute,
        seconds=value.second,
        microseconds=value.microsecond,
    )
    return _TIME, repr(since_midnight / _DAY)


def _encode_duration(value: timedelta) -> Encoded:
    return _DURATION, repr(value / _DAY)


def _encode_durations(values: Sequence[timedelta]) -> EncodedColumn:
    return _DURATION, [repr(value / _DAY) for value in values]


# Other values.


def _encode_object(value: Any) -> Encoded:
    text = str(value)
    if has_address(value):
        raise TypeError(
            f"a cell cannot be a value of type {type(value).__name__}, whose text "
            f"would be {text!r:.80}. Yield the columns of an object, and convert other "
            "values to a str"
        )
    return _encode_text(text)


_ENCODERS: dict[Any, Callable[[Any], Encoded | None]] = {
    type(None): _encode_none,
    bool: _encode_boolean,
    str: _encode_text,
    int: _encode_integer,
    float: _encode_float,
    Decimal: _encode_decimal,
    datetime: _encode_datetime,
    date: _encode_date,
    time: _encode_time,
    timedelta: _encode_duration,
    Integral: _encode_integer,  # numpy's, for example
    Real: _encode_float,
}
"""The encoders by class. The first class that fits is used."""

_COLUMN_ENCODERS: dict[Any, Callable[[Any], EncodedColumn | None]] = {
    str: _encode_texts,
    int: _encode_integers,
    float: _encode_floats,
    bool: _encode_booleans,
    Decimal: _encode_decimals,
    datetime: _encode_datetimes,
    date: _encode_dates,
    timedelta: _encode_durations,
}


# Widths.

MAX_WIDTH = 60
"""Maximum width of a column that is found from its cells, in characters."""


def measure_cell(value: Any) -> int:
    """Return how many characters wide a cell is on the screen.

    East Asian characters are two wide.
    """
    encoded = encode_cell(value)
    if encoded is None:
        return 0
    kind, text = encoded
    if kind.width:
        return kind.width
    line = max(text[: 50 * MAX_WIDTH].split("\n"), key=len)[:MAX_WIDTH]
    return sum(2 if east_asian_width(char) in "WF" else 1 for char in line)
