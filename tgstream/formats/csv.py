"""CSV: rows to text.

Rule: what is written is what Python's ``csv`` writes, to the byte; also where a batch
is written a column at a time.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from ._columns import (
    ADDRESS,
    NoTextError,
    Quoting,
    as_bytes,
    dialect_of,
    guarded,
    guarded_texts,
    is_address,
    texts_of,
    writer_of,
)
from .fields import dump_of, entity_in, names_of
from .protocols import Batched


class CSV:
    """Rows as comma-separated values, RFC 4180; :class:`str` is what each value is.

    Rows are sequences, SQLAlchemy's ``Row``\\ s, mappings, named tuples, dataclasses,
    attrs classes, pydantic models or mapped objects. A ``Row`` of one entity is that
    object. Bytes go out as they are. Do not pass texts as rows.

    :param header: the names of the columns, () for no header; None for the names of the
        first row's own fields, if it has any. Of mappings these are also the keys.
    :param dialect: one of the module ``csv``: a name, or a class.
    :param bom: whether a byte order mark comes first, for Excel to read UTF-8; the
        response is UTF-8 then, whatever was asked.
    :param escape_formulas: whether text cells that a spreadsheet would run (they begin
        with ``=``, ``+``, ``-``, ``@``, tab, CR or LF, also behind invisible
        characters) get a ``'`` in front. Numbers stay.
    :raises TypeError: when the header is no sequence of names.
    :raises ValueError: when the dialect is unknown, or makes no sense.
    """

    content_type = "text/csv"

    def __init__(
        self,
        header: Sequence[str] | None = None,
        dialect: Any = "excel",
        bom: bool = False,
        escape_formulas: bool = False,
    ) -> None:
        self._header = _names(header)
        self._dialect = dialect_of(dialect)
        self._bom = "\ufeff" if bom else ""
        self._escapes = escape_formulas
        self.charset = "utf-8" if bom else None
        self._quoting = Quoting(self._dialect)

    def encode(self, items: Iterable[Any]) -> Iterator[str | bytes]:
        """A line an item, and the header with the first."""
        table = _Table(self)
        for item in items:
            if table.began:
                yield table.line(item)
            else:
                yield from table.begin([item])
        yield from table.foot(())

    def encode_batches(self, source: Batched) -> Iterator[str | bytes]:
        """The lines of a batch at once."""
        table = _Table(self)
        for batch in source.batches():
            if table.began:
                yield from table.lines(batch)
            else:
                yield from table.begin(batch, source.fields)
        yield from table.foot(source.fields)


def _names(header: Any) -> tuple[str, ...] | None:
    if header is None:
        return None
    names = tuple(header) if isinstance(header, Iterable) else (header,)
    if isinstance(header, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"CSV: header={header!r} is no sequence of names; give ['id', 'name']"
        )
    return names


class _Table:
    """One run of a format: what its columns are, and how many rows there were."""

    def __init__(self, format: CSV) -> None:
        self._format = format
        # Not the format's: a csv.writer that two threads use mixes their rows.
        self._write = writer_of(format._dialect)
        self.began = False
        self._number = 0
        self._names: Sequence[str] | None = format._header or None
        self._known: Collection[str] = frozenset(self._names or ())

    # The line of the names.

    def begin(
        self, batch: Sequence[Any], fields: Sequence[str] = ()
    ) -> Iterator[str | bytes]:
        """The first lines, and what goes before them.

        In one piece: a header that left before the first row was made could not be
        taken back.
        """
        first = batch[0]
        if self._names is None and not isinstance(first, _PASSED):
            self._names = tuple(fields) or names_of(first)
            self._known = frozenset(self._names or ())
        head, lines = "".join(self._head()), self.lines(batch)
        for line in lines:  # the first of them is text
            yield head + line  # type: ignore[operator]
            break
        yield from lines

    def foot(self, fields: Sequence[str]) -> Iterator[str]:
        """What there is to say when there was no row."""
        if not self.began:
            self._names = self._names or fields
            yield from self._head()

    def _head(self) -> Iterator[str]:
        self.began = True
        header = self._format._header
        names = self._names if header is None else header
        if self._format._bom:
            yield self._format._bom
        if names:
            yield self._line(names)

    # The rows.

    def line(self, item: Any) -> str | bytes:
        """The line of a row; bytes as they are."""
        self._number += 1
        if isinstance(item, _BYTES):
            return self._bytes(item)
        return self._line(self._cells(item))

    def _line(self, cells: Any) -> str:
        line = self._written(cells)
        # One look at the line is many times as quick as one at the class of each cell.
        if ADDRESS in line and (plain := self._plain(cells)) is not None:
            return self._written(plain)
        return line

    def _plain(self, cells: Any) -> list[Any] | None:
        """The cells with bytes for memoryviews, if there is one.

        :raises TypeError: when the text of one is the address of an object.
        """
        for place, cell in enumerate(cells):
            if is_address(cell):
                known = self._names is not None and place < len(self._names)
                name = repr(self._names[place]) if known else f"column {place + 1}"  # type: ignore[index]
                raise TypeError(
                    f"item {self._number} has a {type(cell).__name__} in {name}, and "
                    f"its text would be {str(cell)!r:.80}. Yield the columns of an "
                    "object, and convert other values to a str"
                )
        if any(isinstance(cell, memoryview) for cell in cells):
            return [as_bytes(cell) for cell in cells]
        return None

    def _written(self, cells: Any) -> str:
        if self._format._escapes:
            cells = map(guarded, cells)
        try:
            return self._write(cells)
        except csv.Error as error:
            what = f"item {self._number}" if self._number else "the header"
            raise ValueError(
                f"{what} cannot be a row of this dialect: {error}; name another in "
                "CSV(dialect=...)"
            ) from error

    def lines(self, batch: Sequence[Any]) -> Iterator[str | bytes]:
        """The lines of a batch: a column at a time where its rows are of one kind."""
        if self._format._quoting.simple and all(map(_is_row, set(map(type, batch)))):
            widths = set(map(len, batch))
            if len(widths) == 1 and widths.pop() > 1:  # "" alone is not an empty line
                with suppress(NoTextError):  # told with its item
                    yield self._by_column(batch)
                    return
        texts: list[str] = []
        for line in map(self.line, batch):
            if isinstance(line, str):
                texts.append(line)
            else:
                yield "".join(texts)
                yield line
                texts.clear()
        yield "".join(texts)

    def _by_column(self, batch: Sequence[Any]) -> str:
        dialect = self._format._dialect
        quoted = self._format._quoting.of
        columns = map(quoted, map(self._texts, zip(*batch, strict=True)))
        lines = map(dialect.delimiter.join, zip(*columns, strict=True))
        self._number += len(batch)
        end: str = dialect.lineterminator
        return end.join(lines) + end

    def _texts(self, column: Sequence[Any]) -> Sequence[str]:
        texts = texts_of(column)
        return guarded_texts(column, texts) if self._format._escapes else texts

    def _cells(self, item: Any) -> Any:
        """The cells of a row, in the order of the columns."""
        kind: Any = type(item)
        if _is_row(kind):
            if len(item) != 1 or (entity := entity_in(item)) is None:
                return item
            item = entity
        elif (dump := dump_of(kind)) is not None:
            item = dump(item)
        if isinstance(item, Mapping):
            return self._of_mapping(item)
        names = names_of(item)
        if names is not None:
            return self._of_object(item, names)
        if isinstance(item, str) or not isinstance(item, Iterable):
            raise TypeError(
                f"item {self._number} is {type(item).__name__}, which is no row for "
                "CSV: yield a sequence, a mapping, or an object that has fields"
            )
        return list(item)  # an iterator can be looked at once

    def _of_mapping(self, item: Mapping[Any, Any]) -> list[Any]:
        if self._names is None:
            self._names = names_of(item) or ()
            self._known = frozenset(self._names)
        if unknown := [key for key in item if key not in self._known]:
            raise ValueError(
                f"item {self._number} has {unknown[0]!r}, for which the header has no "
                f"column: it has {', '.join(map(repr, self._names)) or 'none'}; name "
                "all in CSV(header=[...])"
            )
        return [item.get(name, "") for name in self._names]

    def _of_object(self, item: Any, names: Sequence[str]) -> list[Any]:
        if self._names is not None and len(names) != len(self._names):
            raise ValueError(
                f"item {self._number} has the fields {', '.join(names)}, and the "
                f"header {', '.join(self._names)}: yield a tuple of what is wanted"
            )
        return [getattr(item, name) for name in names]

    def _bytes(self, item: Any) -> bytes:
        if self._format._escapes:
            raise TypeError(
                f"item {self._number} is bytes, in which escape_formulas cannot find "
                "the cells: yield rows, or leave escape_formulas out"
            )
        return bytes(item)


_BYTES = (bytes, bytearray, memoryview)
_PASSED = (str, *_BYTES)
"""What has no names: the one is refused, and the others go out as they are."""


@lru_cache
def _is_row(kind: Any) -> bool:
    """True for tuples and lists, and for a ``Row``, which is a sequence with names."""
    if issubclass(kind, tuple | list):
        return True
    return hasattr(kind, "_fields") and issubclass(kind, Sequence)
