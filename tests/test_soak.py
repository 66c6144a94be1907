"""A short soak of each server, and that what keeps its account can find fault."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.soak.client import Told
from tests.soak.ledger import Account, Ending, Row, balance
from tests.soak.plans import Plan, visits
from tests.soak.run import SERVERS, Soaked, soak
from tests.soak.vitals import Vitals

STREAMS = 60
REST = Vitals(memory=90.0, threads=8, connections=0, idle=0, contexts=0, alive=0)


@pytest.mark.parametrize("server", SERVERS)
def test_soak_finds_nothing_wrong(server: str, postgresql: str) -> None:
    """Of many streams of all fates no row is lost, extra or another's, and nothing is
    left of them."""
    soaked = soak(server, postgresql, seed=1, streams=STREAMS, seconds=60)
    assert soaked.wrongs == []
    assert soaked.account.streams == STREAMS
    assert 0 < soaked.account.told <= soaked.account.found


def account(told: Told, rows: list[Row], reason: str, items: int) -> Account:
    """The balance of one stream, whose server says how it ended."""
    return balance([told], rows, {told.plan.stream: [Ending(reason, items)]})


def wrongs(soaked: Account) -> tuple[int, int, int, int]:
    """What a balance has of each kind of fault."""
    return soaked.lost, soaked.extra, soaked.mixed, len(soaked.astray)


def rows(*numbers: int, owner: str = "ann") -> list[Row]:
    """Rows of the stream that the tests are about."""
    return [Row("s1", number, owner) for number in numbers]


def whole(script: str, **options: Any) -> Told:
    """What a client heard of a stream that ran to its end."""
    plan = Plan("s1", "ann", "complete", script, **options)
    return Told(plan, heard=len(script), end="whole")


def left(script: str, heard: int, **options: Any) -> Told:
    """What a client heard of a stream that it left."""
    plan = Plan("s1", "ann", "leave", script, hears=heard, **options)
    return Told(plan, heard=heard, end="left")


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
    """A stream that completed has exactly its rows, each once."""
    assert wrongs(account(whole("aca"), rows(*stored), "completed", 3)) == found


def test_ledger_finds_the_rows_of_strangers() -> None:
    """A row of no stream that was planned is extra."""
    stranger = [*rows(1), Row("s2", 1, "ann")]
    assert wrongs(account(whole("a"), stranger, "completed", 1)) == (0, 1, 0, 0)


def test_ledger_finds_what_is_mixed() -> None:
    """A row of another owner, and a line that names another."""
    foreign = rows(1, owner="bob")
    assert wrongs(account(whole("a"), foreign, "completed", 1)) == (0, 0, 1, 0)
    told = whole("a")
    told.mixed = 1
    assert wrongs(account(told, rows(1), "completed", 1)) == (0, 0, 1, 0)


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        ((1,), (1, 0, 0, 0)),  # less than was committed when it ended
        ((1, 3), (0, 0, 0, 0)),  # of which the client had not heard
        ((), (2, 0, 0, 0)),
        ((1, 3, 5), (0, 1, 0, 0)),  # a tail that nobody has committed
    ],
)
def test_ledger_knows_the_prefix_of_a_client_that_left(
    stored: tuple[int, ...], found: tuple[int, int, int, int]
) -> None:
    """What was committed when the stream ended, though its client had heard of less."""
    told = left("acacaa", heard=2)
    assert wrongs(account(told, rows(*stored), "disconnected", 5)) == found


@pytest.mark.parametrize(("kind", "extra"), [("raw", 1), ("gathered", 0)])
def test_ledger_knows_when_the_last_commit_is(kind: str, extra: int) -> None:
    """Where chunks are gathered it is before the last of them, over which a client can
    leave; else nothing leaves after it."""
    told = left("aca", heard=1, kind=kind)
    assert wrongs(account(told, rows(1, 3), "disconnected", 3)) == (0, extra, 0, 0)
    assert wrongs(account(told, rows(1), "disconnected", 3)) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("told", "reason", "items"),
    [
        (whole("aa"), "disconnected", 2),
        (replace(whole("aa"), end="broken"), "completed", 2),
        (replace(whole("aa"), heard=1), "completed", 2),
        (replace(whole("aa"), end="hangs"), "completed", 2),
        (replace(whole("aa"), astray="line 7 after 1"), "completed", 2),
        (left("aaaa", heard=3), "disconnected", 2),
        (left("aaaa", heard=3), "failed", 3),
    ],
)
def test_ledger_finds_streams_that_went_astray(
    told: Told, reason: str, items: int
) -> None:
    """A stream that ends otherwise than its client saw, or than its fate is."""
    assert len(account(told, [], reason, items).astray) == 1


def test_ledger_finds_streams_that_did_not_end_once() -> None:
    """Each has one end; only one that nobody heard of may have none."""
    once = [Ending("completed", 1)]
    for ended in [], once * 2:
        assert wrongs(balance([whole("a")], rows(1), {"s1": ended})) == (0, 0, 0, 1)
    assert balance([left("a", heard=0)], [], {}).clean
    assert not balance([left("a", heard=1)], [], {}).clean


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
def test_plan_knows_what_it_stores(
    script: str, commit: str, before: list[int], end: int
) -> None:
    """How many rows are committed before each line, and in the end."""
    states, stored = Plan("s1", "ann", "complete", script, commit).stored()
    assert [len(state) for state in states] == [0, *before]
    assert len(stored) == end


def test_visits_are_the_same_for_the_same_seed() -> None:
    """A soak that went wrong can be had again."""
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
def test_soak_finds_what_is_left(changed: dict[str, Any]) -> None:
    """Memory, threads, connections, contexts and streams are no more in the end."""
    assert Soaked("waitress", Account(), REST, REST, REST, "").wrongs == []
    end = REST._replace(**changed)
    assert len(Soaked("waitress", Account(), REST, REST, end, "").wrongs) == 1
