"""CSV: the format that writes rows exactly as Python's ``csv`` module writes them.

Rows are written in one of two ways, which give the same text. ``csv.writer`` writes
them one by one. A batch of rows of equal length is written a column at a time, if the
dialect is simple: the values of a column are converted to text at once, and only if a
special character occurs in the column is each of its texts looked at.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import lru_cache
from itertools import count
from numbers import Number
from typing import Any
from uuid import UUID

from .cells import CellSimplifier
from .convert import Function, make_converter
from .excel_locale import load_excel_locale
from .formulas import FormulaEscaper
from .json_encoder import COLUMN_SEPARATOR, encode_column, encode_datetimes
from .protocols import Batched, batch_encoder
from .table import Table, check_header
from .values import ADDRESS, BYTES_TYPES, PLAIN_TYPES, has_address


class CSV:
    """Comma-separated values, RFC 4180. Values are written as :class:`str` gives them.

    Rows are sequences, SQLAlchemy's ``Row``\\ s, mappings, named tuples, dataclasses,
    attrs classes, pydantic models or mapped objects. A ``Row`` of one entity is written
    as that object. Bytes are sent unchanged. A ``str`` is not a row. An ``Enum`` is
    written as its value, a mapping, list or tuple as JSON, and a cell of bytes as
    base64.

    :param header: the names of the columns, () for no header, None for the field names
        of the first row, if it has names. Mappings are read by these names.
    :param dialect: a dialect of Python's ``csv`` module: its name or its class.
    :param bom: whether a byte order mark comes first, which lets Excel read UTF-8. The
        response is then UTF-8, whatever charset was chosen.
    :param escape_formulas: whether to put a ``'`` before text cells that a spreadsheet
        would run: text that begins with ``=``, ``+``, ``-``, ``@``, tab, CR or LF, also
        after invisible characters. Numbers are not changed, nor are texts of numbers
        (with ``decimal`` as their decimal separator) and phone numbers such as
        ``+49 30 1234567``.
    :param delimiter: the character between two cells, None for that of the dialect,
        which is usually a comma.
    :param decimal: the decimal separator of floats and Decimals, ``.`` or ``,``.
    :param convert: maps a type or the name of a column to a function of one value. The
        function gets the values of the column, or those of the type and its subclasses,
        also within lists and dicts, and never None. A name outranks a type, and the
        nearest base class wins. Names that no column has are ignored.
    :raises TypeError: when the header is not a sequence of names, or ``convert`` is
        invalid.
    :raises ValueError: when the dialect is unknown or invalid, or ``delimiter`` or
        ``decimal`` is invalid.
    """

    content_type = "text/csv"
    suffix = "csv"

    def __init__(
        self,
        header: Sequence[str] | None = None,
        dialect: Any = "excel",
        bom: bool = False,
        escape_formulas: bool = False,
        *,
        delimiter: str | None = None,
        decimal: str = ".",
        convert: Mapping[Any, Function] | None = None,
    ) -> None:
        self._header = check_header("CSV", header)
        self._dialect = _resolve_dialect(dialect, delimiter)
        self._bom = "\ufeff" if bom else ""
        self._decimal = _check_decimal(decimal)
        self._escaper = (
            FormulaEscaper(decimal, "," if decimal == "." else ".")
            if escape_formulas
            else None
        )
        self._converter = make_converter("CSV", convert)
        self._cell_option = self._find_cell_option()
        self.charset = "utf-8" if bom else None
        self._quoting = _Quoting(self._dialect)
        # Types of cells that ``csv.writer`` itself writes as they must be.
        self._plain_types = PLAIN_TYPES | {UUID}
        if decimal != ".":
            self._plain_types -= {float, Decimal}

    def _find_cell_option(self) -> str | None:
        """Return the name of a parameter that changes cells, None if there is none."""
        if self._converter is not None:
            return "convert"
        if self._escaper is not None:
            return "escape_formulas"
        return None if self._decimal == "." else "decimal"

    @classmethod
    def for_excel(
        cls,
        locale: str,
        header: Sequence[str] | None = None,
        *,
        escape_formulas: bool = False,
        convert: Mapping[Any, Function] | None = None,
    ) -> CSV:
        """Return the format that the Excel of a locale opens with correct cells.

        It has a byte order mark, and the delimiter, the decimal separator and the date
        format of the locale, by Babel's data. Years have four digits. A datetime is
        written to the second, and in UTC if it has an offset. A time with an offset
        keeps it. Pass ``convert`` with ``date``, ``datetime`` or ``time`` to write them
        in another way.

        :param locale: the locale of the user's Windows, such as ``de_DE``.
        :raises ImportError: when Babel is not installed.
        :raises ValueError: when the locale is unknown.
        """
        excel = load_excel_locale(locale)
        format = cls(
            header=header,
            bom=True,
            escape_formulas=escape_formulas,
            delimiter=excel.delimiter,
            decimal=excel.decimal,
            convert=excel.add_dates(convert),
        )
        if escape_formulas:
            format._escaper = FormulaEscaper(excel.decimal, excel.group)
        return format

    def encode(self, items: Iterable[Any]) -> Iterator[str | bytes]:
        """Yield the line of each item, the first one with the header."""
        writer, items = _RowWriter(self), iter(items)
        for item in items:
            yield from writer.start([item])
            break
        for item in items:
            yield writer.write_row(item)
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


def joins_lines(format: Any) -> bool:
    """Return True if ``format`` sends lines of CSV that are encoded already unchanged.

    ``CSV`` does, unless it has another dialect, or an option that changes cells. A
    subclass with its own ``encode`` does not.
    """
    encode_batches = getattr(batch_encoder(format), "__func__", None)
    if encode_batches is not CSV.encode_batches or format._cell_option is not None:
        return False
    dialect = format._dialect
    return format._quoting.is_simple and (dialect.delimiter, dialect.quotechar) == (
        ",",
        '"',
    )


class _RowWriter:
    """Writes the rows of one stream."""

    def __init__(self, format: CSV) -> None:
        self._format = format
        # The format has no csv.writer: threads that share one would mix their rows.
        self._write_line = _make_line_writer(format._dialect)
        self._table = Table("CSV", format._header, format._converter)
        self._simplifier = CellSimplifier()
        # Attributes of the writer, because each look-up counts in a row.
        self._get_cells = self._table.get_cells
        self._are_plain = format._plain_types.issuperset
        self._escape = None if format._escaper is None else format._escaper.escape

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
        return self._write_cells(self._get_cells(item))

    def _write_cells(self, cells: Any) -> str:
        if not self._are_plain(map(type, cells)):
            cells = self._replace_cells(cells)
        if self._escape is not None:
            cells = map(self._escape, cells)
        try:
            return self._write_line(cells)
        except csv.Error as error:
            number = self._table.number
            name = f"item {number}" if number else "the header"
            raise ValueError(
                f"CSV: the dialect cannot write {name}: {error}. Choose another one "
                "with CSV(dialect=...)"
            ) from error

    def _replace_cells(self, cells: Any) -> list[Any]:
        """Return the cells with values and texts that ``csv.writer`` writes."""
        number = self._table.number
        cells = self._simplifier.simplify_column(
            cells, lambda index: self._table.make_namer(index, number)(0)
        )
        return [
            self._replace_cell(cell, index, number) for index, cell in enumerate(cells)
        ]

    def _replace_cell(self, cell: Any, index: int, number: int) -> Any:
        decimal = self._format._decimal
        if decimal != "." and isinstance(cell, _DECIMAL_TYPES):
            return _LocalNumber.from_number(cell, decimal)
        cls: Any = type(cell)
        if _has_own_text(cls):
            return cell
        return self._check_text(str(cell), cell, index, number)

    def _check_text(self, text: str, cell: Any, index: int, number: int) -> str:
        """Return the text of a cell.

        :raises TypeError: when it is the address of an object.
        """
        if ADDRESS in text and has_address(cell):
            raise TypeError(
                f"item {number} has a {type(cell).__name__} in column "
                f"{self._table.name_column(index)}, which would be written as "
                f"{text!r:.80}. Yield the columns of an object, and convert other "
                "values to a str"
            )
        return text

    def _pass_bytes(self, item: Any) -> bytes:
        if (option := self._format._cell_option) is not None:
            raise TypeError(
                f"item {self._table.number} is {type(item).__name__}, in which "
                f"{option} cannot find the cells. Yield rows, or omit {option}"
            )
        return bytes(item)

    # Rows of a batch, a column at a time.

    def write_batch(self, batch: Sequence[Any]) -> Iterator[str | bytes]:
        """Yield the lines of a batch, written a column at a time if possible."""
        columns = (
            self._table.get_columns(batch) if self._format._quoting.is_simple else None
        )
        if columns is not None:
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
        dialect, quoting = self._format._dialect, self._format._quoting
        quoted = map(quoting.quote, map(self._get_texts, count(), columns))
        if len(columns) > 1:
            lines = map(dialect.delimiter.join, zip(*quoted, strict=True))
        else:  # a row of one empty cell has quotes, so that its line is not empty
            lines = (text or quoting.empty for text in next(quoted))  # type: ignore[assignment]
        end: str = dialect.lineterminator
        return end.join(lines) + end

    def _get_texts(self, index: int, column: Sequence[Any]) -> Sequence[str]:
        """Return the texts of the cells of a column. None becomes an empty text."""
        types = set(map(type, column))
        first = self._table.number + 1
        if not types <= PLAIN_TYPES:
            name_cell = self._table.make_namer(index, first)
            column = self._simplifier.simplify_column(column, name_cell)
            types = set(map(type, column))
        texts = _convert_column(column, types, self._format._decimal)
        if not all(map(_has_own_text, types)):
            for row, (text, cell) in enumerate(zip(texts, column, strict=True), first):
                self._check_text(text, cell, index, row)
        if (escaper := self._format._escaper) is not None:
            return escaper.escape_column(column, texts)
        return texts


# Dialects.


class _LineFile:
    """A file for ``csv.writer``, whose ``writerow`` then returns the line."""

    write = str


def _make_line_writer(dialect: Any) -> Callable[[Any], str]:
    """Return a function that converts the cells of a row to a line."""
    writer: Any = csv.writer(_LineFile, dialect)
    write_row: Callable[[Any], str] = writer.writerow
    return write_row


def _resolve_dialect(dialect: Any, delimiter: str | None) -> Any:
    """Return a dialect as ``csv.writer`` reads it.

    ``csv.writer`` itself accepts any object, and uses its defaults for it.

    :param delimiter: replaces that of the dialect, unless it is None.
    :raises ValueError: when the dialect is unknown or invalid.
    """
    try:
        if isinstance(dialect, str) or hasattr(dialect, "delimiter"):
            resolved: Any = csv.writer(_LineFile, dialect)
            if delimiter is None:
                return resolved.dialect
            return _replace_delimiter(resolved.dialect, delimiter)
        reason: Exception = TypeError("it has no delimiter")
    except (csv.Error, TypeError) as error:
        reason = error
    raise ValueError(
        "CSV: dialect must be the name of a dialect of Python's csv module "
        f"({', '.join(csv.list_dialects())}) or a csv.Dialect, got {dialect!r} "
        f"({reason})"
    ) from reason


def _replace_delimiter(dialect: Any, delimiter: Any) -> Any:
    """Return a dialect with another delimiter.

    :raises ValueError: when it is not a character that can separate cells.
    """
    try:
        writer: Any = csv.writer(_LineFile, dialect, delimiter=delimiter)
        reason = ""
        if delimiter in ("\r", "\n", dialect.quotechar, dialect.escapechar):
            reason = "the dialect has another use for it"
    except (csv.Error, TypeError, ValueError) as error:
        reason = str(error)
    if reason:
        raise ValueError(
            "CSV: delimiter must be one character such as ';' or '\\t', got "
            f"{delimiter!r:.80} ({reason})"
        )
    return writer.dialect


def _check_decimal(decimal: Any) -> str:
    if decimal not in (".", ",", "\u066b"):  # the last one is the Arabic separator
        raise ValueError(f"CSV: decimal must be '.' or ',', got {decimal!r:.80}")
    return str(decimal)


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
        self.empty = self._quotechar * 2
        """A cell without text that has quotes."""
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

_VALUE_TYPES = (str, Number, date, time, timedelta)


@lru_cache
def _has_own_text(cls: type) -> bool:
    """Return True for a class whose text never contains the address of an object."""
    return cls is type(None) or issubclass(cls, _VALUE_TYPES)


_DECIMAL_TYPES = (float, Decimal)


class _LocalNumber(float):
    """A number that ``csv.writer`` writes with another decimal separator."""

    text: str

    @classmethod
    def from_number(cls, number: float | Decimal, decimal: str) -> _LocalNumber:
        """Return a number whose text has this decimal separator."""
        local = cls()
        local.text = str(number).replace(".", decimal)
        return local

    def __str__(self) -> str:
        return self.text


def _convert_column(
    column: Sequence[Any], types: set[type], decimal: str
) -> Sequence[str]:
    """Convert the cells of a column to text. None becomes an empty text.

    :param types: the types of the cells.
    :param decimal: the decimal separator of floats and Decimals.
    """
    if types == {str}:
        return column
    if decimal != "." and any(issubclass(cls, _DECIMAL_TYPES) for cls in types):
        column = [
            str(cell).replace(".", decimal)
            if isinstance(cell, _DECIMAL_TYPES)
            else cell
            for cell in column
        ]
    elif (texts := _convert_with_orjson(column, types)) is not None:
        return texts
    if not any(issubclass(cls, (str, type(None))) for cls in types):
        return list(map(str, column))
    return [
        cell if isinstance(cell, str) else "" if cell is None else str(cell)
        for cell in column
    ]


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
