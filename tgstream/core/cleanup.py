"""To end what is open, whatever fails on the way.

Rule: each step runs though the one before failed, and the first error is the one told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def first_error(
    steps: Iterable[Callable[[], None]], first: BaseException | None = None
) -> BaseException | None:
    """Run every step, and return the first error: ``first``, or what one raised."""
    for step in steps:
        try:
            step()
        except BaseException as error:
            first = error if first is None else first  # one may be falsy
    return first


def close(thing: Any) -> None:
    """Close what can be closed."""
    method = getattr(thing, "close", None)
    if method is not None:
        method()
