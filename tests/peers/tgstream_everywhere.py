"""A pytest plugin: each controller that the tests of TurboGears expose is streamed."""

from __future__ import annotations

from typing import Any

from tg.decorators import Decoration

import tgstream

register = Decoration._register_exposition
streamed: list[Any] = []
"""The controllers, which are kept: a marker on each would be seen by the tests."""


def _register_exposition(self: Any, *args: Any, **options: Any) -> None:
    register(self, *args, **options)
    if not any(each is self.controller for each in streamed):
        streamed.append(self.controller)
        tgstream.stream()(self.controller)


Decoration._register_exposition = _register_exposition


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Count them, in the log."""
    terminalreporter.write_line(f"tgstream: {len(streamed)} controllers are streamed")
