"""Streams of an application in a test: opened in process, and pulled as a server does.

Rule: nothing is read that was not asked for, so that an endless stream can be tested.
"""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tg
from webob import Request
from webob.headers import ResponseHeaders

from ..core.cleanup import close
from ..core.headers import find_charset
from ..core.report import Report
from ..formats.sse import Event
from . import decoders as _items
from .leaks import assert_clean

__all__ = ["OpenStream", "assert_clean", "open_stream"]

_KEY = "tgstream.testing"


def open_stream(
    app: Any,
    path: str = "/",
    *,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    body: bytes = b"",
    **environ: Any,
) -> OpenStream:
    """Send one request to an application, and read nothing of the response's body.

    .. code-block:: python

        with open_stream(app, "/users.csv") as response:
            assert response.status_int == 200
            assert next(response.rows()) == ["id", "name"]
        assert response.report().reason == "disconnected"

    :param app: a WSGI application, or a WebTest ``TestApp``, whose cookies and
        ``extra_environ`` are then sent.
    :param path: with its query, as ``/users?since=2``.
    :param method: of the request.
    :param headers: of the request.
    :param body: of the request.
    :param environ: more of the WSGI environ, as ``REMOTE_USER="ada"``.
    :returns: the response, :class:`OpenStream`.
    :raises Exception: what the application raises.
    """
    if hasattr(app, "do_request"):  # WebTest, which need not be installed
        environ = {**app.extra_environ, **environ}
        cookies = "; ".join(f"{name}={value}" for name, value in app.cookies.items())
        headers = {**({"Cookie": cookies} if cookies else {}), **(headers or {})}
        app = app.app
    request = Request.blank(path, environ, method=method, headers=headers, body=body)
    return OpenStream(app, request.environ)


class OpenStream:
    """A response whose body is pulled by the test; :func:`open_stream` makes it.

    It is an iterator of chunks: bytes, each as the server would get it. Used with
    ``with`` it is closed at the end, as servers do it.
    """

    def __init__(self, app: Any, environ: dict[str, Any]) -> None:
        self.path: str = environ["PATH_INFO"]
        self.status = ""
        """The status line, as ``200 OK``."""
        self.headers = ResponseHeaders()
        """The headers of the response."""
        self.errors = environ["wsgi.errors"] = io.StringIO()
        """What was written to ``wsgi.errors``."""
        self._begun = self._sent = False
        self._told = environ[_KEY] = _Told()
        _listen()
        self.body: Any = app(environ, self._start_response)
        """What the application returned; None when it is closed or abandoned."""
        self._chunks: Iterator[bytes] | None = iter(self.body)

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Any:
        if exc_info is not None and self._sent:
            raise exc_info[1]
        if exc_info is None and self.status:
            raise AssertionError(
                f"{self.path}: start_response was called twice, without exc_info "
                "(PEP 3333 forbids it)"
            )
        self.status = status
        self.headers = ResponseHeaders(headers)
        return lambda data: None

    @property
    def status_int(self) -> int:
        """The status as a number."""
        return int(self.status.partition(" ")[0])

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._chunks is None:
            raise AssertionError(f"{self.path}: the stream was closed or abandoned")
        self._begun = True
        chunk = next(self._chunks)
        self._sent = True
        return chunk

    def __enter__(self) -> OpenStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def read(self) -> bytes:
        """The rest of the body. It does not return from an endless one."""
        return b"".join(self)

    # Items.

    def json(self) -> Iterator[Any]:
        """The documents: of NDJSON its lines, of a JSON array its items, or the one.

        :returns: an iterator, which pulls no more than the next document needs.
        :raises TypeError: when the response is no JSON, by its content type.
        :raises ValueError: when it is none in fact, or was cut.
        """
        pieces = self._text("json", "application/json", "application/x-ndjson")
        if self._content_type == "application/x-ndjson":
            return _items.lines_of_json(pieces)
        return _items.items_of_array(pieces)

    def events(self) -> Iterator[Event]:
        """The events, comments included, by the rules of the WHATWG's HTML standard.

        :returns: an iterator, which pulls no more than the next event needs. ``data``
            is text.
        :raises TypeError: when the response is no event stream, by its content type.
        """
        return _items.events(self._text("events", "text/event-stream"))

    def rows(self, dialect: Any = "excel") -> Iterator[list[str]]:
        """The rows of CSV, a header first if there is one.

        :param dialect: as the module ``csv`` knows it.
        :returns: an iterator, which pulls no more than the next row needs.
        :raises TypeError: when the response is no CSV, by its content type.
        """
        return csv.reader(_items.lines(self._text("rows", "text/csv")), dialect)

    @property
    def _content_type(self) -> str:
        return str(self.headers.get("Content-Type", "")).partition(";")[0].strip()

    def _text(self, method: str, *kinds: str) -> Iterator[str]:
        if self._content_type not in kinds:
            raise TypeError(
                f"{self.path} is {self._content_type or 'of no content type'} "
                f"({self.status}), which {method}() cannot read; it reads "
                f"{' and '.join(kinds)}"
            )
        return _items.text(self, find_charset(self.headers.get("Content-Type")))

    # What servers and clients do.

    def pull_on_thread(self) -> bytes:
        """The next chunk, pulled on another thread, as some servers do it.

        :raises StopIteration: when there is none.
        """
        with ThreadPoolExecutor(1) as other:
            chunk = other.submit(next, self, None).result()
        if chunk is None:
            raise StopIteration
        return chunk

    def disconnect(self) -> None:
        """Leave, as a client does: a server then closes the body before its end."""
        self.close()

    def close(self) -> None:
        """Close the body, as a server does at the end; once.

        No server closes a body of which it has not taken the first chunk.
        """
        body, chunks = self.body, self._chunks
        self.body = self._chunks = None
        try:
            if chunks is not None and not self._begun:
                next(chunks, None)
        finally:
            close(body)

    def abandon(self) -> None:
        """Drop the body without closing it, as some servers do."""
        self.body = self._chunks = None

    def report(self, timeout: float = 5.0) -> Report:
        """How the stream ended, once it has; another thread may be what ends it.

        :param timeout: seconds to wait for that.
        :raises AssertionError: when it has not ended by then.
        """
        if not self._told.ended.wait(timeout):
            raise AssertionError(
                f"{self.path} ({self.status}): no stream of this request has ended "
                f"within {timeout:g} s; close it, abandon it or read it to its end"
            )
        assert self._told.report is not None
        return self._told.report


class _Told:
    """What is left in the environ for the hook; it holds nothing of the stream."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.report: Report | None = None


def _listen() -> None:
    """Hear of the streams that end; again each time, for tests reset TG's hooks."""
    tg.hooks.disconnect("tgstream.finished", _hear)
    tg.hooks.register("tgstream.finished", _hear)


def _hear(report: Report) -> None:
    told = tg.request.environ.get(_KEY)
    if told is not None:
        told.report = report
        told.ended.set()
