"""The version and the changelog of a release."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import tgstream

CHANGELOG = (Path(__file__).parents[2] / "docs/changelog.rst").read_text()


def test_version_is_the_same_everywhere() -> None:
    """The package, its metadata and the changelog have the same version.

    If the metadata of an editable install is older, install it again.
    """
    newest = re.findall(r"^(\d\S*) - \d{4}-\d\d-\d\d\n-+$", CHANGELOG, re.MULTILINE)[0]
    assert tgstream.__version__ == newest
    assert metadata.version("tgstream") == newest


def test_changelog_has_each_release_once_and_the_newest_first() -> None:
    """Its headings are the ones of Keep a Changelog."""
    heads = re.findall(r"^(.+)\n-+$", CHANGELOG, re.MULTILINE)
    released = [head for head in heads if head != "Unreleased"]
    matches = [re.fullmatch(r"[\d.]+ - ([\d-]+)", head) for head in released]
    dates = [match[1] for match in matches if match]
    assert len(dates) == len({*released}) > 0
    assert dates == sorted(dates, reverse=True)
    assert "Unreleased" not in heads[1:]
    sections = {*re.findall(r"^(.+)\n~+$", CHANGELOG, re.MULTILINE)}
    assert sections <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }
