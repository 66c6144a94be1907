"""A process that is killed while it commits loses no message and sends no other one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.forks import run_python


@pytest.mark.parametrize("seed", [1])
def test_message_is_stored_if_and_only_if_its_row_is(tmp_path: Path, seed: int) -> None:
    """Processes are killed at instructions between the publish and the commit."""
    url = f"sqlite:///{tmp_path}/test.db"
    done = run_python("-m", "tests.live.killed_publisher", url, "25", str(seed))
    match = re.fullmatch(r"(\d+) of 25 committed, \d+ instructions.*\n", done.stdout)
    assert match is not None, done.stderr
    assert 2 < int(match[1]) < 25  # two of them are not killed
