"""The tutorial itself, and the tests of the application that it makes."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from tests.quickstart.conftest import QUICKSTARTS, Quickstart, run
from tests.quickstart.follow import Shell, follow
from tests.quickstart.tutorial import TUTORIAL, Block, apply, blocks, matches


@pytest.mark.parametrize("kind", QUICKSTARTS)
def test_application_tests_pass(
    quickstart: Quickstart, kind: str, tmp_path: Path
) -> None:
    """Its own tests and the tutorial's tests pass, with the required coverage."""
    app = shutil.copytree(quickstart(kind), tmp_path / "myapp")
    output = run(app, "-m", "pytest", "-v", "-p", "no:cacheprovider")
    assert " failed" not in output
    assert "TestExport::test_manager_gets_every_user PASSED" in output
    assert "TestLive::test_what_one_says_the_other_hears PASSED" in output
    assert "TestAuthentication::test_voluntary_login PASSED" in output
    assert "Required test coverage of 90% reached" in output


def test_each_output_follows_commands() -> None:
    """Each output block of the page comes directly after its commands."""
    steps = blocks(TUTORIAL.read_text())
    for before, shown in pairwise(steps):
        if shown.language == "text" and not shown.caption:
            assert before.language == "sh", shown.text


def test_block_that_does_not_apply_is_an_error(tmp_path: Path) -> None:
    """A diff of other lines fails, and so does a new file that already exists."""
    (tmp_path / "there").write_text("one\none\n")
    for diff in " two\n+three\n", " one\n+two\n":
        with pytest.raises(ValueError, match=r"found [02] times"):
            apply(Block("diff", "there", diff), tmp_path)
    with pytest.raises(ValueError, match="there exists"):
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
def test_follow_stops_at_a_difference(tmp_path: Path, steps: list[Block]) -> None:
    """If a result differs from the page, the command fails."""
    shell = Shell(tmp_path)
    try:
        with pytest.raises(SystemExit):
            follow(shell, tmp_path, steps)
    finally:
        shell.end()


def test_follow_uses_one_shell(tmp_path: Path) -> None:
    """The folder, variables and background processes last from block to block."""
    shell = Shell(tmp_path)
    commands = "mkdir there\ncd there\nname=ada\nsleep 0 &\n"
    steps = [
        Block("sh", "", commands),
        Block("python", "there/greeting", "hello\n"),
        Block("sh", "", 'wait\necho "$(cat greeting) $name"\n'),
        Block("text", "", "hello ...a\n"),
    ]
    try:
        follow(shell, tmp_path, steps)
    finally:
        shell.end()


def test_whole_output_is_compared() -> None:
    """Only three dots stand for any text."""
    assert matches("a ... c\nd", "a b c\r\nd\n")
    assert not matches("a ... c", "a b c d")
    assert not matches("a", "a\nb")
