"""``examples/operator_page.py`` in a real browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By

from tests.browser.conftest import Browser
from tests.docs.test_examples import Example
from tests.valkey import Valkey

PATHS = "[...document.querySelectorAll('#streams tr')].map(r => r.cells[2].textContent)"


@pytest.fixture
def pages(tmp_path: Path) -> Iterator[tuple[Example, Example]]:
    """Two processes of the example, which share their channels."""
    examples = []
    with Valkey(tmp_path / "valkey") as valkey:
        options = f"--channels={valkey.url}", "--password=secret"
        for name in "here", "there":
            (tmp_path / name).mkdir()
            examples.append(Example(tmp_path / name, "operator_page", *options))
        here, there = examples
        yield here, there
        for example in examples:
            example.stop()


def log_in(browser: Browser, address: str) -> None:
    """Open the page for operators, which leads to the form, and log in."""
    browser.open(f"{address}/operator")
    browser.driver.find_element(By.NAME, "password").send_keys("secret\n")
    browser.until("document.querySelector('h1').textContent == 'Open streams'")


def test_operator_sees_and_ends_the_streams_of_all_processes(
    pages: tuple[Example, Example], browser: Browser
) -> None:
    """The stream of the other process ends, and its list is up to date soon.

    ``TGSTREAM_OPERATOR_SCREENSHOT`` names a file for a screenshot.
    """
    here, there = pages
    with there.get("/clock") as clock, there.get("/report") as report:
        assert clock.readline() == b"retry: 1000\n"
        assert report.readline() == b"line 1\n"
        log_in(browser, here.address)
        browser.until(f"{PATHS}.length == 3")
        shown = browser.run(f"return {PATHS}")
        assert sorted(shown) == ["/clock", "/operator/answers", "/report"]
        if path := os.environ.get("TGSTREAM_OPERATOR_SCREENSHOT"):
            browser.driver.set_window_size(1280, 400)
            assert browser.driver.get_screenshot_as_file(path)
        row = f"document.querySelectorAll('#streams tr')[{PATHS}.indexOf('/clock')]"
        browser.run(f"{row}.querySelector('button').click()")
        assert clock.read().endswith(b"\n\n")
        browser.until(f"!{PATHS}.includes('/clock')", seconds=5)
        assert "/report" in browser.run(f"return {PATHS}")


def test_browser_reconnects_if_its_stream_is_ended(
    pages: tuple[Example, Example], browser: Browser
) -> None:
    """The page of the operator ends its own stream, and goes on."""
    here, _ = pages
    log_in(browser, here.address)
    browser.until(f"{PATHS}.length == 1")
    id = browser.run("return document.querySelector('#streams tr').id")
    browser.run("document.querySelector('#streams button').click()")
    browser.until("answers.readyState == EventSource.CONNECTING", seconds=5)
    browser.until("answers.readyState == EventSource.OPEN", seconds=5)
    browser.until(f"!document.getElementById('{id}') && {PATHS}.length == 1")
