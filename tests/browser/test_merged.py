"""Several channels on one stream, and pages that are not born stale, in a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest

from tests.browser.conftest import Browser
from tests.conftest import LiveServer
from tests.live_apps.merged_app import NAMES


class Site:
    """The application on a server, and a client beside the browser."""

    def __init__(self, server: str) -> None:
        self.server = LiveServer(server, "merged_app")
        self.address = f"127.0.0.1:{self.server.port}/"

    def ask(self, path: str) -> bytes:
        """The server's response to a request."""
        connection = HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200
        body = response.read()
        connection.close()
        return body

    def publish(self, name: str, text: str) -> None:
        self.ask(f"/publish?name={name}&text={text}")


@pytest.fixture(params=["waitress", "gunicorn-gevent"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """The application on a server."""
    site = Site(request.param)
    yield site
    site.server.kill()


def open_tabs(browser: Browser, site: Site, count: int) -> list[str]:
    """Open the page in several tabs of one browser, which share its connections."""
    tabs = []
    for _ in range(count):
        browser.driver.switch_to.new_window("tab")
        browser.open(site.address)
        tabs.append(browser.driver.current_window_handle)
    return tabs


def test_two_tabs_need_a_connection_each_for_five_channels(
    site: Site, browser: Browser
) -> None:
    """Each tab receives the events of all channels, and can still send requests."""
    tabs = open_tabs(browser, site, 2)
    for tab in tabs:
        browser.driver.switch_to.window(tab)
        browser.run("merged()")
        browser.until("opened.length == 1")
    expected = [[name, f"{number}"] for number, name in enumerate(NAMES)]
    for name, text in expected:
        site.publish(name, text)
    assert json.loads(site.ask("/streams")) == {"streams": 2}
    for tab in tabs:
        browser.driver.switch_to.window(tab)
        received = browser.until(f"received.length == {len(NAMES)} && received")
        assert sorted(received) == sorted(expected)
        browser.run("fetch('streams').then(r => r.json()).then(j => window.count = j)")
        assert browser.until("window.count") == {"streams": 2}


@pytest.mark.parametrize("site", ["gunicorn-gevent"], indirect=True)
def test_two_tabs_with_a_stream_for_each_channel_block_each_other(
    site: Site, browser: Browser
) -> None:
    """A browser has six connections to a server, so the second tab gets only one."""
    first, second = open_tabs(browser, site, 2)
    browser.driver.switch_to.window(first)
    browser.run("separate()")
    browser.until("opened.length == 5")
    browser.driver.switch_to.window(second)
    browser.run("separate()")
    browser.until("opened.length == 1")
    assert (
        browser.run("return sources.filter(each => each.readyState == 0).length") == 4
    )
    assert json.loads(site.ask("/streams")) == {"streams": 6}


def test_page_misses_no_event_between_its_rendering_and_its_stream(
    site: Site, browser: Browser
) -> None:
    """Each event is in the page or on the stream, once, also after a reload."""
    expected = [["orders", "before"]]
    site.publish("orders", "before")
    for number in range(2):
        browser.open(site.address)
        assert browser.run("return received") == expected
        for name in NAMES:  # the page has its data, and does not listen yet
            site.publish(name, f"between-{number}")
            expected.append([name, f"between-{number}"])
        browser.run("merged()")
        browser.until("opened.length == 1")
        site.publish("chat", f"after-{number}")
        expected.append(["chat", f"after-{number}"])
        received = browser.until(f"received.length == {len(expected)} && received")
        assert sorted(received) == sorted(expected)
