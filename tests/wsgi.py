"""Requests in process, with more of what servers may do than users' tests need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

from tgstream.testing import OpenStream

App = Callable[..., Any]


class Call(OpenStream):
    """One request to a WSGI application, whose body is pulled by the test.

    :param app: the application; it is called at once.
    :param checked: whether ``wsgiref.validate`` stands between; it wants a close().
    :param lenient: whether a second ``start_response`` is taken, against PEP 3333, as
        granian, hypercorn and a2wsgi do.
    """

    text = ""

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
        self.starts += 1  # of those that were not refused
        return write

    @property
    def cookies(self) -> list[str]:
        """The cookies that are set."""
        return list(self.headers.getall("Set-Cookie"))

    def read(self) -> bytes:
        """The rest of the body; closed, as a server does, whatever happens."""
        try:
            return super().read()
        finally:
            self.close()

    def close(self) -> None:
        """Close the body, also before its first chunk was taken, and again."""
        if hasattr(self.body, "close"):
            self.body.close()

    def drop(self) -> None:
        """Let go of the body without closing it, as some servers do."""
        self.abandon()


def get(app: App, path: str = "/", **environ: Any) -> Call:
    """A request that is read to its end."""
    call = Call(app, path, **environ)
    call.text = call.read().decode()
    return call
