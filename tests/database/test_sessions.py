"""A stream's own session, and the calls that replace, remove and close it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import tg
import transaction
from sqlalchemy.orm import Session, scoped_session
from tg import expose
from zope.sqlalchemy import register

from tests.conftest import MakeApp, assert_clean, pool
from tests.database.conftest import ModelRoot, assert_thread_works, find_user
from tests.model import MakeModel, Model, User
from tests.wsgi import Call, get
from tgstream import Stream


def test_session_and_transaction_of_a_stream_are_its_own(
    make_app: MakeApp, model: Model
) -> None:
    """A stream adopts the session of its request, and shares it with no other."""
    seen: list[tuple[Session, Any]] = []

    def note() -> None:
        seen.append((model.DBSession(), transaction.manager.manager))

    def body() -> Iterator[str]:
        for _ in range(3):
            note()
            yield "item"

    class Noting(ModelRoot):
        def _before(self, *args: Any, **params: Any) -> None:
            note()

        def _after(self, *args: Any, **params: Any) -> None:
            note()

    app = make_app(Noting(model, body), model)
    first, second = Call(app), Call(app)
    assert first.read() == second.read() == b"itemitemitem"
    sessions = [session for session, _ in seen]
    assert len({id(session) for session in sessions}) == 4
    assert sessions[0] is sessions[1] is sessions[6] is sessions[7]
    assert sessions[3] is sessions[4] is sessions[8] is sessions[9]
    managers = [manager for _, manager in seen]
    assert len({id(manager) for manager in managers}) == 3
    assert all(managers[i] is transaction.manager.manager for i in (0, 2, 3, 5))
    assert_clean(model)


def test_session_is_not_made_without_use(
    make_app: MakeApp, make_model: MakeModel, url: str
) -> None:
    """A stream that does not use the database makes no session and no connection."""
    made: list[Session] = []

    class Counted(Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(self)
            super().__init__(*args, **options)

    model = make_model(url, class_=Counted)

    def body() -> Iterator[str]:
        yield "one"
        yield "two"

    for commit in ("end", "each", "manual", 2):
        assert (
            get(make_app(ModelRoot(model, body, commit=commit), model)).text == "onetwo"
        )
    assert made == []
    assert pool(model).checkedin() + pool(model).checkedout() == 0
    assert_clean(model)


def test_session_is_the_same_on_each_thread(make_app: MakeApp, model: Model) -> None:
    """A stream that is pulled on several threads writes in one session."""

    def body() -> Iterator[str]:
        for name in ("ada", "bob", "cyd"):
            model.DBSession.add(User(name=name))
            model.DBSession.flush()
            yield name

    call = Call(make_app(ModelRoot(model, body), model), checked=False)
    chunks: list[bytes] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: chunks.append(next(call)))
        thread.start()
        thread.join()
    assert model.names() == []
    assert list(call) == []
    call.close()
    assert chunks == [b"ada", b"bob", b"cyd"]
    assert model.names() == ["ada", "bob", "cyd"]
    assert_clean(model)


def test_session_is_made_with_the_arguments_of_the_call(
    make_app: MakeApp, model: Model
) -> None:
    """``DBSession(info=...)`` in a generator makes the stream's session with them."""

    def body() -> Iterator[str]:
        assert not model.DBSession.registry.has()
        session = model.DBSession(info={"stream": 1})
        assert model.DBSession() is session
        with pytest.raises(sa.exc.InvalidRequestError, match="already present"):
            model.DBSession(info={"stream": 2})
        session.add(User(name="ada"))
        yield "one"
        assert model.DBSession.info == {"stream": 1}
        session.add(User(name="bob"))

    call = Call(make_app(ModelRoot(model, body), model))
    next(call)
    assert not model.DBSession.registry.has()
    call.read()
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


def by_thread() -> Any:
    return threading.get_ident()


def by_request() -> Any:
    try:
        return id(tg.request.environ)
    except TypeError:  # outside of a request, where TG configures the session
        return None


@pytest.mark.parametrize("scopefunc", [by_thread, by_request])
def test_session_of_a_custom_scope_is_the_streams(
    make_app: MakeApp, make_model: MakeModel, url: str, scopefunc: Any
) -> None:
    """A ``scoped_session(scopefunc=...)`` gives a stream its own session, too."""
    model = make_model(url)
    model.DBSession = scoped_session(model.maker, scopefunc=scopefunc)
    register(model.DBSession)
    model.seed("ada")

    class Loading(ModelRoot):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            self.kept = find_user(model, "ada")
            return super().index()

    def body() -> Iterator[str]:
        yield root.kept.name
        model.DBSession.add(User(name="bob"))
        yield "two"

    root = Loading(model, body)
    app = make_app(root, model)
    assert get(app).text == "adatwo"
    assert get(app, "/names").text == "ada,bob"
    assert model.DBSession.registry.registry == {}
    assert_clean(model)


def test_removed_session_is_rolled_back(make_app: MakeApp, model: Model) -> None:
    """``DBSession.remove()`` undoes changes, and the next use makes a new session."""
    sessions: list[Session] = []

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="undone"))
        model.DBSession.flush()
        sessions.append(model.DBSession())
        model.DBSession.remove()
        assert pool(model).checkedout() == 0
        yield "one"
        model.DBSession.add(User(name="ada"))
        sessions.append(model.DBSession())
        yield "two"

    app = make_app(ModelRoot(model, body), model)
    assert get(app).text == "onetwo"
    assert sessions[0] is not sessions[1]
    assert model.names() == ["ada"]
    assert_thread_works(app, model)


@pytest.mark.parametrize("end", ["end", "each", "manual", "leave"])
def test_replaced_session_ends_with_the_stream(
    make_app: MakeApp, model: Model, end: str
) -> None:
    """After ``registry.set()`` both sessions commit, or neither. Both are closed."""
    sessions: list[Session] = []

    def body() -> Iterator[str]:
        sessions.extend([model.maker(), model.maker()])
        model.DBSession.registry.set(sessions[0])
        model.DBSession.add(User(name="ada"))
        model.DBSession.flush()
        model.DBSession.registry.set(sessions[1])
        model.DBSession.query(User).count()
        yield "one"
        yield "two"

    commit = "end" if end == "leave" else end
    call = Call(make_app(ModelRoot(model, body, commit=commit), model))
    next(call)
    if end == "leave":
        call.close()
    else:
        call.read()
    assert model.names() == (["ada"] if end in ("end", "each") else [])
    assert [session.in_transaction() for session in sessions] == [False, False]
    assert_clean(model)


def test_session_that_is_set_again_joins_once(
    make_app: MakeApp, make_model: MakeModel, postgresql: str
) -> None:
    """A generator sets another session for a while, and then the first again."""
    model = make_model(postgresql)

    def body() -> Iterator[str]:
        first = model.DBSession()
        first.add(User(name="first"))
        model.DBSession.registry.set(model.maker())
        model.DBSession.add(User(name="second"))
        model.DBSession.registry.set(first)
        model.DBSession.add(User(name="third"))
        yield "one"

    assert get(make_app(ModelRoot(model, body), model)).text == "one"
    assert sorted(model.names()) == ["first", "second", "third"]
    assert_clean(model)


def test_session_in_two_registries_is_removed_from_one(
    make_app: MakeApp, model: Model
) -> None:
    """``remove()`` closes it, and the other registry goes on with it."""
    other = scoped_session(model.maker)

    def body() -> Iterator[str]:
        other.registry.set(model.DBSession())
        other.add(User(name="ada"))
        yield "one"
        other.remove()
        model.DBSession.add(User(name="bob"))
        yield "two"

    root = ModelRoot(model, body, commit="each")
    assert get(make_app(root, model, tgstream__sessions=[other])).text == "onetwo"
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("how", ["close", "remove", "remove and use"])
@pytest.mark.parametrize("options", [{}, {"close_resets_only": False}], ids=str)
def test_session_may_be_closed_by_the_generator(
    make_app: MakeApp,
    make_model: MakeModel,
    url: str,
    options: dict[str, Any],
    how: str,
    begun: bool,
) -> None:
    """It may be closed for good, also in a transaction that it has joined."""
    model = make_model(url, **options)

    def body() -> Iterator[str]:
        if begun:
            transaction.get()
        model.DBSession.add(User(name="undone"))
        model.DBSession.flush()
        if how == "close":
            model.DBSession.close()
        else:
            model.DBSession.remove()
        if how == "remove and use":
            model.DBSession.add(User(name="ada"))
        yield "one"

    assert get(make_app(ModelRoot(model, body), model)).text == "one"
    assert model.names() == (["ada"] if how == "remove and use" else [])
    assert_clean(model)


def test_removed_session_can_read_again(make_app: MakeApp, model: Model) -> None:
    """SQLAlchemy lets a session begin again after ``remove()`` has closed it."""

    def body() -> Iterator[str]:
        session = model.DBSession()
        model.DBSession.remove()
        yield f"{session.scalars(sa.select(User.name)).all()}"
        session.close()

    assert get(make_app(ModelRoot(model, body), model)).text == "[]"
    assert_clean(model)


def test_session_of_the_application_serves_several_streams(
    make_app: MakeApp, model: Model
) -> None:
    """A session that the application keeps works in each stream that sets it."""

    def body() -> Iterator[str]:
        model.DBSession.registry.set(kept)
        yield f"{model.DBSession.scalars(sa.select(User.name)).all()}"

    app = make_app(ModelRoot(model, body), model)
    kept = model.maker()
    assert [get(app).text, get(app).text] == ["[]", "[]"]
    assert_clean(model)


def test_session_without_autobegin_may_be_idle(
    make_app: MakeApp, make_model: MakeModel, url: str
) -> None:
    """``Session(autobegin=False)`` without a transaction has nothing to commit."""
    model = make_model(url, zope=False, autobegin=False)

    def body() -> Iterator[str]:
        session = model.DBSession()
        transaction.get()
        yield "one"
        with session.begin():
            session.add(User(name="ada"))
        yield "two"

    assert get(make_app(ModelRoot(model, body, commit="each"), model)).text == "onetwo"
    assert model.names() == ["ada"]
    assert_clean(model)
