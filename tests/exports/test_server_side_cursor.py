"""The cursor of ``rows()``: its statements, its plan, the writers that it blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from tests.conftest import MakeApp, Root, assert_clean
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import get
from tgstream import CSV, StreamError, copy, rows
from tgstream.exports import server_side_cursor
from tgstream.formats.protocols import CountedBatches

# Statements and connections with a cursor.

INSERT = "INSERT INTO notes (text) VALUES ('new') RETURNING text"
WITH_INSERT = f"WITH added AS ({INSERT}) SELECT text FROM added"
ADDED = sa.insert(Note).values(text="new").returning(Note.text).cte()
STATEMENTS: dict[str, Any] = {
    "select": sa.text("/* all */ (SELECT 'new' AS text)"),
    "values": sa.text("VALUES ('new')"),
    "with": sa.text("WITH n AS (SELECT 'new' AS text) SELECT text FROM n"),
    "quoted": sa.text("SELECT 'new' AS text WHERE '(UPDATE' <> ' INTO '"),
    "insert": sa.text(INSERT),
    "with insert": sa.text(WITH_INSERT),
    "insert from with": sa.text(
        "WITH n AS (SELECT 'new' AS t) "
        "INSERT INTO notes (text) SELECT t FROM n RETURNING text"
    ),
    "typed": sa.text(WITH_INSERT).columns(Note.text),
    "cte": sa.select(ADDED),
    "update": sa.text("UPDATE users SET name = 'new' RETURNING name"),
    "show": sa.text("SHOW application_name"),
    "explain": sa.text("EXPLAIN (FORMAT json) SELECT 1"),
}
WRITES = {"insert", "with insert", "insert from with", "typed", "cte", "update"}


@pytest.mark.parametrize("name", STATEMENTS)
@pytest.mark.parametrize("isolation", ["READ COMMITTED", "AUTOCOMMIT"])
@pytest.mark.parametrize("function", [rows, copy])
def test_statement_that_returns_rows_can_be_read(
    make_model: MakeModel, postgresql: str, name: str, isolation: str, function: Any
) -> None:
    """It is read with a cursor if possible, on a connection of either kind."""
    model = make_model(postgresql)
    model.seed("old")
    engine = model.outside.execution_options(isolation_level=isolation)
    with Session(engine) as session:
        items = list(function(STATEMENTS[name], session=session))
        session.commit()
    if function is copy:
        items = b"".join(items).splitlines()[1:]
    assert len(items) >= 1
    if name not in ("show", "explain"):
        assert items in ([("new",)], [b"new"])
    written = [*model.texts(), *model.names()]
    assert written.count("new") == (name in WRITES)


@pytest.mark.parametrize(
    "text",
    [
        "/* all */ (SELECT * FROM generate_series(1, 50) AS i)",
        f"VALUES {', '.join(f'({number})' for number in range(50))};",
        "WITH n AS (SELECT * FROM generate_series(1, 50) AS i) TABLE n",
        "select i, '(UPDATE' AS a, ' INTO ' AS b, $$ INTO $$ AS c "
        "from generate_series(1, 50) AS i",
        "SELECT i FROM generate_series(1, 50) AS i -- INTO nothing",
    ],
)
def test_query_is_read_by_a_server_side_cursor(
    make_model: MakeModel, postgresql: str, text: str
) -> None:
    """A statement that DECLARE CURSOR accepts is not fetched at once."""
    model = make_model(postgresql)
    with Session(model.outside) as session:
        source = rows(sa.text(text), session=session).batches()
        assert len(next(source)) == 16
        assert session.scalar(sa.text("SELECT count(*) FROM pg_cursors")) == 1
        source.close()


@pytest.mark.parametrize("option", ["engine", "session", "connect"])
@pytest.mark.parametrize("key", [None, User.id])
def test_rows_work_in_autocommit(
    make_model: MakeModel, postgresql: str, option: str, key: Any
) -> None:
    """AUTOCOMMIT can be set in three places, together with stream_results."""
    model = make_model(postgresql)
    model.seed("ada", "bob")
    everywhere: dict[str, Any] = {"stream_results": True}
    if option == "engine":
        everywhere["isolation_level"] = "AUTOCOMMIT"
    arguments = {"autocommit": True} if option == "connect" else {}
    engine = sa.create_engine(
        postgresql,
        poolclass=sa.NullPool,
        connect_args=arguments,
        execution_options=everywhere,
    )
    if option == "connect":
        engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session(engine) as session:
        if option == "session":
            options: Any = {"isolation_level": "AUTOCOMMIT"}
            session.connection(execution_options=options)
        items = list(rows(sa.select(User.name), key=key, session=session))
    assert sorted(items) == [("ada",), ("bob",)]


def test_insert_returning_is_committed_with_the_stream(
    make_app: MakeApp, make_model: MakeModel, postgresql: str
) -> None:
    """A stream that fails rolls it back."""
    model = make_model(postgresql)

    def body(fails: bool) -> Iterator[str]:
        for row in rows(sa.text(INSERT)):
            yield row.text
        if fails:
            raise ValueError("too late")

    with pytest.raises(ValueError, match="too late"):
        get(make_app(Root(lambda: body(True)), model))
    assert model.texts() == []
    assert get(make_app(Root(lambda: body(False)), model)).text == "new"
    assert model.texts() == ["new"]
    assert_clean(model)


def test_statement_without_rows_is_refused(session: Session) -> None:
    """On PostgreSQL the error does not come from DECLARE CURSOR."""
    with pytest.raises(StreamError, match="returns no rows"):
        list(rows(sa.text("DELETE FROM notes"), session=session))


# The plan.


def fraction(session: Session) -> Any:
    return session.scalar(sa.text("SHOW cursor_tuple_fraction"))


def test_cursor_is_planned_for_all_rows(make_model: MakeModel, postgresql: str) -> None:
    """One more statement sets it, until the transaction ends."""
    model = make_model(postgresql)
    sent: list[str] = []
    engine = sa.create_engine(postgresql, poolclass=sa.StaticPool)
    with Session(engine) as session:
        session.execute(sa.text("SELECT 1"))
        sa.event.listen(
            session.connection(), "before_cursor_execute", lambda *a: sent.append(a[2])
        )
        list(rows(sa.select(User), session=session))
        assert len(sent) == 2
        assert fraction(session) == "1"
        session.rollback()
        assert fraction(session) == "0.1"
    engine.dispose()
    assert model.names() == []


def test_plan_of_the_application_is_kept(
    make_model: MakeModel, postgresql: str
) -> None:
    """A cursor_tuple_fraction other than the default is not changed."""
    make_model(postgresql)
    with Session(sa.create_engine(postgresql, poolclass=sa.NullPool)) as session:
        session.execute(sa.text("SET LOCAL cursor_tuple_fraction = 0.5"))
        list(rows(sa.select(User), session=session))
        assert fraction(session) == "0.5"


def test_planning_does_not_count_as_a_write(
    make_app: MakeApp, make_model: MakeModel, postgresql: str
) -> None:
    """rows(key=...) after a cursor still returns its connection to the pool."""
    model = make_model(postgresql)
    model.seed("ada", "bob")

    def body() -> Iterator[str]:
        yield from (row.name for row in rows(sa.select(User), key=User.id))
        for _ in rows(sa.select(User)):
            pass
        for row in rows(sa.select(User), key=User.id, batch=1):
            assert model.idle_in_transaction() == 0
            yield row.name

    assert get(make_app(Root(body), model)).text == "adabobadabob"
    assert_clean(model)


# Blocked writers.


def warnings_of_wal(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "WAL" in message]


def read_slowly(session: Session, monkeypatch: pytest.MonkeyPatch, end: bool) -> None:
    """Read so slowly that a waiting writer gives up."""
    monkeypatch.setattr(server_side_cursor, "BUSY_TIMEOUT", 0.0)
    batches = rows(sa.select(User), session=session, batch=1).batches()
    next(batches)
    if end:
        assert len(list(batches)) == 2
    batches.close()


@pytest.mark.parametrize("end", [True, False])
def test_slow_reading_of_an_sqlite_file_is_warned_about_once(
    sqlite_model: Model,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    end: bool,
) -> None:
    """There is a warning per engine, even if the client stops reading."""
    sqlite_model.seed("ada", "bob", "cyd")
    with Session(sqlite_model.outside) as session:
        read_slowly(session, monkeypatch, end)
        read_slowly(session, monkeypatch, end)
    (message,) = warnings_of_wal(caplog)
    assert "PRAGMA journal_mode=WAL" in message
    assert "key=" in message
    assert "'delete'" in message


def test_fast_reading_of_an_sqlite_file_has_no_warning(
    sqlite_model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """Writers wait for five seconds before they fail."""
    sqlite_model.seed("ada", "bob", "cyd")
    with Session(sqlite_model.outside) as session:
        assert len(list(rows(sa.select(User), session=session, batch=1))) == 3
    assert warnings_of_wal(caplog) == []


@pytest.mark.parametrize("case", ["wal", "memory", "key", "postgresql"])
def test_slow_reading_that_blocks_no_writer_has_no_warning(
    case: str,
    make_model: MakeModel,
    postgresql: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """This holds in WAL mode, in memory, with key= and on PostgreSQL."""
    url = f"sqlite:///{tmp_path}/test.db"
    url = {"memory": "sqlite://", "postgresql": postgresql}.get(case, url)
    engine = sa.create_engine(url)
    User.metadata.drop_all(engine)
    User.metadata.create_all(engine)
    with Session(engine) as session:
        if case == "wal":
            session.connection().exec_driver_sql("PRAGMA journal_mode=WAL")
        session.add_all([User(name=name) for name in "abc"])
        session.commit()
        if case == "key":
            monkeypatch.setattr(server_side_cursor, "BUSY_TIMEOUT", 0.0)
            by_key = rows(sa.select(User), key=User.id, session=session, batch=1)
            assert len(list(by_key)) == 3
        else:
            read_slowly(session, monkeypatch, True)
    engine.dispose()
    assert warnings_of_wal(caplog) == []


WITH_BYTES = "name,data\r\na,AP8=\r\n"


def test_bytea_of_psycopg2_is_written_as_base64(
    make_model: MakeModel, postgresql: str
) -> None:
    """psycopg2 returns a memoryview, whose str() would be an address."""
    model = make_model(postgresql.replace("+psycopg:", "+psycopg2:"))
    statement = sa.text("SELECT 'a' AS name, '\\x00ff'::bytea AS data")
    with Session(model.outside) as session:
        batched = CountedBatches(
            source := rows(statement, session=session), source.batches()
        )
        assert "".join(map(str, CSV().encode_batches(batched))) == WITH_BYTES
        assert "".join(map(str, CSV().encode(source))) == WITH_BYTES
        [row] = source
        assert isinstance(row.data, memoryview)
