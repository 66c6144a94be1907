"""XLSX: the format of Excel workbooks, written row by row (ECMA-376, parts 1 and 2).

A workbook is a ZIP archive of XML files. The files about the workbook come first, and
then each sheet, compressed while its rows arrive. The archive's central directory comes
last, after the final commit. No program opens a file without it.

The same rows give the same bytes, whatever batches they come in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

from .archive import Archive, Member, import_zipstream
from .cells import CellSimplifier
from .convert import Function, make_converter
from .protocols import Batched, CountedBatches
from .table import Table, check_header
from .xlsx_cells import (
    MAX_WIDTH,
    encode_cell,
    encode_cells,
    encode_header,
    measure_cell,
)
from .xlsx_parts import (
    END_SHEET,
    MAX_COLUMNS,
    MAX_ROWS,
    check_names,
    column_letters,
    make_parts,
    sheet_path,
    start_sheet,
)


class XLSX:
    """An Excel workbook, Office Open XML. Needs ``tgstream[xlsx]``.

    Rows are those of :class:`CSV`. Numbers, booleans, dates, datetimes, times and
    timedeltas are cells of their type, None is an empty cell, and anything else is text
    that Excel never runs as a formula. Items may also be a mapping of names to sources,
    each of which becomes a sheet with the same options.

    Excel stores numbers as doubles and shows 15 digits, so an ``int`` or ``Decimal``
    that has more digits is a text. A datetime with a zone is converted to UTC, and a
    time with a zone is a text.

    :param sheet: the name of the sheet. A mapping of sources has its own names.
    :param header: the names of the columns, () for no header, None for the field names
        of the first row, if it has names. The header is bold, and stays in view.
    :param widths: the widths of the columns in characters: a list, or a mapping by the
        names of the columns. None, also for one column, for a width that fits the first
        50 rows.
    :param convert: maps types or names of columns to functions that convert the values,
        as in :class:`CSV`.
    :raises ImportError: when zipstream-ng is not installed.
    :raises TypeError: when a parameter has a wrong type.
    :raises ValueError: when Excel does not allow the name of the sheet or a width.
    """

    content_type = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
    suffix = "xlsx"
    chunk_size = 1
    """A chunk for each output: the outputs are as large as a chunk must be."""

    def __init__(
        self,
        sheet: str = "Sheet1",
        header: Sequence[str] | None = None,
        widths: Sequence[float | None] | Mapping[str, float | None] | None = None,
        convert: Mapping[Any, Function] | None = None,
    ) -> None:
        import_zipstream("XLSX")
        check_names([sheet])
        self._sheet = sheet
        self._header = check_header("XLSX", header)
        self._widths = _check_widths(widths)
        self._converter = make_converter("XLSX", convert)

    def encode(self, items: Iterable[Any]) -> Iterator[bytes]:
        """Yield the workbook, whose sheet has a row for each item."""
        batches = ([item] for item in items)
        return self._encode(
            {self._sheet: CountedBatches((), batches)}, is_mapping=False
        )

    def encode_batches(self, source: Batched) -> Iterator[bytes]:
        """Yield the workbook, whose sheet has the rows of the batches."""
        return self._encode({self._sheet: source}, is_mapping=False)

    def encode_sources(self, sources: Mapping[str, Batched]) -> Iterator[bytes]:
        """Yield the workbook, which has a sheet for each source."""
        check_names(sources)
        return self._encode(sources, is_mapping=True)

    def _encode(
        self, sources: Mapping[str, Batched], is_mapping: bool
    ) -> Iterator[bytes]:
        archive = Archive("XLSX")
        held = bytearray()  # until the first rows are encoded: before, they may fail
        for path, xml in make_parts([*sources]):
            held += b"".join(archive.add(Member(path, [xml.encode()])))
        for number, (name, source) in enumerate(sources.items(), 1):
            sheet = _Sheet(self, name if is_mapping else None, is_first=number == 1)
            member = Member(sheet_path(number), sheet.encode(source), level=_LEVEL)
            for output in archive.add(member):
                held += output
                if sheet.is_started:
                    yield bytes(held)
                    held.clear()
                else:
                    yield b""  # the items so far may have to be committed
        yield from archive.finish()


def _check_widths(widths: Any) -> Any:
    """Check the widths of columns that a user has given.

    :raises TypeError: when they are neither a sequence of numbers nor a mapping.
    :raises ValueError: when Excel does not allow a width.
    """
    if widths is None:
        return ()
    if isinstance(widths, str) or not isinstance(widths, Sequence | Mapping):
        raise TypeError(
            "XLSX: widths must be a list of numbers, or a mapping such as "
            f"{{'name': 30}}, got {widths!r:.80}"
        )
    values = widths.values() if isinstance(widths, Mapping) else widths
    for width in values:
        if width is None:
            continue
        if isinstance(width, bool) or not isinstance(width, int | float):
            raise TypeError(
                "XLSX: a width must be a number of characters or None, got "
                f"{type(width).__name__}: {width!r:.80}"
            )
        if not 0 < width <= 255:
            raise ValueError(
                f"XLSX: a width must be more than 0 and at most 255, got {width}"
            )
    return widths if isinstance(widths, Mapping) else tuple(widths)


_MEASURED_ROWS = 50
"""Rows whose cells are measured for the widths of the columns."""

_LEVEL = 4
"""Of zlib. Level 6 is 3 % smaller, and takes half as long again for the whole file."""


class _Sheet:
    """Encodes the rows of one sheet.

    :param name: the name of the sheet for messages, None if it is the only one.
    :param is_first: whether it is the first sheet.
    """

    def __init__(self, format: XLSX, name: str | None, is_first: bool) -> None:
        self._name = name
        self._is_first = is_first
        self._given = format._widths
        self._table = Table("XLSX", format._header, format._converter)
        self._simplifier = CellSimplifier()
        self._row = 0  # the number of the last row
        self._widths: list[float] = []  # those that fit the cells
        self.is_started = False
        """Whether the XML before the rows was encoded, and so the first rows."""

    def encode(self, source: Batched) -> Iterator[bytes]:
        """Yield the XML, or ``b""`` for a batch whose XML must wait for the next."""
        held = b""  # until the columns are measured
        for batch in source.batches():
            xml = self._run(self._encode_batch, batch, source.fields)
            if self.is_started:
                yield xml
                continue
            held += xml
            if self._table.number < _MEASURED_ROWS:
                yield b""
                continue
            yield self._run(self._start) + held
        if not self._table.started:
            held = self._run(self._encode_empty, source.fields)
        if not self.is_started:
            yield self._run(self._start) + held
        yield END_SHEET.encode()

    def _run(self, encode: Any, *args: Any) -> bytes:
        """Call a method. Its errors get the name of the sheet."""
        try:
            xml: str = encode(*args)
        except (TypeError, ValueError) as error:
            if self._name is None:
                raise
            raise _name_error(error, f"sheet {self._name!r},") from error
        return xml.encode()

    def _start(self) -> str:
        """Return the XML before the rows, whose columns have been measured."""
        given: Any = self._given
        if isinstance(given, Mapping):
            given = [given.get(name) for name in self._table.names or ()]
        widths = [min(max(width, 8), MAX_WIDTH) + 2 for width in self._widths]
        for index, width in enumerate(given[: len(widths)]):
            if width is not None:
                widths[index] = width
        self.is_started = True
        return start_sheet(widths, bool(self._table.header), self._is_first)

    def _check_widths(self) -> None:
        """Check that the given widths are those of columns.

        A mapping of sources has one format for all of its sheets, so that some widths
        may belong to another sheet.

        :raises ValueError: when the only sheet has a width without a column.
        """
        names, given, count = self._table.names or (), self._given, len(self._widths)
        if self._name is not None:
            return
        if isinstance(given, Mapping):
            if unknown := [name for name in given if name not in names]:
                raise ValueError(
                    f"XLSX: widths has the column {unknown[0]!r}, but the columns are "
                    f"{', '.join(map(repr, names)) or 'without names'}"
                )
        elif len(given) > count:
            raise ValueError(
                f"XLSX: widths must have at most {count} widths, one for each column, "
                f"got {len(given)}"
            )

    # The header.

    def _encode_empty(self, fields: Sequence[str]) -> str:
        """Return the header of a sheet without items."""
        self._table.finish(fields)
        return self._encode_header()

    def _encode_header(self) -> str:
        names = self._table.header
        self._check_columns("the header", names)
        if not names:
            return ""
        self._row = 1
        try:
            cells = [
                f'<c r="{column_letters(index)}1"{encode_header(name)}'
                for index, name in enumerate(names)
            ]
        except ValueError as error:
            raise ValueError(f"the header: {error}") from error
        for index, name in enumerate(names):
            self._measure(index, name)
        return f'<row r="1">{"".join(cells)}</row>'

    # The rows.

    def _encode_batch(self, batch: Sequence[Any], fields: Sequence[str]) -> str:
        """Return the rows of some items, and the header before the first ones."""
        if self._table.started:
            return self._encode_items(batch)
        self._table.start(batch, fields)
        xml = self._encode_header() + self._encode_items(batch)
        self._check_widths()  # now: an error must come before the last commit
        return xml

    def _encode_items(self, batch: Sequence[Any]) -> str:
        """Return the rows of some items, a column at a time if possible."""
        table, room = self._table, MAX_ROWS - self._row
        if len(batch) > room:
            raise ValueError(
                f"item {table.number + room + 1}: a sheet of Excel has at most "
                f"{MAX_ROWS:,} rows. Send fewer rows, or a mapping of several sources"
            )
        # To encode a single row as columns would take twice as long.
        columns = table.get_columns(batch) if len(batch) > 1 else None
        if columns is None:
            return "".join(map(self._encode_row, batch))
        return self._encode_columns(columns, len(batch))

    def _encode_row(self, item: Any) -> str:
        table = self._table
        table.number += 1
        self._row += 1
        number, row = table.number, self._row
        cells = self._simplifier.simplify_column(
            table.get_cells(item), lambda index: table.make_namer(index, number)(0)
        )
        self._check_columns(f"item {number}", cells)
        texts, index = [], 0
        try:
            for index, cell in enumerate(cells):
                encoded = encode_cell(cell)
                if encoded is not None:
                    kind, text = encoded
                    letters = column_letters(index)
                    texts.append(f'<c r="{letters}{row}"{kind.start}{text}{kind.end}')
        except (TypeError, ValueError) as error:
            where = table.make_namer(index, number)(0)
            raise _name_error(error, f"{where}:") from error
        if number <= _MEASURED_ROWS:
            for index, cell in enumerate(cells):
                self._measure(index, cell)
        return f'<row r="{row}">{"".join(texts)}</row>'

    def _encode_columns(self, columns: Sequence[Sequence[Any]], count: int) -> str:
        """Return some rows: their parts, a column of each, are joined row by row."""
        first, row = self._table.number + 1, self._row + 1
        self._check_columns(f"item {first}", columns)
        rows = list(map(str, range(row, row + count)))
        parts: list[Iterable[str]] = [repeat('<row r="'), rows]
        end = '">'
        for index, column in enumerate(columns):
            name_cell = self._table.make_namer(index, first)
            column = self._simplifier.simplify_column(column, name_cell)
            reference = f'<c r="{column_letters(index)}'
            if (encoded := encode_cells(column)) is not None:
                kind, texts = encoded
                start = repeat(f'"{kind.start}')
                parts += [repeat(end + reference), rows, start, texts]
                end = kind.end
            else:
                cells = _encode_mixed(reference, column, rows, name_cell)
                parts += [repeat(end), cells]
                end = ""
            for cell in column[: max(0, _MEASURED_ROWS - self._table.number)]:
                self._measure(index, cell)
        parts.append(repeat(end + "</row>"))
        self._table.number += count
        self._row += count
        return "".join(chain.from_iterable(zip(*parts, strict=False)))

    def _check_columns(self, where: str, cells: Sequence[Any]) -> None:
        if len(cells) > MAX_COLUMNS:
            raise ValueError(
                f"{where} has {len(cells):,} columns, but a sheet of Excel has at most "
                f"{MAX_COLUMNS:,}"
            )

    def _measure(self, index: int, cell: Any) -> None:
        """Widen a column if a cell needs it."""
        missing = index + 1 - len(self._widths)
        self._widths += [0] * missing
        self._widths[index] = max(self._widths[index], measure_cell(cell))


def _encode_mixed(
    reference: str,
    column: Sequence[Any],
    rows: Sequence[str],
    name_cell: Callable[[int], str],
) -> list[str]:
    """Return the cells of a column whose cells differ in type, or are empty.

    :param reference: the beginning of each cell, up to the number of its row.
    :param rows: the numbers of the rows.
    :param name_cell: returns the item and the column of a cell, from its index.
    """
    cells: list[str] = []
    present = [cell for cell in column if cell is not None]
    if not present:
        return [""] * len(column)
    if (encoded := encode_cells(present)) is not None:
        (start, end), texts = encoded[0][:2], iter(encoded[1])
        return [
            "" if cell is None else f'{reference}{row}"{start}{next(texts)}{end}'
            for row, cell in zip(rows, column, strict=True)
        ]
    try:
        for row, cell in zip(rows, column, strict=True):
            if (one := encode_cell(cell)) is None:
                cells.append("")
            else:
                cells.append(f'{reference}{row}"{one[0].start}{one[1]}{one[0].end}')
    except (TypeError, ValueError) as error:
        raise _name_error(error, f"{name_cell(len(cells))}:") from error
    return cells


def _name_error(error: Exception, where: str) -> Exception:
    """Return the error with the place before its message."""
    error_type = TypeError if isinstance(error, TypeError) else ValueError
    return error_type(f"{where} {error}")
