"""Encodes the items of one stream as groups of rows of Arrow, which a writer writes.

Each value is converted when its item arrives: a value that does not fit must fail
before the last commit. A group of rows stays in memory until it is complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from .arrow_columns import Column
from .cells import CellSimplifier
from .protocols import (
    BATCH_SIZE,
    MAX_BATCH_TEXT,
    Batched,
    text_size,
)
from .table import Table
from .values import BYTES_TYPES

_OUTPUT_BYTES = 1 << 20
"""Bytes that are yielded at once, unless pyarrow writes more at once."""


class Writer(Protocol):
    """Writes groups of rows to a file."""

    def write(self, rows: Any) -> None:
        """Write a ``pyarrow.Table`` as one group."""

    def close(self) -> None:
        """Write the end of the file."""

    def abandon(self) -> None:
        """Release everything. Nothing that is still written is used."""


class _Output:
    """The file that a writer writes to. It keeps the bytes until they are taken."""

    closed = False

    def __init__(self) -> None:
        self._parts: deque[bytes] = deque()
        self._length = 0

    def write(self, data: Any) -> int:
        part = bytes(data)
        self._parts.append(part)
        self._length += len(part)
        return len(part)

    def tell(self) -> int:
        return self._length

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def take(self) -> Iterator[bytes]:
        """Yield the bytes in parts, and let go of them."""
        while self._parts:
            joined: list[bytes] = []
            size = 0
            while self._parts and (
                not joined or size + len(self._parts[0]) <= _OUTPUT_BYTES
            ):
                joined.append(self._parts.popleft())
                size += len(joined[-1])
            yield b"".join(joined)


class ParquetWriter:
    """Writes a Parquet file. Each group of rows becomes a row group."""

    def __init__(self, file: Any, schema: Any) -> None:
        self._writer: Any = pq.ParquetWriter(file, schema)

    def write(self, rows: Any) -> None:
        self._writer.write_table(rows, row_group_size=rows.num_rows)

    def close(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        with suppress(Exception):
            self._writer.close()
        self._writer.is_open = False  # its finaliser would close it again


class StreamWriter:
    """Writes an IPC stream. Each group of rows becomes a record batch."""

    def __init__(self, file: Any, schema: Any) -> None:
        self._writer: Any = pa.ipc.new_stream(file, schema)

    def write(self, rows: Any) -> None:
        for batch in rows.combine_chunks().to_batches():
            self._writer.write_batch(batch)

    def close(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        """Do nothing: this writer writes only when it is called."""


class Encoder:
    """The encoder of one stream. Call :meth:`abandon` at its end, also if it failed.

    :param format_name: for error messages.
    :param header: the names of the columns that the user has given.
    :param open_writer: opens a :class:`Writer` for a file and a schema.
    :param max_rows: maximum number of rows in a group.
    :param max_bytes: bytes of values after which a group ends early.
    """

    def __init__(
        self,
        format_name: str,
        header: tuple[str, ...] | None,
        open_writer: Callable[[Any, Any], Writer],
        max_rows: int,
        max_bytes: int,
    ) -> None:
        self._format_name = format_name
        self._table = Table(format_name, header)
        self._open_writer = open_writer
        self._max_rows, self._max_bytes = max_rows, max_bytes
        self._columns: list[Column] | None = None
        self._rows = 0  # of the group
        self._bytes = 0  # of the values of the group
        self._unpacked_rows = self._unpacked_bytes = 0  # that were added one by one
        self._output = _Output()
        self._writer: Writer | None = None

    def add_item(self, item: Any) -> None:
        """Add an item to the group."""
        if not self._table.started:
            self._table.start([item])
        cells = self._read_cells(item, None)
        assert self._columns is not None
        for column, value in zip(self._columns, cells, strict=True):
            column.add(value, self._table.number)
        self._rows += 1
        self._unpacked_rows += 1
        self._unpacked_bytes += text_size(cells)
        if self._unpacked_rows >= BATCH_SIZE or self._unpacked_bytes >= MAX_BATCH_TEXT:
            self._pack()

    def add_batch(self, batch: Sequence[Any], source: Batched) -> Sequence[Any]:
        """Add the items of a batch to the group, and return those for the next one."""
        if not self._table.started:
            self._table.start(batch, source.fields)
        room = self._max_rows - self._rows
        self._add_rows(batch[:room], source)
        return batch[room:]

    @property
    def group_is_complete(self) -> bool:
        """Whether :meth:`encode_group` must be called before another item is added."""
        return self._rows >= self._max_rows or self._bytes >= self._max_bytes

    def encode_group(self) -> Iterator[bytes]:
        """Yield the bytes of the group."""
        self._write_group()
        yield from self._output.take()

    def finish(self, source: Any = None) -> Iterator[bytes]:
        """Yield the last group, and the end of the file."""
        self._table.finish(getattr(source, "fields", ()))
        if self._columns is None:
            self._make_columns(0, source)
        self._pack()
        if self._rows or self._writer is None:
            self._write_group()
        assert self._writer is not None
        self._writer.close()
        yield from self._output.take()

    def abandon(self) -> None:
        """Release the writer. Bytes that were not taken are lost."""
        if self._writer is not None:
            self._writer.abandon()

    # Rows.

    def _read_cells(self, item: Any, source: Any) -> Sequence[Any]:
        self._table.number += 1
        cells: Sequence[Any] = self._table.get_cells(item)
        self._check_width(len(cells), source)
        return cells

    def _add_rows(self, batch: Sequence[Any], source: Batched) -> None:
        first = self._table.number + 1
        values = self._table.get_columns(batch)
        if values is None:
            cells = [self._read_cells(item, source) for item in batch]
            values = list(zip(*cells, strict=True))
        else:
            self._table.number = first
            self._check_width(len(values), source)
            self._table.number += len(batch) - 1
        assert self._columns is not None
        for column, column_values in zip(self._columns, values, strict=True):
            column.add_batch(column_values, first)
        self._rows += len(batch)
        self._count_bytes()

    def _check_width(self, width: int, source: Any) -> None:
        """Make the columns for the first row. Check that the others have as many."""
        if self._columns is None:
            self._make_columns(width, source)
        assert self._columns is not None
        if width != len(self._columns) or not width:
            raise ValueError(
                f"item {self._table.number} has {width} cells, but there are "
                f"{len(self._columns)} columns. Yield a value for each column"
            )

    def _make_columns(self, width: int, source: Any) -> None:
        names = self._table.names or [f"column_{n}" for n in range(1, width + 1)]
        self._names = [str(name) for name in names]
        if len({*self._names}) < len(self._names):
            twice = next(name for name in self._names if self._names.count(name) > 1)
            raise ValueError(
                f"{self._format_name}: two columns have the name {twice!r}. "
                "Give each column its own name"
            )
        simplifier = CellSimplifier(*BYTES_TYPES)
        types = getattr(source, "types", ())
        declared = types if len(types) == len(names) else [None] * len(names)
        self._columns = [
            Column(repr(name), type_, simplifier)
            for name, type_ in zip(self._names, declared, strict=True)
        ]

    # Groups of rows.

    def _pack(self) -> None:
        """Convert the rows that were added one by one to arrays."""
        for column in self._columns or ():
            column.pack()
        self._unpacked_rows = self._unpacked_bytes = 0
        self._count_bytes()

    def _count_bytes(self) -> None:
        self._bytes = sum([column.bytes for column in self._columns or ()])

    def _write_group(self) -> None:
        columns = self._columns or []
        if self._writer is None:
            for column in columns:
                column.fix()
            types = [column.type for column in columns]
            self._schema = pa.schema([*zip(self._names, types, strict=True)])
            file = pa.PythonFile(self._output, mode="w")
            self._writer = self._open_writer(file, self._schema)
        if self._rows:
            rows = [column.take() for column in columns]
            self._writer.write(pa.Table.from_arrays(rows, schema=self._schema))
        self._rows = self._bytes = self._unpacked_rows = self._unpacked_bytes = 0
