"""What a release says of itself, wherever it says it."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import tgstream

CHANGELOG = (Path(__file__).parents[2] / "docs/changelog.rst").read_text()


def test_version_is_one() -> None:
    """The package, what is installed and the newest release in the changelog agree.

    What was installed in place keeps the version that it had then: install it again.
    """
    newest = re.findall(r"^(\d\S*) - \d{4}-\d\d-\d\d\n-+$", CHANGELOG, re.MULTILINE)[0]
    assert tgstream.__version__ == newest
    assert metadata.version("tgstream") == newest


def test_changelog_has_each_release_once_and_the_newest_first() -> None:
    """Its headings are those of Keep a Changelog."""
    heads = re.findall(r"^(.+)\n-+$", CHANGELOG, re.MULTILINE)
    released = [head for head in heads if head != "Unreleased"]
    dates = [re.fullmatch(r"[\d.]+ - ([\d-]+)", head) for head in released]
    told = [found[1] for found in dates if found]
    assert len(told) == len({*released}) > 0
    assert told == sorted(told, reverse=True)
    assert "Unreleased" not in heads[1:]
    kinds = {*re.findall(r"^(.+)\n~+$", CHANGELOG, re.MULTILINE)}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
