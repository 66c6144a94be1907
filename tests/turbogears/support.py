"""Controllers, configurations and middlewares for the tests of a request."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.handlers import SimpleHandler
from wsgiref.util import setup_testing_defaults

import pytest
import tg
from tg import TGController, expose
from tg.appwrappers.base import ApplicationWrapper

import tgstream
from tests.application import Plug
from tgstream import current_stream, stream

# Configurations.

TRACED = {"debug": False, "trace_errors__enable": True}
UNTRACED = {"debug": False, "trace_errors__enable": False}
DEBUGGED = {"debug": True}
BUFFERED = {"registry_streaming": False}
WIRINGS = [
    pytest.param({**around, "registry_streaming": streaming}, id=f"{name}-{kind}")
    for (name, around), (kind, streaming) in itertools.product(
        [("traced", TRACED), ("untraced", UNTRACED), ("debugged", DEBUGGED)],
        [("streaming", True), ("buffered", False)],
    )
]
"""The options that change which middlewares TG puts around an application."""
WIRINGS.append(pytest.param({**TRACED, "make_body_seekable": True}, id="seekable"))

SESSION = {"session__enabled": True, "session__type": "memory"}
ERROR_PAGES = {"errorpage__enabled": True, "errorpage__status_codes": [403, 404]}

HOOKS = ["before_wsgi_middlewares", "after_wsgi_middlewares"]
"""TG's hooks for middlewares, from the inside to the outside."""


def without_guard(app: Any) -> Any:
    """Return the application as if it was made before tgstream was imported."""
    return app.app


class Middleware:
    """The base class of the WSGI middlewares of tests."""

    def __init__(self, app: Any) -> None:
        self.app = app


@contextlib.contextmanager
def install_middleware(middleware: Any, hook: str = HOOKS[0]) -> Iterator[None]:
    """Give the applications that are made in this context a middleware."""
    tg.hooks.register(hook, middleware)
    try:
        yield
    finally:
        tg.hooks.disconnect(hook, middleware)


def plug_with_wrapper(change: Callable[[Any], Any], **options: Any) -> Plug:
    """Return a function that plugs tgstream and an application wrapper.

    :param change: called with each response, which it can change.
    :param options: of ``register_application_wrapper``.
    """

    class Wrapper(ApplicationWrapper):
        def __call__(self, controller: Any, environ: Any, context: Any) -> Any:
            response = self.next_handler(controller, environ, context)
            change(response)
            return response

    def plug(base_config: Any) -> None:
        tgstream.plugme(base_config)
        base_config.register_application_wrapper(Wrapper, **options)

    return plug


def use_upper_case(response: Any) -> None:
    """Replace the body by a generator that reads it, as for compression."""
    response.app_iter = _upper(response.app_iter)


def _upper(app_iter: Iterable[bytes]) -> Iterator[bytes]:
    try:
        for chunk in app_iter:
            yield chunk.upper()
    finally:
        if hasattr(app_iter, "close"):
            app_iter.close()


# Controllers. TG resets its milestones after each test, so that a controller must be
# made in the test.


def make_root() -> Any:
    """Return a root controller with streams and pages."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def fail(self) -> Iterator[str]:
            yield "one"
            yield "two"
            raise LookupError("no third")

        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            yield "one"
            yield "two"

        @expose(content_type="text/plain")
        @stream(length=5)
        def measured(self) -> Iterator[str]:
            yield "12345"

        @expose()
        @stream
        def empty(self) -> Iterator[str]:
            tg.response.status = 204
            return
            yield

        @expose(content_type="text/plain")
        @stream
        def stop(self) -> Iterator[str]:
            yield "one"
            current_stream().close()
            yield "two"
            yield "three"

        @expose(content_type="text/plain")
        @stream
        def log(self) -> Iterator[str]:
            yield "one"
            tg.request.environ["wsgi.errors"].write("a line")
            tg.request.environ["wsgi.errors"].flush()
            yield "two"

        @expose()
        def plain(self) -> str:
            return "plain"

        @expose()
        def crash(self) -> str:
            raise LookupError("no page")

    return Root()


def make_error_controller() -> TGController:
    """Return the controller of an application's own error page."""

    class ErrorController(TGController):
        @expose()
        def document(self) -> str:
            return f"page {tg.response.status_int}"

    return ErrorController()


class Words:
    """A custom format: a header line, a line for each item, and a closing period."""

    content_type = "text/x-words"

    def encode(self, items: Iterable[Any]) -> Iterator[str]:
        yield "#\n"
        for item in items:
            yield f"{item}\n"
        yield "."


def make_numbers() -> Iterator[str]:
    yield "1"
    yield "2"


# Requests.


def serve(app: Any, path: str) -> tuple[str, str, str]:
    """Serve a GET request with wsgiref, which checks the headers.

    :returns: the status, everything after the status line, and the server's log.
    """
    out, errors = io.BytesIO(), io.StringIO()
    environ: dict[str, Any] = {"PATH_INFO": path, "SCRIPT_NAME": ""}
    setup_testing_defaults(environ)
    SimpleHandler(io.BytesIO(), out, errors, environ).run(app)
    status, _, rest = out.getvalue().decode("latin-1").partition("\r\n")
    return status.partition(" ")[2], rest, errors.getvalue()
