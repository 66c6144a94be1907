"""CSV: the format that writes rows exactly as Python's ``csv`` module writes them.

Rows are written in one of two ways, which give the same text. ``csv.writer`` writes
them one by one. A batch of rows of equal length is written a column at a time, if the
dialect is simple: the values of a column are converted to text at once, and only if a
special character occurs in the column is each of its texts looked at.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import lru_cache
from itertools import chain
from numbers import Number
from typing import Any
from uuid import UUID

from .json_encoder import COLUMN_SEPARATOR, encode_column, encode_datetimes
from .protocols import Batched
from .table import BYTES_TYPES, Table, check_header


class CSV:
    """Comma-separated values, RFC 4180. Each value is written as :class:`str` gives it.

    Rows are sequences, SQLAlchemy's ``Row``\\ s, mappings, named tuples, dataclasses,
    attrs classes, pydantic models or mapped objects. A ``Row`` of one entity is written
    as that object. Bytes are sent unchanged. A ``str`` is not a row.

    :param header: the names of the columns, () for no header, None for the field names
        of the first row, if it has names. Mappings are read by these names.
    :param dialect: a dialect of Python's ``csv`` module: its name or its class.
    :param bom: whether a byte order mark comes first, which lets Excel read UTF-8. The
        response is then UTF-8, whatever charset was chosen.
    :param escape_formulas: whether to put a ``'`` before text cells that a spreadsheet
        would run: text that begins with ``=``, ``+``, ``-``, ``@``, tab, CR or LF, also
        after invisible characters. Numbers are not changed.
    :raises TypeError: when the header is not a sequence of names.
    :raises ValueError: when the dialect is unknown or invalid.
    """

    content_type = "text/csv"
    suffix = "csv"

    def __init__(
        self,
        header: Sequence[str] | None = None,
        dialect: Any = "excel",
        bom: bool = False,
        escape_formulas: bool = False,
    ) -> None:
        self._header = check_header("CSV", header)
        self._dialect = _resolve_dialect(dialect)
        self._bom = "\ufeff" if bom else ""
        self._escapes_formulas = escape_formulas
        self.charset = "utf-8" if bom else None
        self._quoting = _Quoting(self._dialect)

    def encode(self, items: Iterable[Any]) -> Iterator[str | bytes]:
        """Yield the line of each item, the first one with the header."""
        writer = _RowWriter(self)
        for item in items:
            if writer.started:
                yield writer.write_row(item)
            else:
                yield from writer.start([item])
        yield from writer.finish(())

    def encode_batches(self, source: Batched) -> Iterator[str | bytes]:
        """Yield the lines of each batch, the first ones with the header."""
        writer = _RowWriter(self)
        for batch in source.batches():
            if writer.started:
                yield from writer.write_batch(batch)
            else:
                yield from writer.start(batch, source.fields)
        yield from writer.finish(source.fields)


class _RowWriter:
    """Writes the rows of one stream."""

    def __init__(self, format: CSV) -> None:
        self._format = format
        # The format has no csv.writer: threads that share one would mix their rows.
        self._write_line = _make_line_writer(format._dialect)
        self._table = Table("CSV", format._header)

    @property
    def started(self) -> bool:
        """Whether the header was written."""
        return self._table.started

    # The header.

    def start(
        self, batch: Sequence[Any], fields: Sequence[str] = ()
    ) -> Iterator[str | bytes]:
        """Yield the first rows, with the header and the byte order mark before them.

        The header and the first row are one string. If the first row fails, no part of
        the body has been sent, and the response can still be an error page.
        """
        self._table.start(batch, fields)
        header, lines = self._write_header(), self.write_batch(batch)
        for line in lines:  # the first of them is text
            yield header + line  # type: ignore[operator]
            break
        yield from lines

    def finish(self, fields: Sequence[str]) -> Iterator[str]:
        """Yield the header if there were no rows."""
        if not self.started:
            self._table.finish(fields)
            yield self._write_header()

    def _write_header(self) -> str:
        names = self._table.header
        return self._format._bom + (self._write_cells(names) if names else "")

    # Rows one by one.

    def write_row(self, item: Any) -> str | bytes:
        """Return the line of a row, or bytes unchanged."""
        self._table.number += 1
        if isinstance(item, BYTES_TYPES):
            return self._pass_bytes(item)
        return self._write_cells(self._table.get_cells(item))

    def _write_cells(self, cells: Any) -> str:
        line = self._write_unchecked(cells)
        # To search the line takes a tenth of the time of a check of each cell.
        if _ADDRESS in line and (safe := self._convert_memoryviews(cells)) is not None:
            return self._write_unchecked(safe)
        return line

    def _convert_memoryviews(self, cells: Any) -> list[Any] | None:
        """Return the cells with memoryviews as bytes, None if there are none.

        :raises TypeError: when the text of a cell is the address of an object.
        """
        for index, cell in enumerate(cells):
            if _text_has_address(cell):
                raise TypeError(
                    f"item {self._table.number} has a {type(cell).__name__} in column "
                    f"{self._table.name_column(index)}, which would be written as "
                    f"{str(cell)!r:.80}. Yield the columns of an object, and convert "
                    "other values to a str"
                )
        if any(isinstance(cell, memoryview) for cell in cells):
            return [_memoryview_to_bytes(cell) for cell in cells]
        return None

    def _write_unchecked(self, cells: Any) -> str:
        if self._format._escapes_formulas:
            cells = map(_escape_formula, cells)
        try:
            return self._write_line(cells)
        except csv.Error as error:
            number = self._table.number
            name = f"item {number}" if number else "the header"
            raise ValueError(
                f"CSV: the dialect cannot write {name}: {error}. Choose another one "
                "with CSV(dialect=...)"
            ) from error

    def _pass_bytes(self, item: Any) -> bytes:
        if self._format._escapes_formulas:
            raise TypeError(
                f"item {self._table.number} is {type(item).__name__}, in which "
                "escape_formulas cannot find the cells. Yield rows, or omit "
                "escape_formulas"
            )
        return bytes(item)

    # Rows of a batch, a column at a time.

    def write_batch(self, batch: Sequence[Any]) -> Iterator[str | bytes]:
        """Yield the lines of a batch, written a column at a time if possible."""
        if self._format._quoting.is_simple:
            columns = self._table.get_columns(batch)
            # A row of one empty cell has quotes, so that its line is not empty.
            if columns is not None and len(columns) > 1:
                with suppress(_AddressError):  # write_row() raises it for its item
                    yield self._write_columns(columns)
                    self._table.number += len(batch)
                    return
        texts: list[str] = []
        for line in map(self.write_row, batch):
            if isinstance(line, str):
                texts.append(line)
            else:
                yield "".join(texts)
                yield line
                texts.clear()
        yield "".join(texts)

    def _write_columns(self, columns: Sequence[Sequence[Any]]) -> str:
        dialect = self._format._dialect
        quote = self._format._quoting.quote
        quoted = map(quote, map(self._get_texts, columns))
        lines = map(dialect.delimiter.join, zip(*quoted, strict=True))
        end: str = dialect.lineterminator
        return end.join(lines) + end

    def _get_texts(self, column: Sequence[Any]) -> Sequence[str]:
        texts = _convert_column(column)
        return (
            _escape_column(column, texts) if self._format._escapes_formulas else texts
        )


# Dialects.


class _LineFile:
    """A file for ``csv.writer``, whose ``writerow`` then returns the line."""

    write = str


def _make_line_writer(dialect: Any) -> Callable[[Any], str]:
    """Return a function that converts the cells of a row to a line."""
    writer: Any = csv.writer(_LineFile, dialect)
    write_row: Callable[[Any], str] = writer.writerow
    return write_row


def _resolve_dialect(dialect: Any) -> Any:
    """Return a dialect as ``csv.writer`` reads it.

    ``csv.writer`` itself accepts any object, and uses its defaults for it.

    :raises ValueError: when the dialect is unknown or invalid.
    """
    try:
        if isinstance(dialect, str) or hasattr(dialect, "delimiter"):
            writer: Any = csv.writer(_LineFile, dialect)
            return writer.dialect
        reason: Exception = TypeError("it has no delimiter")
    except (csv.Error, TypeError) as error:
        reason = error
    raise ValueError(
        "CSV: dialect must be the name of a dialect of Python's csv module "
        f"({', '.join(csv.list_dialects())}) or a csv.Dialect, got {dialect!r} "
        f"({reason})"
    ) from reason


class _Quoting:
    """Quotes the texts of a column as ``csv.writer`` does.

    :param dialect: of a ``csv.writer``. Use :meth:`quote` only if ``is_simple`` is
        True: the dialect then quotes only the cells that need it.
    """

    def __init__(self, dialect: Any) -> None:
        self.is_simple: bool = (
            dialect.quoting == csv.QUOTE_MINIMAL
            and dialect.doublequote
            and dialect.escapechar is None
            and not dialect.skipinitialspace
            and dialect.lineterminator == "\r\n"
        )
        self._quotechar: str = dialect.quotechar or ""
        self._special: str = f"{dialect.delimiter}{self._quotechar}\r\n"
        self._needs_quotes = re.compile(f"[{re.escape(self._special)}]").search

    def quote(self, texts: Sequence[str]) -> Sequence[str]:
        """Return the texts of a column as they are written in the file."""
        joined = "".join(texts)
        # Four searches for a character take a twentieth of the time of one search for a
        # class of characters.
        if not any(char in joined for char in self._special):
            return texts
        quotechar, needs_quotes = self._quotechar, self._needs_quotes
        return [
            quotechar + text.replace(quotechar, quotechar * 2) + quotechar
            if needs_quotes(text)
            else text
            for text in texts
        ]


# The text of a cell.

_ADDRESS = " at 0x"
"""Part of the text of an object whose class does not define its text."""

_find_address = re.compile(f"{_ADDRESS}[0-9A-Fa-f]+>").search


class _AddressError(Exception):
    """The text of a cell is the address of an object."""


def _text_has_address(cell: Any) -> bool:
    """Return True if the text of a cell has the address of an object.

    A ``str`` may contain an address, also in a list or a dict.
    """
    if isinstance(cell, str | bytes | bytearray | memoryview):
        return False
    if _find_address(str(cell)) is None:
        return False
    if type(cell).__repr__ not in _CONTAINER_REPRS:
        return True
    parts = chain(cell, cell.values()) if isinstance(cell, dict) else cell
    return any(
        isinstance(part, memoryview) or _text_has_address(part) for part in parts
    )


_CONTAINER_REPRS: set[Any] = {
    cls.__repr__ for cls in (dict, list, tuple, set, frozenset)
}
"""The methods whose text is made of the texts of the parts alone."""


def _memoryview_to_bytes(cell: Any) -> Any:
    """Convert a memoryview, which psycopg2 returns for a ``bytea``, to bytes."""
    return bytes(cell) if isinstance(cell, memoryview) else cell


def _convert_column(column: Sequence[Any]) -> Sequence[str]:
    """Convert the cells of a column to text. None becomes an empty text.

    :raises _AddressError: when the text of a cell is the address of an object.
    """
    types = set(map(type, column))
    if types == {str}:
        return column
    if (texts := _convert_with_orjson(column, types)) is not None:
        return texts
    if memoryview in types:
        column = list(map(_memoryview_to_bytes, column))
    if not any(issubclass(cls, (str, type(None))) for cls in types):
        texts = list(map(str, column))
    else:
        texts = [
            cell if isinstance(cell, str) else "" if cell is None else str(cell)
            for cell in column
        ]
    if not all(map(_has_own_text, types)) and any(
        _ADDRESS in text and _text_has_address(cell)
        for cell, text in zip(column, texts, strict=True)
    ):
        raise _AddressError
    return texts


_VALUE_TYPES = (str, bytes, bytearray, memoryview, Number, date, time, timedelta, UUID)


@lru_cache
def _has_own_text(cls: type) -> bool:
    """Return True for a class whose text never contains the address of an object."""
    return cls is type(None) or issubclass(cls, _VALUE_TYPES)


def _convert_with_orjson(
    column: Sequence[Any], types: set[type]
) -> Sequence[str] | None:
    """Convert cells to the texts that ``str`` gives.

    That takes a quarter of the time of ``str`` for floats and datetimes, and four
    fifths for integers.

    :return: None if orjson is not installed or would write other texts.
    """
    data = None
    if types == {datetime}:
        if (data := encode_datetimes(column)) is not None:
            data = data.replace(b'"', b"")
    elif types <= {int, float}:
        data = encode_column(column)
        # orjson writes exponents in another form, 0.00001 without one, and NaN as null.
        if data is not None and (b"e" in data or b"n" in data or b"0.0000" in data):
            return None
    return None if data is None else data.decode().split(COLUMN_SEPARATOR.decode())


# Formulas.

_FORMULA_SIGNS = "=+-@\uff1d\uff0b\uff0d\uff20"
"""The signs that begin a formula. East Asian versions of Excel run the wide forms."""

_INVISIBLE_RANGES = (
    *((0x00, 0x1F), (0x7F, 0xA0), (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C)),
    *((0x115F, 0x1160), (0x1680, 0x1680), (0x17B4, 0x17B5), (0x180B, 0x180F)),
    *((0x2000, 0x200F), (0x2028, 0x202F), (0x205F, 0x206F), (0x2800, 0x2800)),
    *((0x3000, 0x3000), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF)),
    *((0xFFA0, 0xFFA0), (0xFFF0, 0xFFFB), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A)),
    (0xE0000, 0xE0FFF),
)
"""Ranges of invisible characters (controls, spaces, marks) that a spreadsheet may drop.
The space itself is not in them: a text that begins with a space stays text."""

_FORMULA_STARTS = frozenset(_FORMULA_SIGNS).union(
    *(map(chr, range(first, last + 1)) for first, last in _INVISIBLE_RANGES)
)
"""The first characters of all texts that a spreadsheet may run."""

_invisible = "".join(f"{chr(first)}-{chr(last)}" for first, last in _INVISIBLE_RANGES)
_match_formula = re.compile(
    f"[{re.escape(_FORMULA_SIGNS)}\t\r\n]"
    f"|[{_invisible}][ {_invisible}]*[{re.escape(_FORMULA_SIGNS)}]"
).match

_NEVER_FORMULA = {type(None), bool, int, float, Decimal}


def _escape_formula(cell: Any) -> Any:
    """Return a cell, with a ``'`` before it if a spreadsheet would run it."""
    if type(cell) in _NEVER_FORMULA:
        return cell
    text = cell if isinstance(cell, str) else str(cell)
    if _is_formula(cell, text):
        return "'" + text
    return cell if isinstance(cell, Number) else text


def _escape_column(column: Sequence[Any], texts: Sequence[str]) -> Sequence[str]:
    """Return the texts of a column, with a ``'`` before those of formulas.

    :param column: the cells.
    """
    if _FORMULA_STARTS.isdisjoint({text[:1] for text in texts}):
        return texts
    return [
        "'" + text if _is_formula(cell, text) else text
        for cell, text in zip(column, texts, strict=True)
    ]


def _is_formula(cell: Any, text: str) -> bool:
    if text[:1] not in _FORMULA_STARTS or not _match_formula(text):
        return False
    # A number may begin with its sign. Any other formula in the text of a subclass of
    # Number is escaped.
    return not (text[0] in "+-" and isinstance(cell, Number))
