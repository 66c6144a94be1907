"""``spool=True`` with ``compress=True``: ranges are those of the uncompressed bytes."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import MakeApp
from tests.turbogears.test_spool import (
    BLOCKS,
    LARGE,
    get_raw,
    make_blocks,
    spooled,
)
from tests.wsgi import Call
from tgstream import Report

GZIP: dict[str, Any] = {"HTTP_ACCEPT_ENCODING": "gzip"}


@pytest.fixture
def app(make_app: MakeApp) -> Any:
    """An application whose stream is spooled and compressed."""
    return spooled(make_app, make_blocks, compress=True)


def test_compressed_file_has_no_length_and_no_ranges(
    app: Any, reports: list[Report]
) -> None:
    """Its ``ETag`` is another one than that of the uncompressed bytes."""
    plain, call = get_raw(app), Call(app, **GZIP)
    assert gzip.decompress(call.read()) == BLOCKS
    assert call.status == "200 OK"
    assert call.headers["Content-Encoding"] == "gzip"
    assert "Content-Length" not in call.headers
    assert "Accept-Ranges" not in call.headers
    assert call.headers["ETag"] == f"W/{plain.headers['ETag']}"
    assert plain.headers["Accept-Ranges"] == "bytes"
    assert plain.headers["Content-Length"] == str(LARGE)
    for each in (plain, call):
        assert each.headers["Vary"] == "Accept-Encoding"
    assert [report.bytes for report in reports] == [LARGE] * 2


@pytest.mark.parametrize("compress", [None, False])
def test_option_of_the_application_does_not_compress_a_file(
    make_app: MakeApp, compress: bool | None
) -> None:
    """The download of this controller can be resumed."""
    config = {"tgstream__compress": True}
    app = spooled(make_app, make_blocks, compress=compress, config=config)
    call = get_raw(app, **GZIP)
    assert "Content-Encoding" not in call.headers
    assert call.headers["Content-Length"] == str(LARGE)


def test_range_is_sent_uncompressed(app: Any) -> None:
    """A client counts the bytes of the file that it has decompressed."""
    etag = get_raw(app).headers["ETag"]
    for environ in ({}, {"HTTP_IF_RANGE": etag}):
        call = get_raw(app, HTTP_RANGE="bytes=1000000-", **GZIP, **environ)
        assert call.status_int == 206
        assert "Content-Encoding" not in call.headers
        assert call.headers["Vary"] == "Accept-Encoding"
        assert call.headers["ETag"] == etag
        assert call.text.encode() == BLOCKS[1000000:]


def test_compressed_file_is_not_resumed(app: Any) -> None:
    """With the ``ETag`` of the compressed bytes, a client gets all of them again."""
    first = Call(app, **GZIP)
    first.read()
    etag = first.headers["ETag"]
    call = Call(app, HTTP_RANGE="bytes=1000-", HTTP_IF_RANGE=etag, **GZIP)
    assert call.status == "200 OK"
    assert gzip.decompress(call.read()) == BLOCKS


def test_unchanged_compressed_file_is_not_sent_again(app: Any) -> None:
    """``If-None-Match`` compares weakly (RFC 9110, 13.1.2)."""
    first = Call(app, **GZIP)
    first.read()
    call = get_raw(app, HTTP_IF_NONE_MATCH=first.headers["ETag"], **GZIP)
    assert (call.status_int, call.text) == (304, "")
    assert call.headers["Vary"] == "Accept-Encoding"
    assert call.headers["ETag"] == first.headers["ETag"]


def test_304_has_the_etag_that_the_client_knows(app: Any) -> None:
    """A cache updates the response with that ``ETag`` (RFC 9111, 4.3.4)."""
    tag = get_raw(app).headers["ETag"]
    for known in tag, f"W/{tag}", "*":
        call = get_raw(app, HTTP_IF_NONE_MATCH=known, **GZIP)
        assert call.status_int == 304
        assert call.headers["ETag"] == (tag if known == "*" else known)


def test_error_at_the_last_row_is_not_compressed(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """It is an ordinary error page."""

    def items() -> Iterator[bytes]:
        yield from make_blocks()
        raise LookupError("at the end")

    call = get_raw(spooled(make_app, items, compress=True), **GZIP)
    assert call.status_int == 500
    assert "Content-Encoding" not in call.headers
    assert [report.reason for report in reports] == ["failed"]
