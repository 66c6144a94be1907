"""What all questions share: both ways in turn, medians, and a verdict.

Rule: a figure is compared within its own run alone; machines differ, ratios hold.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import NamedTuple

Measure = Callable[[], float]


class Result(NamedTuple):
    """A line of the table; ``value`` is held against ``limit``, both in ``unit``."""

    what: str
    plain: str
    tgstream: str
    value: float
    limit: float
    unit: str = "x"

    @property
    def passed(self) -> bool:
        return self.value <= self.limit


class Both(NamedTuple):
    """What the two ways cost, and the ratio of tgstream's cost to plain TG2's."""

    plain: float
    tgstream: float
    ratio: float


def interleave(rounds: int, plain: Measure, tgstream: Measure) -> Both:
    """Measure both in turn, each round the other one first; the medians of that.

    The ratio is the median of the rounds' own: a drift of the machine is in both.
    """
    plain(), tgstream()  # warm
    pairs: list[tuple[float, float]] = []
    for number in range(rounds):
        if number % 2:
            ours, theirs = tgstream(), plain()
        else:
            theirs, ours = plain(), tgstream()
        pairs.append((theirs, ours))
    return Both(
        median(theirs for theirs, _ in pairs),
        median(ours for _, ours in pairs),
        median(ours / theirs for theirs, ours in pairs),
    )


def compare(what: str, both: Both, limit: float, unit: str) -> Result:
    """The result of a comparison, whose figures are in ``unit``."""
    return Result(
        what,
        f"{both.plain:.3g} {unit}",
        f"{both.tgstream:.3g} {unit}",
        both.ratio,
        limit,
    )


def table(results: list[Result]) -> str:
    """The results as text, a line each."""
    rows = [("", "plain TG2", "tgstream", "", "at most", "")]
    rows += [
        (
            result.what,
            result.plain,
            result.tgstream,
            f"{result.value:.3g} {result.unit}",
            f"{result.limit:.4g} {result.unit}",
            "pass" if result.passed else "FAIL",
        )
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
