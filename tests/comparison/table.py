"""The table of ``docs/comparison.txt``."""

from __future__ import annotations

from collections.abc import Iterator
from platform import python_version

VERSIONS = "Seen with Python"
"""The beginning of the last row, whose cells are not pinned."""

Answers = dict[str, dict[str, str]]


def table(all_answers: Answers, versions: dict[str, str]) -> str:
    """Return a list-table: a row for each question, a column for each framework.

    :param all_answers: the answers by framework and question.
    :param versions: the cells of the last row.
    """
    columns = all_answers.values()
    questions = dict.fromkeys(question for answers in columns for question in answers)
    lines = [".. list-table::", "    :header-rows: 1", "    :stub-columns: 1", ""]
    lines += row("In the generator", [*all_answers])
    for question in questions:
        lines += row(question, [answers[question] for answers in columns])
    lines += row(f"{VERSIONS} {python_version()}", [*versions.values()])
    return "\n".join(lines) + "\n"


def row(first: str, cells: list[str]) -> Iterator[str]:
    """Yield the lines of a row."""
    yield f"    * - {first}"
    for cell in cells:
        yield f"      - {cell}"
