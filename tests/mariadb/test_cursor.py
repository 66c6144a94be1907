"""``rows()`` and ``copy()`` with an unbuffered cursor, and streams, on MariaDB."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa
import transaction
from pymysql.cursors import SSCursor
from sqlalchemy import event
from sqlalchemy.orm import Session
from tg import abort

import tgstream
from tests.conftest import MakeApp, Root, assert_clean, pool
from tests.mariadb.conftest import MariaModel
from tests.model import Note, User
from tests.wsgi import Call, get
from tgstream import CSV, NDJSON, StreamError, copy, rows

# Items.


def test_rows_have_the_columns_of_mapped_classes(
    session: Session, model: MariaModel
) -> None:
    """The fields are known, with or without rows."""
    source = rows(sa.select(User), session=session)
    assert list(source) == []
    assert source.fields == ["id", "name"]
    session.rollback()
    model.seed("ada", "bob")
    assert [tuple(row) for row in source] == [(1, "ada"), (2, "bob")]
    assert source.fields == ["id", "name"]


def test_text_and_unions_are_read(session: Session, model: MariaModel) -> None:
    """Parameters and percent signs are kept."""
    model.seed("ada", "b%s")
    text = sa.text("SELECT name FROM users WHERE name LIKE '%s' AND id = :id")
    assert [row.name for row in rows(text.bindparams(id=2), session=session)] == ["b%s"]
    both = sa.union_all(sa.select(User.name), sa.select(User.name))
    assert len(list(rows(both, session=session))) == 4


def test_cursor_is_unbuffered(
    session: Session, model: MariaModel, numbers: sa.TextClause
) -> None:
    """The driver's cursor buffers nothing, so the server is still sending."""
    cursor_types: list[type] = []
    event.listen(
        model.outside,
        "before_cursor_execute",
        lambda connection, cursor, *rest: cursor_types.append(type(cursor)),
    )
    batches = rows(numbers, session=session).batches()
    next(batches)
    assert cursor_types == [SSCursor]
    running = [process[7] for process in model.fetch("SHOW PROCESSLIST")]
    assert any("seq_1_to_100000" in str(text) for text in running)
    batches.close()


def test_memory_does_not_grow_with_the_rows(
    session: Session, numbers: sa.TextClause
) -> None:
    """Reading 100,000 rows takes less than 1 MiB."""
    assert sum(map(len, rows(numbers, session=session).batches())) == 100000
    tracemalloc.start()
    try:
        for batch in rows(numbers, session=session).batches():
            assert batch
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# Other statements.


OTHERS: dict[str, Callable[[Session], Any]] = {
    "execute": lambda session: session.execute(sa.select(User)),
    "get": lambda session: session.get(User, 1),
    "connection": lambda session: session.connection().exec_driver_sql("SELECT 1"),
    "savepoint": lambda session: session.connection().begin_nested(),
    "rows": lambda session: next(iter(rows(sa.select(User), session=session))),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_statement_is_refused_and_no_row_is_lost(
    session: Session, numbers: sa.TextClause, other: Callable[[Session], Any]
) -> None:
    """PyMySQL would end the cursor as if it were complete. Here it continues."""
    source = iter(rows(numbers, session=session))
    actual = [next(source) for _ in range(20)]
    with pytest.raises(StreamError, match=r"Use rows\(\.\.\., key=\.\.\.\)"):
        other(session)
    actual += source
    assert [row.i for row in actual] == list(range(1, 100001))
    session.execute(sa.text("SELECT 1"))


def test_flush_is_refused(session: Session, numbers: sa.TextClause) -> None:
    """The failed flush rolls back. Then reading is an error, and not the end."""
    source = iter(rows(numbers, session=session))
    next(source)
    session.add(User(name="ada"))
    with pytest.raises(StreamError, match="execute no other statement"):
        session.flush()
    with pytest.raises(sa.exc.ResourceClosedError):
        list(source)


@pytest.mark.parametrize("end", [Session.commit, Session.rollback, Session.close])
def test_cursor_whose_transaction_ended_does_not_look_complete(
    session: Session, numbers: sa.TextClause, end: Callable[[Session], None]
) -> None:
    """Reading after a commit, rollback or close is an error."""
    source = iter(rows(numbers, session=session))
    next(source)
    end(session)
    with pytest.raises(sa.exc.ResourceClosedError):
        list(source)
    assert session.scalar(sa.text("SELECT 1")) == 1


def test_other_session_can_write_while_rows_are_read(
    make_app: MakeApp, model: MariaModel
) -> None:
    """A separate session reads, and the stream's session writes."""
    model.seed("ada", "bob")

    def body() -> Iterator[str]:
        with Session(model.engine) as session:
            for row in rows(sa.select(User), session=session):
                model.DBSession.add(Note(text=row.name))
                model.DBSession.flush()
                yield row.name

    assert get(make_app(Root(body), model)).text == "adabob"
    assert model.texts() == ["ada", "bob"]
    assert_clean(model)


def test_connection_is_usable_after_rows_ended_early(
    session: Session, numbers: sa.TextClause
) -> None:
    """The remaining rows are discarded."""
    for _ in range(2):
        source = rows(numbers, session=session).batches()
        next(source)
        source.close()
        assert session.scalar(sa.text("SELECT 7")) == 7


def test_result_of_a_handler_blocks_no_connection(session: Session) -> None:
    """A cache can return its own Result. Other statements are allowed then."""
    frozen = session.execute(sa.text("SELECT 'cached' AS name")).freeze()
    results = iter([frozen(), None])
    event.listen(session, "do_orm_execute", lambda state: next(results))
    source = iter(rows(sa.select(User.name), session=session))
    assert next(source).name == "cached"
    assert session.scalar(sa.text("SELECT 7")) == 7


# In a stream.


ENDS: dict[str, Callable[[], Any]] = {
    "commit()": tgstream.commit,
    "rollback()": tgstream.rollback,
    "transaction.commit()": transaction.commit,
    "transaction.abort()": transaction.abort,
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("stop", ["exhausted", "stopped"])
def test_transaction_cannot_end_while_rows_are_read(
    make_app: MakeApp,
    model: MariaModel,
    numbers: sa.TextClause,
    end: Callable[[], Any],
    stop: str,
) -> None:
    """A commit or rollback is an error until the rows are read or closed."""

    def body() -> Iterator[str]:
        source = iter(rows(numbers))
        for row in source:
            if row.i == 20:
                with pytest.raises(StreamError, match=r"key=\.\.\."):
                    end()
                if stop == "stopped":
                    break
        yield str(row.i)
        source.close()  # type: ignore[attr-defined]
        end()
        model.DBSession.add(Note(text="after"))
        tgstream.commit()

    expected = "100000" if stop == "exhausted" else "20"
    assert get(make_app(Root(body), model)).text == expected
    assert model.texts() == ["after"]
    assert_clean(model)


@pytest.mark.parametrize("commit", ["each", 3])
def test_automatic_commits_are_refused_when_reading_starts(
    make_app: MakeApp, model: MariaModel, commit: Any
) -> None:
    """The error comes before the first chunk, so the client gets an error page."""

    def body() -> Iterator[str]:
        for row in rows(sa.select(User)):
            yield row.name

    app = make_app(Root(body, commit=commit), model, trace_errors__enable=False)
    with pytest.raises(StreamError, match=r"Root\.index commits after its items"):
        get(app)
    assert_clean(model)


@pytest.mark.parametrize("end", ["exhausted", "closed", "dropped", "failed", "kept"])
def test_open_cursor_is_closed_with_the_stream(
    make_app: MakeApp, model: MariaModel, numbers: sa.TextClause, end: str
) -> None:
    """A stream that succeeds still commits, and a failed one still rolls back."""
    kept: list[Any] = []

    def body() -> Iterator[str]:
        model.DBSession.add(Note(text="written"))
        source = rows(numbers).batches()
        if end == "kept":
            kept.append(source)
            model.DBSession.add(Note(text="pending"))
        for row in next(source):
            yield row.text
        if end == "failed":
            raise ValueError("halfway")

    call = Call(make_app(Root(body), model), checked=False)
    assert next(call) == b"text1"
    if end in ("exhausted", "kept"):
        list(call)
    elif end == "failed":
        with pytest.raises(ValueError, match="halfway"):
            list(call)
    if end == "dropped":
        call.drop()
    else:
        call.close()
    del call
    written = {"exhausted": ["written"], "kept": ["written", "pending"]}
    assert model.texts() == written.get(end, [])
    for source in kept:
        with pytest.raises(sa.exc.ResourceClosedError):
            next(source)
    assert_clean(model)


def fetch_with_pymysql(model: MariaModel, statement: str) -> list[tuple[Any, ...]]:
    with closing(model.connect()) as connection, connection.cursor() as cursor:
        cursor.execute(statement)
        return list(cursor.fetchall())


TEXTS = ["", 'a "quote"', "comma, line\nfeed", "cr\r\n", "日本 é 😀", "100%s", "tail "]


def fill(model: MariaModel) -> None:
    with Session(model.outside) as session:
        session.add_all([Note(text=text) for text in [*TEXTS, *TEXTS * 50]])
        session.commit()


@pytest.mark.parametrize("make", ["rows", "key", "copy"])
def test_csv_has_the_values_of_the_driver(
    make_app: MakeApp, model: MariaModel, make: str
) -> None:
    """Python's csv reads the same values as PyMySQL alone."""
    fill(model)
    statement = sa.select(Note)
    makes: dict[str, Callable[[], Any]] = {
        "rows": lambda: rows(statement.order_by(Note.id)),
        "key": lambda: rows(statement, key=Note.id, batch=50),
        "copy": lambda: copy(statement.order_by(Note.id)),
    }
    text = get(make_app(Root(makes[make], format=CSV), model)).text
    assert list(csv.reader(io.StringIO(text, newline=""))) == [
        ["id", "text", "user_id"],
        *(
            ["" if value is None else str(value) for value in row]
            for row in fetch_with_pymysql(
                model, "SELECT id, text, user_id FROM notes ORDER BY id"
            )
        ),
    ]
    assert_clean(model)


@pytest.mark.parametrize("key", [None, Note.id])
def test_json_has_the_values_of_the_driver(
    make_app: MakeApp, model: MariaModel, key: Any
) -> None:
    """Python's json reads the same values as PyMySQL alone."""
    fill(model)
    body = lambda: rows(sa.select(Note), key=key, batch=50)  # noqa: E731
    text = get(make_app(Root(body, format=NDJSON), model)).text
    assert [
        tuple(json.loads(line).values()) for line in text.splitlines()
    ] == fetch_with_pymysql(model, "SELECT id, text, user_id FROM notes ORDER BY id")
    assert_clean(model)


# The transaction of the stream.


def write(model: MariaModel, *texts: str) -> Iterator[str]:
    for text in texts:
        model.DBSession.add(Note(text=text))
        model.DBSession.flush()
        yield text


def test_stream_commits_at_its_end(make_app: MakeApp, model: MariaModel) -> None:
    """Nothing is committed before."""
    call = Call(make_app(Root(lambda: write(model, "a", "b")), model))
    assert next(call) == b"a"
    assert model.texts() == []
    assert call.read() == b"b"
    assert model.texts() == ["a", "b"]
    assert_clean(model)


def test_stream_that_fails_rolls_back(make_app: MakeApp, model: MariaModel) -> None:
    """Flushed changes are rolled back."""

    def body() -> Iterator[str]:
        yield from write(model, "a", "b")
        raise ValueError("too late")

    with pytest.raises(ValueError, match="too late"):
        get(make_app(Root(body), model))
    assert model.texts() == []
    assert_clean(model)


def test_abort_before_the_first_chunk_shows_the_error_page(
    make_app: MakeApp, model: MariaModel
) -> None:
    """The status is that of abort()."""

    def body() -> Iterator[str]:
        list(rows(sa.select(User)))
        abort(404)
        yield ""

    assert get(make_app(Root(body), model)).status.startswith("404")
    assert_clean(model)


def test_commit_each_commits_before_the_chunk_is_sent(
    make_app: MakeApp, model: MariaModel
) -> None:
    """The stream holds no connection while it waits."""
    call = Call(make_app(Root(lambda: write(model, "a", "b"), commit="each"), model))
    assert next(call) == b"a"
    assert model.texts() == ["a"]
    assert pool(model).checkedout() == 0
    assert next(call) == b"b"
    call.close()
    assert model.texts() == ["a", "b"]
    assert_clean(model)
