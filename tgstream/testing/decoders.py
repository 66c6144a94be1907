"""Decodes the formats for tests: from chunks to rows, documents and events.

Each function iterates its input no further than the next item needs, so that a test can
read the first items of an endless stream.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

from ..formats.sse import Event


def decode_text(chunks: Iterable[bytes], charset: str | None) -> Iterator[str]:
    """The text of each chunk, without a byte order mark.

    A character may be split between two chunks.

    :param charset: None for UTF-8.
    :raises UnicodeDecodeError: if the bytes are invalid in this charset.
    """
    charset = charset or "utf-8"
    if codecs.lookup(charset).name == "utf-8":
        charset = "utf-8-sig"
    decoder = codecs.getincrementaldecoder(charset)()
    for chunk in chunks:
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def split_lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of a text that is in several parts, each with its LF."""
    rest = ""
    for text in texts:
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield f"{line}\n"
    if rest:
        yield rest


def parse_ndjson(texts: Iterable[str]) -> Iterator[Any]:
    """The documents of NDJSON.

    :raises ValueError: if a line is not JSON.
    """
    return map(json.loads, split_lines(texts))


def parse_array(texts: Iterable[str]) -> Iterator[Any]:
    """The items of a JSON array. A document of another type is the only item.

    :raises ValueError: if the document is invalid or truncated.
    """
    texts, rest = iter(texts), ""
    while not rest and (text := next(texts, None)) is not None:
        rest = text.lstrip()
    if not rest.startswith("["):
        yield json.loads(rest + "".join(texts))
        return
    rest = rest[1:]
    while True:
        parsed = _parse_item(rest)
        if parsed is not None:
            item, rest, is_last = parsed
            if item is not _NO_ITEM:
                yield item
            if is_last:
                json.loads(f"[]{rest}{''.join(texts)}")  # raises if something follows
                return
        elif (text := next(texts, None)) is not None:
            rest += text
        else:
            raise ValueError(f"truncated JSON array, incomplete from {rest[:50]!r}")


_NO_ITEM = object()
_decoder = json.JSONDecoder()


def _parse_item(text: str) -> tuple[Any, str, bool] | None:
    """The next item of an array, the text after it, and whether the array ends there.

    :returns: None if the text is too short to know.
    """
    text = text.lstrip()
    if text.startswith("]"):
        return _NO_ITEM, text[1:], True
    try:
        item, end = _decoder.raw_decode(text)
    except ValueError:
        return None
    rest = text[end:].lstrip()
    if rest[:1] not in (",", "]") or not rest:  # more digits of a number may follow
        return None
    return item, rest[1:], rest.startswith("]")


_SEPARATORS = {"data": "\n", "comment": " ", "event": "", "id": ""}
"""The text fields of an event, and the text between two lines of data or comments."""


def parse_events(texts: Iterable[str]) -> Iterator[Event]:
    """The events, as section 9.2.6 of the WHATWG's HTML standard, and the comments.

    An event that is truncated before its empty line is ignored.
    """
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    fields: dict[str, Any] = {}
    for line in split_lines(newlines.decode(text) for text in texts):
        if line == "\n":
            if fields:
                yield Event(**fields)
            fields = {}
            continue
        name, colon, value = line.removesuffix("\n").partition(":")
        value = value.removeprefix(" ")
        if not name and colon:
            name = "comment"
        if name in ("data", "comment") and name in fields:
            value = f"{fields[name]}{_SEPARATORS[name]}{value}"
        if name == "retry" and value.isdecimal():
            fields[name] = int(value)
        elif name in _SEPARATORS and not (name == "id" and "\0" in value):
            fields[name] = value
