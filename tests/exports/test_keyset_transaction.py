"""The transaction of ``rows(key=...)`` in a stream: when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import transaction
from sqlalchemy import event
from sqlalchemy.orm import Session

import tgstream
from tests.conftest import MakeApp, Root, assert_clean, pool
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import Call, get
from tgstream import rows


def free(model: Model) -> bool:
    return pool(model).checkedout() == 0 and model.idle_in_transaction() == 0


@pytest.mark.parametrize("zope", [True, False])
@pytest.mark.parametrize("commit", ["end", "each", "manual", 2])
def test_no_connection_is_held_between_batches(
    make_app: MakeApp, make_model: Any, url: str, commit: Any, zope: bool
) -> None:
    """While the client reads a batch, the connection is free."""
    model = make_model(url, zope=zope)
    model.seed(*(f"user{number}" for number in range(9)))
    expired: list[User] = []

    def body() -> Iterator[str]:
        first = model.DBSession.query(User).first()
        assert first is not None
        for row in rows(sa.select(User), key=User.id, batch=3):
            assert free(model)
            assert "name" in sa.inspect(first).dict
            yield row.name[-1]
        expired.extend([] if "name" in sa.inspect(first).dict else [first])

    app = make_app(Root(body, commit=commit), model)
    call = Call(app)
    for number in range(9):
        assert next(call) == str(number).encode()
        assert free(model)
    call.close()
    assert expired == []
    assert_clean(model)


WRITES: dict[str, Callable[[Session], Any]] = {
    "flushed": lambda session: session.bulk_save_objects([Note(text="new")]),
    "pending": lambda session: session.add(Note(text="new")),
    "orm": lambda session: session.execute(sa.insert(Note).values(text="new")),
    "connection": lambda session: session.connection().execute(
        sa.insert(Note).values(text="new")
    ),
    "driver": lambda session: session.connection().exec_driver_sql(
        "INSERT INTO notes (text) VALUES ('new')"
    ),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("when", ["before", "between"])
def test_reading_by_key_does_not_commit_changes(
    make_app: MakeApp, model: Model, write: Any, when: str
) -> None:
    """A stream that fails rolls back its changes from before or between batches."""
    model.seed(*(f"user{number}" for number in range(6)))

    def body() -> Iterator[str]:
        if when == "before":
            write(model.DBSession())
        for number, row in enumerate(rows(sa.select(User), key=User.id, batch=1)):
            if when == "between" and number == 2:
                write(model.DBSession())
            yield row.name
        raise ValueError("too late")

    app = make_app(Root(body), model)
    with pytest.raises(ValueError, match="too late"):
        get(app)
    assert model.texts() == []
    assert_clean(model)


@pytest.mark.parametrize("commit", [tgstream.commit, transaction.commit])
def test_commit_between_rows_keeps_the_rows(
    make_app: MakeApp, model: Model, commit: Callable[[], None]
) -> None:
    """With key= a generator can commit after each row."""
    model.seed(*(f"user{number}" for number in range(5)))

    def body() -> Iterator[str]:
        for row in rows(sa.select(User), key=User.id, batch=2):
            model.DBSession.add(Note(text=row.name))
            commit()
            assert free(model)
            yield row.name[-1]

    assert get(make_app(Root(body, commit="manual"), model)).text == "01234"
    assert model.texts() == [f"user{number}" for number in range(5)]
    assert_clean(model)


def test_doomed_transaction_stays_doomed_after_a_batch(
    make_app: MakeApp, model: Model
) -> None:
    """Reading by key does not make it commit."""
    model.seed("ada", "bob", "cyd")

    def body() -> Iterator[str]:
        transaction.doom()
        for row in rows(sa.select(User), key=User.id, batch=1):
            yield row.name
        model.DBSession.add(Note(text="doomed"))

    assert get(make_app(Root(body), model)).text == "adabobcyd"
    assert model.texts() == []
    assert_clean(model)


def test_transaction_of_another_session_stays_open(
    make_app: MakeApp, model: Model
) -> None:
    """The owner of a session that was passed ends its transaction."""
    model.seed("ada", "bob")

    def body() -> Iterator[str]:
        with Session(model.outside) as session:
            for row in rows(sa.select(User), key=User.id, batch=1, session=session):
                assert session.in_transaction()
                yield row.name

    assert get(make_app(Root(body), model)).text == "adabob"
    assert_clean(model)


def test_rows_added_meanwhile_are_included_if_they_sort_after_the_last_key(
    session: Session, model: Model
) -> None:
    """Each batch is a separate query. A deleted row does no harm."""
    model.seed("a", "c", "e", "g")
    source = iter(rows(sa.select(User.name), key=User.name, batch=2, session=session))
    actual = [next(source).name, next(source).name]
    session.rollback()
    with Session(model.outside) as other:
        other.execute(sa.delete(User).where(User.name == "c"))
        other.add_all([User(name="b"), User(name="f")])
        other.commit()
    assert [*actual, *(row.name for row in source)] == ["a", "c", "e", "f", "g"]


# A transaction that the generator began.


@pytest.fixture
def tenants(make_model: MakeModel, postgresql: str) -> Iterator[Model]:
    """A model with row-level security: only the users of the set tenant are visible."""
    admin = make_model(postgresql)
    admin.seed(*(f"a{number}" for number in range(40)))
    with admin.outside.begin() as connection:
        for statement in (
            "CREATE ROLE tenant",
            "GRANT ALL ON ALL TABLES IN SCHEMA public TO tenant",
            "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO tenant",
            "ALTER TABLE users ENABLE ROW LEVEL SECURITY",
            "CREATE POLICY own ON users USING (left(name, 1) = "
            "current_setting('app.tenant', true))",
        ):
            connection.exec_driver_sql(statement)
    yield make_model(f"{postgresql}&options=-c%20role%3Dtenant", create=False)
    with admin.outside.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE users DISABLE ROW LEVEL SECURITY")
        connection.exec_driver_sql("DROP POLICY own ON users")
        connection.exec_driver_sql("DROP OWNED BY tenant")
        connection.exec_driver_sql("DROP ROLE tenant")


SET_CONFIG = sa.select(sa.func.set_config("app.tenant", "a", True))
SET_LOCAL = "SET LOCAL app.tenant = 'a'"


def query_then_set(session: Any) -> None:
    session.query(Note).first()
    session.connection().exec_driver_sql(SET_LOCAL)


def query_then_set_config(session: Any) -> None:
    session.query(Note).first()
    session.execute(SET_CONFIG)


SETS: dict[str, Callable[[Any], Any]] = {
    "function": lambda session: session.execute(SET_CONFIG),
    "query": lambda session: session.query(sa.func.set_config("app.tenant", "a", True)),
    "text": lambda session: session.execute(sa.text(SET_LOCAL)),
    "connection": lambda session: session.connection().execute(SET_CONFIG),
    "driver": lambda session: session.connection().exec_driver_sql(SET_LOCAL),
    "later": query_then_set_config,
    "later, driver": query_then_set,
}


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("set_tenant", SETS.values(), ids=SETS)
def test_set_local_lasts_over_the_batches(
    make_app: MakeApp, tenants: Model, set_tenant: Callable[[Any], Any], when: str
) -> None:
    """Row-level security needs the setting in every batch."""

    def body() -> Iterator[str]:
        if when == "between":
            assert not list(rows(sa.select(User), key=User.id))
        result = set_tenant(tenants.DBSession)
        if isinstance(result, sa.orm.Query):
            result.all()
        for row in rows(sa.select(User), key=User.id, batch=5):
            yield f"{row.name} "

    names = get(make_app(Root(body), tenants)).text.split()
    assert names == [f"a{number}" for number in range(40)]
    assert_clean(tenants)


def test_set_local_in_after_begin_holds_no_connection(
    make_app: MakeApp, tenants: Model
) -> None:
    """The handler sets the tenant again in each transaction."""

    @event.listens_for(tenants.maker.class_, "after_begin")
    def set_tenant(session: Any, begun: Any, connection: Any) -> None:
        connection.execute(SET_CONFIG)

    def body() -> Iterator[str]:
        tenants.DBSession.query(Note).first()
        source = rows(sa.select(User), key=User.id, batch=5)
        for number, row in enumerate(source):
            assert number % 5 or free(tenants)
            tenants.DBSession.get(User, row.id)
            yield f"{row.name} "

    names = get(make_app(Root(body), tenants)).text.split()
    assert names == [f"a{number}" for number in range(40)]
    assert_clean(tenants)


LOCK = sa.func.pg_advisory_xact_lock(7)
LOCKS: dict[str, Callable[[Session], Any]] = {
    "advisory": lambda session: session.execute(sa.select(LOCK)),
    "rows": lambda session: session.scalars(sa.select(User).with_for_update()).all(),
    "Query": lambda session: session.query(User).with_for_update(read=True).all(),
    "hint": lambda session: session.execute(
        sa.select(User.id).suffix_with("FOR SHARE")
    ).all(),
}


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("lock", LOCKS.values(), ids=LOCKS)
def test_lock_lasts_over_the_batches(
    make_app: MakeApp,
    make_model: MakeModel,
    postgresql: str,
    lock: Callable[[Session], Any],
    when: str,
) -> None:
    """The generator keeps a lock until it commits."""
    model = make_model(postgresql)
    model.seed(*(f"user{number}" for number in range(6)))
    free_rows = "SELECT count(*) FROM (SELECT FROM users FOR UPDATE SKIP LOCKED) AS r"
    free_lock = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    held: list[bool] = []

    def body() -> Iterator[str]:
        if when == "before":
            lock(model.DBSession())
        for number, row in enumerate(rows(sa.select(User), key=User.id, batch=1)):
            if when == "between" and number == 1:
                lock(model.DBSession())
            if number > 1:
                ((rows_left,),), ((locks,),) = map(model.fetch, (free_rows, free_lock))
                held.append(rows_left == 0 or locks == 1)
            yield row.name
        tgstream.commit()
        assert model.fetch(free_rows) == [(6,)]

    get(make_app(Root(body), model))
    assert held == [True] * 4
    assert_clean(model)


@pytest.mark.parametrize("read_before", [True, False])
def test_transaction_that_the_generator_began_stays_open(
    make_app: MakeApp, make_model: MakeModel, url: str, read_before: bool
) -> None:
    """A batch in a block ``with DBSession.begin()`` does not end its transaction."""
    model = make_model(url, zope=False)
    model.seed(*(f"user{number}" for number in range(6)))

    def body() -> Iterator[str]:
        if read_before:
            assert len(list(rows(sa.select(User), key=User.id))) == 6
        with model.DBSession.begin():
            begun = model.DBSession().get_transaction()
            for row in rows(sa.select(User), key=User.id, batch=1):
                assert model.DBSession().get_transaction() is begun
                yield row.name
        assert free(model)

    assert get(make_app(Root(body), model)).text == "".join(model.names())
    assert_clean(model)


def test_connection_of_the_application_works_after_reading_by_key(
    make_app: MakeApp, model: Model
) -> None:
    """A session that is bound to a connection leaves no listener on it that fails."""
    model.seed("ada")

    def body() -> Iterator[str]:
        yield from (row.name for row in rows(sa.select(User), key=User.id))

    app = make_app(Root(body), model)
    with model.engine.connect() as connection:
        model.DBSession.configure(bind=connection)
        assert get(app).text == "ada"
        replaced = sa.select(sa.func.replace("a", "a", "b"))
        assert connection.execute(replaced).scalar() == "b"


@pytest.mark.parametrize("outer", ["rows", "yield_per"])
def test_reading_by_key_in_the_loop_of_a_cursor_keeps_the_cursor(
    make_app: MakeApp, model: Model, outer: str
) -> None:
    """A batch does not end the transaction of an open cursor in its session."""
    model.seed(*(f"user{number}" for number in range(50)))
    options = sa.select(User).execution_options(yield_per=5)

    def users() -> Iterator[Any]:
        if outer == "rows":
            return iter(rows(sa.select(User), batch=5))
        return iter(model.DBSession.scalars(options))

    def body() -> Iterator[str]:
        for user in users():
            for row in rows(sa.select(User.id), key=User.id, batch=20):
                if row.id == user.id:
                    yield user.name

    assert get(make_app(Root(body), model)).text == "".join(model.names())
    assert_clean(model)


def test_two_alternating_keysets_hold_no_connection(
    make_app: MakeApp, model: Model
) -> None:
    """Each batch ends the transaction that it began."""
    model.seed(*(f"user{number}" for number in range(9)))

    def body() -> Iterator[str]:
        up = rows(sa.select(User), key=User.id, batch=2)
        down = rows(sa.select(User), key=User.id.desc(), batch=3)
        for first, second in zip(up, down, strict=True):
            assert free(model)
            yield f"{first.name[-1]}{second.name[-1]} "

    assert get(make_app(Root(body), model)).text == "08 17 26 35 44 53 62 71 80 "
    assert_clean(model)


def test_reading_by_key_does_not_commit_a_function_that_writes(
    make_app: MakeApp, make_model: MakeModel, postgresql: str
) -> None:
    """A stream that fails rolls back the writes of a function in its select()."""
    model = make_model(postgresql)
    model.seed(*(f"user{number}" for number in range(6)))
    with model.outside.begin() as connection:
        connection.exec_driver_sql(
            "CREATE OR REPLACE FUNCTION mark(id int) RETURNS int LANGUAGE sql AS "
            "$$ INSERT INTO notes (text) VALUES (id) RETURNING id $$"
        )
    marked = sa.select(User.id, sa.func.mark(User.id).label("mark"))

    def body() -> Iterator[str]:
        for row in rows(marked, key=User.id, batch=2):
            yield str(row.id)
        raise ValueError("too late")

    with pytest.raises(ValueError, match="too late"):
        get(make_app(Root(body), model))
    assert model.texts() == []
    assert_clean(model)


def test_reading_by_key_does_not_commit_writes_past_sqlalchemy(
    make_app: MakeApp, model: Model
) -> None:
    """A write on the driver's cursor is rolled back with a stream that fails."""
    model.seed("ada", "bob", "eve", "zoe")

    def items() -> Iterator[str]:
        for number, row in enumerate(rows(sa.select(User.name), key=User.id, batch=1)):
            if number == 1:
                driver: Any = model.DBSession.connection().connection
                driver.cursor().execute("INSERT INTO users (name) VALUES ('new')")
            if number == 3:
                raise LookupError
            yield row.name

    with pytest.raises(LookupError):
        get(make_app(Root(items), model, trace_errors__enable=False))
    assert model.names() == ["ada", "bob", "eve", "zoe"]
    assert_clean(model)
