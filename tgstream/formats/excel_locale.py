"""How the Excel of a locale reads CSV files, by the data of Babel (Unicode CLDR)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timezone
from typing import Any

_NUMERIC_DATE = re.compile(r"[dMy]+([./-])[dMy]+\1[dMy]+").fullmatch
"""Matches date patterns that Excel reads as dates. In patterns such as ``d. M. y``,
spaces or words may differ from the patterns of Windows."""

_ISO_DATE = "yyyy-MM-dd"
"""Excel reads it as a date in every locale."""

_DATE_FIELDS = {
    "d": "{0.day}",
    "dd": "{0.day:02}",
    "M": "{0.month}",
    "MM": "{0.month:02}",
}


@dataclass(frozen=True)
class ExcelLocale:
    """The separators and the format of dates in one locale.

    :param delimiter: separates the cells.
    :param decimal: the decimal separator.
    :param group: the separator of thousands.
    :param date_format: for :meth:`str.format`.
    """

    delimiter: str
    decimal: str
    group: str
    date_format: str

    def add_dates(self, convert: Mapping[Any, Any] | None) -> dict[Any, Any]:
        """Return a ``convert`` mapping, with functions for dates and times.

        They are not added for types that are in the mapping.

        :param convert: the mapping of the user.
        """
        given = dict(convert or {})
        types = tuple(key for key in given if issubclass(type(key), type))
        functions: dict[type, Callable[[Any], str]] = {
            date: self.date_format.format,
            datetime: self._format_datetime,
            time: _format_time,
        }
        added = {
            cls: function
            for cls, function in functions.items()
            if not issubclass(cls, types)
        }
        return added | given

    def _format_datetime(self, value: datetime) -> str:
        if value.utcoffset() is not None:  # Excel reads no offsets
            value = value.astimezone(timezone.utc)
        return f"{self.date_format.format(value)} {_format_time(value)}"


def _format_time(value: datetime | time) -> str:
    if isinstance(value, time) and value.utcoffset() is not None:
        return str(value)  # without a date it cannot be converted to UTC
    return f"{value.hour:02}:{value.minute:02}:{value.second:02}"


def load_excel_locale(name: str) -> ExcelLocale:
    """Return the separators and the format of dates of a locale.

    Excel separates cells by the list separator of Windows, which is ``;`` where the
    decimal separator is a comma.

    :param name: such as ``de_DE`` or ``de-DE``.
    :raises ImportError: when Babel is not installed.
    :raises TypeError: when the name is not a str.
    :raises ValueError: when the locale is unknown.
    """
    try:
        from babel import Locale, UnknownLocaleError
        from babel.numbers import get_decimal_symbol, get_group_symbol
    except ImportError as error:
        raise ImportError(
            "CSV.for_excel() needs Babel. Install it with: pip install Babel"
        ) from error
    if not isinstance(name, str):
        raise TypeError(
            "CSV.for_excel(): locale must be a name such as 'de_DE', got "
            f"{type(name).__name__}: {name!r:.80}"
        )
    try:
        locale = Locale.parse(name.replace("-", "_"))
    except (UnknownLocaleError, ValueError) as error:
        raise ValueError(
            "CSV.for_excel(): locale must be the name of a locale such as 'de_DE', "
            f"got {name!r:.80} ({error})"
        ) from error
    decimal = get_decimal_symbol(locale)
    return ExcelLocale(
        delimiter="," if decimal == "." else ";",
        decimal=decimal,
        group=get_group_symbol(locale),
        date_format=_make_date_format(locale.date_formats["short"].pattern),
    )


def _make_date_format(pattern: str) -> str:
    """Return a pattern of CLDR for :meth:`str.format`, with four digits for a year."""
    if not _NUMERIC_DATE(pattern):
        pattern = _ISO_DATE
    return re.sub(
        r"d+|M+|y+",
        lambda match: _DATE_FIELDS.get(match[0], "{0.year:04}"),
        pattern,
    )
