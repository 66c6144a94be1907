"""The protocols ``Format`` and ``Batched``, and how a source is split into batches.

To encode items in batches is faster than to encode them one by one, and gives the same
bytes. A source gives batches if it is :class:`Batched` or a list or tuple, and a format
takes them if it has a method ``encode_batches``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, Protocol, runtime_checkable
from uuid import UUID


class Format(Protocol):
    """A format encodes items as text or bytes. It has one attribute and one method.

    A format may also set these attributes. ``commit`` and ``chunk_size`` are its
    defaults for these options. ``charset`` is set if it always uses that charset.
    ``headers`` is a mapping of headers for the response, which do not replace the
    user's. ``endless = True`` is set if a body is complete after any item. ``suffix``,
    such as ``"csv"``, completes a ``filename`` that has no suffix.

    A format may have these methods. ``encode_batches(source)`` does the same as
    ``encode()`` for a :class:`Batched` source, and is faster if it encodes a batch at
    once. ``encode_sources(sources)`` encodes a mapping of names to :class:`Batched`
    sources, which it must read in their order: a controller may then return a mapping.
    ``measure(source)`` returns the bytes of the whole body if they are known before the
    first item is taken, else None. ``encode_failure(incident)`` returns the last bytes
    of a body whose stream has failed after its first chunk, as text or bytes. They must
    be valid after any output of ``encode()``. Its argument is the id of the failure, 16
    hexadecimal digits that the log has too. ``encode_replaced()`` returns the last
    bytes of a body that may end after any item, and whose stream was replaced
    (``limit_action='replace'``).
    """

    content_type: str

    def encode(self, items: Iterable[Any]) -> Iterator[str | bytes]:
        """Yield the parts of the body, while ``items`` are taken one by one."""
        ...


@runtime_checkable
class Batched(Protocol):
    """A source that gives its items in batches, like ``rows()``.

    ``fields`` are the names of the items' fields, () if they have no names. They must
    be known when the first batch has been requested, also if there are no items. The
    result of ``rows()`` also has the types of the fields, as ``types``.

    A source may also have an attribute and a method. ``documents`` is True if the items
    are lines of JSON, as bytes or memoryviews: a document in UTF-8 and a line feed, and
    no other line break. It must be known when the first batch has been requested.
    ``NDJSON`` and ``JSONArray`` send these documents unchanged. ``for_format(format)``
    returns the source that a stream reads in place of this one. Its argument is the
    format of the stream, None for a stream without a format.
    """

    @property
    def fields(self) -> Sequence[str]: ...

    def batches(self) -> Iterator[Sequence[Any]]:
        """Yield the items in batches that are not empty."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


class ColumnType(NamedTuple):
    """The type of a column's values, as a statement declares it.

    :param python_type: the class of the values. ``dict`` stands for any JSON document,
        ``list`` for an array.
    :param precision: the number of digits of a ``Decimal``, None if it is not known.
    :param scale: the number of digits after the point, None if it is not known.
    :param timezone: whether datetimes or times have a zone.
    :param unsigned: whether integers may be 2**63 or greater.
    :param item: the type of the items of an array.
    """

    python_type: Any
    precision: int | None = None
    scale: int | None = None
    timezone: bool = False
    unsigned: bool = False
    item: Any = None


BATCH_SIZE = 256
"""Items that are encoded at once. Batches of 64 take a quarter more time for each item,
and larger batches save nothing."""

MAX_BATCH_TEXT = 1 << 19
"""Bytes of text that are encoded at once, unless a single item has more."""

_SAMPLE_STEP = 127
"""Only every 127th item is measured: to measure an item takes more than half of the
time that it takes to encode it."""

_TEXT_TYPES = frozenset({str, bytes, bytearray, memoryview})
_SMALL_TYPES = frozenset({int, float, bool, type(None), Decimal, datetime, date, UUID})


def estimate_largest_item(items: Sequence[Any]) -> int:
    """Estimate how many bytes of text the largest item has, by measuring some items."""
    if not items:
        return 0
    return max(map(text_size, items[:: min(_SAMPLE_STEP, len(items) // 2 or 1)]))


def text_size(item: Any, depth: int = 4) -> int:
    """The bytes of text in an item.

    :param depth: how deep parts of parts are measured.
    """
    cls: Any = type(item)
    if cls in _TEXT_TYPES:
        return len(item)
    if not depth or cls in _SMALL_TYPES:
        return 0
    values: Iterable[Any] = item
    if not _is_sequence(cls):
        if isinstance(item, Mapping):
            values = item.values()
        else:
            values, depth = getattr(item, "__dict__", {}).values(), 1
    size = 0
    for value in values:
        cls = type(value)
        if cls in _TEXT_TYPES:
            size += len(value)
        elif cls not in _SMALL_TYPES:
            size += text_size(value, depth - 1)
    return size


@lru_cache
def _is_sequence(cls: Any) -> bool:
    return issubclass(cls, Sequence)


def split_batch(batch: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield the batch, or parts of it if its items are large."""
    largest = estimate_largest_item(batch) if len(batch) > 1 else 0
    if largest * len(batch) <= MAX_BATCH_TEXT:
        yield batch
        return
    size = max(1, MAX_BATCH_TEXT // largest)
    for start in range(0, len(batch), size):
        yield batch[start : start + size]


def is_batched(source: Any) -> bool:
    """Return True for a source that :func:`iter_batches` accepts."""
    return type(source) in (list, tuple) or isinstance(source, Batched)


def iter_batches(source: Any) -> Iterator[Sequence[Any]]:
    """Return an iterator over the batches of a batched source, a list or a tuple."""
    if isinstance(source, Batched):
        return source.batches()
    starts = range(0, len(source), BATCH_SIZE)
    return (source[start : start + BATCH_SIZE] for start in starts)


def batch_encoder(format: Any) -> Any:
    """Return the method ``encode_batches`` of a format, None if it must not be used."""
    return find_method(format, "encode_batches")


def find_method(format: Any, name: str) -> Any:
    """Return an optional method of a format, None if it must not be used.

    A subclass that overrides ``encode`` alone means it for all items, so an inherited
    ``encode_batches`` or ``measure`` is not used.
    """
    for cls in type(format).__mro__:
        if name in vars(cls):
            break
        if "encode" in vars(cls):
            return None
    return getattr(format, name, None)


class CountedBatches:
    """A batched source for a format, whose batches come from another iterator.

    The iterator may count the batches of ``source``, for example, or close them.

    :param source: has the names of the fields.
    :param batches: the batches.
    """

    def __init__(self, source: Any, batches: Iterator[Sequence[Any]]) -> None:
        self._source = source
        self._batches = batches

    @property
    def fields(self) -> Sequence[str]:
        """The names of the items' fields, () if they have no names."""
        return getattr(self._source, "fields", ())

    @property
    def documents(self) -> bool:
        """Whether the items are lines of JSON."""
        return getattr(self._source, "documents", False)

    @property
    def types(self) -> Sequence[ColumnType | None]:
        """The types of the fields, () if they are not known."""
        return getattr(self._source, "types", ())

    def batches(self) -> Iterator[Sequence[Any]]:
        """Return the iterator over the batches."""
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self._batches)
