"""How Python's garbage collector is set in a server, while its streams are open."""

from __future__ import annotations

import gc

DEFAULT, FROZEN, RARE = "default", "frozen", "rare"
THRESHOLDS = (50_000, 20, 100)
_thresholds = gc.get_threshold()


def set_collector(how: str) -> None:
    """Set it ``how``: as Python begins, with all there is frozen, or rarely run."""
    gc.unfreeze()
    gc.set_threshold(*(THRESHOLDS if how == RARE else _thresholds))
    if how == FROZEN:
        gc.collect()
        gc.freeze()
