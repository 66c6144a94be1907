"""What a real browser makes of streams, under real servers."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.browser.conftest import Browser
from tests.browser.proxy import Proxy
from tests.conftest import LiveServer

SERVERS = ["waitress", "gunicorn-gevent"]
Start = Callable[..., LiveServer]


class Site:
    """The application of these tests on a server, behind a proxy that can be cut."""

    def __init__(self, server: LiveServer) -> None:
        self.connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
        self.proxy = Proxy(server.port)
        self.address = f"127.0.0.1:{self.proxy.port}/"

    def ask(self, path: str) -> bytes:
        """What the server answers, past the proxy."""
        self.connection.request("GET", path)
        response = self.connection.getresponse()
        assert response.status == 200
        return response.read()

    def asked(self) -> list[str]:
        """The last ids with which a feed was asked for."""
        asked: list[str] = json.loads(self.ask("/asked"))["asked"]
        return asked

    def close(self) -> None:
        """End the proxy, but not the server."""
        self.proxy.close()
        self.connection.close()


class Publisher:
    """Publishes the numbers from 0 on, until it is told to stop."""

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
    """Starts the application under a named server."""
    sites: list[Site] = []

    def start(server: str, *options: str) -> Site:
        sites.append(Site(live_server(server, "browser_app", *options)))
        return sites[-1]

    yield start
    for site in sites:
        site.close()


@pytest.mark.parametrize("server", SERVERS)
def test_event_source_opens_before_the_first_event(
    start_site: Callable[..., Site], browser: Browser, server: str
) -> None:
    """The page knows that it listens, while there is nothing to hear."""
    site = start_site(server)
    browser.open(site.address)
    browser.run("listen()")
    assert browser.until("opened.length && opened") == [0]
    site.ask("/publish?number=1")
    [[data, id]] = browser.until("received.length && received")
    assert data == "1"
    assert id


@pytest.mark.parametrize("server", SERVERS)
def test_event_source_comes_back_with_its_last_id(
    start_site: Callable[..., Site], browser: Browser, server: str
) -> None:
    """Cut off, it tells the server the id of the last event that it has had."""
    site = start_site(server)
    browser.open(site.address)
    browser.run("listen()")
    browser.until("opened.length")
    site.ask("/publish?number=1")
    [[_, id]] = browser.until("received.length && received")
    site.proxy.cut()
    browser.until("opened.length == 2")
    assert site.asked() == ["", id]


@pytest.mark.parametrize("server", SERVERS)
def test_event_source_that_is_cut_three_times_gets_each_event_once(
    start_site: Callable[..., Site], browser: Browser, server: str
) -> None:
    """Whether the connection ends, tears inside an event, or is refused for a while."""
    site = start_site(server)
    browser.open(site.address)
    browser.run("listen()")
    browser.until("opened.length")
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
def test_event_source_whose_stream_expires_gets_each_event_once(
    start_site: Callable[..., Site], browser: Browser, server: str
) -> None:
    """``max_seconds`` ends it three times, and events are published meanwhile."""
    site = start_site(server, "seconds=1")
    browser.open(site.address)
    browser.run("listen()")
    browser.until("opened.length")
    with Publisher(site) as publisher:
        browser.until("opened.length == 4")
        had = browser.run("return received.length")
        browser.until(f"received.length >= {had + 50}")
    assert_ledger(f"{server}, expired three times", site, browser, publisher)


def assert_ledger(
    name: str, site: Site, browser: Browser, publisher: Publisher
) -> None:
    """Hold what was published against what came, and print it."""
    site.ask("/publish?number=end")
    browser.until("received.some(([data]) => data == 'end')")
    received = [data for data, _ in browser.run("return received")]
    ids = browser.run("return received.map(([_, id]) => id)")
    [first, *others] = site.asked()
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
    told = ", ".join(f"{count} {what}" for what, count in ledger.items())
    print(f"\n{name}: {told}; came back {len(others)} times with its last id")
    assert received == expected


@pytest.mark.parametrize("server", SERVERS)
def test_fetch_reads_ndjson_piece_by_piece(
    start_site: Callable[..., Site], browser: Browser, server: str
) -> None:
    """A piece is made when the page has said that it has the one before."""
    site = start_site(server)
    browser.open(site.address)
    browser.run("read()")
    pieces: list[Any] = browser.until("pieces.length == 3 && pieces")
    assert [json.loads(piece) for piece in pieces] == [
        {"piece": 1},
        {"piece": 2, "seen": True},
        {"piece": 3, "seen": True},
    ]


def test_browser_has_six_streams_of_a_server(
    start_site: Callable[..., Site], browser: Browser
) -> None:
    """The next waits until one is closed, as the page on servers warns."""
    site = start_site("gunicorn-gevent")
    browser.open(site.address)
    browser.run(
        "window.sources = [...Array(7)].map(() => new EventSource('feed'));"
        "window.open_ones = () => sources.filter(each => each.readyState == 1).length"
    )
    browser.until("open_ones() == 6")
    assert len(site.asked()) == 6
    browser.run("sources.find(each => each.readyState == 1).close()")
    browser.until("open_ones() == 6 && sources.every(each => each.readyState > 0)")
    assert len(site.asked()) == 7
