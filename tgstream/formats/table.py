"""The columns of a table: their names, and the cells of each item as a row.

The formats that write a table (CSV, XLSX) read all kinds of items here: sequences,
rows, mappings, named tuples, dataclasses, models and mapped objects.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import zip_longest
from typing import Any

from .convert import Converter, Function
from .fields import dump_method, field_names, is_named_row, single_entity
from .values import BYTES_TYPES

_NAMELESS_TYPES = (str, *BYTES_TYPES)
"""Items without field names: they are not rows."""


def check_header(where: str, header: Any) -> tuple[str, ...] | None:
    """Check the names of the columns that a user has given.

    :param where: the name of the format, for error messages.
    :returns: the names, None if none were given.
    :raises TypeError: when the header is not a sequence of names.
    """
    if header is None:
        return None
    names = tuple(header) if isinstance(header, Iterable) else (header,)
    if isinstance(header, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{where}: header must be a list of column names such as ['id', 'name'], "
            f"got {header!r}"
        )
    return names


class Table:
    """The columns of the items of one stream, and the number of its current item.

    Call :meth:`start` with the first batch, or :meth:`finish` if there is none, then
    :meth:`get_columns` or :meth:`get_cells` for the items.

    :param format_name: for error messages.
    :param header: the names of the columns that the user has given, () for no header.
    :param convert: the functions that convert the cells, None for no functions.
    """

    def __init__(
        self,
        format_name: str,
        header: tuple[str, ...] | None,
        convert: Converter | None = None,
    ) -> None:
        self.started = False
        self.number = 0
        """The number of the item that was read last."""
        self._format_name = format_name
        self._given = header
        self._width = len(header) if header else None
        self._converter = convert
        self._functions: list[Function | None] = []
        self._set_names(header or None)

    def _set_names(
        self, names: Sequence[str] | None, fields: Sequence[str] = ()
    ) -> None:
        self.names = names
        """The names of the columns, None if they are not known."""
        self._known_names: Collection[str] = frozenset(names or ())
        if self._converter is not None:
            self._functions = self._converter.find_functions(names or (), fields)

    @property
    def header(self) -> Sequence[str]:
        """The names to write above the rows, () for no header."""
        return (self.names or ()) if self._given is None else self._given

    def start(self, batch: Sequence[Any], fields: Sequence[str] = ()) -> None:
        """Find the names of the columns.

        :param batch: the first items.
        :param fields: the names of the fields of the source, () if it has none.
        """
        self.started = True
        first = batch[0]
        if isinstance(first, _NAMELESS_TYPES):
            return
        if self.names is None:
            self._set_names(tuple(fields) or field_names(first))
        elif self._converter is not None and not isinstance(first, Mapping):
            # The header renames the fields: convert may have either name.
            self._set_names(self.names, tuple(fields) or field_names(first) or ())

    def finish(self, fields: Sequence[str]) -> None:
        """Take the names from the source if there were no items."""
        if not self.started:
            self.started = True
            self._set_names(self.names or fields)

    def get_columns(self, batch: Sequence[Any]) -> list[Sequence[Any]] | None:
        """The cells of a batch, a column at a time.

        :returns: None if its items are not sequences of the length of the header, or of
            one length, so that each must be read by :meth:`get_cells`.
        """
        if not all(map(_is_sequence_row, set(map(type, batch)))):
            return None
        widths = set(map(len, batch))
        if len(widths) != 1 or 0 in widths:
            return None
        if self._width is not None and self._width not in widths:
            return None
        if widths == {1} and any(single_entity(row) is not None for row in batch):
            return None
        columns: list[Sequence[Any]] = list(zip(*batch, strict=True))
        if self._converter is not None:
            columns = self._convert_columns(columns, self.number + 1)
        return columns

    def get_cells(self, item: Any) -> Any:
        """The cells of an item, in the order of the columns.

        :raises TypeError: when the item is not a row.
        :raises ValueError: when its fields are not those of the header.
        """
        cls: Any = type(item)
        if _is_sequence_row(cls) and (len(item) != 1 or single_entity(item) is None):
            cells = item
        else:
            cells = self._read_fields(item)
        if self._width is not None and self._width != len(cells):
            raise self._wrong_width(cells)
        return cells if self._converter is None else self._convert_cells(cells)

    def _read_fields(self, item: Any) -> list[Any]:
        cls: Any = type(item)
        if _is_sequence_row(cls):
            item = single_entity(item)
        elif (dump := dump_method(cls)) is not None:
            item = dump(item)
        if isinstance(item, Mapping):
            return self._get_mapping_cells(item)
        names = field_names(item)
        if names is not None:
            return self._get_object_cells(item, names)
        if isinstance(item, _NAMELESS_TYPES) or not isinstance(item, Iterable):
            raise TypeError(
                f"item {self.number} must be a row (a sequence, a mapping, or an "
                f"object with fields), got {type(item).__name__}"
            )
        return list(item)  # an iterator can be read only once

    def _wrong_width(self, cells: Sequence[Any]) -> ValueError:
        names = self._given or ()
        return ValueError(
            f"item {self.number} has {_count(len(cells), 'cell')}, but the header has "
            f"{_count(len(names), 'name')}: {', '.join(names)}. Pass a name for each "
            f"column in {self._format_name}(header=[...])"
        )

    def name_column(self, index: int) -> str:
        """The name of a column in messages, or its number if it has no name."""
        known = self.names is not None and index < len(self.names)
        return repr(self.names[index]) if known else str(index + 1)  # type: ignore[index]

    def make_namer(self, index: int, first: int) -> Callable[[int], str]:
        """Return a function that names a cell in messages: ``item 3, column 'name'``.

        It takes the index of the cell in its column.

        :param index: the index of the column.
        :param first: the item number of the first cell of the column.
        """
        return lambda row: f"item {first + row}, column {self.name_column(index)}"

    def _convert_columns(
        self, columns: Sequence[Sequence[Any]], first: int
    ) -> list[Sequence[Any]]:
        """Convert the cells of some rows.

        :param first: the item number of the first row.
        """
        assert self._converter is not None
        return [
            self._converter.convert_column(
                column, function, self.make_namer(index, first)
            )
            for index, (column, function) in enumerate(
                zip_longest(columns, self._functions[: len(columns)])
            )
        ]

    def _convert_cells(self, cells: Sequence[Any]) -> list[Any]:
        assert self._converter is not None
        convert = self._converter.convert_one
        return [
            convert(cell, function, partial(self._name_cell, index))
            for index, (cell, function) in enumerate(
                zip_longest(cells, self._functions[: len(cells)])
            )
        ]

    def _name_cell(self, index: int) -> str:
        return f"item {self.number}, column {self.name_column(index)}"

    def _get_mapping_cells(self, item: Mapping[Any, Any]) -> list[Any]:
        if self.names is None:
            self._set_names(field_names(item) or ())
        assert self.names is not None
        if unknown := [key for key in item if key not in self._known_names]:
            columns = ", ".join(map(repr, self.names)) or "no columns"
            raise ValueError(
                f"item {self.number} has the key {unknown[0]!r}, but the header has "
                f"{columns}. List all columns in {self._format_name}(header=[...])"
            )
        return [item.get(name) for name in self.names]

    def _get_object_cells(self, item: Any, names: Sequence[str]) -> list[Any]:
        if self.names is not None and len(names) != len(self.names):
            raise ValueError(
                f"item {self.number} has the fields {', '.join(names)}, but the "
                f"header has {', '.join(self.names)}. Yield a tuple with a value for "
                "each column of the header"
            )
        return [getattr(item, name) for name in names]


@lru_cache
def _is_sequence_row(cls: Any) -> bool:
    """Return True for tuples, lists, and SQLAlchemy's ``Row``."""
    return issubclass(cls, tuple | list) or is_named_row(cls)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
