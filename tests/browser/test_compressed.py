"""Compressed streams in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from urllib.request import urlopen

import pytest

from tests.browser.conftest import Browser
from tests.conftest import LiveServer

SERVERS = ["waitress", "gunicorn-gthread", "gunicorn-gevent"]
Start = Callable[[str, str], LiveServer]


def open_page(live_server: Start, browser: Browser, server: str) -> str:
    """Open the page on a server, and return the server's URL."""
    port = live_server(server, "compressed_app").port
    browser.open(f"127.0.0.1:{port}/")
    return f"http://127.0.0.1:{port}/"


@pytest.mark.parametrize("server", SERVERS)
def test_first_compressed_event_arrives_before_the_second_is_made(
    live_server: Start, browser: Browser, server: str
) -> None:
    """An event source reads it. The server makes the second one after that."""
    url = open_page(live_server, browser, server)
    browser.run("listen('page'); read('lines?name=lines')")
    assert browser.until("received.length && received") == ["one"]
    urlopen(f"{url}see?name=page").close()
    urlopen(f"{url}see?name=lines").close()
    assert browser.until("received.length > 1 && received") == ["one", "two, True"]
    path = "lines?name=lines"
    assert '"seen":true' in browser.until(f"texts['{path}']")
    assert browser.run(f"return codings['{path}']") == "zstd"


def test_events_are_compressed_with_gzip(live_server: Start, browser: Browser) -> None:
    """It has the smallest memory of the codings that the browser accepts."""
    open_page(live_server, browser, "waitress")
    browser.run("read('events?name=page'); fetch('see?name=page')")
    text = browser.until("texts['events?name=page']")
    assert text == "data: one\n\ndata: two, True\n\n"
    assert browser.run("return codings['events?name=page']") == "gzip"


@pytest.mark.parametrize("server", ["waitress", "wsgiref"])
def test_truncated_export_is_noticed_over_http_1_1_alone(
    live_server: Start, browser: Browser, server: str
) -> None:
    """wsgiref closes the connection, and the browser does not check the coding."""
    open_page(live_server, browser, server)
    browser.run("read('export'); read('export?fail=yes')")
    assert len(browser.until("texts.export")) == 123098
    text = browser.until("texts['export?fail=yes']")
    if server == "waitress":
        assert text == "TypeError"
    else:
        assert text.startswith("n,text\r\n0,\r\n1,x")
        assert len(text) < 100_000
    assert browser.run("return codings['export?fail=yes']") == "zstd"
