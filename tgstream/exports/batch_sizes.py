"""How many rows an export fetches at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..formats.protocols import estimate_largest_item

BATCH_BYTES = 1 << 20
"""Bytes of text in a batch, at most, if its rows are as large as those before."""


class BatchSizes:
    """The sizes of an export's batches: they start small and grow.

    The first batch is small, so that the first rows of a slow query are sent early.

    :param maximum: maximum number of rows in a batch.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self.size = min(16, maximum)

    def room_after(self, rows: Sequence[Any]) -> int:
        """The number of rows that still fit in the batch, if they are as large."""
        fitting = BATCH_BYTES // (estimate_largest_item(rows) or 1)
        return max(0, min(self.size, fitting) - len(rows)) if rows else 0

    def grow(self, rows: Sequence[Any] = ()) -> None:
        """Double the next batch, unless the rows of the last one were large."""
        fitting = BATCH_BYTES // (estimate_largest_item(rows) or 1)
        self.size = max(1, min(self.size * 2, self._maximum, fitting))
