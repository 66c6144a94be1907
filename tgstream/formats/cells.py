"""The cells of a table, for the formats whose cells hold one simple value each.

CSV, XLSX and Parquet write the same value for a cell that is an ``Enum``, a dict, a
list, bytes, or a range. Each format keeps the values that it can write itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSequence, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import lru_cache, partial
from typing import Any

from .json_encoder import Encoder
from .values import find_substitute

PLAIN_TYPES = frozenset(
    {type(None), bool, int, float, Decimal, str, date, datetime, time, timedelta}
)
"""Types of cells that are never replaced."""


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
        if PLAIN_TYPES.issuperset(map(type, cells)):
            return cells
        return [
            cell
            if type(cell) in PLAIN_TYPES
            else self._simplify(cell, partial(name_cell, index))
            for index, cell in enumerate(cells)
        ]

    def _simplify(self, cell: Any, name: Callable[[], str]) -> Any:
        while type(cell) not in PLAIN_TYPES and not isinstance(cell, self._kept):
            cls: Any = type(cell)
            if (substitute := find_substitute(cls)) is not None:
                cell = substitute(cell)
            elif _is_container(cls):
                self._encoder = self._encoder or Encoder()
                return self._encoder.encode(cell, name).decode()
            else:
                break
        return cell


@lru_cache
def _is_container(cls: Any) -> bool:
    """Return True for a class whose values are objects or arrays in JSON."""
    # psycopg's Multirange is a MutableSequence.
    return issubclass(cls, Mapping | list | tuple | MutableSequence)
