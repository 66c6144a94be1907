"""Real browsers, each with an empty profile. ``.ci/browser`` runs these tests."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.support.wait import WebDriverWait

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync
--disable-dev-shm-usage --window-size=800,600"""


class Browser:
    """A headless Chromium, with an empty profile in ``folder``."""

    def __init__(self, folder: Path) -> None:
        options = ChromeOptions()
        options.binary_location = os.environ["TGSTREAM_BROWSER"]
        for flag in (*FLAGS.split(), f"--user-data-dir={folder}"):
            options.add_argument(flag)
        # With a path, so that Selenium does not download a driver.
        service = ChromeService(shutil.which("chromedriver"))
        self.driver = Chrome(options, service)

    def open(self, address: str) -> None:
        """Open a page."""
        self.driver.get(f"http://{address}")

    def run(self, script: str) -> Any:
        """Run a script in the page, and return its result."""
        return self.driver.execute_script(script)

    def until(self, condition: str, seconds: float = 30) -> Any:
        """Wait until an expression is true in the page, and return its value."""
        wait = WebDriverWait(self.driver, seconds, poll_frequency=0.02)
        return wait.until(lambda _: self.run(f"return {condition}"), condition)


@pytest.fixture
def open_browser(tmp_path: Path) -> Iterator[Callable[[], Browser]]:
    """Opens browsers, and closes them after the test."""
    numbers = count()
    with contextlib.ExitStack() as stack:

        def start() -> Browser:
            browser = Browser(tmp_path / f"profile {next(numbers)}")
            stack.callback(browser.driver.quit)
            return browser

        yield start


@pytest.fixture
def browser(open_browser: Callable[[], Browser]) -> Browser:
    """One browser."""
    return open_browser()
