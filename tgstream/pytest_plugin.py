"""The fixture ``open_stream``, for those who ask for it in their ``conftest.py``.

Rule: nothing here is imported by tgstream itself, which does not need pytest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from . import testing


@pytest.fixture
def open_stream() -> Iterator[Callable[..., testing.OpenStream]]:
    """:func:`tgstream.testing.open_stream`, and afterwards nothing may be left behind.

    Put ``pytest_plugins = ["tgstream.pytest_plugin"]`` into ``conftest.py``.
    """
    with contextlib.ExitStack() as stack:

        def open(app: Any, *args: Any, **options: Any) -> testing.OpenStream:
            return stack.enter_context(testing.open_stream(app, *args, **options))

        yield open
    testing.assert_clean()
