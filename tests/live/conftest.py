"""Fixtures of the tests of channels."""

from __future__ import annotations

from itertools import count

import pytest

from tests.conftest import MakeApp
from tgstream import Channel

numbers = count()


@pytest.fixture
def name() -> str:
    """The name of a channel that no other test uses."""
    return f"test {next(numbers)}"


@pytest.fixture
def channel(make_app: MakeApp, name: str) -> Channel:
    """A channel that no other test uses."""
    return Channel(name)
