"""Requests in process, pulled chunk by chunk, as no test client does it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

App = Callable[..., Any]


class Call:
    """One request to a WSGI application, whose body is pulled by the test.

    :param app: the application; it is called at once.
    :param checked: whether ``wsgiref.validate`` stands between; it wants a close().
    :param lenient: whether a second ``start_response`` is taken, against PEP 3333, as
        granian, hypercorn and a2wsgi do.
    """

    def __init__(
        self,
        app: App,
        path: str = "/",
        method: str = "GET",
        checked: bool = True,
        lenient: bool = False,
        **environ: Any,
    ) -> None:
        path, _, query = path.partition("?")
        self.status = ""
        self.headers: dict[str, str] = {}
        self.cookies: list[str] = []
        self.starts = 0
        self.lenient = lenient
        self.errors = io.StringIO()
        self.environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "SCRIPT_NAME": "",
            "wsgi.errors": self.errors,
            **environ,
        }
        setup_testing_defaults(self.environ)
        self.body: Any = (validator(app) if checked else app)(self.environ, self._start)
        self._chunks: Iterator[bytes] = iter(self.body)

    def _start(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        if exc_info is not None and self.starts and self.pulled:
            raise exc_info[1]
        if exc_info is None and self.starts and not self.lenient:
            raise AssertionError("start_response was called twice, without exc_info")
        self.starts += 1
        self.status = status
        self.headers = {name: value for name, value in headers}
        self.cookies = [v for name, v in headers if name.lower() == "set-cookie"]
        return sys.stderr.write

    pulled = False
    text = ""

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        chunk = next(self._chunks)
        self.pulled = True
        return chunk

    def read(self) -> bytes:
        """The rest of the body; closed, as a server does, whatever happens."""
        try:
            return b"".join(self)
        finally:
            self.close()

    def close(self) -> None:
        """Close the body, as a server does at the end or when the client has left."""
        if hasattr(self.body, "close"):
            self.body.close()

    def drop(self) -> None:
        """Let go of the body without closing it, as some servers do."""
        del self.body, self._chunks


def get(app: App, path: str = "/", **environ: Any) -> Call:
    """A request that is read to its end."""
    call = Call(app, path, **environ)
    call.text = call.read().decode()
    return call
