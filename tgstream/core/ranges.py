"""Conditional requests and ranges: which bytes of a file answer a request.

RFC 9110, sections 8.8 (validators), 13 (conditional requests) and 14 (ranges). Nothing
here reads a file, a clock or a response.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from email.utils import formatdate, mktime_tz, parsedate_tz
from itertools import pairwise
from typing import Any, NamedTuple

MAX_RANGES = 16
"""Ranges of a request that are answered. A request with more gets the whole file."""


class Representation(NamedTuple):
    """The content that a resource has now.

    ``size`` is its bytes. ``etag`` is the value of its header ``ETag``, with quotes.
    ``last_modified`` is the time of its last change, in seconds since 1970. Both are
    None if they are not known.
    """

    size: int
    etag: str | None = None
    last_modified: int | None = None


class Answer(NamedTuple):
    """The answer to a request for a file.

    ``ranges`` are the positions of the bytes that are sent. There are none for a 304,
    412 or 416.
    """

    status: int
    ranges: list[range]
    headers: dict[str, str]


def evaluate(environ: Mapping[str, Any], content: Representation) -> Answer:
    """Answer a request whose response would be a 200 with the whole content.

    Conditions are evaluated in the order of RFC 9110, section 13.2.2. A ``Range`` is
    ignored if its syntax is invalid or its unit is unknown, if its ranges overlap or
    are more than :data:`MAX_RANGES`, and for all methods but ``GET``.

    :param environ: the WSGI environ of the request.
    """
    method = environ["REQUEST_METHOD"]
    headers = _describe(content)
    if method not in ("GET", "HEAD"):
        return Answer(200, [range(content.size)], headers)
    if not _is_precondition_met(environ, content):
        return Answer(412, [], headers)
    if _is_unmodified(environ, content):
        return Answer(304, [], headers)
    ranges = None
    if method == "GET" and "HTTP_RANGE" in environ and _is_in_range(environ, content):
        ranges = parse_range(environ["HTTP_RANGE"], content.size)
    if ranges is None:
        return Answer(200, [range(content.size)], headers)
    if not ranges:
        headers["Content-Range"] = f"bytes */{content.size}"
        return Answer(416, [], headers)
    if len(ranges) == 1:
        headers["Content-Range"] = format_content_range(ranges[0], content.size)
    return Answer(206, ranges, headers)


def _describe(content: Representation) -> dict[str, str]:
    """The headers of every response about the content."""
    headers = {"Accept-Ranges": "bytes"}
    if content.etag is not None:
        headers["ETag"] = content.etag
    if content.last_modified is not None:
        headers["Last-Modified"] = formatdate(content.last_modified, usegmt=True)
    return headers


# Conditions, RFC 9110, section 13.1.

_ETAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')


def _is_precondition_met(environ: Mapping[str, Any], content: Representation) -> bool:
    """Whether ``If-Match``, or else ``If-Unmodified-Since``, is true."""
    if "HTTP_IF_MATCH" in environ:
        wanted = environ["HTTP_IF_MATCH"].strip()
        if wanted == "*":
            return True
        return _is_strong(content.etag) and content.etag in _ETAG.findall(wanted)
    since = parse_date(environ.get("HTTP_IF_UNMODIFIED_SINCE"))
    return (
        since is None or content.last_modified is None or content.last_modified <= since
    )


def _is_unmodified(environ: Mapping[str, Any], content: Representation) -> bool:
    """Whether ``If-None-Match``, or else ``If-Modified-Since``, is false."""
    if "HTTP_IF_NONE_MATCH" in environ:
        known = environ["HTTP_IF_NONE_MATCH"].strip()
        if known == "*":
            return True
        tags = {tag.removeprefix("W/") for tag in _ETAG.findall(known)}
        return content.etag is not None and content.etag.removeprefix("W/") in tags
    since = parse_date(environ.get("HTTP_IF_MODIFIED_SINCE"))
    return since is not None and (
        content.last_modified is not None and content.last_modified <= since
    )


def _is_in_range(environ: Mapping[str, Any], content: Representation) -> bool:
    """Whether ``If-Range`` is true or missing, so that ``Range`` counts."""
    if "HTTP_IF_RANGE" not in environ:
        return True
    validator = environ["HTTP_IF_RANGE"].strip()
    if '"' in validator:
        return _is_strong(content.etag) and content.etag == validator
    date = parse_date(validator)
    return date is not None and date == content.last_modified


def _is_strong(etag: str | None) -> bool:
    return etag is not None and not etag.startswith("W/")


def parse_date(text: str | None) -> int | None:
    """The seconds since 1970 of an HTTP date. None if it is missing or invalid."""
    if text is None or len(text) > 64:
        return None
    try:
        parts = parsedate_tz(text)
        return None if parts is None else int(mktime_tz(parts))
    except (ValueError, OverflowError, IndexError, TypeError):
        return None


# Ranges, RFC 9110, section 14.1.

_RANGE = re.compile(r"(?:([0-9]+)-([0-9]*)|-([0-9]+))")


def parse_range(header: str, size: int) -> list[range] | None:
    """The positions that a ``Range`` header selects of ``size`` bytes.

    :returns: the ranges that are not empty, in their order. An empty list if the
        content has none of them. None if the header must be ignored.
    """
    unit, equals, text = header.partition("=")
    if unit.strip().lower() != "bytes" or not equals:
        return None
    specs = [spec.strip(" \t") for spec in text.split(",", 2 * MAX_RANGES)]
    specs = [spec for spec in specs if spec]  # a list may have empty elements
    if not 0 < len(specs) <= MAX_RANGES:
        return None
    ranges = []
    for spec in specs:
        selected = _parse_spec(spec, size)
        if selected is None:
            return None
        ranges.append(selected)
    ranges = [selected for selected in ranges if selected]
    in_order = sorted(ranges, key=lambda selected: selected.start)
    for one, following in pairwise(in_order):
        if following.start < one.stop:
            return None
    return ranges


def _parse_spec(spec: str, size: int) -> range | None:
    match = _RANGE.fullmatch(spec)
    if match is None:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        if not size and _to_int(suffix):
            return None  # the whole file, which a 206 cannot describe
        return range(max(0, size - _to_int(suffix)), size)
    if last and _to_int(last) < _to_int(first):
        return None
    stop = min(size, _to_int(last) + 1) if last else size
    return range(_to_int(first), stop)


def _to_int(digits: str) -> int:
    """The number. Python converts no more than some thousand digits."""
    digits = digits.lstrip("0")
    return int(digits or "0") if len(digits) < 20 else 10**20


def format_content_range(selected: range, size: int) -> str:
    """The value of the header ``Content-Range``."""
    return f"bytes {selected.start}-{selected.stop - 1}/{size}"


def make_multipart(
    ranges: Sequence[range], size: int, content_type: str | None
) -> tuple[str, list[bytes | range]]:
    """Make a body of several ranges (RFC 9110, section 14.6).

    :param content_type: of the whole content.
    :returns: the content type of the body, and its parts.
    """
    boundary = secrets.token_hex(16)
    of_content = f"Content-Type: {content_type}\r\n" if content_type else ""
    parts: list[bytes | range] = []
    line = f"--{boundary}"
    for selected in ranges:
        position = format_content_range(selected, size)
        head = f"{line}\r\n{of_content}Content-Range: {position}\r\n\r\n"
        parts += [head.encode("latin-1"), selected]
        line = f"\r\n--{boundary}"
    parts.append(f"{line}--\r\n".encode())
    return f"multipart/byteranges; boundary={boundary}", parts
