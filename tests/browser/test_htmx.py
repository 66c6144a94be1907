"""The pages of ``docs/htmx.rst`` with the real libraries, which npm has installed."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.browser.conftest import Browser
from tests.browser.proxy import Proxy
from tests.conftest import LiveServer
from tests.returning import measure_stop

ROWS = "[...document.querySelectorAll('#users > li')].map(row => row.textContent)"


class Site:
    """The pages on a server, behind a proxy, and one of them in a browser."""

    def __init__(self, server: LiveServer, browser: Browser, library: str) -> None:
        self.proxy = Proxy(server.port)
        self.browser = browser
        self.library = library
        self._port = server.port

    def open(self) -> None:
        """Open the page of the library."""
        self.browser.open(f"127.0.0.1:{self.proxy.port}/{self.library}/")

    def send(self, path: str, **form: str) -> None:
        """Send a form to the server without the proxy."""
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        connection = HTTPConnection("127.0.0.1", self._port, timeout=20)
        connection.request("POST", path, urlencode(form), headers)
        assert connection.getresponse().status == 204
        connection.close()

    def register(self, *names: str) -> None:
        """Register users, whose rows are published to the page."""
        for name in names:
            self.send(f"/{self.library}/register", name=name)

    def await_rows(self, *names: str) -> None:
        """Wait until the page shows these users, from top to bottom."""
        expected = json.dumps(names)
        self.browser.until(f"JSON.stringify({ROWS}) == JSON.stringify({expected})")


@pytest.fixture(params=["htmx", "htmx4", "turbo", "datastar"])
def site(
    request: pytest.FixtureRequest,
    live_server: Callable[..., LiveServer],
    browser: Browser,
    tmp_path: Path,
) -> Iterator[Site]:
    """The pages on a server. The page of one library has not been opened."""
    site = Site(
        live_server(
            "gunicorn-gevent",
            "htmx_app",
            f"url=sqlite:///{tmp_path}/test.db",
            f"folder={tmp_path}/app",
            f"npm={os.environ['TGSTREAM_NPM']}",
        ),
        browser,
        request.param,
    )
    yield site
    site.proxy.close()


def test_page_shows_users_that_register(site: Site) -> None:
    """Each is shown once, also if the page has the row before its event.

    Their names are text, even if they are markup.
    """
    site.register("ada", "bob")
    site.open()
    site.await_rows("bob", "ada")
    site.register("<b>eve")
    site.await_rows("<b>eve", "bob", "ada")
    site.send("/again", library=site.library, name="ada")
    site.register("joe")
    site.browser.until(f"{ROWS}.includes('joe')")
    shown = site.browser.run(f"return {ROWS}")
    assert sorted(shown) == ["<b>eve", "ada", "bob", "joe"]


def test_page_that_was_disconnected_misses_nothing(site: Site) -> None:
    """The library reconnects with its last id, also after a complete response."""
    site.register("ada")
    site.open()
    site.register("bob")
    site.await_rows("bob", "ada")
    site.proxy.cut()
    site.register("eve", "joe")
    site.await_rows("joe", "eve", "bob", "ada")
    site.send("/drain")
    site.register("kim", "zoe")
    site.await_rows("zoe", "kim", "joe", "eve", "bob", "ada")


def test_page_loads_its_data_again_if_events_are_missing(site: Site) -> None:
    """The history has fewer events than were published meanwhile."""
    site.register("ada")
    site.open()
    site.register("bob")
    site.await_rows("bob", "ada")
    site.proxy.block()
    missed = [f"missed {number}" for number in range(12)]
    site.register(*missed)
    site.proxy.unblock()
    site.await_rows(*reversed(missed), "bob", "ada")
    site.register("zoe")
    site.await_rows("zoe", *reversed(missed), "bob", "ada")


@pytest.mark.parametrize("server", ["gunicorn-gthread", "gunicorn-gevent"])
def test_server_with_an_open_page_stops_soon(
    live_server: Callable[..., LiveServer],
    browser: Browser,
    tmp_path: Path,
    server: str,
) -> None:
    """The page reconnects forever, and its connections for files are idle."""
    live = live_server(
        server,
        "htmx_app",
        "drains=yes",
        f"url=sqlite:///{tmp_path}/test.db",
        f"folder={tmp_path}/app",
        f"npm={os.environ['TGSTREAM_NPM']}",
    )
    site = Site(live, browser, "htmx")
    browser.open(f"127.0.0.1:{live.port}/htmx/")
    browser.until("document.querySelector('#users')")
    site.register("ada")
    site.await_rows("ada")
    assert measure_stop(live) < 4  # with the idle connections: 2 s, and 1 s of gevent
    socket.create_server(("127.0.0.1", live.port)).close()
    site.proxy.close()
