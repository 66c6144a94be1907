"""Streams of real servers in a real browser."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.browser.conftest import Browser
from tests.browser.proxy import Proxy
from tests.conftest import LiveServer
from tests.pages import DOCS, blocks

SERVERS = ["waitress", "gunicorn-gevent"]
Start = Callable[..., LiveServer]


class Site:
    """The application of these tests on a server, behind a proxy."""

    def __init__(self, server: LiveServer) -> None:
        self.connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
        self.proxy = Proxy(server.port)
        self.address = f"127.0.0.1:{self.proxy.port}/"

    def ask(self, path: str) -> bytes:
        """Return the server's response to a request without the proxy."""
        self.connection.request("GET", path)
        response = self.connection.getresponse()
        assert response.status == 200
        return response.read()

    def last_ids(self) -> list[str]:
        """Return the ``Last-Event-ID`` of each request for the feed."""
        last_ids: list[str] = json.loads(self.ask("/last_ids"))["last_ids"]
        return last_ids

    def close(self) -> None:
        """Stop the proxy, but not the server."""
        self.proxy.close()
        self.connection.close()


class Publisher:
    """Publishes the numbers from 0 on, until the ``with`` block ends."""

    def __init__(self, site: Site) -> None:
        self.site, self.published = site, 0
        self._stops = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Publisher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stops.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stops.wait(0.004):
            self.site.ask(f"/publish?number={self.published}")
            self.published += 1


@pytest.fixture
def start_site(live_server: Start) -> Iterator[Callable[..., Site]]:
    """Starts the application on a server."""
    sites: list[Site] = []

    def start(server: str, *options: str) -> Site:
        sites.append(Site(live_server(server, "browser_app", *options)))
        return sites[-1]

    yield start
    for site in sites:
        site.close()


def open_feed(site: Site, browser: Browser) -> None:
    """Open the page, and let it listen to the feed."""
    browser.open(site.address)
    browser.run("listen()")
    assert browser.until("opened.length && opened") == [0]


@pytest.mark.parametrize("server", SERVERS)
def test_event_source_opens_before_the_first_event(
    start_site: Callable[..., Site], browser: Browser, server: str
) -> None:
    """The event source is open although no event was published."""
    site = start_site(server)
    open_feed(site, browser)
    site.ask("/publish?number=1")
    [[data, id]] = browser.until("received.length && received")
    assert data == "1"
    assert id


@pytest.mark.parametrize("server", SERVERS)
def test_event_source_reconnects_with_its_last_id(
    start_site: Callable[..., Site], browser: Browser, server: str
) -> None:
    """After a closed connection, the browser sends the id of its last event."""
    site = start_site(server)
    open_feed(site, browser)
    site.ask("/publish?number=1")
    [[_, id]] = browser.until("received.length && received")
    site.proxy.cut()
    browser.until("opened.length == 2")
    assert site.last_ids() == ["", id]


@pytest.mark.parametrize("server", SERVERS)
def test_event_source_gets_each_event_once_over_three_reconnects(
    start_site: Callable[..., Site], browser: Browser, server: str
) -> None:
    """The connection is closed, then closed within an event, then refused twice."""
    site = start_site(server)
    open_feed(site, browser)
    with Publisher(site) as publisher:
        for cuts, cut in enumerate(
            [site.proxy.cut, site.proxy.tear, site.proxy.refuse], 1
        ):
            had = browser.run("return received.length")
            browser.until(f"received.length >= {had + 50}")
            cut()
            browser.until(f"opened.length == {cuts + 1}")
        had = browser.run("return received.length")
        browser.until(f"received.length >= {had + 50}")
    assert_ledger(f"{server}, cut three times", site, browser, publisher)


@pytest.mark.parametrize("server", SERVERS)
def test_event_source_gets_each_event_once_when_its_stream_expires(
    start_site: Callable[..., Site], browser: Browser, server: str
) -> None:
    """``max_seconds`` ends the stream three times while events are published."""
    site = start_site(server, "seconds=1")
    open_feed(site, browser)
    with Publisher(site) as publisher:
        browser.until("opened.length == 4")
        had = browser.run("return received.length")
        browser.until(f"received.length >= {had + 50}")
    assert_ledger(f"{server}, expired three times", site, browser, publisher)


def assert_ledger(
    name: str, site: Site, browser: Browser, publisher: Publisher
) -> None:
    """Compare the published events with the received ones, and print the counts."""
    site.ask("/publish?number=end")
    browser.until("received.some(([data]) => data == 'end')")
    received = [data for data, _ in browser.run("return received")]
    ids = browser.run("return received.map(([_, id]) => id)")
    [first, *others] = site.last_ids()
    assert first == ""
    assert len(others) >= 3
    assert set(others) <= set(ids)
    expected = [*map(str, range(publisher.published)), "end"]
    times = Counter(received)
    ledger = {
        "published": len(expected),
        "received": len(received),
        "duplicated": times.total() - len(times),
        "lost": len(set(expected) - set(received)),
    }
    counts = ", ".join(f"{count} {what}" for what, count in ledger.items())
    print(f"\n{name}: {counts}, {len(others)} reconnects with the last id")
    assert received == expected


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("query", ["", "?fail=yes"], ids=["done", "failed"])
def test_event_source_that_is_done_or_failed_does_not_reconnect(
    start_site: Callable[..., Site], browser: Browser, server: str, query: str
) -> None:
    """The script of ``docs/live.rst`` closes it, while another one reconnects."""
    site = start_site(server)
    browser.open(site.address)
    scripts = blocks((DOCS / "live.rst").read_text(), "javascript")
    script = next(script for script in scripts if "/live/names" in script)
    address = f"/live/names{query}"
    browser.run(
        "window.shown = [], window.show = text => shown.push(text), window.others = 0;"
        f"{script.replace('/live/names', address)} window.names = names;"
    )
    *received, last = browser.until("shown.length == 3 && shown")
    assert received == ["ada", "bob"]
    assert re.fullmatch(r"Something .*: [0-9a-f]{16}" if query else "2 names", last)
    browser.run("new EventSource('/live/endless').onopen = () => ++others")
    browser.until("others == 5")
    assert browser.run("return names.readyState") == 2  # CLOSED
    assert json.loads(site.ask("/live/visits")) == {"visits": [query[6:]]}
    assert browser.run("return shown.length") == 3


@pytest.mark.parametrize("server", SERVERS)
def test_fetch_reads_ndjson_line_by_line(
    start_site: Callable[..., Site], browser: Browser, server: str
) -> None:
    """The page receives each line before the next line is made."""
    site = start_site(server)
    browser.open(site.address)
    browser.run("read()")
    pieces: list[Any] = browser.until("pieces.length == 3 && pieces")
    assert [json.loads(piece) for piece in pieces] == [
        {"piece": 1},
        {"piece": 2, "seen": True},
        {"piece": 3, "seen": True},
    ]


def test_browser_opens_at_most_six_streams_of_a_server(
    start_site: Callable[..., Site], browser: Browser
) -> None:
    """The seventh stream waits until another is closed, as the servers page warns."""
    site = start_site("gunicorn-gevent")
    browser.open(site.address)
    browser.run(
        "window.sources = [...Array(7)].map(() => new EventSource('feed'));"
        "window.countOpen = () => sources.filter(each => each.readyState == 1).length"
    )
    browser.until("countOpen() == 6")
    assert len(site.last_ids()) == 6
    browser.run("sources.find(each => each.readyState == 1).close()")
    browser.until("countOpen() == 6 && sources.every(each => each.readyState > 0)")
    assert len(site.last_ids()) == 7
