"""The table, as ``docs/comparison.txt`` has it."""

from __future__ import annotations

from collections.abc import Iterator
from platform import python_version

VERSIONS = "Seen with Python"
"""How the last row begins, which is not pinned."""

Answers = dict[str, dict[str, str]]


def table(seen: Answers, versions: dict[str, str]) -> str:
    """A list-table: a row for each question, a column for each framework.

    :param seen: the answers by framework and question.
    :param versions: the last row.
    """
    questions = [*dict.fromkeys(of for answers in seen.values() for of in answers)]
    lines = [".. list-table::", "    :header-rows: 1", "    :stub-columns: 1", ""]
    lines += row("In the generator", [*seen])
    for of in questions:
        lines += row(of, [answers[of] for answers in seen.values()])
    lines += row(f"{VERSIONS} {python_version()}", [*versions.values()])
    return "\n".join(lines) + "\n"


def row(first: str, cells: list[str]) -> Iterator[str]:
    """The lines of one row."""
    yield f"    * - {first}"
    for cell in cells:
        yield f"      - {cell}"
