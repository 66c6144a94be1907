"""Bytes back into items, for tests: what each format has made of them.

Rule: each reads from an iterator of pieces, and no further than its next item needs.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

from ..formats.sse import Event


def text(chunks: Iterable[bytes], charset: str | None) -> Iterator[str]:
    """The chunks as text; a byte order mark is dropped.

    :param charset: None for UTF-8.
    """
    charset = charset or "utf-8"
    known = codecs.lookup(charset).name
    decoder = codecs.getincrementaldecoder(
        "utf-8-sig" if known == "utf-8" else charset
    )()
    for chunk in chunks:
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def lines(pieces: Iterable[str]) -> Iterator[str]:
    """The lines, each with the LF that ends it."""
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece).split("\n")
        for line in whole:
            yield f"{line}\n"
    if rest:
        yield rest


def lines_of_json(pieces: Iterable[str]) -> Iterator[Any]:
    """The documents of NDJSON."""
    return map(json.loads, lines(pieces))


def items_of_array(pieces: Iterable[str]) -> Iterator[Any]:
    """The items of a JSON array; a document that is none is the one item.

    :raises ValueError: when it is not whole, or no JSON.
    """
    pieces, rest = iter(pieces), ""
    while not rest and (piece := next(pieces, None)) is not None:
        rest = piece.lstrip()
    if not rest.startswith("["):
        yield json.loads(rest + "".join(pieces))
        return
    rest = rest[1:]
    while True:
        found = _item(rest)
        if found is not None:
            value, rest, ended = found
            if value is not _NOTHING:
                yield value
            if ended:
                json.loads(f"[]{rest}{''.join(pieces)}")  # nothing may follow
                return
        elif (piece := next(pieces, None)) is not None:
            rest += piece
        else:
            raise ValueError(f"the array was cut, before {rest[:50]!r}")


_NOTHING = object()
_decoder = json.JSONDecoder()


def _item(rest: str) -> tuple[Any, str, bool] | None:
    """The next item, what follows it, and whether it was the last; None if cut."""
    rest = rest.lstrip()
    if rest.startswith("]"):
        return _NOTHING, rest[1:], True
    try:
        value, end = _decoder.raw_decode(rest)
    except ValueError:
        return None
    rest = rest[end:].lstrip()
    if rest[:1] not in (",", "]") or not rest:  # a number may go on
        return None
    return value, rest[1:], rest.startswith("]")


SEPARATORS = {"data": "\n", "comment": " ", "event": "", "id": ""}
"""The fields that are text, and what stands between two lines of the first two."""


def events(pieces: Iterable[str]) -> Iterator[Event]:
    """The events, by section 9.2.6 of the WHATWG's HTML standard, and the comments.

    What is cut before its empty line is no event.
    """
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    fields: dict[str, Any] = {}
    for line in lines(newlines.decode(piece) for piece in pieces):
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
            value = f"{fields[name]}{SEPARATORS[name]}{value}"
        if name == "retry" and value.isdecimal():
            fields[name] = int(value)
        elif name in SEPARATORS and not (name == "id" and "\0" in value):
            fields[name] = value
