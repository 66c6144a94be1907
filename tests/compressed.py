"""Decompressors for the tests, which are not those of tgstream's clients."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import brotli
import zstandard

CODINGS = ["gzip", "zstd", "br"]


class Decompressor:
    """Decompresses the chunks of a body, as they arrive."""

    def __init__(self, coding: str) -> None:
        if coding == "br":
            decoder = brotli.Decompressor()
            self.decompress: Callable[[bytes], bytes] = decoder.process
            self._is_finished: Callable[[], Any] = decoder.is_finished
        else:
            decoder = zlib.decompressobj(31)
            if coding == "zstd":
                decoder = zstandard.ZstdDecompressor().decompressobj()
            self.decompress = decoder.decompress
            self._is_finished = lambda: decoder.eof

    @property
    def finished(self) -> bool:
        """Whether the end of the coding was read."""
        return bool(self._is_finished())


def decompress(coding: str, chunks: Iterable[bytes]) -> tuple[bytes, bool]:
    """Return the decompressed bytes, and whether they have the end of the coding."""
    decompressor = Decompressor(coding)
    data = b"".join(map(decompressor.decompress, chunks))
    return data, decompressor.finished
