"""Measure two ways in turn, compute medians, and compare them with limits.

Figures are compared only within one run. Machines differ, but ratios are stable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import NamedTuple, TypeVar

Measure = Callable[[], float]
Way = TypeVar("Way")


class Result(NamedTuple):
    """A line of the table: ``value`` is compared with ``limit``, both in ``unit``.

    ``plain`` is the figure of plain TurboGears2, or of the peer that ``what`` names. A
    line without a limit is informative.
    """

    what: str
    plain: str
    measured: str
    value: float
    limit: float | None
    unit: str = "x"
    at_least: bool = False

    @property
    def passed(self) -> bool:
        if self.limit is None:
            return True
        if self.at_least:
            return self.value >= self.limit
        return self.value <= self.limit

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the line."""
        value = f"{self.value:.3g} {self.unit}"
        if self.limit is None:
            return self.what, self.plain, self.measured, value, "", ""
        sign = ">=" if self.at_least else "<="
        limit = f"{sign} {self.limit:.4g} {self.unit}"
        verdict = "pass" if self.passed else "FAIL"
        return self.what, self.plain, self.measured, value, limit, verdict


class Both(NamedTuple):
    """The cost of both ways, and the ratio of tgstream to plain TurboGears2."""

    plain: float
    tgstream: float
    ratio: float


def interleave(rounds: int, plain: Measure, tgstream: Measure) -> Both:
    """Measure both ways in turn, in alternating order, and return the medians.

    The ratio is the median of each round's ratio, because the machine's speed drifts.
    """
    plain(), tgstream()  # warm up
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


def alternate(rounds: int, count: int, plain: Measure, tgstream: Measure) -> Both:
    """Measure single requests, and alternate the two ways request by request.

    The processor's caches then hold as little of one way as of the other, as on a
    server that runs other code between two streams.
    """
    plain(), tgstream()  # warm
    medians: list[tuple[float, float]] = []
    for _ in range(rounds):
        requests = [(plain(), tgstream()) for _ in range(count)]
        theirs, ours = zip(*requests, strict=True)
        medians.append((median(theirs), median(ours)))
    return Both(
        median(theirs for theirs, _ in medians),
        median(ours for _, ours in medians),
        median(ours / theirs for theirs, ours in medians),
    )


def compare(what: str, both: Both, limit: float, unit: str) -> Result:
    """Return the result of a comparison, whose figures are in ``unit``."""
    return Result(
        what,
        f"{both.plain:.3g} {unit}",
        f"{both.tgstream:.3g} {unit}",
        both.ratio,
        limit,
    )


def in_turn(rounds: int, ways: Mapping[str, Callable[[], Way]]) -> dict[str, list[Way]]:
    """Measure all ways once per round, each round with another way first."""
    names = list(ways)
    measured: dict[str, list[Way]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            measured[name].append(ways[name]())
    return measured


def ratio(over: Iterable[float], under: Iterable[float]) -> float:
    """Return the median of each round's ratio."""
    return median(a / b for a, b in zip(over, under, strict=True))


def table(results: list[Result]) -> str:
    """Format the results, a line each."""
    rows: list[tuple[str, ...]] = [("", "beside", "measured", "", "limit", "")]
    rows += [result.cells() for result in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
