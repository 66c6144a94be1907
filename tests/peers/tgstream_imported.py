"""A pytest plugin that imports tgstream before the tests of another project."""

from __future__ import annotations

from typing import Any

import tgstream


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the path of the tested package."""
    terminalreporter.write_line(f"tgstream: imported from {tgstream.__file__}")
