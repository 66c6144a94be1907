"""``rows()``: items, sessions, cursors and batches, without ``key``."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
import tg
import transaction
from sqlalchemy import event
from sqlalchemy.orm import (
    Bundle,
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    column_property,
    joinedload,
    load_only,
    mapped_column,
    scoped_session,
    selectinload,
    sessionmaker,
    with_loader_criteria,
)
from tg import TGController, expose

import tgstream
from tests.conftest import MakeApp, Root, assert_clean, pool
from tests.forks import run_python
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import Call, get
from tgstream import CSV, NDJSON, JSONArray, Stream, StreamError, rows, stream


@dataclass
class Blob:
    text: str


# Items.


class Zoo(DeclarativeBase):
    pass


class Animal(Zoo):
    __tablename__ = "animals"
    id: Mapped[int] = mapped_column("animal_id", primary_key=True)
    name: Mapped[str]
    kind: Mapped[str]
    portrait: Mapped[bytes | None] = mapped_column(deferred=True)
    loud: Mapped[str] = column_property(sa.func.upper(sa.literal_column("'x'")))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Bird(Animal):
    __tablename__ = "birds"
    id: Mapped[int] = mapped_column(sa.ForeignKey(Animal.id), primary_key=True)
    wings: Mapped[int]
    __mapper_args__ = {"polymorphic_identity": "bird"}


class Cage(Zoo):
    __tablename__ = "cages"
    id: Mapped[int] = mapped_column(primary_key=True)
    animal_id: Mapped[int] = mapped_column("inmate", sa.ForeignKey(Animal.id))


@pytest.fixture
def zoo(model: Model, session: Session) -> Iterator[Session]:
    """A session with two animals and a cage."""
    Zoo.metadata.create_all(model.outside)
    session.add_all([Bird(name="owl", wings=2), Animal(name="cat")])
    session.flush()
    session.add(Cage(animal_id=1))
    session.commit()
    yield session
    session.close()
    Zoo.metadata.drop_all(model.outside)


OTHER = aliased(Animal)
SELECTS: list[tuple[Any, list[str], list[tuple[Any, ...]]]] = [
    (
        sa.select(Animal).order_by(Animal.id),
        ["id", "name", "kind", "loud"],
        [(1, "owl", "bird", "X"), (2, "cat", "animal", "X")],
    ),
    (
        sa.select(Bird),
        ["id", "name", "kind", "wings", "loud"],
        [(1, "owl", "bird", 2, "X")],
    ),
    (
        sa.select(Animal.id, Animal.name).order_by("id").limit(1),
        ["id", "name"],
        [(1, "owl")],
    ),
    (
        sa.select(Cage, OTHER).join(OTHER, OTHER.id == Cage.animal_id),
        ["id", "animal_id", "id_1", "name", "kind", "loud"],
        [(1, 1, 1, "owl", "bird", "X")],
    ),
    (
        sa.select(OTHER.id, Cage.id).join(Cage, OTHER.id == Cage.animal_id),
        ["id", "id_1"],
        [(1, 1)],
    ),
    (
        sa.select(Cage.id, OTHER.id, Bird.id)
        .join(OTHER, OTHER.id == Cage.animal_id)
        .join(Bird, Bird.id == Cage.animal_id),
        ["id", "id_1", "id_2"],
        [(1, 1, 1)],
    ),
    (
        sa.select(Bundle("both", Animal.id, Animal.name), sa.func.count())
        .group_by(Animal.id, Animal.name)
        .order_by(Animal.id)
        .limit(1),
        ["animal_id", "name", "count_1"],
        [(1, "owl", 1)],
    ),
    (sa.select(Animal.__table__.c.animal_id.label("n")).limit(0), ["n"], []),
    (sa.union(sa.select(Cage.id), sa.select(Cage.id)), ["id"], [(1,)]),
    (
        sa.text("SELECT name FROM animals WHERE animal_id = :id").bindparams(id=2),
        ["name"],
        [("cat",)],
    ),
    (sa.text("SELECT id FROM cages").columns(Cage.id), ["id"], [(1,)]),
    (sa.select(Animal).where(Animal.id > 5), ["id", "name", "kind", "loud"], []),
]


@pytest.mark.parametrize(("statement", "fields", "expected"), SELECTS)
def test_rows_have_the_columns_of_mapped_classes(
    zoo: Session, statement: Any, fields: list[str], expected: Any
) -> None:
    """Columns are named like their attributes, without duplicates or deferred ones."""
    source = rows(statement, session=zoo)
    assert len(source.fields) == 0
    items = list(source)
    assert [tuple(row) for row in items] == expected
    assert source.fields == fields
    assert set(map(type, source.fields)) == {str}
    assert all(row._fields == tuple(fields) for row in items)
    assert list(source) == items


def test_columns_have_the_same_names_as_in_session_execute(zoo: Session) -> None:
    """This holds for statements that select only attributes."""
    for statement in (
        sa.select(Animal.id, Animal.name, Animal.loud),
        sa.select(Cage.id, Cage.animal_id, Animal.id).join(Animal),
        sa.select(Animal.id.label("x"), Cage.id).join(Cage),
    ):
        source = rows(statement, session=zoo)
        assert list(source) == list(zoo.execute(statement))
        assert source.fields == list(zoo.execute(statement).keys())


def test_columns_with_the_same_name_are_refused(session: Session) -> None:
    """A JSON object would lose a value."""
    for statement in (
        sa.text("SELECT 1 AS a, 2 AS a"),
        sa.select(sa.literal(1).label("a"), sa.literal(2).label("a")),
    ):
        with pytest.raises(StreamError, match="two columns named 'a'"):
            list(rows(statement, session=session))
    assert not isinstance(session.scalar(sa.text("SELECT 1")), str)


def test_quoted_name_is_a_key_in_json(make_app: MakeApp, model: Model) -> None:
    """SQLAlchemy's quoted_name becomes a plain str."""
    column = sa.literal(1).label(sa.sql.quoted_name("Größe, total", True))
    app = make_app(Root(lambda: rows(sa.select(column)), format=NDJSON), model)
    assert json.loads(get(app).text) == {"Größe, total": 1}


@pytest.mark.parametrize("key", [None, User.id])
def test_rows_apply_the_handlers_of_the_session(model: Model, key: Any) -> None:
    """A filter for soft deletion applies to exports."""
    model.seed("ada", "ghost of ada", "bob")
    calls: list[Any] = []

    class Living(Session):
        pass

    @event.listens_for(Living, "do_orm_execute")
    def hide(state: Any) -> None:
        if calls and calls[-1] == "own":
            return
        calls.append("own")
        assert len(state.session.scalars(sa.select(User)).all()) == 3
        calls.append(state.statement)
        living = with_loader_criteria(User, User.name.not_like("ghost%"))
        state.statement = state.statement.options(living)

    with Living(model.outside) as session:
        for statement in (sa.select(User), sa.select(User.name, User.id)):
            result = rows(
                statement.order_by(User.id) if key is None else statement,
                key=key,
                session=session,
            )
            assert [row.name for row in result] == ["ada", "bob"]
        other = aliased(User)
        joined = sa.select(other.name).join(User, User.id == other.id)
        assert {row.name for row in rows(joined, session=session)} == {"ada", "bob"}
        option = with_loader_criteria(User, User.name == "bob")
        result = rows(sa.select(User).options(option), key=key, session=session)
        assert [row.name for row in result] == ["bob"]


def test_rows_come_from_the_result_of_a_handler(model: Model) -> None:
    """A cache can return its own Result in ``do_orm_execute``."""
    with Session(model.outside) as session:
        frozen = session.execute(sa.text("SELECT 'cached' AS name")).freeze()
        event.listen(session, "do_orm_execute", lambda state: frozen())
        source = rows(sa.select(User.name), session=session)
        assert [row.name for row in source] == ["cached"]


@pytest.mark.parametrize(
    "option", [joinedload(User.notes), selectinload(User.notes), load_only(User.name)]
)
def test_loader_option_is_refused(option: Any) -> None:
    """Columns have no relationships. rows() itself raises the error."""
    with pytest.raises(TypeError, match="name the columns"):
        rows(sa.select(User).options(option))


def test_rows_reject_wrong_arguments(session: Session) -> None:
    """Each error shows a valid argument."""
    for wrong in (
        User,
        User.id,
        "SELECT 1",
        sa.insert(User),
        User.__table__,
        [1],
        None,
    ):
        with pytest.raises(TypeError, match=r"Pass a select\(\), a union"):
            rows(wrong)
    with pytest.raises(StreamError, match="Pass the statement itself"):
        rows(session.execute(sa.select(User)))
    for batch in (0, -1, 1.5, True, "10"):
        with pytest.raises(
            ValueError, match=f"batch must be an integer >= 1, got {batch!r}"
        ):
            rows(sa.select(User), batch=batch)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="session must be a Session or a scoped_session"
    ):
        rows(sa.select(User), session=session.bind)
    # PostgreSQL raises first, because it cannot open a cursor for a DELETE.
    with pytest.raises((StreamError, sa.exc.ProgrammingError)) as raised:
        list(rows(sa.text("DELETE FROM notes"), session=session))
    if session.get_bind().dialect.name == "sqlite":
        assert "returns no rows" in str(raised.value)


# The session.


def test_rows_work_outside_of_a_stream(make_app: MakeApp, model: Model) -> None:
    """A script passes a session. In a request the application's session is used."""
    model.seed("ada")
    with Session(model.outside) as session:
        assert [row.name for row in rows(sa.select(User), session=session)] == ["ada"]
        assert [row.name for row in rows(session.query(User))] == ["ada"]
    scoped = scoped_session(sessionmaker(bind=model.outside))
    assert [row.name for row in rows(sa.select(User), session=scoped)] == ["ada"]
    scoped.remove()

    class Body(TGController):
        @expose()
        def index(self) -> str:
            return ",".join(row.name for row in rows(sa.select(User)))

    assert get(make_app(Body(), model)).text == "ada"
    assert_clean(model)


READERS: dict[str, Callable[[Any], Any]] = {
    "cursor": rows,
    "key": lambda statement: rows(statement, key=User.id, batch=1),
    "core": lambda statement: rows(sa.text("SELECT name FROM users ORDER BY id")),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_rows_flush_pending_objects_first(
    make_app: MakeApp, model: Model, read: Callable[[Any], Any]
) -> None:
    """As any query does with autoflush, rows() find what the generator has added."""

    def body() -> Iterator[str]:
        model.DBSession.add_all([User(name="ada"), User(name="bob")])
        for row in read(sa.select(User.id, User.name)):
            yield row.name

    call = get(make_app(Root(body), model))
    assert call.text == "adabob"
    assert model.fetch("SELECT name FROM users ORDER BY id") == [("ada",), ("bob",)]
    assert_clean(model)


def test_rows_do_not_flush_without_autoflush(session: Session) -> None:
    """no_autoflush, the execution option and Query.autoflush(False) are respected."""
    session.add(User(name="ada"))
    select = sa.select(User.name)
    with session.no_autoflush:
        assert list(rows(select, session=session)) == []
    without = select.execution_options(autoflush=False)
    assert list(rows(without, session=session)) == []
    assert list(rows(session.query(User.name).autoflush(False))) == []
    assert list(rows(select, session=session)) == [("ada",)]


def test_rows_without_a_session_are_an_error(make_app: MakeApp) -> None:
    """An application without a database must pass session=."""

    class Body(TGController):
        @expose()
        def index(self) -> str:
            return str(list(rows(sa.select(User))))

    app = make_app(Body(), trace_errors__enable=False)
    with pytest.raises(StreamError, match=r"session=\.\.\."):
        get(app)


def test_returned_statement_is_streamed(make_app: MakeApp, model: Model) -> None:
    """A controller or a Stream can have a select() or Query in place of rows()."""

    class Bare(TGController):
        @expose()
        @stream(NDJSON)
        def select(self) -> Any:
            return sa.select(User).order_by(User.id)

        @expose()
        @stream(NDJSON)
        def query(self) -> Any:
            return model.DBSession.query(User).order_by(User.id)

        @expose()
        @stream(NDJSON)
        def text(self) -> Any:
            return sa.text("SELECT id, name FROM users ORDER BY id")

        @expose()
        def helper(self) -> Any:
            return Stream(sa.select(User).order_by(User.id), NDJSON)

        @expose()
        @stream(NDJSON)
        def insert(self) -> Any:
            return Stream(sa.insert(User), NDJSON)

    model.seed("ada", "bob")
    app = make_app(Bare(), model, trace_errors__enable=False)
    for path in ("select", "query", "text", "helper"):
        lines = get(app, f"/{path}").text.splitlines()
        assert list(map(json.loads, lines)) == [
            {"id": 1, "name": "ada"},
            {"id": 2, "name": "bob"},
        ]
    with pytest.raises(TypeError, match="Stream: items must be iterable"):
        get(app, "/insert")
    assert_clean(model)


def test_csv_without_rows_has_a_header(make_app: MakeApp, model: Model) -> None:
    """The names come from the statement."""
    for key in (None, User.id):
        body = lambda key=key: rows(sa.select(User), key=key)  # noqa: E731
        app = make_app(Root(body, format=CSV), model)
        assert get(app).text == "id,name\r\n"
    assert_clean(model)


# The cursor, in a stream.


def seed(model: Model, count: int) -> None:
    with model.outside.begin() as connection:
        users = [{"id": n, "name": f"user{n}"} for n in range(1, count + 1)]
        connection.execute(sa.insert(User), users)


def names(statement: Any = None, **options: Any) -> Iterator[str]:
    for row in rows(
        sa.select(User.name) if statement is None else statement, **options
    ):
        yield row.name


ENDS: dict[str, Callable[[], Any]] = {
    "commit()": tgstream.commit,
    "rollback()": tgstream.rollback,
    "transaction.commit()": transaction.commit,
    "transaction.abort()": transaction.abort,
    "transaction.begin()": transaction.begin,
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("stop", ["exhausted", "stopped"])
def test_transaction_cannot_end_while_rows_are_read(
    make_app: MakeApp, model: Model, end: Callable[[], Any], stop: str
) -> None:
    """A commit or rollback is an error until the rows are read or closed."""
    seed(model, 50)

    def body() -> Iterator[str]:
        source = iter(rows(sa.select(User).order_by(User.id), batch=5))
        for row in source:
            with pytest.raises(
                StreamError, match=r"(?i)use rows\(\.\.\., key=\.\.\.\)"
            ):
                end()
            if stop == "stopped" and row.id == 20:
                break
            yield f"{row.id} "
        source.close()  # type: ignore[attr-defined]
        end()
        model.DBSession.add(Note(text="after"))
        tgstream.commit()

    last = 50 if stop == "exhausted" else 19
    expected = "".join(f"{n} " for n in range(1, last + 1))
    assert get(make_app(Root(body), model)).text == expected
    assert model.texts() == ["after"]
    assert_clean(model)


@pytest.mark.parametrize("commit", ["each", 3])
def test_automatic_commits_are_refused_when_reading_starts(
    make_app: MakeApp, model: Model, commit: Any
) -> None:
    """The error comes before the first chunk, so the client gets an error page."""
    seed(model, 3)
    app = make_app(Root(names, commit=commit), model, trace_errors__enable=False)
    with pytest.raises(
        StreamError, match=r"(?i)use rows\(\.\.\., key=\.\.\.\)"
    ) as raised:
        get(app)
    assert "Root.index" in str(raised.value)
    assert_clean(model)

    def foreign() -> Iterator[str]:
        with Session(model.outside) as session:
            yield from names(session=session)

    assert get(make_app(Root(foreign, commit=commit), model)).text == "user1user2user3"
    assert_clean(model)


@pytest.mark.parametrize(
    "end", ["exhausted", "closed", "dropped", "failed", "kept", "kept, failed"]
)
def test_open_cursor_is_closed_with_the_stream(
    make_app: MakeApp, model: Model, end: str
) -> None:
    """A stream that succeeds still commits, and a failed one still rolls back."""
    seed(model, 50)
    kept: list[Any] = []

    def body() -> Iterator[str]:
        model.DBSession.add(Note(text="written"))
        source = rows(sa.select(User), batch=5).batches()
        if end.startswith("kept"):
            kept.append(source)
        for _ in range(2):
            for row in next(source):
                yield row.name
        if end.endswith("failed"):
            raise ValueError("halfway")

    app = make_app(Root(body), model)
    call = Call(app, checked=False)
    assert next(call) == b"user1"
    if end in ("exhausted", "kept"):
        list(call)
    elif end.endswith("failed"):
        with pytest.raises(ValueError, match="halfway"):
            list(call)
    if end == "dropped":
        call.drop()
    else:
        call.close()
    del call
    assert model.texts() == (["written"] if end in ("exhausted", "kept") else [])
    assert pool(model).checkedout() == 0
    for source in kept:
        with pytest.raises(sa.exc.ResourceClosedError):
            next(source)
    assert_clean(model)


def test_cursor_is_on_the_server(make_app: MakeApp, model: Model) -> None:
    """Memory has one batch, which grows to batch=. The database keeps the rest."""
    seed(model, 5000)

    def body() -> Iterator[str]:
        source = rows(sa.select(User), batch=100)
        for number, batch in enumerate(source.batches()):
            assert len(batch) <= 100
            if number == 0 and not model.sqlite:
                count = sa.text("SELECT count(*) FROM pg_cursors")
                assert model.DBSession.execute(count).scalar() == 1
            yield f"{len(batch)} "

    sizes = get(make_app(Root(body), model)).text.split()
    assert sizes[:4] == ["16", "32", "64", "100"]
    assert sum(map(int, sizes)) == 5000
    assert_clean(model)


WIDE = sa.Table(
    "wide",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("cell", sa.Text),
)
CELL = 256 * 1024


@pytest.mark.parametrize("format", [CSV, NDJSON, JSONArray])
@pytest.mark.parametrize("source_type", ["cursor", "key", "yielded", "list", "source"])
def test_large_cells_do_not_make_large_chunks_or_batches(
    make_app: MakeApp, model: Model, source_type: str, format: Any
) -> None:
    """After the first large row, batches and chunks are limited in bytes."""
    many = [(number, f"{number:0{CELL}}") for number in range(80)]
    WIDE.drop(model.outside, checkfirst=True)
    WIDE.create(model.outside)
    with model.outside.begin() as connection:
        values = [{"id": number, "cell": cell} for number, cell in many]
        connection.execute(sa.insert(WIDE), values)

    class Source(list[Any]):
        fields = ("id", "cell")

        def batches(self) -> Iterator[Any]:
            yield self

    def body() -> Any:
        result = rows(sa.select(WIDE), key=WIDE.c.id if source_type == "key" else None)
        beside = {"yielded": (row for row in result), "list": many}
        return {**beside, "source": Source(many)}.get(source_type, result)

    call = Call(make_app(Root(body, format=format), model))
    tracemalloc.start()
    try:
        sizes = [len(chunk) for chunk in call]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        call.close()
        WIDE.drop(model.outside)
    assert sum(sizes) > 80 * CELL
    assert max(sizes) < CELL + 1024 * 1024
    assert peak < 16 * 1024 * 1024


@pytest.mark.parametrize("item_type", [tuple, dict, Blob, "text"], ids=str)
def test_large_items_of_a_list_are_sent_in_several_chunks(
    make_app: MakeApp, item_type: Any
) -> None:
    """This holds after many small items too."""
    large = "\0" * CELL  # six times as long in JSON
    texts = ["small"] * 300 + [large] * 12
    items: list[Any] = texts
    if item_type is tuple:
        items = [(1, text) for text in texts]
    elif item_type is dict:
        items = [{"a": {"b": [text]}} for text in texts]
    elif item_type is Blob:
        items = list(map(Blob, texts))
    call = Call(make_app(Root(lambda: items, format=NDJSON)))
    chunks = list(call)
    call.close()
    assert max(map(len, chunks)) <= 1024 * 1024
    assert len(b"".join(chunks).splitlines()) == 312


def test_memory_does_not_grow_with_the_rows(session: Session, model: Model) -> None:
    """Reading 100,000 rows takes less than 1 MiB."""
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n"
    text = sa.text(f"{numbers} WHERE i < 100000) SELECT i, 'text' || i AS t FROM n")
    assert sum(len(batch) for batch in rows(text, session=session).batches()) == 100000
    tracemalloc.start()
    try:
        for batch in rows(text, session=session).batches():
            assert batch
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_commit_after_reading_expires_nothing(make_app: MakeApp, model: Model) -> None:
    """A stream that only reads does not count as changed."""
    model.seed("ada")

    def body() -> Iterator[str]:
        ada = model.DBSession.query(User).one()
        yield from names(key=User.id)
        assert "name" in sa.inspect(ada).dict

    assert get(make_app(Root(body, commit="each"), model)).text == "ada"
    assert_clean(model)


def test_rows_use_a_session_of_tgstream_sessions(
    make_app: MakeApp, make_model: MakeModel, url: str
) -> None:
    """A second scoped session gives the stream its own session too."""
    model = make_model(url)
    model.seed("ada")
    second = scoped_session(sessionmaker(bind=model.outside))

    def body() -> Iterator[str]:
        for row in rows(sa.select(User), session=second):
            with pytest.raises(StreamError, match="key="):
                tgstream.commit()
            yield row.name
        assert tg.request is not None

    app = make_app(Root(body), model, tgstream__sessions=[second])
    assert get(app).text == "ada"
    assert not second.registry.has()
    assert_clean(model)


ON_SQLITE = """
import sys, sqlalchemy as sa
from sqlalchemy.orm import Session
from tgstream import rows

with Session(sa.create_engine("sqlite://")) as session:
    assert list(rows(sa.select(sa.literal(1)), session=session)) == [(1,)]
print([name for name in ("mysql", "postgresql") if f"sqlalchemy.dialects.{name}" in
       sys.modules])
"""


def test_rows_on_sqlite_import_no_other_dialect() -> None:
    """Importing the dialect of PostgreSQL takes longer than a short export."""
    ran = run_python("-c", ON_SQLITE)
    assert ran.stdout == "[]\n", ran.stderr
