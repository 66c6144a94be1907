"""The compression of a response while it is sent (RFC 9110, sections 8.4 and 12.5.3).

Each chunk is flushed, so that a client can read it before the next one is made. The end
of the coding (the trailer of gzip, the end of a zstd frame, the last block of br) is
sent only if the body has completed, which is after the final commit.

A compressor keeps its window and its tables in memory as long as the stream is open,
and a client that listens to events keeps a stream open for hours. Measured with zlib
1.2.13, zstandard 0.25 and Brotli 1.2, in KB for each open stream, and the ratio for
events of 126 bytes to 9 kB, or for CSV in chunks of 32 KiB:

======  ====================================  =====  ==========
coding  settings                              KB     ratio
======  ====================================  =====  ==========
gzip    level 4, window 4 KB, memory level 4     30  3.9 to 5.9
zstd    level 1, window 4 KB, tables 1 K         56  3.2 to 6.0
br      quality 5, window 4 KB                  371  3.8 to 6.8
gzip    level 4, window 32 KB                   145  4.0
zstd    level 1, window 128 KB                  137  4.5
br      quality 4, window 256 KB                587  4.4
======  ====================================  =====  ==========

The first three are for event streams. gzip is preferred there, and 5,000 open streams
take 208 MiB instead of 61 MiB. br has no smaller setting: its tables are 303 KB at
quality 2, and quality 1 does not compress events, because it forgets everything at each
flush. The other three are for exports, where zstd needs a third of gzip's CPU. Some
decoders of br (curl 7.88, Brotli for Python) return no more than 16 or 32 KiB of a
chunk before the next one arrives.
"""

from __future__ import annotations

import importlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from webob.acceptparse import AcceptEncodingValidHeader, create_accept_encoding_header

from .cleanup import close
from .headers import add_vary, has_no_body

if TYPE_CHECKING:
    from .body import Body
    from .options import Plan

MIN_LENGTH = 1024
"""Bytes of a whole body below which it is not compressed."""

_TEXT = re.compile(
    r"text/.+|[^/]+/(.+[.+-])?(csv|ecmascript|html|javascript|json|jsonl|json-seq"
    r"|ndjson|sql|toml|xhtml|xml|yaml)"
)

_COMPRESSED = re.compile(
    r"(audio|video)/.+|image/(?!svg\+xml|bmp|x-ms-bmp|tiff).+|font/woff2?"
    r"|application/(.+[.+-])?(7z-compressed|br|brotli|bzip2?|compress|compressed|gzip"
    r"|java-archive|lzip|lzma|parquet|rar|xz|zip|zstd)"
    r"|application/vnd\.(openxmlformats-officedocument|oasis\.opendocument)\..+"
)


def is_text(content_type: str) -> bool:
    """Whether a content type without parameters is one of text: CSV, JSON, HTML..."""
    return _TEXT.fullmatch(content_type) is not None


def is_compressible(content_type: str) -> bool:
    """Whether a content type is not compressed already, like ZIP, XLSX and images."""
    return _COMPRESSED.fullmatch(content_type) is None


class Compressor(Protocol):
    """Compresses the chunks of one body."""

    def compress(self, chunk: bytes) -> bytes:
        """Compress a chunk. A client can decompress all of it at once."""

    def finish(self) -> bytes:
        """The end of the coding, after the last chunk."""


class _Gzip:
    def __init__(self, small: bool) -> None:
        bits, memory = (12, 4) if small else (15, 8)
        gzip_header = 16
        self._zlib = zlib.compressobj(4, zlib.DEFLATED, bits + gzip_header, memory)

    def compress(self, chunk: bytes) -> bytes:
        return self._zlib.compress(chunk) + self._zlib.flush(zlib.Z_SYNC_FLUSH)

    def finish(self) -> bytes:
        return self._zlib.flush()


class _Zstd:
    def __init__(self, small: bool) -> None:
        zstandard: Any = _import("zstandard")
        sizes = {"window_log": 17}
        if small:
            sizes = {"window_log": 12, "hash_log": 10, "chain_log": 10}
        parameters = zstandard.ZstdCompressionParameters.from_level(1, **sizes)
        compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self._zstd = compressor.compressobj()
        self._flush_block = zstandard.COMPRESSOBJ_FLUSH_BLOCK

    def compress(self, chunk: bytes) -> bytes:
        data: bytes = self._zstd.compress(chunk) + self._zstd.flush(self._flush_block)
        return data

    def finish(self) -> bytes:
        data: bytes = self._zstd.flush()
        return data


class _Brotli:
    def __init__(self, small: bool) -> None:
        brotli: Any = _import("brotli")
        quality, window = (5, 12) if small else (4, 18)
        self._brotli = brotli.Compressor(
            mode=brotli.MODE_TEXT, quality=quality, lgwin=window
        )

    def compress(self, chunk: bytes) -> bytes:
        data: bytes = self._brotli.process(chunk) + self._brotli.flush()
        return data

    def finish(self) -> bytes:
        data: bytes = self._brotli.finish()
        return data


_CODINGS: dict[str, tuple[str, Callable[[bool], Compressor]]] = {
    "zstd": ("zstandard", _Zstd),
    "br": ("brotli", _Brotli),
    "gzip": ("zlib", _Gzip),
}
"""The module of each coding, and its compressor. The best one for exports is first."""

_SMALLEST = ["gzip", "zstd", "br"]
"""The codings in the order of the memory of an open event stream."""


@lru_cache
def _import(module: str) -> Any:
    """Import an optional module. None if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def choose_coding(accepted: str | None, small: bool = False) -> str | None:
    """Choose the content coding of a response.

    If the client accepts several equally, it is the best one of the server.

    :param accepted: the header ``Accept-Encoding``, None if there is none.
    :param small: whether memory matters most, like for event streams.
    :returns: ``'zstd'``, ``'br'`` or ``'gzip'``. None for no coding: the client prefers
        or accepts nothing else, its header is invalid, or a package is missing.
    """
    header = create_accept_encoding_header(accepted)
    if not isinstance(header, AcceptEncodingValidHeader):
        return None
    offers = header.acceptable_offers(_SMALLEST if small else [*_CODINGS])
    # An identity that is not listed has no quality by RFC 9110. WebOb's is 1.
    listed = [quality for name, quality in header.parsed if name.lower() == "identity"]
    for coding, quality in offers:
        if quality < max(listed, default=0):
            return None
        if _import(_CODINGS[coding][0]) is not None:
            return coding
    return None


def make_compressor(coding: str, small: bool = False) -> Compressor:
    """Make the compressor of a body.

    :param coding: a result of :func:`choose_coding`.
    :param small: whether it has a small window, for a stream that is open for long.
    """
    return _CODINGS[coding][1](small)


class CompressedBody:
    """A body whose chunks are compressed.

    :param body: the body of the stream, None if it is not iterated (HEAD). If it has
        not completed after the last chunk, the end of the coding is not sent. If the
        compressor fails, the body fails.
    """

    def __init__(
        self, chunks: Iterable[bytes], coding: str, small: bool, body: Body | None
    ) -> None:
        self._chunks = chunks
        self._coding = coding
        self._small = small
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        body = self._body
        assert body is not None
        compressor = make_compressor(self._coding, self._small)
        compress = compressor.compress
        for chunk in self._chunks:
            if chunk:
                yield self._run(compress, chunk)
        if body.ended_normally:
            yield self._run(compressor.finish)

    def _run(self, function: Callable[..., bytes], *args: bytes) -> bytes:
        try:
            return function(*args)
        except BaseException as error:
            if self._body is not None:
                self._body.fail_pull(error)
            raise

    def close(self) -> None:
        """Close the body, also if it was never iterated."""
        close(self._chunks)


def compress_response(
    response: Any,
    environ: dict[str, Any],
    plan: Plan,
    length: int | None,
    body: Body | None,
) -> None:
    """Compress a response if its headers allow it, and the client accepts it.

    :param response: a WebOb response, whose ``app_iter`` is replaced.
    :param environ: of its request.
    :param plan: the options of the stream.
    :param length: the bytes of the whole body, if they are known.
    :param body: see :class:`CompressedBody`.
    """
    content_type = (response.content_type or "").lower()
    if not _is_allowed(plan, content_type, response):
        return
    add_vary(response, "Accept-Encoding")
    unmodified = response.status.startswith("304")
    if response.status.startswith("206") or (
        length is not None and length < MIN_LENGTH and not unmodified
    ):
        return
    small = plan.traits.endless or content_type == "text/event-stream"
    coding = choose_coding(environ.get("HTTP_ACCEPT_ENCODING"), small)
    if coding is None:
        return
    etag = response.headers.get("ETag", "")
    known = environ.get("HTTP_IF_NONE_MATCH", "")
    if etag.startswith('"') and (not unmodified or f"W/{etag}" in known):
        # A strong one would be that of the uncompressed bytes.
        response.headers["ETag"] = f"W/{etag}"
    if unmodified:
        return
    # WebOb removes the Content-Length.
    response.app_iter = CompressedBody(response.app_iter, coding, small, body)
    response.headers["Content-Encoding"] = coding
    response.headers.pop("Accept-Ranges", None)


_OF_WHOLE = "206", "304"
"""Responses without the whole body, which have the ``Vary`` of the whole one (RFC 9110,
sections 15.3.7 and 15.4.5). They are not compressed."""


def _is_allowed(plan: Plan, content_type: str, response: Any) -> bool:
    """Whether the response may be compressed for a client that accepts it."""
    headers, status = response.headers, response.status
    if plan.compress is None or not plan.compress(content_type):
        return False
    if "Content-Encoding" in headers:
        return False
    if not status.startswith(_OF_WHOLE) and (
        has_no_body(status) or "Content-Range" in headers
    ):
        return False
    directives = ",".join(headers.getall("Cache-Control")).lower().split(",")
    return "no-transform" not in map(str.strip, directives)
