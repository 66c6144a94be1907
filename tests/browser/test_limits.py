"""``limit=`` with a browser that reloads, reconnects, and has two tabs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from tests.browser.conftest import Browser
from tests.conftest import LiveServer
from tests.pages import DOCS, blocks
from tests.test_servers import Client

SERVERS = ["gunicorn-gthread", "gunicorn-gevent", "waitress"]


@pytest.fixture(params=SERVERS)
def server(
    request: pytest.FixtureRequest, live_server: Callable[..., LiveServer]
) -> Iterator[LiveServer]:
    yield live_server(request.param, "limited", "threads=16")


def publish(server: LiveServer, data: str) -> None:
    Client(server, f"/publish?data={data}").close()


def open_page(browser: Browser, server: LiveServer, kind: str, user: str) -> None:
    browser.open(f"127.0.0.1:{server.port}/?{kind}&user={user}")


def test_page_is_reloaded_again_and_again(server: LiveServer, browser: Browser) -> None:
    """Each reload gets the only slot of its user at once."""
    open_page(browser, server, "refusing", "ada")
    for _ in range(5):
        browser.until("state.opened", 5)
        browser.driver.refresh()
    browser.until("state.opened", 5)
    publish(server, "news")
    assert browser.until("state.events.length && state.events") == ["news"]


def test_two_tabs_do_not_replace_each_other_forever(
    server: LiveServer, browser: Browser
) -> None:
    """The older one learns that it was replaced, and does not reconnect at once."""
    open_page(browser, server, "replacing", "ada")
    browser.until("state.opened")
    old, address = browser.driver.current_window_handle, browser.driver.current_url
    browser.driver.switch_to.new_window("tab")
    new = browser.driver.current_window_handle
    browser.driver.get(address)
    browser.until("state.opened")
    numbers = [str(number) for number in range(50)]
    for number in numbers:
        publish(server, number)
        browser.until(f"state.events.includes('{number}')")
    browser.driver.switch_to.window(old)
    browser.until("state.replaced")
    assert browser.run("return [state.opened, source.readyState]") == [1, 0]
    browser.driver.switch_to.window(new)
    assert browser.run("return [state.opened, source.readyState]") == [1, 1]
    assert browser.run("return [state.events, state.replaced]") == [numbers, None]


def test_script_of_the_docs_opens_the_stream_of_the_visible_tab(
    server: LiveServer, browser: Browser
) -> None:
    """The user goes to and fro between two tabs, and sees a live one each time."""
    [script] = blocks((DOCS / "operating.rst").read_text(), "javascript")
    script = script.replace("let feed;", "")  # a global variable
    script = script.replace("/feeds/news", "/replacing?user=ada")
    tabs = []
    for _ in range(2):
        browser.driver.switch_to.new_window("tab")
        browser.open(f"127.0.0.1:{server.port}/state")
        browser.run(script)
        browser.until("feed.readyState == EventSource.OPEN")
        tabs.append(browser.driver.current_window_handle)
    for number, tab in enumerate((tabs[0], tabs[1], tabs[0]), 1):
        publish(server, "news")  # it wakes the stream that was replaced
        while count_replaced(server) < number:
            pass
        browser.driver.switch_to.window(tab)  # makes it visible
        browser.until("feed.readyState == EventSource.OPEN")


def count_replaced(server: LiveServer) -> int:
    """Return how many streams were replaced."""
    client = Client(server, "/state")
    ended = json.loads(client.response.read())["ended"]
    client.close()
    return sum(reason == "replaced" for _, reason in ended)


def test_refused_browser_reconnects_until_a_slot_is_free(
    server: LiveServer, open_browser: Callable[[], Browser]
) -> None:
    """With ``busy='retry'``. After a 503 it never tries again."""
    holders = [Client(server, f"/{kind}?user=ada") for kind in ("retrying", "refusing")]
    retrying, refused = open_browser(), open_browser()
    open_page(refused, server, "refusing", "ada")
    refused.until("source.readyState == EventSource.CLOSED")
    open_page(retrying, server, "retrying", "ada")
    retrying.until("state.opened == 2")
    for holder in holders:
        holder.close()
    retrying.until("state.opened == 3")
    publish(server, "news")
    retrying.until("state.events.length")
    assert retrying.run("return [source.readyState, state.opened]") == [1, 3]
    assert refused.run("return [source.readyState, state.opened]") == [2, 0]
