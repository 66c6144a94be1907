"""``docs/tutorial.rst`` as a program reads it: its blocks, and what is done with each.

A block of ``sh`` is commands, a line each. One of ``text`` is what the commands before
it print, where ``...`` stands for anything; with a caption, what the server logs. Any
other block is for the file that its caption names: a new file, or lines for the end of
one (``FILE, at its end``), or a ``diff``, each of whose hunks fits once.

Rule: it needs the standard library alone, for it also runs where nothing is installed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs/tutorial.rst"
AT_ITS_END = ", at its end"
_BLOCK = re.compile(
    r"^\.\. code-block:: (?P<language>\w+)\n"
    r"(?: {4}:caption: (?P<caption>.+)\n)?"
    r"\n(?P<text>(?: {4}.*\n|\n)+)",
    re.MULTILINE,
)


class Block(NamedTuple):
    """A block of the page, where the page stands in the margin."""

    language: str
    caption: str
    text: str

    @property
    def is_for_a_file(self) -> bool:
        """True where the caption names a file."""
        return self.language not in ("sh", "text")


def blocks(page: str) -> list[Block]:
    """All blocks of a page, in order."""
    found = [
        Block(each["language"], each["caption"] or "", dedented(each["text"]))
        for each in _BLOCK.finditer(page)
    ]
    assert len(found) == page.count(".. code-block::"), "a block has another form"
    return found


def dedented(text: str) -> str:
    """The text of a block, without its margin."""
    return re.sub(r"^ {4}", "", text, flags=re.MULTILINE).rstrip("\n") + "\n"


def apply(block: Block, folder: Path) -> None:
    """Do to a file of the application what the block says.

    :raises ValueError: when it does not fit.
    """
    file = folder / block.caption.removesuffix(AT_ITS_END)
    if block.language == "diff":
        file.write_text(patched(file.read_text(), block))
    elif block.caption.endswith(AT_ITS_END):
        file.write_text(f"{file.read_text().rstrip()}\n\n{block.text}")
    elif file.exists():
        raise ValueError(f"{block.caption} is there already")
    else:
        file.write_text(block.text)


def patched(text: str, diff: Block) -> str:
    """The text with each hunk of ``diff`` done."""
    for hunk in diff.text.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        if text.count(before) != 1:
            raise ValueError(
                f"{diff.caption} has {text.count(before)} times:\n{before}"
            )
        text = text.replace(before, after)
    return text


def matches(shown: str, seen: str) -> bool:
    """Whether ``seen`` is what the page shows, with anything for ``...``."""
    pattern = ".*".join(map(re.escape, shown.strip().split("...")))
    return re.fullmatch(pattern, seen.replace("\r", "").strip(), re.DOTALL) is not None


def is_logged(shown: str, log: str) -> bool:
    """Whether a log has what the page shows, where a line may be broken differently."""
    return matches(f"...{' '.join(shown.split())}...", " ".join(log.split()))
