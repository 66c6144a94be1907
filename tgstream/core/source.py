"""The source of a stream's items: a generator, an iterable, a statement or a file.

This module recognises a source, claims it for one request, and wraps a file in an
iterator of its blocks. It takes no item.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import GeneratorType
from typing import Any
from weakref import ref

from tg.support.objectproxy import TurboGearsObjectProxy
from webob.request import LimitedLengthFile

from ..formats.protocols import Batched, Format
from .async_items import AsyncItems
from .cleanup import close, run_all
from .errors import StreamError
from .files import BLOCK_SIZE, StoredFile


def resolve_proxy(value: Any) -> Any:
    """The value, or the object behind it if it is a proxy such as ``tg.response``."""
    while isinstance(value, TurboGearsObjectProxy):
        value = value._current_obj()
    return value


# Values that a stream can send, and others.


class Sources(dict[str, Any]):
    """Several sources by their names, for a format that has ``encode_sources``."""

    def for_format(self, format: Format | None) -> Sources:
        """The sources to read for this format."""
        return Sources(
            {name: _choose_source(each, format) for name, each in self.items()}
        )

    def close(self) -> None:
        """Close all of them.

        :raises BaseException: the first error of a source.
        """
        steps = [partial(close, source) for source in self.values()]
        if (error := run_all(steps)) is not None:
            raise error


def _choose_source(source: Any, format: Format | None) -> Any:
    """The source that ``source`` has for this format, or ``source`` itself."""
    return source.for_format(format) if hasattr(source, "for_format") else source


_adapters: list[tuple[Callable[[Any], bool], Callable[[Any], Any]]] = []


def register_adapter(
    accepts: Callable[[Any], bool], make: Callable[[Any], Any]
) -> None:
    """Make values that are not iterable, such as statements, a source of items.

    :param accepts: whether ``make`` can convert a value. It is called for the output of
        every controller, so it must be quick and must not import anything.
    :param make: converts such a value to an iterable.
    """
    _adapters.append((accepts, make))


def _find_adapter(value: Any) -> Callable[[Any], Any] | None:
    for accepts, make in _adapters:
        if accepts(value):
            return make
    return None


def is_iterable(value: Any) -> bool:
    """Whether a stream can send a value item by item.

    True for iterables, except text, bytes and mappings. Also true for statements, for
    async iterables, and for files that only have ``read()``.
    """
    if isinstance(value, GeneratorType):
        return True  # the usual case, and the checks below take longer
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping):
        return False
    return (
        hasattr(value, "__iter__")
        or hasattr(value, "__aiter__")
        or hasattr(value, "read")
        or _find_adapter(value) is not None
    )


def are_sources(value: Any, format: Any) -> bool:
    """Whether a value is a mapping of sources, and the format encodes several.

    :raises TypeError: when a source is not iterable.
    """
    if not (isinstance(value, Mapping) and hasattr(format, "encode_sources")):
        return False
    for name, source in value.items():
        if not is_iterable(source):
            raise TypeError(
                f"{type(format).__name__}: the source {name!r} must be iterable, got "
                f"{type(source).__name__}: {source!r:.80}"
            )
    return True


def needs_stream(output: Any) -> bool:
    """Whether a controller's output is a statement, ``rows()``, ``copy()`` or async.

    TurboGears itself cannot send it. It would run after the end of the request and of
    its session.
    """
    if isinstance(output, dict | str | GeneratorType):
        return False  # the usual case: this is called for every page
    return (
        isinstance(output, Batched)
        or _is_only_async(output)
        or _find_adapter(output) is not None
    )


def _is_only_async(value: Any) -> bool:
    """Whether a value is an async iterable, and cannot be iterated without a loop."""
    return hasattr(value, "__aiter__") and not hasattr(value, "__iter__")


def make_missing_stream_error(output: Any, where: str) -> StreamError:
    """The error for a controller whose output is sent only with ``@stream``.

    :param where: the controller.
    """
    return StreamError(
        f"{where} returned a {type(output).__name__}, which only a stream can send. "
        "Decorate the controller with @stream, or return Stream(...)"
    )


def check_streamable(output: Any, where: str, format: Any) -> bool:
    """Whether to stream the output of a controller with ``@stream``.

    :param where: the controller.
    :param format: of the stream.
    :returns: False if TG should send the output as it is.
    :raises TypeError: when it is a value for which TG would send an empty page.
    """
    if is_iterable(output) or are_sources(output, format):
        return True
    if output is None or isinstance(output, str | bytes | bytearray | Mapping):
        return False
    raise TypeError(
        f"{where} must return a generator, another iterable or a statement to stream, "
        "or a str, a dict or a response for an ordinary page, got "
        f"{type(output).__name__}: {output!r:.80}"
    )


def adapt_items(items: Any) -> Any:
    """Convert items to a source that reads them in the stream's own transaction.

    :param items: an iterable, an async iterable, a statement, or a mapping of names to
        these.
    :raises StreamError: when the items are a result of the request's transaction.
    """
    if isinstance(items, GeneratorType):
        return items
    if isinstance(items, Mapping):
        return Sources({name: adapt_items(value) for name, value in items.items()})
    if _is_only_async(items):
        return AsyncItems(items)
    engine = sys.modules.get("sqlalchemy.engine")
    if engine is not None and isinstance(
        items, engine.Result | engine.ScalarResult | engine.MappingResult
    ):
        items.close()
        raise StreamError(
            "cannot stream a Result: the controller executed its statement in the "
            "request's transaction, which ends before the first item is read. Return "
            "the statement (select(), a Query), or execute it in a generator"
        )
    make = _find_adapter(items)
    return items if make is None else make(items)


# One source, one request.

_ITERATORS = "__next__", "__anext__", "read"
_claimed: dict[int, ref[Any]] = {}


def claim(source: Any, environ: dict[str, Any]) -> bool:
    """Claim an iterator or a file for one request.

    :param environ: the request's.
    :returns: False if another request has claimed it before.
    """
    if type(source) is not GeneratorType:  # the usual source
        if isinstance(source, StoredFile):
            source = source.file
        if isinstance(source, AsyncItems):
            source = source.items
        if isinstance(source, Sources):
            return all([claim(each, environ) for each in source.values()])
        if not any(hasattr(source, name) for name in _ITERATORS):
            return True  # not an iterator: each request iterates it from its beginning
        if source is environ.get("wsgi.input"):
            return True  # a server may use the same object for a whole connection
    key = id(source)
    try:
        reference = ref(source, partial(_claimed.pop, key))
    except TypeError:  # no weak references: a second request finds it exhausted
        return True
    return _claimed.setdefault(key, reference) is reference


# Files.

POLL_SECONDS = 0.05
"""Seconds before a non-blocking file that had no data is read again."""


def open_source(source: Any, format: Format | None, environ: dict[str, Any]) -> Any:
    """Choose the source for a format, and wrap a file so that a stream can iterate it.

    :param format: the stream's. A stream without a format sends a file's blocks.
    :param environ: the request's, whose ``wsgi.input`` belongs to the server.
    :raises TypeError: when a format would get a file that cannot be iterated.
    """
    if isinstance(source, GeneratorType):
        return source
    if not hasattr(source, "read"):
        return _choose_source(source, format)
    raw = format is None
    body = _find_request_body(source, environ)
    if body is not None:
        return _Blocks(body) if raw else io.BufferedReader(body)
    if raw and not isinstance(source, io.TextIOBase):
        return _Blocks(source)
    if not hasattr(source, "__iter__"):
        raise TypeError(
            f"a stream with a format needs an iterable of items, got a file of type "
            f"{type(source).__name__} that only has read(). Return a generator that "
            "reads it, or omit the format to send its bytes"
        )
    return source if _find_response(source) is None else _ResponseLines(source)


class _Blocks:
    """The blocks of a binary file. Each is sent as soon as it has some bytes.

    A file's own iterator would look for line ends, and ``read()`` waits for a whole
    block.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._read = _choose_read(file)
        self._confirm_end = self._read != file.read

    def __iter__(self) -> Iterator[Any]:
        while True:
            block = self._read_block()
            if block:
                yield block
            elif block is None:  # not the end: a non-blocking file has no data yet
                yield b""  # the body checks between two items whether it must end
                time.sleep(POLL_SECONDS)
            else:
                break
        _check_complete(self._file)

    def _read_block(self) -> Any:
        """The next bytes, ``b""`` at the end, None if there is no data yet."""
        try:
            block = self._read(BLOCK_SIZE)
            if block == b"" and self._confirm_end:
                # read1() of a BufferedReader also returns b"" if there is no data yet.
                block = self._file.read(BLOCK_SIZE)
            return block
        except BlockingIOError:
            return None

    def close(self) -> None:
        close(self._file)


def _choose_read(file: Any) -> Any:
    """The file's ``read1()``, which waits for some bytes only, or its ``read()``."""
    read1 = getattr(file, "read1", None)
    if (
        read1 is None
        or getattr(type(file), "read1", None) is io.BufferedIOBase.read1  # abstract
        or isinstance(getattr(file, "encoding", None), str)  # a wrapped text file
    ):
        return file.read
    return read1


class _ResponseLines:
    """The lines of an HTTP response. They fail if the response was truncated."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __iter__(self) -> Iterator[Any]:
        yield from self._file
        _check_complete(self._file)

    def close(self) -> None:
        close(self._file)


def _check_complete(file: Any) -> None:
    """Check that an HTTP response was not truncated. ``http.client`` does not.

    :raises IncompleteRead: when it has fewer bytes than its Content-Length.
    """
    response = _find_response(file)
    if response is not None and response.length:
        raise sys.modules["http.client"].IncompleteRead(b"", response.length)


def _find_response(file: Any) -> Any:
    """The ``http.client`` response that ``file`` is or wraps, if any."""
    client = sys.modules.get("http.client")
    if client is None:
        return None
    wrapped = (getattr(file, name, None) for name in ("file", "buffer", "raw"))
    responses = (f for f in (file, *wrapped) if isinstance(f, client.HTTPResponse))
    return next(responses, None)


class _RequestBody(io.RawIOBase):
    """``wsgi.input`` up to its end, after which some servers wait for more forever.

    ``close()`` does not close the server's file.
    """

    def __init__(self, file: Any, length: int | None) -> None:
        self._read = _choose_read(file)
        self._missing = length  # bytes, None if the server ends the file itself

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        size = len(buffer)
        if self._missing is not None:
            size = min(size, self._missing)
        data = self._read(size) if size else b""
        if data is None:
            return None
        if self._missing is not None:
            if size and not data:
                raise ConnectionResetError(
                    f"the client disconnected before it sent {self._missing} bytes of "
                    "the request body"
                )
            self._missing -= len(data)
        buffer[: len(data)] = data
        return len(data)


def _find_request_body(file: Any, environ: dict[str, Any]) -> _RequestBody | None:
    """The request's body, if ``file`` is its ``wsgi.input`` or ``body_file``."""
    raw = getattr(file, "raw", None)
    if isinstance(raw, LimitedLengthFile) and raw.remaining == raw.maxlen:
        file = raw.file  # not read yet: WebOb's wrapper would wait for whole blocks
    if file is not environ.get("wsgi.input"):
        return None
    if environ.get("wsgi.input_terminated"):
        return _RequestBody(file, None)
    return _RequestBody(file, int(environ.get("CONTENT_LENGTH") or 0))
