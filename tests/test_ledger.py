"""The counts of the ledger: it finds each kind of fault."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random

import pytest

from tests.ledger.book import Account, Committed, Record, balance, merge
from tests.ledger.notes import PLANTS, Last, Note, records
from tests.ledger.plans import plan
from tgstream import Event

RESET = None
SENT = [Committed("news", f"e{number}", "ann", float(number)) for number in range(1, 9)]


def record(texts: str, opened: float = 0.0, stayed: bool = True) -> Record:
    """The entries of a listener: numbers of events, and ``R`` for a reset."""
    entries = [(9.0, None if text == "R" else f"e{text}") for text in texts]
    return Record("listener", "news", opened, entries, stayed)


def count(account: Account) -> dict[str, int]:
    """The counts of faults, and of events reported by a reset, that are not 0."""
    names = "duplicated", "disordered", "uncommitted", "lost", "reported"
    counts = {name: getattr(account, name) for name in names}
    return {name: number for name, number in counts.items() if number}


@pytest.mark.parametrize("in_commit_order", [True, False])
@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ("12345678", {}),
        ("1245678", {"lost": 1}),
        ("1234567", {"lost": 1}),
        ("2345678", {"lost": 1}),
        ("123345678", {"duplicated": 1}),
        ("123R45678", {}),
        ("12R5678", {"reported": 2}),
        ("R5678", {"reported": 4}),
        ("1RR45678", {"reported": 2}),
        ("12R456R8", {"reported": 2}),
        ("12R568", {"reported": 2, "lost": 1}),
        ("R12345678R", {}),
        ("1239456789", {"uncommitted": 2}),
    ],
)
def test_ledger_counts_the_events_of_a_listener(
    texts: str, found: dict[str, int], in_commit_order: bool
) -> None:
    """A missing event is lost, unless the listener received a reset in its place."""
    others = [record("12345678"), record(texts)]
    account = balance(SENT, others, in_commit_order)
    assert count(account) == found
    assert account.published == 8
    assert len(account.resets) == texts.count("R")


@pytest.mark.parametrize(
    ("seconds", "found"), [(0.5, {"reported": 1}), (1.5, {"lost": 1})]
)
def test_reset_may_come_soon_after_an_event_that_overtakes_another(
    seconds: float, found: dict[str, int]
) -> None:
    """A client that reloads its data then misses nothing."""
    late = record("124R5678")
    late.entries[3:] = [(9.0 + seconds, text) for _, text in late.entries[3:]]
    account = balance(SENT, [record("12345678"), late], in_commit_order=True)
    assert count(account) == found


def test_ledger_finds_events_that_are_not_in_the_order_of_commits() -> None:
    """This holds also if all listeners received them in the same order."""
    account = balance(SENT, [record("12435678")] * 2, in_commit_order=True)
    assert count(account) == {"disordered": 2}


def test_ledger_finds_listeners_that_disagree_on_the_order() -> None:
    """If the back end does not promise the order of commits, they only must agree."""
    sent = [event._replace(publisher=event.text) for event in SENT]
    agreeing = [replace(record("12435678"), listener=name) for name in "abc"]
    assert count(balance(sent, agreeing, in_commit_order=False)) == {}
    other = replace(record("12345678"), listener="d")
    account = balance(sent, [*agreeing, other], in_commit_order=False)
    assert account.disordered > 0


def test_ledger_finds_events_that_are_not_in_the_order_of_their_publisher() -> None:
    """A publisher sends one event after the other."""
    account = balance(SENT, [record("12435678")], in_commit_order=False)
    assert account.disordered == 1


@pytest.mark.parametrize(
    ("texts", "opened", "stayed", "found"),
    [
        ("45678", 3.0, True, {}),  # it joined after the third event
        ("45678", 2.0, True, {"lost": 1}),
        ("5678", 3.0, True, {"lost": 1}),
        ("1234", 0.0, False, {}),  # it left after the fourth event
        ("124", 0.0, False, {"lost": 1}),
        ("45R78", 3.0, True, {"reported": 1}),
        ("", 0.0, True, {"lost": 8}),
        ("", 0.0, False, {}),
        ("", float("inf"), True, {}),  # it never reached a server
    ],
)
def test_listener_receives_the_events_between_its_start_and_its_end(
    texts: str, opened: float, stayed: bool, found: dict[str, int]
) -> None:
    """Events from before and after that are not due."""
    account = balance(SENT, [record(texts, opened, stayed)], in_commit_order=True)
    assert count(account) == found


def test_event_that_nobody_received_may_be_in_doubt() -> None:
    """Its process died after the commit. If anybody received it, everybody must."""
    sent = [event._replace(doubtful=event.text == "e3") for event in SENT]
    account = balance(sent, [record("1245678")] * 2, in_commit_order=False)
    assert (count(account), account.doubtful, account.published) == ({}, 1, 7)
    mixed = [record("12345678"), record("1245678")]
    account = balance(sent, mixed, in_commit_order=False)
    assert (count(account), account.doubtful) == ({"lost": 1}, 0)


def test_order_is_that_of_all_chains() -> None:
    """The older text comes first if no chain decides."""
    ages = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 0.0}
    assert merge([["a", "b"], ["b", "c"]], ages) == ["d", "a", "b", "c"]
    assert merge([], ages) == ["d", "b", "c", "a"]
    assert merge([["a", "b"], ["b", "a"]], ages) == ["d", "c", "b", "a"]


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        ("drop", {"lost": 12}),
        ("duplicate", {"duplicated": 12}),
        ("reorder", {"disordered": 11}),
    ],
)
def test_ledger_finds_a_planted_fault(plant: str, found: dict[str, int]) -> None:
    """``python -m tests.ledger --plant`` runs the ledger with the same fault."""
    sent = [Committed("0", f"0 {n}", "ann", float(n)) for n in range(1, 121)]
    events = iter([Event(event.text) for event in sent])
    notes = [Note(0.0, "open", "")]
    notes += [Note(1.0, "event", str(event.data)) for event in PLANTS[plant](events)]
    received = records("listener", ["0"], notes, stayed=True)
    assert count(balance(sent, received, in_commit_order=True)) == found


def notes_of(texts: Iterable[tuple[str, str]]) -> list[Note]:
    """Notes of events and resets."""
    return [Note(float(time), *text) for time, text in enumerate(texts)]


def test_reset_of_a_merged_stream_concerns_its_channels() -> None:
    """Its data names a channel. Without a name it concerns all."""
    notes = notes_of([("open", ""), ("event", "0 a 1"), ("reset", "0"), ("reset", "")])
    first, second = records("listener", ["0", "1"], notes, stayed=True)
    assert [text for _, text in first.entries] == ["0 a 1", RESET, RESET]
    assert [text for _, text in second.entries] == [RESET]
    assert first.opened == 0.0


def test_listener_is_complete_with_the_last_events_or_a_reset() -> None:
    """A reset from before the last events were published does not count."""
    last = Last(0.5, 1.5, {"0": {"0 a 1"}, "1": set()})
    assert last.arrived(["0", "1"], notes_of([("event", "0 a 1")]))
    assert not last.arrived(["0"], notes_of([("reset", ""), ("reset", "")]))
    assert last.arrived(["0"], notes_of([("reset", "")] * 3))
    assert last.arrived(["1"], [])


def test_listener_that_begins_during_the_last_events_waits_for_its_share() -> None:
    """It is complete when it has listened for a second after they were published."""
    last = Last(-0.5, 1.5, {"0": {"0 a 1"}})
    notes = notes_of([("open", ""), ("beat", ""), ("beat", ""), ("beat", "")])
    assert not last.arrived(["0"], notes[:3])
    assert last.arrived(["0"], notes)


def test_plans_are_the_same_for_the_same_seed() -> None:
    """A run can be repeated, as far as processes allow."""
    first, again, other = Random("1"), Random("1"), Random("2")
    plans = [plan(first, True) for _ in range(50)]
    assert plans == [plan(again, True) for _ in range(50)]
    assert plans != [plan(other, True) for _ in range(50)]


def test_plan_for_sqlite_has_no_savepoint() -> None:
    """zope.sqlalchemy has no savepoints on SQLite."""
    random = Random("1")
    words = {
        word
        for _ in range(200)
        for transaction in plan(random, savepoints=False).transactions
        for word in transaction.split()
    }
    assert not words & {"(", ")", "<", "s", "k", "u"}
    assert {"p0", "m0", "f", "c", "d", "r"} <= words
