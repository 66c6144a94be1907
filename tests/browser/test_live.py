"""``examples/live.py`` in real browsers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By

from tests.browser.conftest import Browser
from tests.docs.test_examples import Example
from tests.valkey import Valkey

OpenBrowser = Callable[[], Browser]
StartLive = Callable[..., Example]
MARKUP = '<img src=x onerror=\'document.title = "broken into"\'> & "more"'


@pytest.fixture
def start_live(tmp_path: Path) -> Iterator[StartLive]:
    """Starts the example, and stops it after the test."""
    examples: list[Example] = []

    def start(*options: str) -> Example:
        folder = tmp_path / f"live {len(examples)}"
        folder.mkdir()
        examples.append(Example(folder, "live", *options))
        return examples[-1]

    yield start
    for example in examples:
        example.stop()


def visit(browser: Browser, address: str) -> None:
    """Open a page of the example, and wait until its feed is open."""
    browser.open(address)
    browser.until("feed.readyState == EventSource.OPEN")


def say(browser: Browser, text: str) -> None:
    """Send the form with this text."""
    browser.driver.find_element(By.NAME, "text").send_keys(text + "\n")


def lines(browser: Browser, count: int) -> list[str]:
    """Wait until the feed has ``count`` lines, and return them, the oldest first."""
    shown = "[...document.querySelectorAll('#feed li')].map(each => each.textContent)"
    browser.until(f"{shown}.length >= {count}")
    return list(reversed(browser.run(f"return {shown}")))


def test_message_of_one_browser_is_shown_in_both(
    start_live: StartLive, open_browser: OpenBrowser
) -> None:
    """The message is shown as text, even if it is markup."""
    live, one, two = start_live(), open_browser(), open_browser()
    visit(one, live.address)
    visit(two, live.address)
    say(one, MARKUP)
    assert lines(one, 1) == lines(two, 1) == [MARKUP]
    say(two, "Grüße")
    assert lines(one, 2) == lines(two, 2) == [MARKUP, "Grüße"]
    for browser in one, two:
        assert browser.driver.title == "Live"
        assert browser.run("return document.images.length") == 0
        browser.until("$('say').text.value == ''")


def test_progress_survives_a_reload(
    start_live: StartLive, open_browser: OpenBrowser
) -> None:
    """The bar continues after a reload, and in a browser that opens the same address.

    ``TGSTREAM_SCREENSHOT`` names a file for a screenshot.
    """
    live, one, two = start_live("--pause=0.2"), open_browser(), open_browser()
    visit(one, live.address)
    visit(two, live.address)
    one.driver.find_element(By.ID, "start").click()
    before = one.until("bar.value > 0.2 && bar.value")
    one.driver.refresh()
    # The page gets the earlier steps at once.
    assert one.until("bar.value > 0 && bar.value") < 1
    one.until(f"bar.value > {before}")
    visit(two, one.driver.current_url.removeprefix("http://"))
    two.until(f"bar.value > {before}")
    say(two, "The job is half done.")
    lines(one, 1)
    if path := os.environ.get("TGSTREAM_SCREENSHOT"):
        take_picture(one, two, path)
    for browser in one, two:
        browser.until("step.textContent == 'done'")
        assert browser.run("return [bar.value, steps.readyState]") == [1, 2]
    one.driver.refresh()
    one.until("step.textContent == 'done'")


def take_picture(one: Browser, two: Browser, path: str) -> None:
    """Take a screenshot of the first browser, with a half done job and messages."""
    say(one, "I reloaded the page, and the job continued.")
    lines(one, 2)
    say(two, "I see it too.")
    lines(one, 3)
    say(one, "Two browsers, one server, and no JavaScript library.")
    lines(one, 4)
    one.driver.set_window_size(720, 580)
    one.until("bar.value >= 0.5")
    assert one.driver.get_screenshot_as_file(path)


def test_unknown_job_is_shown_as_forgotten(
    start_live: StartLive, browser: Browser
) -> None:
    """A job is unknown after a restart of a server with channels in memory."""
    live = start_live()
    visit(browser, f"{live.address}/?job={'0' * 32}&lastEventId=00000000-1")
    browser.until("step.textContent == 'forgotten'")


def test_two_processes_share_channels_over_valkey(
    start_live: StartLive, open_browser: OpenBrowser, tmp_path: Path
) -> None:
    """Each browser uses another server, and sees the messages of the other browser."""
    with Valkey(tmp_path) as valkey:
        url = f"--channels={valkey.url}"
        here, there = start_live(url, "--pause=0.1"), start_live(url)
        one, two = open_browser(), open_browser()
        visit(one, here.address)
        visit(two, there.address)
        say(one, "from here")
        assert lines(one, 1) == lines(two, 1) == ["from here"]
        say(two, "from there")
        assert lines(one, 2) == lines(two, 2) == ["from here", "from there"]
        one.driver.find_element(By.ID, "start").click()
        one.until("bar.value > 0.1")
        query = one.run("return location.search")
        visit(two, f"{there.address}/{query}")
        for browser in one, two:
            browser.until("step.textContent == 'done'")


def test_feed_continues_after_its_server_is_restarted(
    start_live: StartLive, browser: Browser, tmp_path: Path
) -> None:
    """The open page gets the messages that another process published meanwhile."""
    with Valkey(tmp_path) as valkey:
        url = f"--channels={valkey.url}"
        here, there = start_live(url), start_live(url)
        visit(browser, here.address)
        say(browser, "before")
        assert lines(browser, 1) == ["before"]
        assert here.stop() == 0
        browser.until("feed.readyState == EventSource.CONNECTING")
        assert there.post("/say", text="meanwhile").status == 204
        start_live(url, f"--port={here.address.rpartition(':')[2]}")
        browser.until("feed.readyState == EventSource.OPEN")
        say(browser, "after")
        assert lines(browser, 3) == ["before", "meanwhile", "after"]
