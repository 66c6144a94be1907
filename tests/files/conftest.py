"""Fixtures that these tests share with those of the browser."""

from tests.browser.conftest import open_browser

__all__ = ["open_browser"]
