"""Parquet and Arrow: the formats that write columns with types, for data frames.

pyarrow encodes them. It is imported when the first stream begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .protocols import Batched
from .table import check_header

if TYPE_CHECKING:
    from .arrow_encoder import Encoder


class _ArrowFormat:
    """The base of both formats: groups of rows, which an encoder writes."""

    def __init__(self, header: Sequence[str] | None) -> None:
        self._name = type(self).__name__
        if find_spec("pyarrow") is None:
            raise ImportError(
                f"{self._name} needs pyarrow. Install it with: "
                "pip install 'tgstream[arrow]'"
            )
        self._header = check_header(self._name, header)

    def _make_encoder(self) -> Encoder:
        raise NotImplementedError

    def encode(self, items: Iterable[Any]) -> Iterator[bytes]:
        """Yield the groups of rows that are complete, and the end of the file."""
        encoder = self._make_encoder()
        try:
            for item in items:
                encoder.add_item(item)
                if encoder.group_is_complete:
                    yield from encoder.encode_group()
                else:
                    yield b""  # the stream commits after an output, if it is due
            yield from encoder.finish()
        finally:
            encoder.abandon()

    def encode_batches(self, source: Batched) -> Iterator[bytes]:
        """Do the same, with the types that the source declares."""
        encoder = self._make_encoder()
        try:
            for batch in source.batches():
                while batch:
                    batch = encoder.add_batch(batch, source)
                    if encoder.group_is_complete:
                        yield from encoder.encode_group()
                yield b""  # as above
            yield from encoder.finish(source)
        finally:
            encoder.abandon()

    def _check_rows(self, option: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{self._name}: {option} must be a number of rows, an integer >= 1, "
                f"got {value!r}"
            )
        return value


class Parquet(_ArrowFormat):
    """A table as an Apache Parquet file, compressed with Snappy.

    The columns have the types that the statement declares. If there is no statement,
    they have the types of the values in the first row group.

    The rows of a row group are in memory until it is complete. Then it is sent. A row
    group also ends when its values have 64 MiB. Readers need the last bytes of the
    file, which are sent after the last commit.

    :param row_group: maximum number of rows in a row group.
    :param header: the names of the columns, if the items have no names, or others.
    :raises ImportError: if pyarrow is not installed.
    :raises TypeError: if ``header`` is not a list of names.
    :raises ValueError: if ``row_group`` is not an integer >= 1.
    """

    content_type = "application/vnd.apache.parquet"
    suffix = "parquet"

    def __init__(
        self, row_group: int = 100_000, header: Sequence[str] | None = None
    ) -> None:
        super().__init__(header)
        self._row_group = self._check_rows("row_group", row_group)

    def _make_encoder(self) -> Encoder:
        from .arrow_encoder import Encoder, ParquetWriter

        return Encoder(
            self._name, self._header, ParquetWriter, self._row_group, 1 << 26
        )


class Arrow(_ArrowFormat):
    """A table as a stream of Apache Arrow record batches: the IPC streaming format.

    The columns have the types that the statement declares. If there is no statement,
    they have the types of the values in the first record batch.

    A record batch is sent when it is complete. It also ends when its values have 4 MiB.
    If a transfer is aborted between two record batches, the part that was sent looks
    complete to readers.

    :param batch: maximum number of rows in a record batch.
    :param header: the names of the columns, if the items have no names, or others.
    :raises ImportError: if pyarrow is not installed.
    :raises TypeError: if ``header`` is not a list of names.
    :raises ValueError: if ``batch`` is not an integer >= 1.
    """

    content_type = "application/vnd.apache.arrow.stream"
    suffix = "arrow"

    def __init__(
        self, batch: int = 10_000, header: Sequence[str] | None = None
    ) -> None:
        super().__init__(header)
        self._batch = self._check_rows("batch", batch)

    def _make_encoder(self) -> Encoder:
        from .arrow_encoder import Encoder, StreamWriter

        return Encoder(self._name, self._header, StreamWriter, self._batch, 1 << 22)
