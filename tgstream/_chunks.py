"""The chunks of a body: items in, bytes out, gathered and stored on the way.

Rule: nothing here knows a thread, a request or a server.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from ._options import Format

clock = time.perf_counter


class Plan(NamedTuple):
    """How a body is to be made: the options of a stream, resolved for one request."""

    controller: str
    format: Format | None
    every: int  # items after which it commits, 0: at the end
    manual: bool
    chunk_size: int  # bytes, 0: a chunk an item
    chunk_seconds: float
    charset: Callable[[], str]


class Store(Protocol):
    """What is told while the chunks are made."""

    def settle(self) -> None:
        """Items are encoded and due to be committed; their chunk has not left."""

    def exhaust(self) -> None:
        """The items have run out; what the format adds has not left."""


class Chunks:
    """An iterator of chunks, counting the items that it has taken."""

    def __init__(self, plan: Plan) -> None:
        self.items = 0
        self.last = False
        self._plan = plan
        self._exhausted = False
        self._encoder: codecs.IncrementalEncoder | None = None

    def of(self, items: Iterator[Any], store: Store) -> Iterator[bytes]:
        """The chunks of ``items``, made one by one; none is empty."""
        format = self._plan.format
        if format is not None:
            return self._gathered(self._formatted(format, items, store))
        raw = self._raw(items, store)
        return self._gathered(raw) if self._plan.chunk_size else raw

    def _raw(self, items: Iterator[Any], store: Store) -> Iterator[bytes]:
        """The items as they are, each stored before it is handed on."""
        every = self._plan.every
        for item in items:
            self.items += 1
            data = item if type(item) is bytes else self._encode(item)
            if every and self.items % every == 0:
                store.settle()
            if data:
                yield data
        self._exhaust(store)
        if tail := self._tail():
            yield tail

    def _formatted(
        self, format: Format, items: Iterator[Any], store: Store
    ) -> Iterator[bytes]:
        """What the format makes of the items, each stored before it is handed on."""
        every, settled = self._plan.every, 0
        for piece in format.encode(self._counted(items, store)):
            data = piece if type(piece) is bytes else self._encode(piece)
            if every and self.items - settled >= every:
                settled = self.items
                store.settle()
            if data:
                yield data
        if not self._exhausted:  # the format has stopped early: that is its end
            self._exhaust(store)
        if tail := self._tail():
            yield tail

    def _counted(self, items: Iterator[Any], store: Store) -> Iterator[Any]:
        for item in items:
            self.items += 1
            yield item
        self._exhaust(store)

    def _exhaust(self, store: Store) -> None:
        store.exhaust()
        self._exhausted = True

    def _gathered(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """``pieces`` in chunks of a size, or of what a slow pull has brought."""
        gathered: list[bytes] = []
        size, seconds = self._plan.chunk_size, self._plan.chunk_seconds
        length, start = 0, clock()
        for piece in pieces:
            gathered.append(piece)
            length += len(piece)
            if not self.items and not self._exhausted:
                continue  # a header alone does not leave: an error may come yet
            if length >= size or clock() - start >= seconds:
                yield b"".join(gathered)
                gathered.clear()
                length, start = 0, clock()
        if gathered:
            self.last = True
            yield b"".join(gathered)

    def _encode(self, piece: Any) -> bytes:
        if isinstance(piece, str):
            if self._encoder is None:
                # Incremental: a byte order mark is said once, and not a piece.
                self._encoder = codecs.getincrementalencoder(self._plan.charset())()
            return self._encoder.encode(piece)
        try:
            return bytes(memoryview(piece))
        except TypeError:
            raise TypeError(self._unencodable(piece)) from None

    def _tail(self) -> bytes:
        return b"" if self._encoder is None else self._encoder.encode("", final=True)

    def _unencodable(self, piece: Any) -> str:
        plan, kind = self._plan, type(piece).__name__
        if plan.format is None:
            return (
                f"{plan.controller} yielded {kind} as item {self.items}: without a "
                "format a stream sends str and bytes; yield those, or name a format"
            )
        return (
            f"{type(plan.format).__name__}.encode() yielded {kind} in "
            f"{plan.controller}: a format yields str or bytes"
        )
