"""The cells of a table, for the formats whose cells hold one simple value each.

CSV, XLSX and Parquet write the same value for a cell that is an ``Enum``, a dict, a
list, bytes, or a range. Each format keeps the values that it can write itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSequence, Sequence
from functools import lru_cache, partial
from typing import Any

from .json_encoder import Encoder
from .values import PLAIN_TYPES, find_substitute


class CellSimplifier:
    """Replaces the cells of one stream that are not simple values.

    An ``Enum`` becomes its value, a mapping, list or tuple becomes JSON text, bytes
    become base64, and UUIDs, addresses and ranges become text. Cells of other classes
    are returned unchanged.

    :param kept: more classes whose values are returned unchanged.
    """

    def __init__(self, *kept: type) -> None:
        self._kept = kept
        self._encoder: Encoder | None = None

    def simplify_column(
        self, cells: Sequence[Any], name_cell: Callable[[int], str]
    ) -> Sequence[Any]:
        """Return some cells, of a column or a row, with those replaced.

        :param name_cell: returns the item and the column of a cell, for an error, from
            the index of the cell.
        :raises TypeError: when a list or mapping has a part that JSON does not support.
        :raises ValueError: when it contains NaN, Infinity or itself.
        """
        while not (classes := set(map(type, cells))) <= PLAIN_TYPES:
            classes -= PLAIN_TYPES
            cls = classes.pop()
            if classes or (substitute := self._find_substitute(cls)) is None:
                return [
                    cell
                    if type(cell) in PLAIN_TYPES
                    else self._simplify(cell, partial(name_cell, index))
                    for index, cell in enumerate(cells)
                ]
            # The cells that are not plain are of one class.
            cells = [substitute(cell) if type(cell) is cls else cell for cell in cells]
        return cells

    def _find_substitute(self, cls: Any) -> Callable[[Any], Any] | None:
        return None if issubclass(cls, self._kept) else find_substitute(cls)

    def _simplify(self, cell: Any, name: Callable[[], str]) -> Any:
        cls: Any
        while (cls := type(cell)) not in PLAIN_TYPES and (
            substitute := self._find_substitute(cls)
        ) is not None:
            cell = substitute(cell)
        if _is_container(cls) and not issubclass(cls, self._kept):
            self._encoder = self._encoder or Encoder()
            return self._encoder.encode(cell, name).decode()
        return cell


@lru_cache
def _is_container(cls: Any) -> bool:
    """Return True for a class whose values are objects or arrays in JSON."""
    # psycopg's Multirange is a MutableSequence.
    return issubclass(cls, Mapping | list | tuple | MutableSequence)
