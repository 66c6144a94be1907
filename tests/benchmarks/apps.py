"""The applications that are compared: plain TurboGears2, and the same with tgstream.

Rule: nothing here imports tgstream before an application asks for it, so that a
process can stay without.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple
from wsgiref.util import setup_testing_defaults

from tg import FullStackApplicationConfigurator, TGController, expose

from tests.model import Model

App = Callable[..., Any]
BLOCK = 65536


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
        yield bytes(BLOCK)  # a new one each time: what is kept would be seen


def lines(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b"nineteen characters\n"


def make_root(stream: Callable[[Any], Any]) -> TGController:
    """The controllers, decorated with ``stream``."""

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
            return "A page that is no stream."

    return RootController()


def make_app(tgstream: bool, folder: Path | None) -> App:
    """An application of TG's full stack.

    :param tgstream: whether its controllers stream with tgstream, and it is plugged.
    :param folder: where to make its database; without, it has no transactions either.
    """
    configurator = FullStackApplicationConfigurator()
    stream: Callable[[Any], Any] = lambda function: function  # noqa: E731
    if tgstream:
        import tgstream as library

        library.plugme(configurator)
        stream = library.stream
    options = {"tm.enabled": False} if folder is None else database(folder)
    return configure(make_root(stream), options, configurator)


def configure(
    root: TGController,
    options: dict[str, Any],
    configurator: Any = None,
) -> App:
    """An application of TG's full stack, with ``root`` and with no error pages."""
    configurator = configurator or FullStackApplicationConfigurator()
    configurator.update_blueprint(
        {
            "root_controller": root,
            "renderers": ["json"],
            "default_renderer": "json",
            "errorpage.enabled": False,
            "app_globals": Nothing,
            "helpers": Nothing,
            **options,
        }
    )
    app: App = configurator.make_wsgi_app({}, {})
    return app


class Nothing:
    """What ``tg.app_globals`` and a template's ``h`` are."""


def database(folder: Path) -> dict[str, Any]:
    """What an application with a database has in its configuration."""
    url = f"sqlite:///{mkdtemp(dir=folder)}/benchmark.db"
    return {"use_sqlalchemy": True, "sqlalchemy.url": url, "model": Model(url)}


class Pair(NamedTuple):
    """The same application both ways, in this process."""

    plain: App
    tgstream: App


def make_pairs(folder: Path) -> tuple[Pair, Pair]:
    """The application with a database in ``folder``, and without any."""
    # Plain first: an application made before tgstream is imported has no guard.
    assert "tgstream" not in sys.modules
    with_database, without = make_app(False, folder), make_app(False, None)
    return (
        Pair(with_database, make_app(True, folder)),
        Pair(without, make_app(True, None)),
    )


def environ(path: str) -> dict[str, Any]:
    """The environment of a request, as small as a server may make it."""
    made: dict[str, Any] = {"PATH_INFO": path, "wsgi.errors": io.StringIO()}
    setup_testing_defaults(made)
    return made


def start_response(*args: Any) -> None:
    """What a server would do with the headers: here nothing."""
