"""What one stream is to do: its options, resolved for one request.

Rule: it says what; how is told where it is done.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import NamedTuple

from .options import Format

clock = time.perf_counter


class Plan(NamedTuple):
    """How a body is to be made: the options of a stream, resolved for one request."""

    controller: str
    format: Format | None
    every: int  # items after which it commits, 0: at the end
    manual: bool
    chunk_size: int  # bytes, 0: a chunk an item
    chunk_seconds: float
    charset: Callable[[], str]
    length: Callable[[], int | None]  # bytes of the whole body, where they are known
    max_seconds: float | None = None  # of its life
    idle_seconds: float = 0.0  # with a transaction open, to be told of; 0: never

    def lifetime(self) -> float:
        """Seconds that it may live. Where clients come back, not all at once."""
        if self.max_seconds is None:
            return float("inf")
        share = random.uniform(0.9, 1) if getattr(self.format, "endless", False) else 1
        return self.max_seconds * share
