"""``flush()``, ``commit()`` and ``rollback()`` in a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import transaction
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, make_transient, selectinload

import tgstream
from tests.conftest import MakeApp, assert_clean, pool
from tests.database.conftest import (
    USERS,
    ModelRoot,
    assert_thread_works,
    defer_unique_names,
    find_user,
)
from tests.model import Model, Note, User
from tests.wsgi import get


def test_flush_gives_a_new_object_its_key(make_app: MakeApp, model: Model) -> None:
    """It stores nothing."""

    def body() -> Iterator[str]:
        ada = User(name="ada")
        model.DBSession.add(ada)
        tgstream.flush()
        yield str(ada.id)
        assert model.names() == []
        tgstream.rollback()

    assert get(make_app(ModelRoot(model, body), model)).text == "1"
    assert model.names() == []
    assert_clean(model)


Write = Callable[[Any], Any]


WRITES: dict[str, Write] = {
    "core": lambda session: session.execute(sa.insert(USERS), [{"name": "ada"}]),
    "text": lambda session: session.execute(
        sa.text("INSERT INTO users (name) VALUES ('ada')")
    ),
    "connection": lambda session: session.connection().execute(
        sa.insert(USERS), [{"name": "ada"}]
    ),
    "mappings": lambda session: session.bulk_insert_mappings(User, [{"name": "ada"}]),
    "objects": lambda session: session.bulk_save_objects([User(name="ada")]),
    "orm": lambda session: session.execute(sa.insert(User), [{"name": "ada"}]),
    "add": lambda session: session.add(User(name="ada")),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize(
    ("commit", "end"),
    [
        ("manual", tgstream.commit),
        ("manual", transaction.commit),
        ("end", lambda: None),
        ("each", lambda: None),
    ],
    ids=["commit()", "transaction.commit()", "end", "each"],
)
def test_commit_stores_every_kind_of_change(
    make_app: MakeApp, sqlite_model: Model, write: Write, commit: str, end: Any
) -> None:
    """Core statements are stored like ORM changes, by each kind of commit."""
    model = sqlite_model

    def body() -> Iterator[str]:
        write(model.DBSession())
        end()
        yield "one"

    get(make_app(ModelRoot(model, body, commit=commit), model))
    assert model.names() == ["ada"]
    assert_clean(model)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize(
    "undo",
    [tgstream.rollback, transaction.abort, transaction.doom],
    ids=["rollback()", "transaction.abort()", "transaction.doom()"],
)
def test_rollback_undoes_every_kind_of_change(
    make_app: MakeApp, sqlite_model: Model, write: Write, undo: Any
) -> None:
    """No change that was undone is in the next commit."""
    model = sqlite_model

    def body() -> Iterator[str]:
        write(model.DBSession())
        undo()
        yield "one"
        model.DBSession.add(Note(text="after"))

    get(make_app(ModelRoot(model, body, commit="each"), model))
    assert model.names() == []
    assert model.texts() == ["after"]
    assert_clean(model)


@pytest.mark.parametrize("commit", [tgstream.commit, transaction.commit])
def test_commit_keeps_objects_attached_and_refreshes_them(
    make_app: MakeApp, model: Model, commit: Callable[[], None]
) -> None:
    """After a commit an object is read again on its next use, lazy loads included."""

    def body() -> Iterator[str]:
        ada = User(name="ada", notes=[Note(text="one")])
        model.DBSession.add(ada)
        commit()
        assert model.names() == ["ada"]
        assert pool(model).checkedout() == 0
        with model.outside.begin() as outside:
            outside.execute(sa.text("UPDATE users SET name = 'countess'"))
        assert ada in model.DBSession
        yield ada.name + ada.notes[0].text
        ada.name = "lovelace"
        commit()
        yield ada.name

    app = make_app(ModelRoot(model, body, commit="manual"), model)
    assert get(app).text == "countessonelovelace"
    assert model.names() == ["lovelace"]
    assert_clean(model)


USES: dict[str, Callable[[Session, User], Any]] = {
    "attribute": lambda session, each: each.name,
    "query": lambda session, each: session.query(User).all(),
    "refresh": lambda session, each: session.refresh(each),
    "lazy load": lambda session, each: each.notes,
    "eager load": lambda session, each: session.scalars(
        sa.select(User).options(selectinload(User.notes))
    ).all(),
    "set": lambda session, each: setattr(each, "name", "set"),
    "bulk": lambda session, each: session.execute(sa.update(User).values(name="bulk")),
    "nothing": lambda session, each: None,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("commit", ["commit()", "each"])
def test_commit_expires_objects_that_were_used(
    make_app: MakeApp, sqlite_model: Model, use: Any, commit: str
) -> None:
    """After the next commit an object is read again, however it was used."""
    model = sqlite_model
    model.seed("ada")

    def body() -> Iterator[str]:
        ada = find_user(model, "ada")
        for text in ("first", "second", "third"):
            use(model.DBSession(), ada)
            model.DBSession.add(Note(text=text))
            if commit == "commit()":
                tgstream.commit()
            yield text
            with model.outside.begin() as outside:
                outside.execute(sa.text(f"UPDATE users SET name = 'outside {text}'"))
                outside.execute(sa.text("UPDATE notes SET user_id = 1"))
            assert ada.name == f"outside {text}"
            assert ada.notes[-1].text == text

    app = make_app(ModelRoot(model, body, commit="each"), model)
    assert get(app).text == "firstsecondthird"
    assert_clean(model)


@pytest.mark.parametrize("bulk", [False, True])
def test_commit_detaches_deleted_objects(
    make_app: MakeApp, model: Model, bulk: bool
) -> None:
    """A deleted object leaves the session, and can be added again."""
    model.seed("ada", "bob")

    def body() -> Iterator[str]:
        ada, bob = find_user(model, "ada"), find_user(model, "bob")
        if bulk:
            model.DBSession.execute(sa.delete(User).where(User.name == "ada"))
        else:
            model.DBSession.delete(ada)
        tgstream.commit()
        assert sa.inspect(ada).detached
        assert bob in model.DBSession
        yield bob.name
        make_transient(ada)
        model.DBSession.add(ada)

    assert get(make_app(ModelRoot(model, body), model)).text == "bob"
    assert sorted(model.names()) == ["ada", "bob"]
    assert_clean(model)


@pytest.mark.parametrize("commit", [tgstream.commit, transaction.commit])
@pytest.mark.parametrize("deferred", [False, True])
def test_commit_that_fails_does_not_end_the_stream(
    make_app: MakeApp, model: Model, commit: Callable[[], None], deferred: bool
) -> None:
    """The changes are undone and the error is raised. The next commit works."""
    if deferred:
        defer_unique_names(model)
    model.seed("ada")

    def body() -> Iterator[str]:
        kept = find_user(model, "ada")
        for _ in range(2):
            model.DBSession.add(User(name="lost"))
            model.DBSession.add(User(name="ada"))
            with pytest.raises(IntegrityError):
                commit()
            assert kept in model.DBSession
            yield kept.name
        model.DBSession.add(User(name="bob"))
        commit()
        yield "stored"
        model.DBSession.add(User(name="cyd"))

    app = make_app(ModelRoot(model, body), model)
    assert get(app).text == "adaadastored"
    assert model.names() == ["ada", "bob", "cyd"]
    assert_thread_works(app, model)


@pytest.mark.parametrize("abort", [tgstream.rollback, transaction.abort])
def test_rollback_keeps_objects_attached(
    make_app: MakeApp, model: Model, abort: Callable[[], None]
) -> None:
    """Uncommitted changes are undone, flushed or pending, and the stream goes on."""
    model.seed("ada")

    def body() -> Iterator[str]:
        ada = find_user(model, "ada")
        model.DBSession.add(User(name="flushed"))
        model.DBSession.flush()
        model.DBSession.add(User(name="pending"))
        ada.name = "changed"
        abort()
        yield ada.name
        model.DBSession.add(User(name="bob"))

    app = make_app(ModelRoot(model, body), model)
    assert get(app).text == "ada"
    assert model.names() == ["ada", "bob"]
    assert_clean(model)
