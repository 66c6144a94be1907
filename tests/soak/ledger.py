"""What the clients were told, held against what the tables have.

A stream has stored exactly what was committed before the last item that it yielded,
and all if it completed; which of the two, the server tells, and it may not tell of less
than its client has heard. Who never got an answer may have stored nothing. Where chunks
are gathered, the last one is made after the last commit: a client that leaves over it
leaves a stream that has stored all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .client import Told
from .plans import LEFT, Rows


class Row(NamedTuple):
    """A row of the table."""

    stream: str
    number: int
    owner: str


class Ending(NamedTuple):
    """How a stream ended, by its server."""

    reason: str
    items: int


REASONS = {
    "fail": {"failed"},
    "leave": {"disconnected", "completed"},
    "reset": {"disconnected", "completed"},
    "stall": {"expired"},
    "stuck": {"expired"},
    "expire": {"expired"},
}
"""The reasons that a fate may have; any other completes."""

HEARS = {"failed": {"broken", "500"}, "expired": {"broken"}, "completed": {"whole"}}
"""What a client that is still there takes the end for, by its reason."""


@dataclass
class Account:
    """The balance: what there was, and what is wrong."""

    fates: Counter[str] = field(default_factory=Counter)
    told: int = 0
    """Rows that a client knew to be committed."""
    found: int = 0
    lost: int = 0
    extra: int = 0
    mixed: int = 0
    """Lines and rows that were another's."""
    astray: list[str] = field(default_factory=list)
    """Streams that did not end as they should, a sentence each."""
    faults: list[str] = field(default_factory=list)
    """Streams whose rows are not as they should be, a sentence each."""

    @property
    def streams(self) -> int:
        """How many were had."""
        return sum(self.fates.values())

    @property
    def clean(self) -> bool:
        """True if nothing is wrong."""
        return not (self.lost or self.extra or self.mixed or self.astray)


def balance(
    told: Iterable[Told], rows: Iterable[Row], endings: Mapping[str, list[Ending]]
) -> Account:
    """Hold all against each other.

    :param told: what the clients heard.
    :param rows: of the table.
    :param endings: by the name of the stream; one each, if all is well.
    """
    account = Account()
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.stream].append(row)
    for each in told:
        ended = endings.get(each.plan.stream, [])
        _enter(account, each, found.pop(each.plan.stream, []), ended)
    for strangers in found.values():
        account.found += len(strangers)
        account.extra += len(strangers)
    return account


def _enter(account: Account, told: Told, rows: list[Row], ended: list[Ending]) -> None:
    """Account for one stream."""
    plan = told.plan
    states, whole = plan.stored()
    known = whole if told.end == "whole" else states[min(told.heard, len(states) - 1)]
    numbers = Rows(row.number for row in rows)
    dues = _dues(told, ended, states, whole)
    due = numbers if numbers in dues else dues[0]
    account.fates[plan.fate] += 1
    account.told += len(known)
    account.found += len(rows)
    lost = len((due | known) - numbers)
    extra = len(numbers - due) + len(rows) - len(numbers)
    mixed = told.mixed + sum(row.owner != plan.user for row in rows)
    account.lost, account.extra = account.lost + lost, account.extra + extra
    account.mixed += mixed
    if lost or extra or mixed:
        account.faults.append(
            f"{lost} lost, {extra} extra, {mixed} mixed: found {sorted(numbers)} and "
            f"not {sorted(due)}, {told.end} after {told.heard} of {ended}; {plan}"
        )
    if wrong := _wrong(told, ended):
        account.astray.append(f"{plan.stream} ({plan.fate}): {wrong}")


def _dues(
    told: Told, ended: list[Ending], states: list[Rows], whole: Rows
) -> list[Rows]:
    """What the stream must have stored, no row less or more: the committed prefix."""
    if told.plan.fate == "fail":
        return [states[-1]]
    if told.plan.fate not in REASONS:
        return [whole]
    if not ended:
        return [states[0]]
    if ended[0].reason == "completed":
        return [whole]
    last = len(states) - 1
    over = told.plan.kind == "gathered" and ended[0].items == last
    return [states[min(ended[0].items, last)], *([whole] if over else [])]


def _wrong(told: Told, ended: list[Ending]) -> str:
    """What was not as it should be with the end of a stream, if anything was."""
    plan = told.plan
    if told.astray:
        return told.astray
    if told.end == "hangs":
        return "hangs"
    if not ended and plan.fate in ("leave", "reset") and not told.heard:
        return ""  # the server may have seen that its client was gone
    if len(ended) != 1:
        return f"ended {len(ended)} times"
    (ending,) = ended
    if ending.reason not in REASONS.get(plan.fate, {"completed"}):
        return f"{ending.reason} after {ending.items} items"
    if told.heard > ending.items:
        return f"heard {told.heard} of {ending.items} items"
    if told.end != "left" or plan.fate not in LEFT:
        return _misheard(told, ending)
    return ""


def _misheard(told: Told, ending: Ending) -> str:
    """What is wrong with what a client has heard that was there to the end."""
    if told.end not in HEARS.get(ending.reason, ()):
        return f"{ending.reason} at the server, {told.end} at the client"
    all_heard = ending.reason == "completed" or told.plan.kind == "raw"
    if told.plan.fate != "expire" and all_heard and told.heard != ending.items:
        return f"{ending.reason}: heard {told.heard} of {ending.items} items"
    return ""
