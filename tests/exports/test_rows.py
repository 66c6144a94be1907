"""rows(): what a statement selects, through one cursor, in the session's own rules."""

from __future__ import annotations

import json
import subprocess
import sys
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
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import Call, get
from tgstream import CSV, NDJSON, JSONArray, Stream, StreamError, rows, stream


@dataclass
class Blob:
    text: str


# What an item is.


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
    """A session on a zoo of two animals and a cage."""
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
def test_entities_become_their_columns(
    zoo: Session, statement: Any, fields: list[str], expected: Any
) -> None:
    """Named as the attributes are, each its own name; deferred ones stay away."""
    source = rows(statement, session=zoo)
    assert len(source.fields) == 0
    found = list(source)
    assert [tuple(row) for row in found] == expected
    assert source.fields == fields
    assert set(map(type, source.fields)) == {str}
    assert all(row._fields == tuple(fields) for row in found)
    assert list(source) == found


def test_columns_have_the_names_that_the_session_gives(zoo: Session) -> None:
    """A statement of attributes alone has the fields of session.execute()."""
    for statement in (
        sa.select(Animal.id, Animal.name, Animal.loud),
        sa.select(Cage.id, Cage.animal_id, Animal.id).join(Animal),
        sa.select(Animal.id.label("x"), Cage.id).join(Cage),
    ):
        source = rows(statement, session=zoo)
        assert list(source) == list(zoo.execute(statement))
        assert source.fields == list(zoo.execute(statement).keys())


def test_column_that_comes_twice_is_refused(session: Session) -> None:
    """A mapping would lose one of the two."""
    for statement in (
        sa.text("SELECT 1 AS a, 2 AS a"),
        sa.select(sa.literal(1).label("a"), sa.literal(2).label("a")),
    ):
        with pytest.raises(StreamError, match="two columns named 'a'"):
            list(rows(statement, session=session))
    assert not isinstance(session.scalar(sa.text("SELECT 1")), str)


def test_name_that_needs_quotes_is_a_key_of_json(
    make_app: MakeApp, model: Model
) -> None:
    """A name is a plain text, whatever SQLAlchemy made of it."""
    column = sa.literal(1).label(sa.sql.quoted_name("Größe, total", True))
    app = make_app(Root(lambda: rows(sa.select(column)), format=NDJSON), model)
    assert json.loads(get(app).text) == {"Größe, total": 1}


@pytest.mark.parametrize("key", [None, User.id])
def test_handlers_of_the_session_apply(model: Model, key: Any) -> None:
    """A filter by tenant, or for what is deleted softly, holds for exports, too."""
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
            found = rows(
                statement.order_by(User.id) if key is None else statement,
                key=key,
                session=session,
            )
            assert [row.name for row in found] == ["ada", "bob"]
        other = aliased(User)
        joined = sa.select(other.name).join(User, User.id == other.id)
        assert {row.name for row in rows(joined, session=session)} == {"ada", "bob"}
        option = with_loader_criteria(User, User.name == "bob")
        found = rows(sa.select(User).options(option), key=key, session=session)
        assert [row.name for row in found] == ["bob"]


def test_handler_that_answers_is_heard(model: Model) -> None:
    """A cache that gives a Result of its own is what the rows come from."""
    with Session(model.outside) as session:
        frozen = session.execute(sa.text("SELECT 'cached' AS name")).freeze()
        event.listen(session, "do_orm_execute", lambda state: frozen())
        source = rows(sa.select(User.name), session=session)
        assert [row.name for row in source] == ["cached"]


@pytest.mark.parametrize(
    "option", [joinedload(User.notes), selectinload(User.notes), load_only(User.name)]
)
def test_option_for_entities_is_refused(option: Any) -> None:
    """Columns have no relationships; it is said where rows() is called."""
    with pytest.raises(TypeError, match="name the columns"):
        rows(sa.select(User).options(option))


def test_what_does_not_select_is_refused(session: Session) -> None:
    """Each mistake has a sentence that says what to give instead."""
    for wrong in (
        User,
        User.id,
        "SELECT 1",
        sa.insert(User),
        User.__table__,
        [1],
        None,
    ):
        with pytest.raises(TypeError, match=r"give it what selects"):
            rows(wrong)
    with pytest.raises(StreamError, match="give it the statement"):
        rows(session.execute(sa.select(User)))
    for batch in (0, -1, 1.5, True, "10"):
        with pytest.raises(ValueError, match="from 1 on"):
            rows(sa.select(User), batch=batch)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is no session"):
        rows(sa.select(User), session=session.bind)
    # PostgreSQL says it before, for it cannot open a cursor for that.
    with pytest.raises((StreamError, sa.exc.ProgrammingError)) as raised:
        list(rows(sa.text("DELETE FROM notes"), session=session))
    if session.get_bind().dialect.name == "sqlite":
        assert "returns no rows" in str(raised.value)


# Whose session.


def test_rows_outside_of_a_stream_need_a_session(
    make_app: MakeApp, model: Model
) -> None:
    """A script gives one; in a request it is the application's own."""
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


def test_without_any_session_it_says_so(make_app: MakeApp) -> None:
    """An application without a database has no session to run in."""

    class Body(TGController):
        @expose()
        def index(self) -> str:
            return str(list(rows(sa.select(User))))

    app = make_app(Body(), trace_errors__enable=False)
    with pytest.raises(StreamError, match=r"session=\.\.\."):
        get(app)


def test_statement_that_a_controller_returns_is_streamed(
    make_app: MakeApp, model: Model
) -> None:
    """A bare select() or Query is as rows() of it, decorated or in a Stream."""

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
    with pytest.raises(TypeError, match="a Stream is made of an iterable"):
        get(app, "/insert")
    assert_clean(model)


def test_header_comes_from_the_statement_where_there_is_no_row(
    make_app: MakeApp, model: Model
) -> None:
    """An export of nothing has the columns of nothing."""
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
@pytest.mark.parametrize("stop", ["exhausted", "broken off"])
def test_end_of_the_transaction_waits_for_the_cursor(
    make_app: MakeApp, model: Model, end: Callable[[], Any], stop: str
) -> None:
    """Refused while rows are read, in a sentence; welcome once they were."""
    seed(model, 50)

    def body() -> Iterator[str]:
        source = iter(rows(sa.select(User).order_by(User.id), batch=5))
        for row in source:
            with pytest.raises(StreamError, match=r"Use rows\(\.\.\., key=\.\.\.\)"):
                end()
            if stop == "broken off" and row.id == 20:
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
def test_automatic_commits_are_refused_where_reading_starts(
    make_app: MakeApp, model: Model, commit: Any
) -> None:
    """In the same words, and before the first chunk: an error page can be shown."""
    seed(model, 3)
    app = make_app(Root(names, commit=commit), model, trace_errors__enable=False)
    with pytest.raises(StreamError, match=r"Use rows\(\.\.\., key=\.\.\.\)") as raised:
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
def test_stream_ends_its_own_cursors(make_app: MakeApp, model: Model, end: str) -> None:
    """However it ends, an open cursor is no hindrance, and what was written counts."""
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
            raise ValueError("half-way")

    app = make_app(Root(body), model)
    call = Call(app, checked=False)
    assert next(call) == b"user1"
    if end in ("exhausted", "kept"):
        list(call)
    elif end.endswith("failed"):
        with pytest.raises(ValueError, match="half-way"):
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


def test_cursor_is_the_servers_own(make_app: MakeApp, model: Model) -> None:
    """No more than a batch is in memory: the rest stays in the database."""
    seed(model, 5000)

    def body() -> Iterator[str]:
        source = rows(sa.select(User), batch=100)
        for number, batch in enumerate(source.batches()):
            assert len(batch) <= 100
            if number == 0 and not model.sqlite:
                asked = sa.text("SELECT count(*) FROM pg_cursors")
                assert model.DBSession.execute(asked).scalar() == 1
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
@pytest.mark.parametrize("kind", ["cursor", "key", "yielded", "list", "source"])
def test_large_cells_make_neither_large_chunks_nor_large_batches(
    make_app: MakeApp, model: Model, kind: str, format: Any
) -> None:
    """Batches and chunks are bounded in bytes as well, once a large row was seen."""
    many = [(number, f"{number:0{CELL}}") for number in range(120)]
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
        found = rows(sa.select(WIDE), key=WIDE.c.id if kind == "key" else None)
        beside = {"yielded": (row for row in found), "list": many}
        return {**beside, "source": Source(many)}.get(kind, found)

    call = Call(make_app(Root(body, format=format), model))
    tracemalloc.start()
    try:
        sizes = [len(chunk) for chunk in call]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        call.close()
        WIDE.drop(model.outside)
    assert sum(sizes) > 120 * CELL
    assert max(sizes) < CELL + 1024 * 1024
    assert peak < 16 * 1024 * 1024


@pytest.mark.parametrize("kind", [tuple, dict, Blob, "text"], ids=str)
def test_large_items_of_a_list_are_not_one_chunk(make_app: MakeApp, kind: Any) -> None:
    """After many small ones, too; a chunk that grew all the same is parted."""
    large = "\0" * CELL  # six times as long in JSON
    texts = ["small"] * 300 + [large] * 40
    items: list[Any] = texts
    if kind is tuple:
        items = [(1, text) for text in texts]
    elif kind is dict:
        items = [{"a": {"b": [text]}} for text in texts]
    elif kind is Blob:
        items = list(map(Blob, texts))
    call = Call(make_app(Root(lambda: items, format=NDJSON)))
    chunks = list(call)
    call.close()
    assert max(map(len, chunks)) <= 1024 * 1024
    assert len(b"".join(chunks).splitlines()) == 340


def test_memory_does_not_grow_with_the_rows(session: Session, model: Model) -> None:
    """A hundred thousand rows, read to the end, never hold a megabyte."""
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


def test_reading_is_no_change(make_app: MakeApp, model: Model) -> None:
    """A stream that commits after a read still expires nothing, as before."""
    model.seed("ada")

    def body() -> Iterator[str]:
        ada = model.DBSession.query(User).one()
        yield from names(key=User.id)
        assert "name" in sa.inspect(ada).dict

    assert get(make_app(Root(body, commit="each"), model)).text == "ada"
    assert_clean(model)


def test_session_named_for_streams_is_read_in(
    make_app: MakeApp, make_model: MakeModel, url: str
) -> None:
    """A second scoped session of the application is the stream's own, as the first."""
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


def test_rows_of_sqlite_import_no_other_dialect() -> None:
    """To import PostgreSQL takes longer than a short export does."""
    command = [sys.executable, "-c", ON_SQLITE]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.stdout == "[]\n", ran.stderr
