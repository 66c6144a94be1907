"""The English of the project: no file has a word that :mod:`tests.docs.words` finds."""

from __future__ import annotations

from pathlib import Path

import pytest

import tgstream
from tests.docs.words import (
    CHECKED,
    WORDS,
    Passage,
    file_hits,
    files,
    hits,
    markdown_passages,
    python_passages,
    rst_passages,
)

ROOT = Path(__file__).parents[2]
PATHS = {
    str(path.relative_to(root)): path
    for name in CHECKED
    for root in [Path(tgstream.__file__).parents[1] if name == "tgstream" else ROOT]
    for path in files(root / name)
}
"""The files, by their names in the repository. The tests may run with a wheel."""
NOT_REWRITTEN = {
    "README.md",
    "docs/benchmarks.rst",
    "docs/changelog.rst",
    "docs/comparison.rst",
    "docs/contributing.rst",
    "docs/doctor.rst",
    "docs/explanation.rst",
    "docs/exports.rst",
    "docs/index.rst",
    "docs/live.rst",
    "docs/moving.rst",
    "docs/proxies.rst",
    "docs/security.rst",
    "docs/servers.rst",
    "docs/streams.rst",
    "docs/testing.rst",
    "docs/tutorial.rst",
    "docs/writing.rst",
}
"""Pages and folders that still have such words. Nothing may be added."""


def words_of(*passages: Passage) -> list[str]:
    """The words that are found, in the order of the rules."""
    return [hit.word for passage in passages for hit in hits(passage)]


def is_below(name: str, old: str) -> bool:
    return name == old or name.startswith(f"{old}/")


def is_rewritten(name: str) -> bool:
    return not any(is_below(name, old) for old in NOT_REWRITTEN)


@pytest.mark.parametrize("folder", CHECKED)
def test_files_have_only_the_words_of_the_project(folder: str) -> None:
    """Each hit is shown with its line and a better word."""
    wrong = [
        f"{name}:{hit.line}: {hit.word} -> {hit.better}"
        for name, path in PATHS.items()
        if Path(name).parts[0] == folder and is_rewritten(name)
        for hit in file_hits(path)
    ]
    assert wrong == []


def test_files_were_found() -> None:
    """The tests above read the library, the tests, the examples and all pages."""
    assert {Path(name).parts[0] for name in PATHS} == {*CHECKED}
    assert len(PATHS) > 200


@pytest.mark.parametrize("old", sorted(NOT_REWRITTEN))
def test_page_to_rewrite_has_such_words(old: str) -> None:
    """A page without them leaves the list."""
    assert any(file_hits(path) for name, path in PATHS.items() if is_below(name, old))


WRONG = {
    "All seats are taken.": ["seats"],
    "Mend this first.": ["Mend"],
    "The client is told the size.": ["told"],
    "It tells the reason, and a browser hears it.": ["tells", "hears"],
    "The page says how.": ["says"],
    "Text that Latin-1 cannot say.": ["cannot say"],
    "The server is asked again.": ["asked"],
    "A proxy holds them back.": ["holds them back"],
    "Its chunks are held back.": ["held back"],
    "The two are held against each other.": ["held against"],
    "limit=0 makes no sense": ["makes no sense"],
    "Most of what CSV makes of it.": ["makes of"],
    "It fails half-way, and waits for ever.": ["half-way", "for ever"],
    "Read it anew, as ever.": ["anew", "as ever"],
    "A browser that comes back.": ["comes back"],
    "The stream ended well, and looks whole.": ["ended well", "looks whole"],
    "5 is no text": ["is no text"],
    "a kind that is none of them": ["is none"],
    "Its pieces are gathered.": ["pieces", "gathered"],
    "Each beat ends a silence.": ["beat", "a silence"],
    "Core writes count.": ["Core writes count"],
    "The way out of the application.": ["way out"],
    "Rule: nothing is lost.": ["Rule:"],
    "A format of one's own.": ["one's"],
    "A client that left, and a chunk that leaves.": [
        "client that left",
        "chunk that leaves",
    ],
    "The transfer breaks.": ["transfer breaks"],
    "Both are to be longer.": ["are to be"],
    "It shall wait for what it wants.": ["shall", "wants"],
    "It is refused, for it has no name.": ["for it"],
    "Of the two, that one fails, and the latter waits.": ["that one", "the latter"],
    "This is done by who pulls.": ["by who"],
    "What it wrote is stored.": ["What"],
    "what it wrote is stored": ["what"],
    "It ends. Whoever waits goes on.": ["Whoever"],
    "Where it began is known.": ["Where"],
    "It ends; the rest is lost.": [";"],
}
RIGHT = [
    "What commits when?",
    "It ends. Who commits then? The stream does.",
    "There is no file, and there are none like it.",
    "It is no longer open, and no slower than before: it is no faster than that.",
    "The session is None.",
    "Frequently asked questions",
    "``tell`` and :meth:`says` are code, as `held back`_ is.",
    "Content-Type: text/csv; charset=utf-8",
    "Content-Disposition: attachment; filename=users.csv",
    "fish &amp; chips",
    "In config/app_cfg.py: import tgstream; tgstream.plugme(base_config)",
    "The body has seating, amendments, a heartbeat and whatnot.",
    "A row for it is stored, so that one of them waits, for example.",
    "It warns that one commit may fail.",
    "If you want a body that is complete, wait.",
    "It knows what is stored, and who wrote it.",
    "The user on the left leaves a note.",
]


@pytest.mark.parametrize("sentence", WRONG)
def test_wrong_sentence_is_found(sentence: str) -> None:
    """Only the words that are wrong are found."""
    assert sorted(words_of(Passage(1, [sentence]))) == sorted(WRONG[sentence])


@pytest.mark.parametrize("sentence", RIGHT)
def test_right_sentence_is_not_found(sentence: str) -> None:
    """It uses a similar word, or has the word in code."""
    assert words_of(Passage(1, [sentence])) == []


def test_every_rule_has_a_sentence() -> None:
    """Each regular expression has a wrong sentence that it finds."""
    by_rules = {hit.better for text in WRONG for hit in hits(Passage(1, [text]))}
    assert by_rules == {*WORDS.values(), "begin with the actor", "two sentences"}


SOURCE = '''
"""Module that tells.

    code.tells()

It has code.
"""

import re  # which asks

TABLE = "this one is data that tells nothing"


def test_name_is_told() -> None:
    """Docstring that hears.

    :param name: what is
        gathered.
    """
    # A comment of two lines
    # says so.
    log.warning("X was told to %s", 1)
    raise ValueError(f"{name} is no text; give "
                     "a seat to it")  # type: ignore[x; y]
'''


def test_docstrings_comments_messages_and_test_names_are_read() -> None:
    """The line is that of the word, or that of the message's beginning."""
    words = [(hit.line, hit.word) for p in python_passages(SOURCE) for hit in hits(p)]
    assert sorted(words) == [
        (2, "tells"),
        (9, "asks"),
        (14, "told"),
        (15, "hears"),
        (17, "what"),
        (18, "gathered"),
        (21, "says"),
        (22, "told"),
        (23, ";"),
        (23, "is no text"),
        (23, "seat"),
    ]


def test_every_text_of_the_library_is_a_message() -> None:
    """Options and findings are shown to a reader too."""
    words = words_of(*python_passages(SOURCE, every_text=True))
    assert words.count("tells") == 2


RST = """\
What it does
============

A paragraph that
tells::

    code.tells()

- It asks.

.. code-block:: python

    code.tells()

.. list-table::

    * - ``told``
      - What is seen
"""
MARKDOWN = """\
# What it does

```python
code.tells()
```

| a | What is seen |
"""


def test_pages_are_read_without_their_code() -> None:
    """Headings, paragraphs, items and cells are read."""
    assert words_of(*rst_passages(RST)) == ["What", "tells", "asks", "What"]
    assert words_of(*markdown_passages(MARKDOWN)) == ["What"]
