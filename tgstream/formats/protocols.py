"""Sources whose items come in batches: rows of a query, and lists.

Rule: to take items in batches changes what they cost, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from itertools import chain
from typing import Any, Protocol, runtime_checkable
from uuid import UUID


class Format(Protocol):
    """What turns items into bytes: one attribute and one method.

    A format may also set ``commit`` and ``chunk_size``, its defaults for these options;
    ``charset`` where it is that whatever was asked; ``headers``, a mapping of what is
    set where the user set none; and ``endless = True`` where a body may end anywhere.
    A method ``encode_batches(source)`` is the same for a :class:`Batched` source, and
    faster where it encodes a batch at once.
    """

    content_type: str

    def encode(self, items: Iterable[Any]) -> Iterator[str | bytes]:
        """The pieces of the body, made while ``items`` are taken one by one."""
        ...


@runtime_checkable
class Batched(Protocol):
    """Items that come in batches, as those of ``rows()`` do.

    ``fields`` are the names of the items' fields, () where they have none; they are
    known once the first batch was asked for, also if there is no item.
    """

    @property
    def fields(self) -> Sequence[str]: ...

    def batches(self) -> Iterator[Sequence[Any]]:
        """The items, a batch at a time; none is empty."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


BATCH = 256
"""Items that are encoded at once: few enough to stay in a processor's cache, and for
Python's garbage collector not to begin."""


PART = 1 << 19
"""Bytes of text that are encoded at once, unless one item has more of it."""

_STEP = 127  # few are looked at: to look costs a third of what it takes to encode one
_TEXTS = frozenset({str, bytes, bytearray, memoryview})
_SMALL = frozenset({int, float, bool, type(None), Decimal, datetime, date, UUID})


def largest_of(items: Sequence[Any]) -> int:
    """About how many bytes of text the largest item has: some of them are looked at."""
    if not items:
        return 0
    return max(map(_weight, items[:: min(_STEP, len(items) // 2 or 1)]))


def _weight(item: Any, depth: int = 4) -> int:
    kind: Any = type(item)
    if kind in _TEXTS:
        return len(item)
    if not depth or kind in _SMALL:
        return 0
    cells: Iterable[Any] = item
    if not _is_sequence(kind):
        if isinstance(item, Mapping):
            cells = item.values()
        else:
            cells, depth = getattr(item, "__dict__", {}).values(), 1
    size = 0
    for cell in cells:
        kind = type(cell)
        if kind in _TEXTS:
            size += len(cell)
        elif kind not in _SMALL:
            size += _weight(cell, depth - 1)
    return size


@lru_cache
def _is_sequence(kind: Any) -> bool:
    return issubclass(kind, Sequence)


def parts_of(batch: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """A batch, and where its items are large as much of it as is encoded at once."""
    largest = largest_of(batch) if len(batch) > 1 else 0
    if largest * len(batch) <= PART:
        yield batch
        return
    size = max(1, PART // largest)
    for start in range(0, len(batch), size):
        yield batch[start : start + size]


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
