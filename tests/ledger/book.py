"""Compare the received events with the committed events.

The committed events are the rows of a table, which were written in the same transaction
as the events were published. For each listener and channel, each of these events is one
of:

- *received*, once and in order.
- *reported*: it is missing, but the listener received a ``reset`` in its place, or
  within a second after a later event. On a reset a client reloads its data.
- *not due*: from before the listener joined, or from after it left.
- *lost*: it is missing, and the listener cannot know it. This is a fault.

The order is that of the commits if the back end promises this. Otherwise all listeners
must agree on one order, in which the events of each publisher keep their own order.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, TypeAlias

LATE_SECONDS = 1.0
"""Maximum time between an event that overtakes others and the reset for these."""


class Committed(NamedTuple):
    """An event of a committed transaction."""

    channel: str
    text: str
    """The data of the event, which is unique."""
    publisher: str
    """Publishes one event after the other, in one process."""
    published: float
    """When it was published, in seconds of the run, as all times here."""
    doubtful: bool = False
    """The process died, or lost the database, before it could send the event."""


@dataclass
class Record:
    """The events of a channel that a listener received."""

    listener: str
    channel: str
    opened: float
    """When the listener knew that it listens."""
    entries: list[tuple[float, str | None]]
    """The time and the text of each event. A ``reset`` has no text."""
    stayed: bool
    """True if it listened to the end."""


class Reset(NamedTuple):
    """A reset that a listener received."""

    listener: str
    channel: str
    since: float
    """When the listener received the event before it, or began to listen."""
    time: float
    reported: int
    """How many events it stands for."""
    is_first: bool
    """Whether the listener had received nothing of the channel before."""


@dataclass
class Account:
    """The counts of events. Those of listeners are the sums of all listeners."""

    published: int = 0
    doubtful: int = 0
    """Committed events that no listener received, because their process died."""
    received: int = 0
    duplicated: int = 0
    disordered: int = 0
    uncommitted: int = 0
    """Received events without a committed row."""
    lost: int = 0
    reported: int = 0
    resets: list[Reset] = field(default_factory=list)
    faults: dict[str, list[str]] = field(default_factory=dict)
    """For each fault, which is a sentence, the listeners that saw it."""

    def note(self, fault: str, listener: str) -> None:
        """Add a fault."""
        self.faults.setdefault(fault, []).append(listener)


Segment: TypeAlias = dict[int, float]
"""The events between two resets: the position of each, and when it was received."""


def balance(
    committed: Iterable[Committed], records: Iterable[Record], in_commit_order: bool
) -> Account:
    """Compare the committed events with what the listeners received.

    :param committed: in the order of their commits.
    :param in_commit_order: whether the back end promises the order of the commits.
    """
    account = Account()
    events: dict[str, list[Committed]] = defaultdict(list)
    for event in committed:
        events[event.channel].append(event)
    by_channel: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_channel[record.channel].append(record)
    for channel in sorted(events.keys() | by_channel.keys()):
        heard = by_channel[channel]
        known = {text for record in heard for _, text in record.entries}
        due = [
            event for event in events[channel] if not (_may_be_missing(event, known))
        ]
        account.published += len(due)
        account.doubtful += len(events[channel]) - len(due)
        if not in_commit_order:
            due = _agree(due, heard)
        positions = {event.text: position for position, event in enumerate(due)}
        for record in heard:
            _check(account, record, due, positions)
    return account


def _may_be_missing(event: Committed, known: set[str | None]) -> bool:
    """Whether an event is doubtful, and missing for all listeners."""
    return event.doubtful and event.text not in known


def _agree(events: list[Committed], records: list[Record]) -> list[Committed]:
    """Return the events in an order on which the listeners and the publishers agree.

    If there is none, some of them do not have this order.
    """
    by_text = {event.text: event for event in events}
    chains: dict[str, list[str]] = defaultdict(list)
    for event in events:
        chains[f"by {event.publisher}"].append(event.text)
    for record in records:
        texts = dict.fromkeys(text for _, text in record.entries if text in by_text)
        chains[f"to {record.listener}"] += [text for text in texts if text is not None]
    ages = {event.text: event.published for event in events}
    return [by_text[text] for text in merge(chains.values(), ages)]


def merge(chains: Iterable[Sequence[str]], ages: Mapping[str, float]) -> list[str]:
    """Sort texts so that each chain is in order, and by age where no chain decides.

    :param ages: the time of each text. In a circle the oldest text comes first.
    """
    after: dict[str, set[str]] = defaultdict(set)
    waits_for: dict[str, set[str]] = {text: set() for text in ages}
    for chain in chains:
        for first, second in pairwise(chain):
            after[first].add(second)
            waits_for[second].add(first)
    ready = [(age, text) for text, age in ages.items() if not waits_for[text]]
    heapq.heapify(ready)
    merged: dict[str, None] = {}
    while len(merged) < len(ages):
        if not ready:
            ready.append(min((ages[t], t) for t in ages if t not in merged))
        _, text = heapq.heappop(ready)
        if text in merged:
            continue
        merged[text] = None
        for later in after[text]:
            waits_for[later].discard(text)
            if not waits_for[later]:
                heapq.heappush(ready, (ages[later], later))
    return list(merged)


def _check(
    account: Account,
    record: Record,
    due: list[Committed],
    positions: Mapping[str, int],
) -> None:
    """Add what a listener received of a channel to the account."""
    segments: list[Segment] = [{}]
    seen: set[int] = set()
    latest = -1
    for time, text in record.entries:
        position = None if text is None else positions.get(text)
        if text is None:
            segments.append({})
        elif position is None:
            account.uncommitted += 1
            account.note(f"{text!r} was not committed", record.listener)
        elif position in seen:
            account.duplicated += 1
            account.note(f"{text!r} arrived twice", record.listener)
        else:
            if position < latest:
                account.disordered += 1
                later = due[latest].text
                account.note(f"{text!r} arrived after {later!r}", record.listener)
            latest = max(latest, position)
            seen.add(position)
            segments[-1][position] = time
    account.received += len(seen)
    _count_missing(account, record, segments, due)


def _count_missing(
    account: Account, record: Record, segments: list[Segment], due: list[Committed]
) -> None:
    """Count the events that a listener has not received, and its resets."""
    seen = set().union(*segments)
    reported = [0] * len(segments)
    for position, event in enumerate(due):
        if position in seen:
            continue
        number = _find_reset(record, event, position, segments)
        if number is not None:
            reported[number] += 1
        if number == 0:
            between = _neighbours(position, seen, due)
            lost = f"{event.text!r} of {event.publisher} is lost"
            account.note(
                f"{lost}, published at {event.published:.2f} s",
                f"{record.listener} {between}",
            )
    account.lost += reported[0]
    account.reported += sum(reported[1:])
    since, counts = record.opened, iter(reported[1:])
    for index, (time, text) in enumerate(record.entries):
        if text is None:
            count, names = next(counts), (record.listener, record.channel)
            account.resets.append(Reset(*names, since, time, count, index == 0))
        since = time


def _neighbours(position: int, seen: set[int], due: list[Committed]) -> str:
    """Return the received events before and after a missing event."""
    before = max((each for each in seen if each < position), default=None)
    after = min((each for each in seen if each > position), default=None)
    first, second = (
        "nothing" if each is None else repr(due[each].text) for each in (before, after)
    )
    return f"between {first} and {second}"


def _find_reset(
    record: Record, event: Committed, position: int, segments: list[Segment]
) -> int | None:
    """Return the number of the reset that stands for a missing event.

    :returns: 0 if there is no such reset. None if the event is not due.
    """
    before = [n for n, part in enumerate(segments) if part and min(part) < position]
    after = [n for n, part in enumerate(segments) if part and max(part) > position]
    if not before and event.published <= record.opened:
        return None
    if not after and not record.stayed:
        return None
    last_before = before[-1] if before else 0
    first_after = after[0] if after else len(segments) - 1
    if first_after > last_before:
        return first_after
    resets = [time for time, text in record.entries if text is None]
    if after and first_after < len(resets):
        segment = segments[first_after]
        overtaken = min(time for each, time in segment.items() if each > position)
        if resets[first_after] - overtaken <= LATE_SECONDS:
            return first_after + 1
    return 0
