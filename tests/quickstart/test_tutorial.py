"""The page itself, and what becomes of the application's own tests."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.quickstart.conftest import QUICKSTARTS, Quickstart, run
from tests.quickstart.follow import Shell, follow
from tests.quickstart.tutorial import TUTORIAL, Block, apply, blocks, matches


@pytest.mark.parametrize("kind", QUICKSTARTS)
def test_application_s_own_tests_stay_green(quickstart: Quickstart, kind: str) -> None:
    """Those it came with and those of the tutorial pass, with the coverage it wants."""
    printed = run(quickstart(kind), "-m", "pytest", "-v", "-p", "no:cacheprovider")
    assert " failed" not in printed
    assert "TestExport::test_manager_gets_every_user PASSED" in printed
    assert "TestLive::test_what_one_says_the_other_hears PASSED" in printed
    assert "TestAuthentication::test_voluntary_login PASSED" in printed
    assert "Required test coverage of 90% reached" in printed


def test_each_output_follows_commands() -> None:
    """What the page shows is what the commands right before it print."""
    steps = blocks(TUTORIAL.read_text())
    for before, shown in pairwise(steps):
        if shown.language == "text" and not shown.caption:
            assert before.language == "sh", shown.text


def test_block_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Neither a diff of other lines nor a new file that is there passes silently."""
    (tmp_path / "there").write_text("one\none\n")
    for diff in " two\n+three\n", " one\n+two\n":
        with pytest.raises(ValueError, match=r"there has [02] times"):
            apply(Block("diff", "there", diff), tmp_path)
    with pytest.raises(ValueError, match="is there already"):
        apply(Block("python", "there", "x = 1\n"), tmp_path)


@pytest.mark.parametrize(
    "steps",
    [
        [Block("sh", "", "false\n")],
        [Block("sh", "", "echo one\n"), Block("text", "", "two\n")],
        [Block("text", "where gearbox serve runs", "what is not logged\n")],
    ],
    ids=["command fails", "other output", "not logged"],
)
def test_who_follows_stops_at_a_surprise(tmp_path: Path, steps: list[Block]) -> None:
    """What is not as the page says ends the newcomer's command with an error."""
    shell = Shell(tmp_path)
    try:
        with pytest.raises(SystemExit):
            follow(shell, tmp_path, steps)
    finally:
        shell.end()


def test_who_follows_has_one_shell(tmp_path: Path) -> None:
    """Folder, variables and what runs in the background last from block to block."""
    shell = Shell(tmp_path)
    words = "mkdir there\ncd there\nname=ada\nsleep 0 &\n"
    steps = [
        Block("sh", "", words),
        Block("python", "there/said", "hello\n"),
        Block("sh", "", 'wait\necho "$(cat said) $name"\n'),
        Block("text", "", "hello ...a\n"),
    ]
    try:
        follow(shell, tmp_path, steps)
    finally:
        shell.end()


def test_output_is_compared_to_its_end() -> None:
    """Three dots stand for anything, and nothing else does."""
    assert matches("a ... c\nd", "a b c\r\nd\n")
    assert not matches("a ... c", "a b c d")
    assert not matches("a", "a\nb")
