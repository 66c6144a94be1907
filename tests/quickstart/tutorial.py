"""Read ``docs/tutorial.rst``: its code blocks, and how to apply them.

- A block of ``sh`` has commands, one on each line.
- A block of ``text`` has the output of the commands before it. ``...`` stands for any
  text. With a caption, it has lines of the server's log.
- Any other block changes the file in its caption. It is a new file, or lines for the
  end of a file (``FILE, at its end``), or a ``diff``, whose hunks each match once.

This module uses the standard library only, because it also runs without any package.
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
    """A code block of the page, without its indentation."""

    language: str
    caption: str
    text: str

    @property
    def is_for_a_file(self) -> bool:
        """True if the caption names a file."""
        return self.language not in ("sh", "text")


def blocks(page: str) -> list[Block]:
    """All blocks of a page, in order."""
    blocks_of_page = [
        Block(match["language"], match["caption"] or "", dedent(match["text"]))
        for match in _BLOCK.finditer(page)
    ]
    assert len(blocks_of_page) == page.count(".. code-block::"), (
        "a block has a form that this module cannot read"
    )
    return blocks_of_page


def dedent(text: str) -> str:
    """The text of a block, without its indentation."""
    return re.sub(r"^ {4}", "", text, flags=re.MULTILINE).rstrip("\n") + "\n"


def apply(block: Block, folder: Path) -> None:
    """Change or create the file in the caption of a block.

    :param folder: the application.
    :raises ValueError: if the file exists, or a hunk does not match exactly once.
    """
    file = folder / block.caption.removesuffix(AT_ITS_END)
    if block.language == "diff":
        file.write_text(patch(file.read_text(), block))
    elif block.caption.endswith(AT_ITS_END):
        file.write_text(f"{file.read_text().rstrip()}\n\n{block.text}")
    elif file.exists():
        raise ValueError(f"{block.caption} exists")
    else:
        file.write_text(block.text)


def patch(text: str, diff: Block) -> str:
    """The text with each hunk of ``diff`` applied."""
    for hunk in diff.text.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        if text.count(before) != 1:
            raise ValueError(
                f"{diff.caption} must have these lines once, "
                f"found {text.count(before)} times:\n{before}"
            )
        text = text.replace(before, after)
    return text


def matches(shown: str, output: str) -> bool:
    """Whether an output is equal to the one shown, with any text for ``...``."""
    pattern = ".*".join(map(re.escape, shown.strip().split("...")))
    return (
        re.fullmatch(pattern, output.replace("\r", "").strip(), re.DOTALL) is not None
    )


def is_logged(shown: str, log: str) -> bool:
    """Whether a log contains the shown text, with any line breaks."""
    return matches(f"...{' '.join(shown.split())}...", " ".join(log.split()))
