"""How many streams of a controller may run at once in a process.

Rule: a seat is taken before anything of a stream runs, and left once, however it ends.
Nothing here locks: a seat may be left by garbage collection, anywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from webob.exc import HTTPServiceUnavailable

RETRY_SECONDS = 5
"""What a client that found no seat is told to wait."""


class Seat:
    """One of the streams that may run; dropped, it is left."""

    def __init__(self, free: deque[None]) -> None:
        self._free: deque[None] | None = free

    def leave(self) -> None:
        """Let another stream have it; a second time is no harm."""
        free, self._free = self._free, None
        if free is not None:
            free.append(None)

    __del__ = leave


_seats: WeakKeyDictionary[Any, dict[int, deque[None]]] = WeakKeyDictionary()


def take(controller: Any, limit: int | None) -> Seat | None:
    """A seat among the streams of a controller; None where they have no limit.

    :raises HTTPServiceUnavailable: when all are taken, with ``Retry-After``.
    """
    if limit is None:
        return None
    of_controller = _seats.setdefault(controller, {})
    free = of_controller.setdefault(limit, deque([None] * limit))
    try:
        free.pop()
    except IndexError:
        raise HTTPServiceUnavailable(
            f"all seats for streams of this kind are taken ({limit}); come back later",
            headers=[("Retry-After", str(RETRY_SECONDS))],
        ) from None
    return Seat(free)


@contextmanager
def held(controller: Any, limit: int | None) -> Iterator[Seat | None]:
    """A seat, left at once by an error: its traceback would keep it for a while.

    :raises HTTPServiceUnavailable: as :func:`take`.
    """
    seat = take(controller, limit)
    try:
        yield seat
    except BaseException:
        if seat is not None:
            seat.leave()
        raise
