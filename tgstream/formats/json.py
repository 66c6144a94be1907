"""The formats that hold many JSON documents.

Rule: what a document is, is told in ``_encoder``; here is what stands between them. No
ending is written before the items have run out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ._json_columns import are_alike, objects
from .json_encoder import Encoder, document
from .protocols import Batched


class _Documents:
    """What both formats share: a document an item, with something in between."""

    charset = "utf-8"
    _start, _between, _after = b"", b"", b""

    def encode(self, items: Iterable[Any]) -> Iterator[bytes]:
        """A document an item."""
        encoder, number = Encoder(), 0
        before = self._start
        for number, item in enumerate(items, 1):
            yield before + encoder.encode(document(item), number) + self._after
            before = self._between
        yield self._ending(number)

    def encode_batches(self, source: Batched) -> Iterator[bytes]:
        """The documents of a batch at once."""
        encoder, number = Encoder(), 0
        before, between = self._start, self._after + self._between
        for batch in source.batches():
            first, number = number + 1, number + len(batch)
            if encoder.quick and len(batch) > 1 and are_alike(batch, source.fields):
                data = objects(encoder, batch, source.fields, first, between)
            else:
                data = between.join(
                    encoder.encode(document(item), n)
                    for n, item in enumerate(batch, first)
                )
            yield before + data + self._after
            before = self._between
        yield self._ending(number)

    def _ending(self, number: int) -> bytes:
        return b""


class NDJSON(_Documents):
    """A JSON document a line, in UTF-8.

    :param end: whether one more record, ``{"end": true, "items": N}``, tells the client
        that it got all there was, where a server cannot show a break.
    """

    content_type = "application/x-ndjson"
    _after = b"\n"

    def __init__(self, end: bool = False) -> None:
        self._end = end

    def _ending(self, number: int) -> bytes:
        return b'{"end":true,"items":%d}\n' % number if self._end else b""


class JSONArray(_Documents):
    """One JSON array of all items, in UTF-8; it stays open if the stream fails."""

    content_type = "application/json"
    _start, _between = b"[", b","

    def _ending(self, number: int) -> bytes:
        return b"]" if number else b"[]"
