"""Set Python's garbage collector in a server while its streams are open."""

from __future__ import annotations

import gc

DEFAULT, FROZEN, RARE = "default", "frozen", "rare"
THRESHOLDS = (50_000, 20, 100)
_thresholds = gc.get_threshold()


def set_collector(how: str) -> None:
    """Set the collector to Python's default, to frozen objects, or to rare runs."""
    gc.unfreeze()
    gc.set_threshold(*(THRESHOLDS if how == RARE else _thresholds))
    if how == FROZEN:
        gc.collect()
        gc.freeze()
