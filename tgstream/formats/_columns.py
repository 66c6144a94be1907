"""The cells of a column as text: what makes an export of a million rows quick.

Rule: it is what ``csv.writer`` makes of the same cells, one row at a time.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import lru_cache
from itertools import chain
from numbers import Number
from typing import Any
from uuid import UUID

from . import _orjson as _orjson
from ._orjson import orjson


def dialect_of(dialect: Any) -> Any:
    """What the module ``csv`` makes of a dialect, which takes anything for one.

    :raises ValueError: when it is none.
    """
    try:
        if isinstance(dialect, str) or hasattr(dialect, "delimiter"):
            writer: Any = csv.writer(_Echo, dialect)
            return writer.dialect
        reason: Exception = TypeError("it has no delimiter")
    except (csv.Error, TypeError) as error:
        reason = error
    raise ValueError(
        f"CSV: dialect={dialect!r} is none of the module csv ({reason}); name one of "
        f"{', '.join(csv.list_dialects())}, or give a csv.Dialect"
    ) from reason


def writer_of(dialect: Any) -> Callable[[Any], str]:
    """What makes the line of a row."""
    writer: Any = csv.writer(_Echo, dialect)
    write: Callable[[Any], str] = writer.writerow
    return write


class _Echo:
    """The file of a ``csv.writer`` whose ``writerow`` returns the line."""

    write = str


ADDRESS = " at 0x"
"""What is in the text of an object whose class has no text for it."""

_is_object = re.compile(f"{ADDRESS}[0-9A-Fa-f]+>").search


class NoTextError(Exception):
    """The text of a cell is the address of an object."""


def is_address(cell: Any) -> bool:
    """True for an object whose text is an address, or has one in it.

    A ``str`` may contain an address, also inside a list or a dict.
    """
    if isinstance(cell, str | bytes | bytearray | memoryview):
        return False
    if _is_object(str(cell)) is None:
        return False
    if type(cell).__repr__ not in _OF_PARTS:
        return True
    parts = chain(cell, cell.values()) if isinstance(cell, dict) else cell
    return any(isinstance(part, memoryview) or is_address(part) for part in parts)


_OF_PARTS: set[Any] = {kind.__repr__ for kind in (dict, list, tuple, set, frozenset)}
"""The methods whose text is the text of the parts alone."""


def as_bytes(cell: Any) -> Any:
    """A cell, and for a memoryview its bytes: psycopg2 gives them for a bytea."""
    return bytes(cell) if isinstance(cell, memoryview) else cell


def texts_of(column: Sequence[Any]) -> Sequence[str]:
    """The cells as text; None is empty.

    :raises NoTextError: when a cell has none.
    """
    kinds = set(map(type, column))
    if kinds == {str}:
        return column
    if (texts := _by_orjson(column, kinds)) is not None:
        return texts
    if memoryview in kinds:
        column = list(map(as_bytes, column))
    if not any(issubclass(kind, (str, type(None))) for kind in kinds):
        texts = list(map(str, column))
    else:
        texts = [
            cell if isinstance(cell, str) else "" if cell is None else str(cell)
            for cell in column
        ]
    if not all(map(_has_text, kinds)) and any(
        ADDRESS in text and is_address(cell)
        for cell, text in zip(column, texts, strict=True)
    ):
        raise NoTextError
    return texts


_VALUES = (str, bytes, bytearray, memoryview, Number, date, time, timedelta, UUID)


@lru_cache
def _has_text(kind: type) -> bool:
    """True for a class of plain values, whose text no address is in."""
    return kind is type(None) or issubclass(kind, _VALUES)


def _by_orjson(column: Sequence[Any], kinds: set[type]) -> Sequence[str] | None:
    """What ``str`` makes of the cells, in a fifth of its time; None if it may not."""
    if orjson is None:
        return None
    data = None
    if kinds == {datetime}:
        if (data := _orjson.dates(column)) is not None:
            data = data.replace(b'"', b"")
    elif kinds <= {int, float}:
        data = _orjson.column(column)
        if data is not None and (b"e" in data or b"n" in data or b"0.0000" in data):
            return None  # exponents look different or are none, and a NaN is null
    return None if data is None else data.decode().split(_orjson.SEPARATOR.decode())


class Quoting:
    """How a dialect quotes the cells that need it, if it quotes no others.

    :param dialect: of a ``csv.writer``.
    """

    def __init__(self, dialect: Any) -> None:
        self.simple: bool = (
            dialect.quoting == csv.QUOTE_MINIMAL
            and dialect.doublequote
            and dialect.escapechar is None
            and not dialect.skipinitialspace
            and dialect.lineterminator == "\r\n"
        )
        self._quote: str = dialect.quotechar or ""
        self._special: str = f"{dialect.delimiter}{self._quote}\r\n"
        self._needs = re.compile(f"[{re.escape(self._special)}]").search

    def of(self, texts: Sequence[str]) -> Sequence[str]:
        """The cells as they stand in the file."""
        joined = "".join(texts)
        # To look for one character is many times as quick as for a class of them.
        if not any(char in joined for char in self._special):
            return texts
        quote, needs = self._quote, self._needs
        return [
            quote + text.replace(quote, quote * 2) + quote if needs(text) else text
            for text in texts
        ]


# Formulas.

_SIGNS = "=+-@\uff1d\uff0b\uff0d\uff20"
"""The signs that begin a formula; East Asian versions of Excel run the wide ones."""

_UNSEEN = (
    *((0x00, 0x1F), (0x7F, 0xA0), (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C)),
    *((0x115F, 0x1160), (0x1680, 0x1680), (0x17B4, 0x17B5), (0x180B, 0x180F)),
    *((0x2000, 0x200F), (0x2028, 0x202F), (0x205F, 0x206F), (0x2800, 0x2800)),
    *((0x3000, 0x3000), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF)),
    *((0xFFA0, 0xFFA0), (0xFFF0, 0xFFFB), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A)),
    (0xE0000, 0xE0FFF),
)
"""Ranges of characters that show nothing, which a spreadsheet may drop: controls,
spaces, marks. Not the space itself: a text that begins with a space stays a text."""

_SUSPECT = frozenset(_SIGNS).union(
    *(map(chr, range(first, last + 1)) for first, last in _UNSEEN)
)
"""The first character of each text that may be run."""

_unseen = "".join(f"{chr(first)}-{chr(last)}" for first, last in _UNSEEN)
_is_formula = re.compile(
    f"[{re.escape(_SIGNS)}\t\r\n]|[{_unseen}][ {_unseen}]*[{re.escape(_SIGNS)}]"
).match

_HARMLESS = {type(None), bool, int, float, Decimal}


def guarded(cell: Any) -> Any:
    """A cell, with a ``'`` in front if a spreadsheet would run it."""
    if type(cell) in _HARMLESS:
        return cell
    text = cell if isinstance(cell, str) else str(cell)
    if _runs(cell, text):
        return "'" + text
    return cell if isinstance(cell, Number) else text


def guarded_texts(column: Sequence[Any], texts: Sequence[str]) -> Sequence[str]:
    """The same for the cells of a column, of which ``texts`` are the texts."""
    if _SUSPECT.isdisjoint({text[:1] for text in texts}):
        return texts
    return [
        "'" + text if _runs(cell, text) else text
        for cell, text in zip(column, texts, strict=True)
    ]


def _runs(cell: Any, text: str) -> bool:
    if text[:1] not in _SUSPECT or not _is_formula(text):
        return False
    # A sign is a number's own; with another text a number would be of a strange kind.
    return not (text[0] in "+-" and isinstance(cell, Number))
