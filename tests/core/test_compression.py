"""The content codings: their choice, and what is readable of a body at any time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compressed import CODINGS, Decompressor, decompress
from tgstream.core import compression
from tgstream.core.compression import (
    CompressedBody,
    choose_coding,
    is_compressible,
    is_text,
)

quick = settings(deadline=None, database=None, max_examples=60)
chunk_lists = st.lists(st.binary(max_size=200).map(lambda data: data * 7), max_size=12)


def make_body(
    coding: str, chunks: object, small: bool = False, complete: bool = True
) -> CompressedBody:
    body: Any = SimpleNamespace(ended_normally=complete)
    return CompressedBody(chunks, coding, small, body)  # type: ignore[arg-type]


@pytest.mark.parametrize("small", [True, False], ids=["events", "export"])
@pytest.mark.parametrize("coding", CODINGS)
@given(chunks=chunk_lists)
@quick
def test_each_chunk_is_readable_before_the_next_one_is_made(
    coding: str, small: bool, chunks: list[bytes]
) -> None:
    """The body has the same bytes, and its end comes after the last chunk."""
    decompressor, made = Decompressor(coding), b""

    def make() -> Iterator[bytes]:
        nonlocal made
        for chunk in chunks:
            made += chunk
            yield chunk

    received = b""
    for data in make_body(coding, make(), small):
        assert not decompressor.finished
        received += decompressor.decompress(data)
        assert received == made
    assert received == b"".join(chunks)
    assert decompressor.finished


@pytest.mark.parametrize("small", [True, False], ids=["events", "export"])
@pytest.mark.parametrize("coding", CODINGS)
def test_chunks_larger_than_any_window_are_readable(coding: str, small: bool) -> None:
    """The bytes of 3 MB, which repeat over a distance of 300 kB, are the same."""
    pattern = b"".join(b"%d," % (n * n) for n in range(40_000))
    chunks = [pattern * 5, b"x", pattern * 5]
    data, finished = decompress(coding, make_body(coding, chunks, small))
    assert (data == b"".join(chunks), finished) == (True, True)


@pytest.mark.parametrize("coding", CODINGS)
def test_body_that_has_not_completed_has_no_end(coding: str) -> None:
    """It may have stopped, or raised an error, which is passed on."""
    assert decompress(coding, make_body(coding, [b"one"], complete=False)) == (
        b"one",
        False,
    )

    def fail() -> Iterator[bytes]:
        yield b"one"
        raise LookupError

    body, received = iter(make_body(coding, fail())), []
    with pytest.raises(LookupError):
        for chunk in body:
            received.append(chunk)
    assert decompress(coding, received) == (b"one", False)


def test_empty_chunk_is_not_sent() -> None:
    """A flush of nothing would be bytes that no client needs."""
    assert len([*make_body("gzip", [b"", b"one", b""])]) == 2


def test_body_that_was_never_iterated_is_closed() -> None:
    """A generator that was never started does not close anything."""

    class Source:
        closed = 0

        def __iter__(self) -> Iterator[bytes]:
            raise AssertionError

        def close(self) -> None:
            self.closed += 1

    source = Source()
    body = make_body("gzip", source)
    iter(body)
    body.close()
    assert source.closed == 1


# The choice.


@pytest.mark.parametrize(
    ("accepted", "export", "events"),
    [
        (None, None, None),
        ("", None, None),
        ("identity", None, None),
        ("gzip", "gzip", "gzip"),
        ("br", "br", "br"),
        ("gzip, deflate, br, zstd", "zstd", "gzip"),
        ("gzip, deflate, br", "br", "gzip"),
        ("br;q=1.0, gzip;q=0.8, *;q=0.1", "br", "br"),
        ("GZIP;Q=0.5", "gzip", "gzip"),
        ("gzip;q=0.001", "gzip", "gzip"),
        ("gzip;q=0", None, None),
        ("gzip;q=0.000, br", "br", "br"),
        ("*", "zstd", "gzip"),
        ("*;q=0", None, None),
        ("zstd;q=0, *", "br", "gzip"),
        ("gzip, identity;q=0", "gzip", "gzip"),
        ("identity;q=0", None, None),
        ("gzip;q=0.5, identity", None, None),
        ("gzip;q=0.5, identity;q=0.5", "gzip", "gzip"),
        ("gzip;q=0.5, IDENTITY;q=0.6", None, None),
        ("deflate, compress, x-unknown", None, None),
        (",, gzip ,,", "gzip", "gzip"),
        ("gzip;q=2", None, None),
        ("gzip;q=nan", None, None),
        ("gzip;level=1", None, None),
        ("gzip;", None, None),
        ('"gzip"', None, None),
        ("gzip\xa0", None, None),
    ],
)
def test_coding_is_the_one_that_the_client_prefers(
    accepted: str | None, export: str | None, events: str | None
) -> None:
    """RFC 9110, 12.5.3. The server's preference decides among equal qualities."""
    assert choose_coding(accepted) == export
    assert choose_coding(accepted, small=True) == events


@pytest.mark.parametrize(
    "accepted",
    [
        "," * 10_000,
        "gzip," * 2000,
        "a" * 10_000,
        "gzip;q=0." + "0" * 10_000,
        "gzip; " + " " * 10_000 + "q=1",
        ", " * 5000 + "!",
        ";" * 10_000,
    ],
    ids=lambda accepted: accepted[:10],
)
def test_header_of_10_kb_is_read(accepted: str) -> None:
    """It takes some milliseconds, and is valid or not."""
    assert choose_coding(accepted) in (None, "gzip")


@given(st.text(alphabet="gzipbrstd*;q=01., \t\"'", max_size=60))
@quick
def test_any_header_has_a_valid_choice(accepted: str) -> None:
    """No text is an error."""
    assert choose_coding(accepted) in (None, *CODINGS)


@pytest.mark.parametrize(
    ("missing", "chosen"),
    [(["zstandard"], "br"), (["zstandard", "brotli"], "gzip"), (["brotli"], "zstd")],
)
def test_coding_whose_package_is_missing_is_not_offered(
    monkeypatch: pytest.MonkeyPatch, missing: list[str], chosen: str
) -> None:
    """A client that accepts nothing else gets no coding."""
    compression._import.cache_clear()
    with monkeypatch.context() as patch:
        for name in missing:
            patch.setitem(sys.modules, name, None)
        assert choose_coding("zstd, br, gzip") == chosen
        for coding in {"zstandard": "zstd", "brotli": "br"}[missing[0]], "deflate":
            assert choose_coding(coding) is None
    compression._import.cache_clear()


@pytest.mark.parametrize(
    ("content_type", "text", "compressible"),
    [
        ("text/csv", True, True),
        ("text/event-stream", True, True),
        ("text/html", True, True),
        ("application/json", True, True),
        ("application/x-ndjson", True, True),
        ("application/ld+json", True, True),
        ("application/xhtml+xml", True, True),
        ("application/javascript", True, True),
        ("image/svg+xml", True, True),
        ("application/vnd.apache.arrow.stream", False, True),
        ("application/octet-stream", False, True),
        ("application/pdf", False, True),
        ("", False, True),
        ("image/bmp", False, True),
        ("image/png", False, False),
        ("video/mp4", False, False),
        ("font/woff2", False, False),
        ("application/zip", False, False),
        ("application/epub+zip", False, False),
        ("application/gzip", False, False),
        ("application/x-7z-compressed", False, False),
        ("application/vnd.apache.parquet", False, False),
        (
            "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
            False,
            False,
        ),
        ("application/vnd.oasis.opendocument.text", False, False),
    ],
)
def test_content_type_is_text_or_compressed_already(
    content_type: str, text: bool, compressible: bool
) -> None:
    """The option of the application compresses text alone."""
    assert is_text(content_type) is text
    assert is_compressible(content_type) is compressible


MEMORY = """
import psutil
from tgstream.core.compression import make_compressor
event = b'data: {"id": 1, "status": "paid"}' * 4
make_compressor(%r, small=True).compress(event)
before = psutil.Process().memory_info().rss
streams = [make_compressor(%r, small=True) for _ in range(500)]
for stream in streams:
    stream.compress(event)
print((psutil.Process().memory_info().rss - before) // 500 // 1000)
"""


@pytest.mark.parametrize(("coding", "limit"), [("gzip", 40), ("zstd", 75), ("br", 450)])
def test_memory_of_an_open_event_stream_is_small(coding: str, limit: int) -> None:
    """In a new process, so that the memory was not used before. The unit is KB."""
    script = MEMORY % (coding, coding)
    environ = {**os.environ, "PYTHONDEVMODE": ""}  # it writes to all it allocates
    command = [sys.executable, "-W", "ignore", "-c", script]
    run = subprocess.run(command, stdout=subprocess.PIPE, env=environ)
    assert 5 < int(run.stdout) <= limit
