"""An application that a type checker reads and that never runs.

Each wrong call has a ``type: ignore`` with its error. If mypy did not find that error,
it would report the comment as unused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from tg import TGController, expose
from typing_extensions import assert_type

from tgstream import (
    CSV,
    NDJSON,
    SSE,
    XLSX,
    ZIP,
    Batched,
    Channel,
    Event,
    Format,
    JSONArray,
    Parquet,
    Report,
    Stream,
    commit,
    copy,
    current_stream,
    drain,
    flush,
    health,
    last_event_id,
    plugme,
    render,
    rollback,
    rows,
    send_file,
    stream,
)
from tgstream.testing import OpenStream, assert_clean, open_stream

users = sa.table("users")


class RootController(TGController):
    @stream
    def bare(self, year: int, name: str = "") -> Iterator[str]:
        yield f"{year} {name}"

    @stream(SSE(heartbeat=15), commit="each", max_seconds=3600, limit=100)
    def called(self, year: int) -> Iterator[Event]:
        yield Event({"year": year}, event="year", id=year)

    @stream(format=CSV, commit=100, chunk_size=0, filename="a.csv", charset="latin-1")
    def listed(self) -> list[tuple[int, str]]:
        return [(1, "one")]

    @expose()
    @stream(NDJSON)
    def exposed(self):  # type: ignore[no-untyped-def]  # as in most applications
        return rows(sa.select(users), key=users.c.id)

    @expose()
    def returned(self, year: int) -> Stream:
        return Stream(self.bare(year), JSONArray(), commit="manual", length=4)

    @expose()
    @stream([CSV, NDJSON, XLSX(widths={"name": 20})], filename="users", spool=True)
    def chosen(self) -> Batched:
        return rows(sa.select(users), convert={int: str, "name": str.title})

    @expose()
    @stream(ZIP(compress=False), compress=False)
    def archive(self) -> Iterator[tuple[str, Any]]:
        yield "users.csv", Stream(sa.select(users), CSV.for_excel("de_DE"))
        yield "users.parquet", Stream(sa.select(users), Parquet(row_group=10))

    @expose()
    def file(self) -> Stream:
        return send_file(Path("report.pdf"), filename="report.pdf", max_age=60)


root = RootController()


# A decorated function keeps its type.

assert_type(root.bare(2026, name="ada"), Iterator[str])
assert_type(root.called(year=2026), Iterator[Event])
assert_type(root.listed(), list[tuple[int, str]])
root.bare()  # type: ignore[call-arg]
root.bare("2026")  # type: ignore[arg-type]


# In a generator.

running = current_stream()
assert_type(running, Stream)
assert_type((running.items, running.chunks, running.bytes), tuple[int, int, int])
assert_type(running.ending, bool)
for hook in commit, flush, rollback:
    assert_type(hook(), None)
assert_type(drain(timeout=10), bool)
assert_type(health()["draining"], bool)
assert_type(health()["open_streams"], int)
running.items = 5  # type: ignore[misc]


# Sources of items.

people: Batched = rows(sa.select(users), batch=100)
assert_type(people.fields, Sequence[str])
for batch in rows("SELECT 1").batches():
    assert_type(batch, Sequence[Any])
assert_type(iter(copy(sa.select(users), header=False)), Iterator[bytes])
assert_type(render("page.xhtml", name="ada"), Iterator[str])
rows(sa.select(users), batch="100")  # type: ignore[arg-type]


# Channels and events.

orders = Channel("orders")
assert_type(orders.listen(after=last_event_id()), Iterator[Event])
assert_type(last_event_id(), str | None)
assert_type(Event("text").retry, int | None)
orders.publish({"number": 5}, event="new", now=True)
orders.publish()  # type: ignore[call-arg]
Channel(5)  # type: ignore[arg-type]
Event(event=5)  # type: ignore[arg-type]
Event("text").data = "other"  # type: ignore[misc]


# Invalid options.

stream(commit=1.5)  # type: ignore[call-overload]
stream(commit="never")  # type: ignore[call-overload]
stream("csv")  # type: ignore[arg-type]
stream(CSV, 100)  # type: ignore[call-overload]
Stream()  # type: ignore[call-arg]
Stream([], commit="never")  # type: ignore[arg-type]
Stream([], chunk_size="5")  # type: ignore[arg-type]
SSE(heartbeat="15")  # type: ignore[arg-type]
SSE(done=True)  # type: ignore[arg-type]
SSE(15, 3000, "done")  # type: ignore[call-arg]
CSV(headers=False)  # type: ignore[call-arg]
CSV(delimiter=5)  # type: ignore[arg-type]
XLSX(widths="wide")  # type: ignore[arg-type]
stream([CSV], spool="yes")  # type: ignore[call-overload]


class Lines:
    """A custom format."""

    content_type = "text/plain"

    def encode(self, items: Any) -> Iterator[str]:
        return (f"{item}\n" for item in items)


class Untyped:
    """An invalid format: it has no content type."""

    def encode(self, items: Any) -> Iterator[str]:
        return iter(items)


lines: Format = Lines()
assert_type(Stream([1, 2], Lines), Stream)
Stream([1, 2], Untyped)  # type: ignore[arg-type]


# Around an application.


def log_report(report: Report) -> None:
    assert_type(report.error, BaseException | None)
    if report.reason == "complete":  # type: ignore[comparison-overlap]
        print("it is 'completed'")
    assert_type(report.first_chunk_seconds, float | None)


def test_stream(app: Callable[..., Any]) -> None:
    with open_stream(app, "/bare?year=2026") as response:
        assert_type(response, OpenStream)
        assert_type(next(response), bytes)
        assert_type([*response.events()], list[Event])
        assert_type([*response.rows()], list[list[str]])
    assert_type(response.report(), Report)
    assert_clean()


plugme(None, {"chunk_size": 65536})
