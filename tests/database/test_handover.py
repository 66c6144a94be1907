"""What a controller holds of its sessions goes into the stream, and nothing else."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import transaction
from sqlalchemy.orm import Session, make_transient
from tg import TGController, expose, redirect

from tests.conftest import MakeApp, assert_clean
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import Call, get
from tgstream import Report, Stream

Body = Callable[[], Any]


def root(model: Model, body: Body, items: Body = lambda: iter(["a", "b"])) -> Any:
    """A controller that does ``body`` and streams ``items``, or answers as plain TG."""

    class Root(TGController):
        @expose(content_type="text/plain")
        def stream(self) -> Stream:
            self.held = body()
            return Stream(items())

        @expose(content_type="text/plain")
        def plain(self) -> str:
            self.held = body()
            return "ab"

    return Root()


def ada(model: Model) -> User:
    return model.DBSession.query(User).filter_by(name="ada").one()


def seed(model: Model) -> None:
    with Session(model.outside) as session:
        session.add(User(name="ada", notes=[Note(text="secret")]))
        session.commit()


def masked(model: Model) -> Any:
    user = ada(model)
    note = user.notes[0]
    model.DBSession.expunge(note)
    note.text = "***"
    return user


def copied(model: Model) -> Any:
    user = ada(model)
    note = user.notes[0]
    model.DBSession.expunge(note)
    make_transient(note)
    del note.id
    return user


def previewed(model: Model) -> Any:
    user = ada(model)
    list(user.notes)
    return user, Note(text="preview", user=user)


@pytest.mark.filterwarnings("ignore:Object of type <Note> not in session")
@pytest.mark.parametrize("way", ["plain", "stream"])
@pytest.mark.parametrize("body", [masked, copied, previewed])
def test_object_that_was_left_out_is_not_stored(
    make_app: MakeApp, model: Model, body: Callable[[Model], Any], way: str
) -> None:
    """What was expunged, or never added, does not follow a relationship in."""
    seed(model)
    app = make_app(root(model, lambda: body(model)), model)
    assert get(app, f"/{way}").text == "ab"
    assert model.texts() == ["secret"]
    assert_clean(model)


def test_object_that_was_left_out_does_not_come_back(
    make_app: MakeApp, model: Model
) -> None:
    """Nor when the objects go back to the request, and TG commits a moment later."""

    def items() -> Iterator[str]:
        yield masked(model).name

    seed(model)

    class Root(TGController):
        @expose(content_type="text/plain")
        def short(self) -> Stream:
            return Stream(items(), chunk_size=1000)

    assert get(make_app(Root(), model), "/short").text == "ada"
    assert model.texts() == ["secret"]
    assert_clean(model)


@pytest.mark.parametrize("way", ["plain", "stream"])
def test_before_commit_hook_finds_its_objects(
    make_app: MakeApp, model: Model, way: str
) -> None:
    """A hook of the request's transaction may read and write what the body loaded."""

    def body() -> None:
        user = ada(model)

        def hook() -> None:
            user.name = f"{user.name} with {len(user.notes)}"
            model.DBSession.add(Note(text="audit", user=user))

        transaction.get().addBeforeCommitHook(hook)

    def items() -> Iterator[str]:
        yield "a"
        assert model.names() == ["ada with 1"]
        yield "b"

    seed(model)
    app = make_app(root(model, body, items), model)
    assert get(app, f"/{way}").text == "ab"
    assert model.names() == ["ada with 1"]
    assert model.texts() == ["secret", "audit"]
    assert_clean(model)


def test_session_that_is_closed_for_good_gives_way(
    make_app: MakeApp, make_model: MakeModel, url: str
) -> None:
    """With ``close_resets_only=False`` the stream has a new one, with the objects."""
    model = make_model(url, close_resets_only=False)
    held: list[User] = []

    def items() -> Iterator[str]:
        yield f"{held[0].name} {len(held[0].notes)}"

    seed(model)
    app = make_app(root(model, lambda: held.append(ada(model)), items), model)
    assert get(app, "/stream").text == "ada 1"
    assert_clean(model)


def test_session_of_a_stream_needs_no_collector(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """With the stream goes its session, and what is in it."""
    model = sqlite_model
    sessions: list[weakref.ref[Session]] = []

    def body() -> None:
        ada(model)
        sessions.append(weakref.ref(model.DBSession()))

    seed(model)
    app = make_app(root(model, body), model)
    get(app, "/stream")
    gc.collect()
    gc.disable()
    try:
        get(app, "/stream")
        assert [session() for session in sessions] == [None, None]
    finally:
        gc.enable()


def test_explicit_manager_is_served(make_app: MakeApp, model: Model) -> None:
    """With ``manager.explicit`` on there is a transaction where TG ends it."""

    def body() -> None:
        model.DBSession.add(User(name="ada"))

    app = make_app(root(model, body), model)
    transaction.manager.explicit = True
    try:
        assert get(app, "/stream").text == "ab"
    finally:
        transaction.manager.explicit = False
    assert model.names() == ["ada"]


def test_request_that_fails_before_its_stream_tells_nothing_of_it(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """A stream whose request could not be committed never was."""
    closed = []

    class Items:
        def __iter__(self) -> Iterator[str]:
            raise AssertionError("it never began")

        def close(self) -> None:
            closed.append(True)

    def body() -> None:
        model.DBSession.add_all([User(name="ada"), User(name="ada")])

    app = make_app(root(model, body, Items), model, debug=False)
    assert get(app, "/stream").status.startswith("500")
    assert (reports, closed) == ([], [True])
    assert_clean(model)


@pytest.mark.parametrize("end", ["fail", "redirect", "complete", "go on"])
def test_second_session_is_not_left_on_the_thread(
    make_app: MakeApp, make_model: MakeModel, tmp_path: Any, end: str
) -> None:
    """TG removes one session at the end; tgstream all that it was told of."""
    model = make_model(f"sqlite:///{tmp_path}/first.db")
    other = make_model(f"sqlite:///{tmp_path}/second.db")
    other.init_model(other.outside)
    seed(other)

    def items() -> Iterator[str]:
        if end == "fail":
            raise ValueError("failed")
        if end == "redirect":
            redirect("/")
        yield ada(other).name
        if end == "go on":
            yield "b"

    class Root(TGController):
        @expose(content_type="text/plain")
        def stream(self) -> Stream:
            ada(other)
            return Stream(items())

        def _after(self, *remainder: Any, **params: Any) -> None:
            ada(other)

    app = make_app(Root(), model, tgstream__sessions=[other.DBSession])
    get(app, "/stream")
    assert not other.DBSession.registry.has()
    assert_clean(model)


def test_shield_counts_the_removals(make_app: MakeApp, sqlite_model: Model) -> None:
    """Two bodies dropped at once in a request take their removals, and no session."""
    model = sqlite_model
    calls: list[Call] = []

    class Second:
        """Dropped with the first body, while that one is being closed."""

        def __del__(self) -> None:
            calls.pop().drop()

    def items() -> Iterator[str]:
        second = Second()
        yield "a"
        yield str(second)

    class Root(TGController):
        @expose(content_type="text/plain")
        def stream(self) -> Stream:
            return Stream(items())

        @expose(content_type="text/plain")
        def plain(self) -> Stream:
            return Stream(iter(["a", "b"]))

        @expose(content_type="text/plain")
        def drop(self) -> str:
            session = model.DBSession()
            session.add(User(name="ada"))
            calls.pop().drop()
            return str(model.DBSession() is session)

    app = make_app(Root(), model)
    for path in ("/plain", "/stream"):
        calls.append(Call(app, path, checked=False))
        next(calls[-1])
    assert get(app, "/drop").text == "True"
    assert model.names() == ["ada"]
    assert_clean(model)
