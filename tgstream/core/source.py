"""What the items of a stream are taken from.

Rule: nothing is taken here; a source is looked at, claimed, and handed on.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import GeneratorType
from typing import Any
from weakref import ref

from tg.support.objectproxy import TurboGearsObjectProxy
from webob.request import LimitedLengthFile

from ..formats.protocols import Batched
from .cleanup import close
from .errors import StreamError


def resolve_proxy(value: Any) -> Any:
    """The object behind a proxy of TG's, such as ``tg.response``; else the value."""
    while isinstance(value, TurboGearsObjectProxy):
        value = value._current_obj()
    return value


def is_iterable(value: Any) -> bool:
    """True for what can be streamed: any iterable but text, bytes and mappings.

    A statement is one, too, for it stands for its rows, and so is a file that can do
    nothing but ``read()``.
    """
    if isinstance(value, GeneratorType):
        return True  # as mostly: the look below takes longer
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping):
        return False
    return (
        hasattr(value, "__iter__")
        or hasattr(value, "read")
        or _adapter_of(value) is not None
    )


def is_for_a_stream(value: Any) -> bool:
    """True for what TurboGears cannot send: a statement, ``rows()`` and ``copy()``.

    They would run when the request and its session are over.
    """
    if isinstance(value, dict | str | GeneratorType):
        return False  # as mostly: each page is looked at
    return isinstance(value, Batched) or _adapter_of(value) is not None


_adapters: list[tuple[Callable[[Any], bool], Callable[[Any], Any]]] = []


def register_adapter(
    accepts: Callable[[Any], bool], make: Callable[[Any], Any]
) -> None:
    """Stream values that are not iterable, such as statements.

    :param accepts: True for a value of this kind. It is called for the output of each
        controller, so it must be quick and must not import anything.
    :param make: makes the iterable of such a value.
    """
    _adapters.append((accepts, make))


def _adapter_of(value: Any) -> Callable[[Any], Any] | None:
    for accepts, make in _adapters:
        if accepts(value):
            return make
    return None


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


def source_of(items: Any) -> Any:
    """What the items are taken from, in the stream's own transaction."""
    if isinstance(items, GeneratorType):
        return items
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
    make = _adapter_of(items)
    return items if make is None else make(items)


BLOCK = 65536
"""Bytes of a file that make an item, at most."""

WAIT_SECONDS = 0.05
"""Pause before a non-blocking file without data is read again."""


def open_source(source: Any, raw: bool, environ: dict[str, Any]) -> Any:
    """The source as a stream of this request iterates it: a file in blocks if ``raw``.

    :param raw: whether the stream has no format.
    :param environ: the request's, whose ``wsgi.input`` belongs to the server.
    """
    if isinstance(source, GeneratorType) or not hasattr(source, "read"):
        return source
    file = _input_of(source, environ)
    if file is not None:
        return _Blocks(file) if raw else io.BufferedReader(file)
    if raw and not isinstance(source, io.TextIOBase):
        return _Blocks(source)
    if not hasattr(source, "__iter__"):
        raise TypeError(
            f"a stream with a format needs an iterable of items, got a file of type "
            f"{type(source).__name__} that only has read(). Return a generator that "
            "reads it, or omit the format to send its bytes"
        )
    return source if _response_in(source) is None else _Lines(source)


class _Blocks:
    """An open binary file in blocks, each sent as soon as some bytes have come.

    A file's own iterator would seek line ends, and ``read()`` waits for a whole block.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._read = _read_method(file)
        self._confirm = self._read != file.read

    def __iter__(self) -> Iterator[Any]:
        while True:
            block = self._next()
            if block:
                yield block
            elif block is None:  # not the end: a non-blocking file has no data yet
                yield b""  # so that the body can look whether it is to end
                time.sleep(WAIT_SECONDS)
            else:
                break
        _check_complete(self._file)

    def _next(self) -> Any:
        """The next bytes, ``b""`` at the end, None where there are none yet."""
        try:
            block = self._read(BLOCK)
            if block == b"" and self._confirm:
                # A BufferedReader's read1() has that for "no data yet", too.
                block = self._file.read(BLOCK)
            return block
        except BlockingIOError:
            return None

    def close(self) -> None:
        close(self._file)


def _read_method(file: Any) -> Any:
    """``read1()``, which waits for some bytes only, where a file has it; ``read()``."""
    read1 = getattr(file, "read1", None)
    if (
        read1 is None
        or getattr(type(file), "read1", None) is io.BufferedIOBase.read1  # abstract
        or isinstance(getattr(file, "encoding", None), str)  # text, in a wrapper
    ):
        return file.read
    return read1


def _check_complete(file: Any) -> None:
    """Fail where an HTTP response was cut: ``http.client`` itself overlooks it.

    :raises IncompleteRead: when there are fewer bytes than its Content-Length.
    """
    response = _response_in(file)
    if response is not None and response.length:
        kind = sys.modules["http.client"].IncompleteRead
        raise kind(b"", response.length)


def _response_in(file: Any) -> Any:
    """The ``http.client`` response that is, or is wrapped by, ``file``; else None."""
    client = sys.modules.get("http.client")
    if client is None:
        return None
    wrapped = (getattr(file, name, None) for name in ("file", "buffer", "raw"))
    responses = (f for f in (file, *wrapped) if isinstance(f, client.HTTPResponse))
    return next(responses, None)


class _Lines:
    """The lines of an HTTP response, which fail where it was cut."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __iter__(self) -> Iterator[Any]:
        yield from self._file
        _check_complete(self._file)

    def close(self) -> None:
        close(self._file)


class _Input(io.RawIOBase):
    """``wsgi.input`` up to its end, where some servers would wait forever for more.

    To close it leaves the server's own file open.
    """

    def __init__(self, file: Any, length: int | None) -> None:
        self._read = _read_method(file)
        self._left = length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        size = len(buffer) if self._left is None else min(len(buffer), self._left)
        data = self._read(size) if size else b""
        if data is None:
            return None
        if self._left is not None:
            if size and not data:
                raise ConnectionResetError(
                    f"the client disconnected with {self._left} bytes of the request "
                    "body unsent"
                )
            self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)


def _input_of(file: Any, environ: dict[str, Any]) -> _Input | None:
    """The body of the request, if ``file`` is its ``wsgi.input`` or ``body_file``."""
    raw = getattr(file, "raw", None)
    if isinstance(raw, LimitedLengthFile) and raw.remaining == raw.maxlen:
        file = raw.file  # WebOb's wrapper, not read yet, would wait for whole blocks
    if file is not environ.get("wsgi.input"):
        return None
    if environ.get("wsgi.input_terminated"):
        return _Input(file, None)
    return _Input(file, int(environ.get("CONTENT_LENGTH") or 0))


_served: dict[int, ref[Any]] = {}


def claim(source: Any, environ: dict[str, Any]) -> bool:
    """False if this very iterator, or file, has been given to a request before."""
    if not (hasattr(source, "__next__") or hasattr(source, "read")):
        return True  # no iterator: each request begins anew
    if source is environ.get("wsgi.input"):
        return True  # a server may keep the same object for a whole connection
    key = id(source)
    with suppress(TypeError):  # no weak reference to it: a second finds it used up
        reference = ref(source, lambda dead: _served.pop(key, None))
        return _served.setdefault(key, reference) is reference
    return True
