"""Runs every step of a cleanup, although steps before it fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def run_all(
    steps: Iterable[Callable[[], None]], first: BaseException | None = None
) -> BaseException | None:
    """Run every step, and return the first error instead of raising it.

    :param steps: functions without arguments.
    :param first: an error that was raised before, if any. It then is the first.
    """
    for step in steps:
        try:
            step()
        except BaseException as error:
            first = error if first is None else first  # an exception may be falsy
    return first


def close(resource: Any) -> None:
    """Call the ``close()`` of a resource, if it has one."""
    method = getattr(resource, "close", None)
    if method is not None:
        method()
