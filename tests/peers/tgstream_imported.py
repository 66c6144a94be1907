"""A pytest plugin: tgstream is imported before the tests of another project."""

from __future__ import annotations

from typing import Any

import tgstream


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the package that is tested, in the log."""
    terminalreporter.write_line(f"tgstream: imported from {tgstream.__file__}")
