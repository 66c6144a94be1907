"""The chunks of a body: items in, bytes out, gathered and stored on the way.

Rule: nothing here knows a thread, a request or a server.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any, Protocol

from ..formats.protocols import (
    CountedBatches,
    batch_encoder,
    is_batched,
    iter_batches,
    split_batch,
)
from .cleanup import close
from .errors import StreamError
from .options import Plan, check_charset, clock

LARGEST = 1 << 20
"""Bytes of a chunk that is made of batches, at most, if no more were asked for."""


class StreamEnding(BaseException):
    """Raised between two items, through the format, when the stream is to end.

    Not an ``Exception``: a format that catches those must not catch it.
    """


class Store(Protocol):
    """What is told while the chunks are made."""

    @property
    def closing(self) -> str | None:
        """Why the stream is to end; None while it is not."""

    def checkpoint(self) -> None:
        """No chunk was made yet, and another item is about to be asked for.

        :raises StreamEnding: when the stream is to end.
        """

    def settle(self) -> None:
        """Items are encoded and due to be committed; their chunk has not left."""

    def exhaust(self) -> None:
        """The items have run out; what the format adds has not left."""


_BEFORE_CHECKPOINT = 64
"""Items that a format may take before the stream is watched: few streams have more."""


def encoder_for(plan: Plan) -> codecs.IncrementalEncoder:
    """What encodes the text of a stream: a byte order mark comes once, not a piece.

    :raises ValueError: when the response or the format names an unknown charset.
    """
    charset = plan.charset()
    check_charset(plan.controller, charset)
    return codecs.getincrementalencoder(charset)()


def _texts(pieces: Iterator[Any]) -> Iterator[str]:
    return (piece for piece in pieces if isinstance(piece, str))


class Chunks:
    """An iterator of chunks, counting the items that it has taken."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.last = False
        self._plan = plan
        self._store: Store | None = store
        self.iterator: Any = None  # of the source
        self._items = 0
        self._raw = plan.format is None
        self._held: list[Any] = []  # pieces of the next chunk: str or bytes
        self._exhausted = False
        self._encoder: codecs.IncrementalEncoder | None = None
        self._batch: Sequence[Any] | None = None  # that is encoded now
        self._large = False  # pieces are made of many items
        self._left = 0  # the items whose pieces are no longer held

    @property
    def items(self) -> int:
        """How many items were taken."""
        if self._raw and not self._exhausted:
            return self._items + len(self._held)
        return self._items

    def close(self) -> None:
        """Close the iterator of the source; nothing is told any more."""
        self._store = None  # which holds this: a stream is to be freed at once
        close(self.iterator)

    def of(self, source: Any) -> Iterator[bytes]:
        """The chunks of the source's items, made one by one; none is empty."""
        plan = self._plan
        pieces = self._pieces(source)
        if self._raw and not plan.chunk_size:
            return self._single(pieces)
        chunks = self._gathered(self._stored(pieces) if plan.every else pieces)
        if plan.chunk_size:
            chunks = self._with_rest(chunks)
        if self._large:
            chunks = self._bounded(chunks, max(LARGEST, plan.chunk_size))
        return chunks

    def measured(
        self, first: bytes | None, rest: Iterator[bytes], length: int
    ) -> Iterator[bytes]:
        """The chunks of a body whose length is known.

        :param first: the first chunk, which is made; None if there is none.
        :param rest: the other chunks.
        :raises StreamError: when they have more bytes than ``length``, or fewer.
        """
        return self._measured(chain([] if first is None else [first], rest), length)

    def _pieces(self, source: Any) -> Iterator[Any]:
        """The items as they are, or what the format makes of them."""
        format = self._plan.format
        encode_batches = batch_encoder(format)
        if encode_batches is not None and is_batched(source):
            counted = self._counted_batches(self._batches(source))
            pieces: Iterator[Any] = encode_batches(CountedBatches(source, counted))
            return pieces
        self.iterator = iter(source)
        if format is None:
            taken: Iterator[Any] = self.iterator
            return taken
        return format.encode(self._counted(self.iterator))

    def _batches(self, source: Any) -> Iterator[Sequence[Any]]:
        """The batches; of one item where each may be committed, or leaves alone."""
        if self._plan.chunk_size and not self._plan.every:
            self._large = True
            self.iterator = iter_batches(source)
            return self.iterator  # type: ignore[no-any-return]
        self.iterator = iter(source)
        return ([item] for item in self.iterator)

    def _counted(self, items: Any) -> Iterator[Any]:
        store = self._store
        assert store is not None
        for item in islice(items, _BEFORE_CHECKPOINT):
            self._items += 1
            yield item
            if store.closing is not None:
                store.checkpoint()
        store.checkpoint()  # the format may make nothing of all items
        for item in items:
            self._items += 1
            yield item
            if store.closing is not None:
                store.checkpoint()
        self._exhaust()

    def _counted_batches(
        self, batches: Iterator[Sequence[Any]]
    ) -> Iterator[Sequence[Any]]:
        store = self._store
        assert store is not None
        for number, batch in enumerate(batches, 1):
            for part in split_batch(batch) if batch else ():
                self._items += len(part)
                self._batch = part
                yield part
            if not batch or number == _BEFORE_CHECKPOINT or store.closing is not None:
                store.checkpoint()  # the format may make nothing of all batches
        self._exhaust()

    def _exhaust(self) -> None:
        if self._held:  # what cannot be encoded is to fail before the last commit
            self._held[:] = [self._joined()]
        self._exhausted = True
        if self._store is not None:
            self._store.exhaust()

    def _settle(self) -> None:
        if self._store is not None:
            self._store.settle()

    def _checkpoint(self) -> None:
        if self._store is not None:
            self._store.checkpoint()

    def _single(self, items: Iterator[Any]) -> Iterator[bytes]:
        """A chunk an item, each stored before it is handed on."""
        every = self._plan.every
        for item in items:
            self._items += 1
            data = item if type(item) is bytes else self._encode_of(self._items, item)
            if every and self._items % every == 0:
                self._settle()
            if data:
                yield data
            else:
                self._checkpoint()
        self._exhaust()
        if tail := self._tail():
            yield tail

    def _stored(self, pieces: Iterator[Any]) -> Iterator[bytes]:
        """The pieces encoded, and committed where that is due, before they go on."""
        every, settled = self._plan.every, 0
        for number, piece in enumerate(pieces, 1):
            items = number if self._raw else self._items
            data = piece if type(piece) is bytes else self._encode_of(items, piece)
            if items - settled >= every:
                settled = items
                self._settle()
            yield data

    def _gathered(self, pieces: Iterator[Any]) -> Iterator[bytes]:
        """The pieces in chunks of a size, or of what a slow pull has brought.

        The clock is looked at each time: a producer that was fast may have turned slow.
        """
        size, seconds, now = self._plan.chunk_size, self._plan.chunk_seconds, clock
        held, length = self._held, 0
        hold, due = held.append, now() + seconds
        for piece in pieces:
            if not (size or held) and type(piece) is bytes and piece and self._items:
                yield piece  # a chunk a piece: there is nothing to gather
                continue
            # A str of its own kind waits its turn: the encoder may know an order. That
            # of a batch does not: it is long, and its batch is known now if it fails.
            if type(piece) is not bytes and (
                self._batch is not None or not isinstance(piece, str)
            ):
                piece = self._encode_of(self._items, piece)
            hold(piece)
            length += len(piece)
            if length >= size or now() >= due:
                if not (self._exhausted or self.items):
                    self._checkpoint()
                    continue  # a header alone does not leave: an error may come yet
                if chunk := self._joined():
                    yield chunk
                else:
                    self._checkpoint()
                length, due = 0, now() + seconds
        if not self._exhausted:  # without a format, or one that has stopped early
            self._exhaust()
        chunk = self._joined() + self._tail()
        self.last = True
        if chunk:
            yield chunk

    def _bounded(self, chunks: Iterator[bytes], most: int) -> Iterator[bytes]:
        """The chunks, parted where one has more than ``most`` bytes."""
        for chunk in chunks:
            last, self.last = self.last, False
            while len(chunk) > most:
                yield chunk[:most]
                chunk = chunk[most:]
            self.last = last
            yield chunk

    def _with_rest(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The chunks. If the stream is to end, the last one is what is buffered.

        Its items may be committed, and a body that may end anywhere looks complete.
        """
        try:
            yield from chunks
        except StreamEnding:
            if self.items and (chunk := self._joined()):
                yield chunk
            raise

    def _joined(self) -> bytes:
        """What is held, as one chunk; it is held no longer."""
        held = self._held
        if self._raw and not self._exhausted:
            self._items += len(held)
        if not held:
            return b""
        try:
            return self._encode_all(held)
        except UnicodeEncodeError as error:
            raise self._naming(error, self._items, held) from None
        finally:
            held.clear()
            self._left = self._items

    def _encode_all(self, pieces: list[Any]) -> bytes:
        try:
            if type(pieces[0]) is bytes:
                return b"".join(pieces)
            return self._encode("".join(pieces))
        except TypeError:  # some text, some bytes
            return b"".join(
                [p if type(p) is bytes else self._encode(p) for p in pieces]
            )

    def _measured(self, chunks: Iterator[bytes], length: int) -> Iterator[bytes]:
        """The chunks, of which the completing one comes when all is done.

        A client is content with the last byte: nothing must be able to fail after it.
        """
        made, completing = 0, b""
        for chunk in chunks:
            made += len(chunk)
            if made > length:
                raise StreamError(self._mismeasured("more than", length))
            if made == length:
                completing = chunk
            elif not self.last:
                yield chunk
        if made != length:
            raise StreamError(self._mismeasured(f"{made} bytes of", length))
        self.last = True
        if completing:
            yield completing

    def _mismeasured(self, made: str, length: int) -> str:
        return (
            f"{self._plan.controller} made {made} the {length} bytes that length= had "
            "announced; give the exact number of bytes, or leave length out"
        )

    def _encode(self, piece: Any) -> bytes:
        if isinstance(piece, str):
            if self._encoder is None:
                self._encoder = encoder_for(self._plan)
            return self._encoder.encode(piece)
        try:
            return bytes(memoryview(piece))
        except TypeError:
            raise TypeError(self._unencodable(piece)) from None

    def _encode_of(self, number: int, piece: Any) -> bytes:
        """The bytes of a piece that an item, or the batch up to it, was made into."""
        try:
            return self._encode(piece)
        except UnicodeEncodeError as error:
            if self._batch is None or self._plan.format is None:
                raise self._naming(error, number, [piece]) from None
            encode = self._plan.format.encode
            lines = ["".join(_texts(encode([item]))) for item in self._batch]
            raise self._naming(error, number, lines) from None

    def _naming(
        self, error: UnicodeEncodeError, last: int, texts: Sequence[Any]
    ) -> UnicodeEncodeError:
        """The error, with the item in which it is, and its place there.

        :param last: the number of the item that the last of the texts is made of.
        """
        first = self._left + 1 if self._batch is None else last - len(texts) + 1
        where = f"items {first} to {last}"
        if self._batch is not None or len(texts) in (1, last - self._left):
            for number, text in enumerate(texts, last - len(texts) + 1):
                try:
                    (text if isinstance(text, str) else "").encode(error.encoding)
                except UnicodeEncodeError as found:
                    error, where = found, f"item {number}"
                    break
        return UnicodeEncodeError(
            *(error.encoding, error.object, error.start, error.end),
            f"{error.reason}; it is in {where} of {self._plan.controller}. Replace "
            "the character, or choose another charset",
        )

    def _tail(self) -> bytes:
        return b"" if self._encoder is None else self._encoder.encode("", final=True)

    def _unencodable(self, piece: Any) -> str:
        plan, kind = self._plan, type(piece).__name__
        if plan.format is None:
            number = self._items if not plan.chunk_size else self.items + 1
            return (
                f"{plan.controller} yielded {kind} as item {number}: without a "
                "format a stream sends str and bytes; yield those, or name a format"
            )
        return (
            f"{type(plan.format).__name__}.encode() yielded {kind} in "
            f"{plan.controller}: a format yields str or bytes"
        )
