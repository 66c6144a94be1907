"""What the items of a stream are taken from.

Rule: nothing is taken here; a source is looked at, claimed, and handed on.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import GeneratorType
from typing import Any
from weakref import ref

from ._options import Batched, StreamError


def is_iterable(value: Any) -> bool:
    """True for what can be streamed: any iterable but text, bytes and mappings.

    A statement is one, too, for it stands for its rows.
    """
    if isinstance(value, GeneratorType):
        return True  # as mostly: the look below takes longer
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping):
        return False
    return hasattr(value, "__iter__") or _is_statement(value)


def is_for_a_stream(value: Any) -> bool:
    """True for what TurboGears cannot send: a statement, ``rows()`` and ``copy()``.

    They would run when the request and its session are over.
    """
    if isinstance(value, dict | str | GeneratorType):
        return False  # as mostly: each page is looked at
    return isinstance(value, Batched) or _is_statement(value)


def _is_statement(value: Any) -> bool:
    """True for what ``rows()`` takes; nothing is imported to find out."""
    if "sqlalchemy.orm" not in sys.modules:
        return False
    kinds: tuple[type, ...] = importlib.import_module("tgstream._statement").KINDS
    return isinstance(value, kinds)


def not_streamed(value: Any, where: str) -> StreamError:
    """The error of a controller, ``where``, that lacks its ``@stream``."""
    return StreamError(
        f"{where} returned a {type(value).__name__}, which only a stream can send; put "
        "@stream on it, or return Stream(...)"
    )


def is_streamed(value: Any, where: str) -> bool:
    """Whether a controller's output is a stream; False for what TG sends as it is.

    :param where: the controller.
    :raises TypeError: when TG would make an empty page of it.
    """
    if is_iterable(value):
        return True
    if value is None or isinstance(value, str | bytes | bytearray | Mapping):
        return False
    raise TypeError(
        f"{where} returned {value!r:.80}, which can neither be streamed nor sent by "
        "TurboGears; return a generator, another iterable or a statement, or else a "
        "text, a dict or a response"
    )


BLOCK = 65536
"""Bytes of a file that make an item."""


class _Blocks:
    """An open binary file in blocks; a file's own iterator would seek line ends."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.close = file.close

    def __iter__(self) -> Iterator[Any]:
        while block := self.file.read(BLOCK):
            yield block


def source_of(items: Any, raw: bool) -> Any:
    """What the items are taken from, in the stream's own transaction."""
    if isinstance(items, GeneratorType):
        return items
    if raw and hasattr(items, "read"):
        return items if isinstance(items, io.TextIOBase) else _Blocks(items)
    engine = sys.modules.get("sqlalchemy.engine")
    if engine is not None and isinstance(
        items, engine.Result | engine.ScalarResult | engine.MappingResult
    ):
        items.close()
        raise StreamError(
            "a Result that the controller's body ran belongs to the request's "
            "transaction, which ends before the first item is taken: return the "
            "statement (select(), a Query), or run it inside a generator"
        )
    if _is_statement(items):
        return importlib.import_module("tgstream._rows").rows(items)
    return items


_served: dict[int, ref[Any]] = {}


def claim(source: Any) -> bool:
    """False if this very iterator, or file, has been given to a request before."""
    if isinstance(source, _Blocks):
        source = source.file
    if not hasattr(source, "__next__"):
        return True  # no iterator: each request begins anew
    key = id(source)
    with suppress(TypeError):  # no weak reference to it: a second finds it used up
        reference = ref(source, lambda dead: _served.pop(key, None))
        return _served.setdefault(key, reference) is reference
    return True
