"""Sources whose items come in batches: rows of a query, and lists.

Rule: to take items in batches changes what they cost, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from ._options import Batched

BATCH = 256
"""Items that are encoded at once: few enough to stay in a processor's cache, and for
Python's garbage collector not to begin."""


def is_batched(source: Any) -> bool:
    """True for a source that :func:`batches_of` takes."""
    return type(source) in (list, tuple) or isinstance(source, Batched)


def batches_of(source: Any) -> Iterator[Sequence[Any]]:
    """The items of a batched source, or of a list, a batch at a time."""
    if isinstance(source, Batched):
        return source.batches()
    starts = range(0, len(source), BATCH)
    return (source[start : start + BATCH] for start in starts)


def encoder_of(format: Any) -> Any:
    """Its ``encode_batches``; None if it has none, or a subclass has a new ``encode``.

    Who writes an ``encode`` means it for all items, whatever was inherited.
    """
    for kind in type(format).__mro__:
        if "encode_batches" in vars(kind):
            break
        if "encode" in vars(kind):
            return None
    return getattr(format, "encode_batches", None)


class Passed:
    """A batched source as it is passed to a format, by way of who counts its batches.

    :param source: the source.
    :param batches: its batches.
    """

    def __init__(self, source: Any, batches: Iterator[Sequence[Any]]) -> None:
        self._source = source
        self._batches = batches

    @property
    def fields(self) -> Sequence[str]:
        """The names of the items' fields, () where they have none."""
        return getattr(self._source, "fields", ())

    def batches(self) -> Iterator[Sequence[Any]]:
        """The items, a batch at a time."""
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self._batches)
