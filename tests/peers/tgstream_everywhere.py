"""A pytest plugin that streams each controller that TurboGears' tests expose."""

from __future__ import annotations

from typing import Any

from tg.decorators import Decoration

import tgstream

register = Decoration._register_exposition
streamed: list[Any] = []
"""The streamed controllers. A marker on them could change the tests."""


def _register_exposition(self: Any, *args: Any, **options: Any) -> None:
    register(self, *args, **options)
    if not any(controller is self.controller for controller in streamed):
        streamed.append(self.controller)
        tgstream.stream()(self.controller)


Decoration._register_exposition = _register_exposition


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many controllers are streamed."""
    terminalreporter.write_line(f"tgstream: {len(streamed)} streamed controllers")
