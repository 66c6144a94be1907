"""Opens streams of an application in a test, and reads them as a server does.

Only the test decides how much of a response is read, so that it can test an endless
stream.
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
from .decoders import decode_text, parse_array, parse_events, parse_ndjson, split_lines

_ENVIRON_KEY = "tgstream.testing"


def open_stream(
    app: Any,
    path: str = "/",
    *,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    body: bytes = b"",
    **environ: Any,
) -> OpenStream:
    """Send a request to an application, and read nothing of the response's body.

    .. code-block:: python

        with open_stream(app, "/users.csv") as response:
            assert response.status_int == 200
            assert next(response.rows()) == ["id", "name"]
        assert response.report().reason == "disconnected"

    :param app: a WSGI application, or a WebTest ``TestApp``. The cookies and the
        ``extra_environ`` of a ``TestApp`` are sent.
    :param path: with its query, such as ``/users?since=2``.
    :param method: of the request.
    :param headers: of the request.
    :param body: of the request.
    :param environ: more of the WSGI environ, such as ``REMOTE_USER="ada"``.
    :returns: the response, :class:`OpenStream`.
    :raises Exception: if the application raises it.
    """
    if hasattr(app, "do_request"):  # WebTest need not be installed
        environ = {**app.extra_environ, **environ}
        cookies = "; ".join(f"{name}={value}" for name, value in app.cookies.items())
        headers = {**({"Cookie": cookies} if cookies else {}), **(headers or {})}
        app = app.app
    request = Request.blank(path, environ, method=method, headers=headers, body=body)
    return OpenStream(app, request.environ)


class OpenStream:
    """A response that :func:`open_stream` returns. The test reads its body.

    It is an iterator of chunks, the ``bytes`` that a server would get. Use it in a
    ``with`` statement, which closes it at the end, as servers do.
    """

    def __init__(self, app: Any, environ: dict[str, Any]) -> None:
        self.path: str = environ["PATH_INFO"]
        self.status = ""
        """The status line, such as ``200 OK``."""
        self.headers = ResponseHeaders()
        """The headers of the response."""
        self.errors = environ["wsgi.errors"] = io.StringIO()
        """The text that was written to ``wsgi.errors``."""
        self._pulled = self._sent = False
        self._end = environ[_ENVIRON_KEY] = _StreamEnd()
        _register_hook()
        self.body: Any = app(environ, self._start_response)
        """The iterable that the application returned. None after ``close()`` or
        ``abandon()``."""
        self._chunks: Iterator[bytes] | None = iter(self.body)

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Any:
        if exc_info is not None and self._sent:
            raise exc_info[1]
        if exc_info is None and self.status:
            raise AssertionError(
                f"{self.path}: start_response was called twice without exc_info, which "
                "PEP 3333 forbids"
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
            raise AssertionError(
                f"{self.path}: cannot read a stream that was closed or abandoned"
            )
        self._pulled = True
        chunk = next(self._chunks)
        self._sent = True
        return chunk

    def __enter__(self) -> OpenStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def read(self) -> bytes:
        """The rest of the body. It does not return for an endless stream."""
        return b"".join(self)

    # Items.

    def json(self) -> Iterator[Any]:
        """The documents of NDJSON, the items of a JSON array, or one other document.

        :returns: an iterator, which reads no more than the next document needs.
        :raises TypeError: if the content type of the response is not JSON or NDJSON.
        :raises ValueError: if the data is invalid or truncated.
        """
        texts = self._decode("json", "application/json", "application/x-ndjson")
        if self._content_type == "application/x-ndjson":
            return parse_ndjson(texts)
        return parse_array(texts)

    def events(self) -> Iterator[Event]:
        """The events and comments, as in the WHATWG's HTML standard.

        :returns: an iterator, which reads no more than the next event needs. ``data``
            is a ``str``.
        :raises TypeError: if the content type of the response is not that of events.
        """
        return parse_events(self._decode("events", "text/event-stream"))

    def rows(self, dialect: Any = "excel") -> Iterator[list[str]]:
        """The rows of CSV, the header included.

        :param dialect: a dialect of the module ``csv``, or its name.
        :returns: an iterator, which reads no more than the next row needs.
        :raises TypeError: if the content type of the response is not CSV.
        """
        return csv.reader(split_lines(self._decode("rows", "text/csv")), dialect)

    @property
    def _content_type(self) -> str:
        return str(self.headers.get("Content-Type", "")).partition(";")[0].strip()

    def _decode(self, method: str, *content_types: str) -> Iterator[str]:
        """The text of the body, for a method that accepts these content types."""
        if self._content_type not in content_types:
            raise TypeError(
                f"{self.path}: {method}() reads {' and '.join(content_types)}, but the "
                f"content type is {self._content_type or 'missing'} ({self.status})"
            )
        return decode_text(self, find_charset(self.headers.get("Content-Type")))

    # Actions of servers and clients.

    def pull_on_thread(self) -> bytes:
        """The next chunk, read on another thread, as some servers do.

        :raises StopIteration: at the end of the body.
        """
        with ThreadPoolExecutor(1) as executor:
            chunk = executor.submit(next, self, None).result()
        if chunk is None:
            raise StopIteration
        return chunk

    def disconnect(self) -> None:
        """Disconnect as a client does: the server closes the body before its end."""
        self.close()

    def close(self) -> None:
        """Close the body as a server does. A second call does nothing.

        Servers take the first chunk before they close a body, so this does, too.
        """
        body, chunks = self.body, self._chunks
        self.body = self._chunks = None
        try:
            if chunks is not None and not self._pulled:
                next(chunks, None)
        finally:
            close(body)

    def abandon(self) -> None:
        """Drop the body without closing it, as some servers do."""
        self.body = self._chunks = None

    def report(self, timeout: float = 5.0) -> Report:
        """How the stream ended. It waits for a stream that another thread ends.

        :param timeout: the longest time to wait, in seconds.
        :raises AssertionError: if the stream has not ended by then.
        """
        if not self._end.event.wait(timeout):
            raise AssertionError(
                f"{self.path} ({self.status}): no stream of this request has ended "
                f"within {timeout:g} s. Close it, abandon it or read it to its end"
            )
        assert self._end.report is not None
        return self._end.report


class _StreamEnd:
    """The report of a request's stream, and an event that is set when it ends.

    It is in the environ, where the hook finds it. It keeps no reference to the stream.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self.report: Report | None = None


def _register_hook() -> None:
    """Register the hook, again for each stream, because tests reset TG's hooks."""
    tg.hooks.disconnect("tgstream.finished", _store_report)
    tg.hooks.register("tgstream.finished", _store_report)


def _store_report(report: Report) -> None:
    end = tg.request.environ.get(_ENVIRON_KEY)
    if end is not None:
        end.report = report
        end.event.set()
