"""A short soak test of each server, and tests of the checks of the soak test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.soak.client import Received
from tests.soak.counters import Totals
from tests.soak.ledger import Account, Ending, Row, balance
from tests.soak.plans import Plan, visits
from tests.soak.run import SERVERS, SoakResult, soak
from tests.soak.vitals import Vitals

STREAMS = 60
REST = Vitals(memory=90.0, threads=8, connections=0, idle=0, contexts=0, alive=0)


@pytest.mark.parametrize("server", SERVERS)
def test_soak_finds_no_fault(server: str, postgresql: str) -> None:
    """No row is lost, extra or of another stream, and the streams leave nothing."""
    result = soak(server, postgresql, seed=1, streams=STREAMS, seconds=60)
    assert result.wrongs == [], "\n".join(result.wrongs)
    assert result.account.streams == STREAMS
    assert 0 < result.account.expected <= result.account.found
    assert result.ledger.started > STREAMS / 2
    assert result.counters == result.ledger


def account(received: Received, rows: list[Row], reason: str, items: int) -> Account:
    """Return the balance of one stream, whose end the server reports."""
    return balance([received], rows, {received.plan.stream: [Ending(reason, items)]})


def count_faults(account: Account) -> tuple[int, int, int, int]:
    """Return the numbers of lost, extra and mixed rows, and of wrong ends."""
    return account.lost, account.extra, account.mixed, len(account.wrong_ends)


def rows(*numbers: int, owner: str = "ann") -> list[Row]:
    """Return stored rows of the stream of these tests."""
    return [Row("s1", number, owner) for number in numbers]


def complete(script: str, **options: Any) -> Received:
    """Return what a client receives of a complete stream."""
    plan = Plan("s1", "ann", "complete", script, **options)
    return Received(plan, lines=len(script), end="complete")


def left(script: str, lines: int, **options: Any) -> Received:
    """Return what a client receives of a stream if it disconnects."""
    plan = Plan("s1", "ann", "leave", script, reads=lines, **options)
    return Received(plan, lines=lines, end="left")


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        ((1, 3), (0, 0, 0, 0)),
        ((1,), (1, 0, 0, 0)),
        ((1, 3, 4), (0, 1, 0, 0)),
        ((1, 3, 3), (0, 1, 0, 0)),
        ((3, 4), (1, 1, 0, 0)),
    ],
)
def test_ledger_finds_lost_and_extra_rows(
    stored: tuple[int, ...], found: tuple[int, int, int, int]
) -> None:
    """A complete stream must have stored exactly its rows."""
    balance = account(complete("aca"), rows(*stored), "completed", 3)
    assert count_faults(balance) == found


def test_ledger_finds_rows_of_unknown_streams() -> None:
    """A row of a stream that was not planned is extra."""
    balance = account(complete("a"), [*rows(1), Row("s2", 1, "ann")], "completed", 1)
    assert count_faults(balance) == (0, 1, 0, 0)


def test_ledger_finds_mixed_rows_and_lines() -> None:
    """A row of another owner and a line with another name are mixed."""
    balance = account(complete("a"), rows(1, owner="bob"), "completed", 1)
    assert count_faults(balance) == (0, 0, 1, 0)
    balance = account(replace(complete("a"), mixed=1), rows(1), "completed", 1)
    assert count_faults(balance) == (0, 0, 1, 0)


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        ((1,), (1, 0, 0, 0)),  # fewer rows than were committed at the end
        ((1, 3), (0, 0, 0, 0)),  # also the rows after the client's last line
        ((), (2, 0, 0, 0)),
        ((1, 3, 5), (0, 1, 0, 0)),  # also a row that was not committed
    ],
)
def test_ledger_checks_a_disconnected_stream(
    stored: tuple[int, ...], found: tuple[int, int, int, int]
) -> None:
    """The rows must be those committed at the end, not at the client's last line."""
    balance = account(left("acacaa", lines=2), rows(*stored), "disconnected", 5)
    assert count_faults(balance) == found


@pytest.mark.parametrize(("kind", "extra"), [("raw", 1), ("buffered", 0)])
def test_ledger_allows_the_final_commit_of_buffered_output(
    kind: str, extra: int
) -> None:
    """With buffered output, a client can disconnect after the final commit."""
    received = left("aca", lines=1, kind=kind)
    balance = account(received, rows(1, 3), "disconnected", 3)
    assert count_faults(balance) == (0, extra, 0, 0)
    balance = account(received, rows(1), "disconnected", 3)
    assert count_faults(balance) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("received", "reason", "items"),
    [
        (complete("aa"), "disconnected", 2),
        (replace(complete("aa"), end="aborted"), "completed", 2),
        (replace(complete("aa"), lines=1), "completed", 2),
        (replace(complete("aa"), end="hangs"), "completed", 2),
        (replace(complete("aa"), wrong_line="line 7 after 1"), "completed", 2),
        (left("aaaa", lines=3), "disconnected", 2),
        (left("aaaa", lines=3), "failed", 3),
    ],
)
def test_ledger_finds_wrong_ends(received: Received, reason: str, items: int) -> None:
    """The reported end must match the client's view, and the fate of the plan."""
    assert len(account(received, [], reason, items).wrong_ends) == 1


def test_ledger_finds_streams_without_exactly_one_end() -> None:
    """Only a stream that sent nothing to its client may have no end."""
    once = [Ending("completed", 1)]
    for ended in [], once * 2:
        faults = balance([complete("a")], rows(1), {"s1": ended})
        assert count_faults(faults) == (0, 0, 0, 1)
    assert balance([left("a", lines=0)], [], {}).clean
    assert not balance([left("a", lines=1)], [], {}).clean


@pytest.mark.parametrize(
    ("script", "commit", "before", "end"),
    [
        ("aica", "end", [0, 0, 2, 2], 3),
        ("aica", "manual", [0, 0, 2, 2], 2),
        ("arit", "end", [0, 0, 0, 1], 1),
        ("aaa", "each", [1, 2, 3], 3),
        ("aaxaa", "2", [0, 2, 2, 3, 3], 4),
        ("aca!a", "end", [0, 1, 1], 2),
    ],
)
def test_plan_computes_the_stored_rows(
    script: str, commit: str, before: list[int], end: int
) -> None:
    """The plan has the rows that are committed before each line, and at the end."""
    states, stored = Plan("s1", "ann", "complete", script, commit).stored()
    assert [len(state) for state in states] == [0, *before]
    assert len(stored) == end


def test_visits_are_the_same_for_the_same_seed() -> None:
    """A soak test with faults can be repeated."""
    first, again = list(visits("1 waitress", 90)), list(visits("1 waitress", 90))
    assert first == again
    assert sum(map(len, first)) == 90
    assert first != list(visits("2 waitress", 90))


@pytest.mark.parametrize(
    "changed",
    [
        {"memory": 120.0},
        {"threads": 9},
        {"connections": 1},
        {"idle": 1},
        {"contexts": 1},
        {"alive": 1},
    ],
)
def test_soak_finds_leaks(changed: dict[str, Any]) -> None:
    """Memory, threads, connections, contexts and streams must not grow."""
    assert SoakResult("waitress", Account(), REST, REST, REST, "").wrongs == []
    end = REST._replace(**changed)
    assert len(SoakResult("waitress", Account(), REST, REST, end, "").wrongs) == 1


@pytest.mark.parametrize(
    "changed",
    [{"started": 2}, {"ended": (("failed", 1),)}, {"bytes": 7}, {"open": 1}],
)
def test_soak_compares_the_metrics_with_the_ledger(changed: dict[str, Any]) -> None:
    """Each count must be that of the hooks."""
    ledger = Totals(1, (("completed", 1),), 6)
    result = SoakResult("waitress", Account(), REST, REST, REST, "", ledger, ledger)
    assert result.wrongs == []
    wrong = result._replace(counters=ledger._replace(**changed))
    assert len(wrong.wrongs) == 1
