"""Limits how many streams of a controller run at once in a process.

A slot is acquired before any code of a stream runs, and released once, however the
stream ends. Nothing here takes a lock: Python's garbage collector may release a slot
on any thread, between any two byte codes. The operations of a ``deque`` are atomic.
"""

from __future__ import annotations

from collections import deque
from typing import Any
from weakref import WeakKeyDictionary

from .refusals import make_refusal


class Slot:
    """The right to run one stream. A slot that is dropped is released."""

    def __init__(self, free: deque[None]) -> None:
        self._free: deque[None] | None = free

    def release(self) -> None:
        """Make room for another stream. A second call does nothing."""
        free, self._free = self._free, None
        if free is not None:
            free.append(None)

    __del__ = release


_free_slots: WeakKeyDictionary[Any, dict[int, deque[None]]] = WeakKeyDictionary()


def acquire(controller: Any, limit: int | None) -> Slot | None:
    """Acquire one of the controller's slots.

    :returns: the slot, or None if the controller has no limit.
    :raises HTTPServiceUnavailable: with ``Retry-After``, when no slot is free.
    """
    if limit is None:
        return None
    slots_by_limit = _free_slots.setdefault(controller, {})
    free = slots_by_limit.setdefault(limit, deque([None] * limit))
    try:
        free.pop()
    except IndexError:
        raise make_refusal("Too many open streams.", as_events=False) from None
    return Slot(free)
