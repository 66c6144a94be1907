"""The two applications that are compared: plain TurboGears2, and with tgstream.

This module imports tgstream only to make the application with tgstream, so that a
process can measure plain TurboGears2 alone.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple
from wsgiref.util import setup_testing_defaults

from tg import TGController, expose

from tests.application import Plug, database_options, make_wsgi_app
from tests.model import Model

App = Callable[..., Any]
BLOCK = 65536
NO_DATABASE = {"tm.enabled": False}


def endless() -> Iterator[bytes]:
    while True:
        yield b"x"


def one() -> Iterator[bytes]:
    yield b"x"


def two() -> Iterator[bytes]:
    yield b"x"
    yield b"x"


def blocks(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield bytes(BLOCK)  # a new object each time, so that a leak shows in the memory


def lines(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b"nineteen characters\n"


def make_root(stream: Callable[[Any], Any]) -> TGController:
    """Return a root controller whose streams are decorated with ``stream``."""

    class RootController(TGController):
        @expose(content_type="application/octet-stream")
        @stream
        def endless(self) -> Any:
            return endless()

        @expose(content_type="application/octet-stream")
        @stream
        def one(self) -> Any:
            return one()

        @expose(content_type="application/octet-stream")
        @stream
        def two(self) -> Any:
            return two()

        @expose(content_type="application/octet-stream")
        @stream
        def blocks(self, count: str) -> Any:
            return blocks(int(count))

        @expose(content_type="application/octet-stream")
        @stream
        def lines(self, count: str) -> Any:
            return lines(int(count))

        @expose(content_type="text/plain")
        def page(self) -> str:
            return "An ordinary page."

    return RootController()


def make_app(tgstream: bool, folder: Path | None) -> App:
    """Return an application of TG's full stack.

    :param tgstream: whether the application uses tgstream, with its plug.
    :param folder: a folder for its database. Without a folder the application has
        neither a database nor transactions.
    """
    options = NO_DATABASE if folder is None else database(folder)
    if not tgstream:
        return configure(make_root(lambda function: function), options)
    from tgstream import plugme, stream

    return configure(make_root(stream), options, plugme)


def configure(
    root: TGController, options: dict[str, Any], plug: Plug | None = None
) -> App:
    """Return an application with ``root``, and with TG's translations.

    :param plug: plugs tgstream, in an application that uses it.
    """
    defaults = {"root_controller": root, "i18n.enabled": True}
    app: App = make_wsgi_app({**defaults, **options}, plug)
    return app


def database(folder: Path) -> dict[str, Any]:
    """Return the options of an application with a new database in ``folder``."""
    return database_options(Model(f"sqlite:///{mkdtemp(dir=folder)}/benchmark.db"))


class Pair(NamedTuple):
    """The same application with and without tgstream, in this process."""

    plain: App
    tgstream: App


def make_pairs(folder: Path) -> tuple[Pair, Pair]:
    """Return the applications with a database in ``folder``, and without a database."""
    # First the plain ones: an application made before the import has no error guard.
    assert "tgstream" not in sys.modules
    with_database, without = make_app(False, folder), make_app(False, None)
    return (
        Pair(with_database, make_app(True, folder)),
        Pair(without, make_app(True, None)),
    )


def environ(path: str) -> dict[str, Any]:
    """Return the smallest WSGI environment of a request."""
    variables: dict[str, Any] = {"PATH_INFO": path, "wsgi.errors": io.StringIO()}
    setup_testing_defaults(variables)
    return variables


def start_response(*args: Any) -> None:
    """Ignore the status and the headers."""
