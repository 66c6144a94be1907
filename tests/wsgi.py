"""Requests to an application in the process of the test.

Unlike ``tgstream.testing``, they can also behave like servers that break PEP 3333.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

from tgstream.testing import OpenStream

App = Callable[..., Any]


class Call(OpenStream):
    """A request to a WSGI application. The test reads the body, chunk by chunk.

    :param app: the application, which is called at once.
    :param checked: whether ``wsgiref.validate`` checks the request. It requires a call
        of ``close()``.
    :param lenient: whether a second ``start_response`` is accepted, although PEP 3333
        forbids it. granian, hypercorn and a2wsgi accept it.
    """

    text = ""
    """The decoded body, if :func:`get` has read it."""

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
        self.starts = 0
        """How many calls of ``start_response`` were accepted."""
        self.lenient = lenient
        self.environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "SCRIPT_NAME": "",
            **environ,
        }
        setup_testing_defaults(self.environ)
        super().__init__(validator(app) if checked else app, self.environ)

    def _start_response(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        if self.lenient and exc_info is None:
            self.status = ""
        write = super()._start_response(status, headers, exc_info)
        self.starts += 1
        return write

    @property
    def cookies(self) -> list[str]:
        """The ``Set-Cookie`` headers."""
        return list(self.headers.getall("Set-Cookie"))

    def read(self) -> bytes:
        """Return the rest of the body, and close it in any case, like a server."""
        try:
            return super().read()
        finally:
            self.close()

    def close(self) -> None:
        """Close the body, even if it is unread or was closed before."""
        if hasattr(self.body, "close"):
            self.body.close()

    def drop(self) -> None:
        """Drop the body without closing it, like some servers do."""
        self.abandon()


def get(app: App, path: str = "/", **environ: Any) -> Call:
    """Make a request, read the body to its end, and close it."""
    call = Call(app, path, **environ)
    call.text = call.read().decode()
    return call


def get_chunks(app: App, path: str = "/") -> list[bytes]:
    """Make a request, and return the chunks that the server gets."""
    call = Call(app, path)
    chunks = list(call)
    call.close()
    return chunks
