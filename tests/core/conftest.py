"""Fixtures that several files of tests use."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    """An object is freed with its last reference, or not at all."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
