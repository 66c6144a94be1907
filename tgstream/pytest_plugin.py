"""The fixture ``open_stream``, for a ``conftest.py``, and a fresh start of each test.

tgstream itself does not import this module, because it does not need pytest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from . import testing
from .core.monitor import monitor


@pytest.fixture(autouse=True)
def tgstream_is_not_draining() -> Iterator[None]:
    """Let tests and fixtures start streams after ``drain()`` in another one."""
    monitor.draining = False
    yield
    monitor.draining = False


@pytest.fixture
def open_stream() -> Iterator[Callable[..., testing.OpenStream]]:
    """:func:`tgstream.testing.open_stream`, and after the test ``assert_clean()``.

    It closes the streams that the test has left open. Put
    ``pytest_plugins = ["tgstream.pytest_plugin"]`` into ``conftest.py``.
    """
    with contextlib.ExitStack() as stack:

        def open(app: Any, *args: Any, **options: Any) -> testing.OpenStream:
            return stack.enter_context(testing.open_stream(app, *args, **options))

        yield open
    testing.assert_clean()
