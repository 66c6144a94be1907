"""Compare what the clients received with the rows of the tables.

A stream that completed must have stored all its rows. Any other stream must have stored
exactly the rows that were committed before its last item. The server reports which of
the two happened, and must report at least as many items as the client received.

There are two exceptions. A stream whose client never got an answer may have stored
nothing. With buffered output, the last chunk is made after the last commit: if a client
disconnects before that chunk, the stream has stored all its rows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .client import Received
from .plans import LEAVING, Rows


class Row(NamedTuple):
    """A stored row."""

    stream: str
    number: int
    owner: str


class Ending(NamedTuple):
    """How a stream ended, according to its server."""

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
"""The allowed reasons by fate. All other streams complete."""

CLIENT_ENDS = {
    "failed": {"aborted", "500"},
    "expired": {"aborted"},
    "completed": {"complete"},
}
"""The ends that a connected client may see, by the server's reason."""


@dataclass
class Account:
    """The counts of rows and streams, and the faults."""

    fates: Counter[str] = field(default_factory=Counter)
    expected: int = 0
    """Rows that are committed as far as the clients know."""
    found: int = 0
    lost: int = 0
    extra: int = 0
    mixed: int = 0
    """Lines and rows of another stream or user."""
    wrong_ends: list[str] = field(default_factory=list)
    """Streams that ended in the wrong way, a sentence each."""
    faults: list[str] = field(default_factory=list)
    """Streams whose rows are wrong, a sentence each."""

    @property
    def streams(self) -> int:
        """The number of streams."""
        return sum(self.fates.values())

    @property
    def clean(self) -> bool:
        """True if nothing is wrong."""
        return not (self.lost or self.extra or self.mixed or self.wrong_ends)


def balance(
    received: Iterable[Received],
    rows: Iterable[Row],
    endings: Mapping[str, list[Ending]],
) -> Account:
    """Compare the clients' data, the rows and the server's reports.

    :param received: the data that the clients received.
    :param rows: the stored rows.
    :param endings: the reported ends, by the name of the stream.
    """
    account = Account()
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.stream].append(row)
    for client in received:
        ended = endings.get(client.plan.stream, [])
        _check_stream(account, client, found.pop(client.plan.stream, []), ended)
    for unknown in found.values():
        account.found += len(unknown)
        account.extra += len(unknown)
    return account


def _check_stream(
    account: Account, received: Received, rows: list[Row], ended: list[Ending]
) -> None:
    """Add a stream to the account."""
    plan = received.plan
    states, final = plan.stored()
    if received.end == "complete":
        known = final
    else:
        known = states[min(received.lines, len(states) - 1)]
    numbers = Rows(row.number for row in rows)
    allowed = _allowed_rows(received, ended, states, final)
    due = numbers if numbers in allowed else allowed[0]
    account.fates[plan.fate] += 1
    account.expected += len(known)
    account.found += len(rows)
    lost = len((due | known) - numbers)
    extra = len(numbers - due) + len(rows) - len(numbers)
    mixed = received.mixed + sum(row.owner != plan.user for row in rows)
    account.lost += lost
    account.extra += extra
    account.mixed += mixed
    if lost or extra or mixed:
        account.faults.append(
            f"{lost} lost, {extra} extra, {mixed} mixed: found {sorted(numbers)} "
            f"instead of {sorted(due)}, {received.end} after {received.lines} of "
            f"{ended}. {plan}"
        )
    if fault := _fault_of_end(received, ended):
        account.wrong_ends.append(f"{plan.stream} ({plan.fate}): {fault}")


def _allowed_rows(
    received: Received, ended: list[Ending], states: list[Rows], final: Rows
) -> list[Rows]:
    """Return the sets of rows that the stream may have stored."""
    if received.plan.fate == "fail":
        return [states[-1]]
    if received.plan.fate not in REASONS:
        return [final]
    if not ended:
        return [states[0]]
    if ended[0].reason == "completed":
        return [final]
    last = len(states) - 1
    allowed = [states[min(ended[0].items, last)]]
    if received.plan.kind == "buffered" and ended[0].items == last:
        allowed.append(final)
    return allowed


def _fault_of_end(received: Received, ended: list[Ending]) -> str:
    """Return what is wrong with the end of a stream, or an empty text."""
    plan = received.plan
    if received.wrong_line:
        return received.wrong_line
    if received.end == "hangs":
        return "hangs"
    if not ended and plan.fate in ("leave", "reset") and not received.lines:
        return ""  # the server may have noticed the disconnect before the stream
    if len(ended) != 1:
        return f"ended {len(ended)} times"
    (ending,) = ended
    if ending.reason not in REASONS.get(plan.fate, {"completed"}):
        return f"{ending.reason} after {ending.items} items"
    if received.lines > ending.items:
        return f"received {received.lines} of {ending.items} items"
    if received.end != "left" or plan.fate not in LEAVING:
        return _fault_of_connected_client(received, ending)
    return ""


def _fault_of_connected_client(received: Received, ending: Ending) -> str:
    """Return what is wrong for a client that stayed until the end."""
    if received.end not in CLIENT_ENDS.get(ending.reason, ()):
        return f"{ending.reason} at the server, {received.end} at the client"
    gets_all = ending.reason == "completed" or received.plan.kind == "raw"
    if received.plan.fate != "expire" and gets_all and received.lines != ending.items:
        return f"{ending.reason}: received {received.lines} of {ending.items} items"
    return ""
