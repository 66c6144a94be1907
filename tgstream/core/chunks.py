"""The chunks of a body: items in, bytes out, buffered and committed on the way.

Nothing here uses a thread, a request or a server.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Protocol, TypeAlias

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
from .source import Sources

_Chunks: TypeAlias = Generator[bytes, None, None]

MAX_CHUNK = 1 << 20
"""Maximum bytes of a chunk that is made of batches, unless ``chunk_size`` is larger."""


class StreamEnding(BaseException):
    """Raised between two items, through the format, when the stream is to end.

    Not an ``Exception``: a format that catches those must not catch it.
    """


class Consumer(Protocol):
    """The body, as it takes part in making the chunks."""

    @property
    def closing(self) -> str | None:
        """The reason to end the stream. None while it is not to end."""

    def checkpoint(self) -> None:
        """Called before another item is taken, if no chunk was made yet.

        :raises StreamEnding: when the stream is to end.
        """

    def commit_items(self) -> None:
        """Commit the items so far. They are encoded, and their chunk is not sent."""

    def finish_items(self) -> None:
        """Commit after the last item. The end of the format is not sent."""


_BEFORE_CHECKPOINT = 64
"""Items that a format may take before the stream is watched: few streams have more."""


class Chunks:
    """The chunks of one body. It counts the items that it has taken.

    :param charset: returns the charset of the response. Called for the first text.
    """

    last = False
    """Whether the chunk that was made last is the last of all."""
    iterator: Any = None
    """The iterator of the source."""
    finished = False
    """Whether the items have run out, and were committed if that is due."""
    _encoder: codecs.IncrementalEncoder | None = None
    _large = False  # each output of the format has many items
    _items = _flushed = 0  # taken, and no longer in the buffer

    def __init__(
        self, plan: Plan, charset: Callable[[], str], consumer: Consumer
    ) -> None:
        self._plan = plan
        self._charset = charset
        self._consumer: Consumer | None = consumer
        self._raw = plan.format is None
        self._buffer: list[Any] = []  # str or bytes of the next chunk
        self._batch: Sequence[Any] | None = None  # the batch that is being encoded

    @property
    def items(self) -> int:
        """The number of items that were taken."""
        if self._raw and not self.finished:
            return self._items + len(self._buffer)
        return self._items

    def detach(self) -> None:
        """Let go of the body, which has this: a stream must be freed at once."""
        self._consumer = None

    def close(self) -> None:
        """Close the iterator of the source. The body is not called again."""
        self.detach()
        close(self.iterator)

    def make(self, source: Any) -> _Chunks:
        """The chunks of the items of ``source``, made one by one. None is empty."""
        plan = self._plan
        if self._raw and not plan.chunk_size:
            self.iterator = iter(source)
            return self._send_each_item(self.iterator)
        output = self._encode_source(source)
        chunks = self._buffer_output(
            self._commit_output(output) if plan.commit_every else output
        )
        if plan.chunk_size:
            chunks = self._flush_at_end(chunks)
        if self._large:
            chunks = self._split_large(chunks, max(MAX_CHUNK, plan.chunk_size))
        return chunks

    def check_length(
        self, first: bytes | None, rest: Iterator[bytes], length: int
    ) -> _Chunks:
        """The chunks of a body whose length is declared.

        :param first: the first chunk, which is made. None if there is none.
        :param rest: the other chunks.
        :raises StreamError: when they have more bytes than ``length``, or fewer.
        """
        return self._check_length(chain([] if first is None else [first], rest), length)

    def _encode_source(self, source: Any) -> Iterator[Any]:
        """The items as they are, or the output of the format."""
        format = self._plan.format
        if isinstance(source, Sources):
            return self._encode_sources(source)
        encode_batches = batch_encoder(format)
        if encode_batches is not None and is_batched(source):
            counted = self._count_batches(self._batches(source))
            output: Iterator[Any] = encode_batches(CountedBatches(source, counted))
            return output
        self.iterator = iter(source)
        if format is None:
            items: Iterator[Any] = self.iterator
            return items
        return format.encode(self._count_items(self.iterator))

    def _encode_sources(self, sources: Sources) -> Iterator[Any]:
        """The output of a format that encodes several sources, one after the other."""
        encode = self._plan.traits.encode_sources
        assert encode is not None  # the stream has checked that
        self._large = bool(self._plan.chunk_size)
        unread = [*sources]

        def count(name: str) -> Iterator[Sequence[Any]]:
            unread.remove(name)
            yield from self._count_batches(
                self._source_batches(sources[name]), is_last=not unread
            )

        return encode(
            {name: CountedBatches(sources[name], count(name)) for name in sources}
        )

    def _source_batches(self, source: Any) -> Iterator[Sequence[Any]]:
        if is_batched(source):
            return self._batches(source)
        self.iterator = iter(source)
        return ([item] for item in self.iterator)

    def _batches(self, source: Any) -> Iterator[Sequence[Any]]:
        """The batches. They have one item if each item has its commit or its chunk."""
        if self._plan.chunk_size and not self._plan.commit_every:
            self._large = True
            self.iterator = iter_batches(source)
            return self.iterator  # type: ignore[no-any-return]
        self.iterator = iter(source)
        return ([item] for item in self.iterator)

    def _count_items(self, items: Any) -> Iterator[Any]:
        consumer = self._consumer
        assert consumer is not None
        for item in islice(items, _BEFORE_CHECKPOINT):
            self._items += 1
            yield item
            if consumer.closing is not None:
                consumer.checkpoint()
        consumer.checkpoint()  # the format may make no output of all items
        for item in items:
            self._items += 1
            yield item
            if consumer.closing is not None:
                consumer.checkpoint()
        self._finish_items()

    def _count_batches(
        self, batches: Iterator[Sequence[Any]], is_last: bool = True
    ) -> Iterator[Sequence[Any]]:
        consumer = self._consumer
        assert consumer is not None
        for number, batch in enumerate(batches, 1):
            for part in split_batch(batch) if batch else ():
                self._items += len(part)
                self._batch = part
                yield part
            if (
                not batch
                or number == _BEFORE_CHECKPOINT
                or consumer.closing is not None
            ):
                consumer.checkpoint()  # the format may make no output of all batches
        if is_last:
            self._finish_items()

    def _finish_items(self) -> None:
        if self._buffer:  # text that cannot be encoded must fail before the last commit
            self._buffer[:] = [self._flush()]
        self.finished = True
        if self._consumer is not None:
            self._consumer.finish_items()

    def _commit_items(self) -> None:
        if self._consumer is not None:
            self._consumer.commit_items()

    def _checkpoint(self) -> None:
        if self._consumer is not None:
            self._consumer.checkpoint()

    def _send_each_item(self, items: Iterator[Any]) -> _Chunks:
        """A chunk for each item. Its commit is before its chunk."""
        every = self._plan.commit_every
        for item in items:
            self._items += 1
            data = item if type(item) is bytes else self._encode_item(self._items, item)
            if every and self._items % every == 0:
                self._commit_items()
            if data:
                yield data
            else:
                self._checkpoint()
        self._finish_items()
        if self._encoder is not None and (final := self._finish_encoding()):
            yield final

    def _commit_output(self, output: Iterator[Any]) -> Iterator[bytes]:
        """The output, encoded. A commit that is due comes before its output."""
        every, committed = self._plan.commit_every, 0
        for number, text in enumerate(output, 1):
            items = number if self._raw else self._items
            data = text if type(text) is bytes else self._encode_item(items, text)
            if items - committed >= every:
                committed = items
                self._commit_items()
            yield data

    def _buffer_output(self, output: Iterator[Any]) -> _Chunks:
        """The output in chunks of a size, or of all that a slow pull has buffered.

        It reads the clock each time, because a generator that was fast may get slow.
        """
        size, seconds, now = self._plan.chunk_size, self._plan.flush_seconds, clock
        buffer, length = self._buffer, 0
        add, due = buffer.append, now() + seconds
        for text in output:
            if not (size or buffer) and type(text) is bytes and text and self._items:
                yield text  # a chunk for each output: there is nothing to buffer
                continue
            # A subclass of str is encoded later: the encoder may have an order. The
            # output of a batch is not: it is long, and its batch is known now if it
            # fails.
            if type(text) is not bytes and (
                self._batch is not None or not isinstance(text, str)
            ):
                text = self._encode_item(self._items, text)
            add(text)
            length += len(text)
            if length >= size or now() >= due:
                if not (self.finished or self.items):
                    self._checkpoint()
                    continue  # a header alone is not sent: an error may follow
                if chunk := self._flush():
                    yield chunk
                else:
                    self._checkpoint()
                length, due = 0, now() + seconds
        if not self.finished:  # without a format, or with a format that stopped early
            self._finish_items()
        chunk = self._flush() + self._finish_encoding()
        self.last = True
        if chunk:
            yield chunk

    def _split_large(self, chunks: Iterator[bytes], most: int) -> _Chunks:
        """The chunks, split if they have more than ``most`` bytes."""
        for chunk in chunks:
            last, self.last = self.last, False
            while len(chunk) > most:
                yield chunk[:most]
                chunk = chunk[most:]
            self.last = last
            yield chunk

    def _flush_at_end(self, chunks: Iterator[bytes]) -> _Chunks:
        """The chunks. If the stream is to end, the last one is what is buffered.

        Its items may be committed, and a body that may end anywhere looks complete.
        """
        try:
            yield from chunks
        except StreamEnding:
            if self.items and (chunk := self._flush()):
                yield chunk
            raise

    def _flush(self) -> bytes:
        """Empty the buffer into one chunk."""
        buffer = self._buffer
        if self._raw and not self.finished:
            self._items += len(buffer)
        if not buffer:
            return b""
        try:
            return self._encode_all(buffer)
        except UnicodeEncodeError as error:
            raise self._name_item(error, self._items, buffer) from None
        finally:
            buffer.clear()
            self._flushed = self._items

    def _encode_all(self, output: list[Any]) -> bytes:
        try:
            if type(output[0]) is bytes:
                return b"".join(output)
            return self._encode("".join(output))
        except TypeError:  # some text, some bytes
            return b"".join(
                [each if type(each) is bytes else self._encode(each) for each in output]
            )

    def _check_length(self, chunks: Iterator[bytes], length: int) -> _Chunks:
        """The chunks. The chunk that completes the body comes after the end of all.

        A client takes a response as complete with its last byte, so that nothing may
        fail after it.
        """
        sent, completing = 0, b""
        for chunk in chunks:
            sent += len(chunk)
            if sent > length:
                raise StreamError(self._wrong_length(f"more than {length}", length))
            if sent == length:
                completing = chunk
            elif not self.last:
                yield chunk
        if sent != length:
            raise StreamError(self._wrong_length(str(sent), length))
        self.last = True
        if completing:
            yield completing

    def _wrong_length(self, sent: str, length: int) -> str:
        return (
            f"{self._plan.controller} sent {sent} bytes, but length={length} was "
            "declared. Pass the exact number of bytes, or omit length"
        )

    def _encode(self, text: Any) -> bytes:
        if isinstance(text, str):
            if self._encoder is None:
                self._encoder = self._make_encoder()
            return self._encoder.encode(text)
        try:
            return bytes(memoryview(text))
        except TypeError:
            raise TypeError(self._describe_type(text)) from None

    def _make_encoder(self) -> codecs.IncrementalEncoder:
        """The encoder of all text: a byte order mark comes once for the body.

        :raises ValueError: when the response or the format names an unknown charset.
        """
        charset = self._charset()
        check_charset(self._plan.controller, charset)
        return codecs.getincrementalencoder(charset)()

    def _encode_item(self, number: int, text: Any) -> bytes:
        """Encode the output of an item, or of the batch that ends with it."""
        try:
            return self._encode(text)
        except UnicodeEncodeError as error:
            if self._batch is None or self._plan.format is None:
                raise self._name_item(error, number, [text]) from None
            encode = self._plan.format.encode
            lines = ["".join(_only_texts(encode([item]))) for item in self._batch]
            raise self._name_item(error, number, lines) from None

    def _name_item(
        self, error: UnicodeEncodeError, last: int, texts: Sequence[Any]
    ) -> UnicodeEncodeError:
        """The error, with the item that has the character, and the place in it.

        :param last: the number of the item that the last of the texts belongs to.
        """
        first = self._flushed + 1 if self._batch is None else last - len(texts) + 1
        where = f"items {first} to {last}"
        if self._batch is not None or len(texts) in (1, last - self._flushed):
            for number, text in enumerate(texts, last - len(texts) + 1):
                try:
                    (text if isinstance(text, str) else "").encode(error.encoding)
                except UnicodeEncodeError as own_error:
                    error, where = own_error, f"item {number}"
                    break
        return UnicodeEncodeError(
            error.encoding,
            error.object,
            error.start,
            error.end,
            f"{error.reason} in {where} of {self._plan.controller}. Replace the "
            "character, or choose another charset",
        )

    def encode_failure(self, incident: str) -> bytes:
        """The last bytes of a failed body. Empty if the format has no such bytes.

        :param incident: the id of the failure.
        """
        encode = getattr(self._plan.format, "encode_failure", None)
        output = None if encode is None else encode(incident)
        return self._encode(output) if output else b""

    def encode_replaced(self) -> bytes:
        """The last bytes of a replaced body. Empty if the format has no such bytes."""
        encode = getattr(self._plan.format, "encode_replaced", None)
        output = None if encode is None else encode()
        return self._encode(output) if output else b""

    def _finish_encoding(self) -> bytes:
        return b"" if self._encoder is None else self._encoder.encode("", final=True)

    def _describe_type(self, value: Any) -> str:
        plan, type_name = self._plan, type(value).__name__
        if plan.format is None:
            number = self._items if not plan.chunk_size else self.items + 1
            return (
                f"{plan.controller} yielded {type_name} as item {number}, but without "
                "a format a stream sends str and bytes. Yield those, or pass a format"
            )
        return (
            f"{type(plan.format).__name__}.encode() yielded {type_name} in "
            f"{plan.controller}, but a format must yield str or bytes"
        )


def _only_texts(output: Iterator[Any]) -> Iterator[str]:
    return (text for text in output if isinstance(text, str))
