"""The objects and sessions of a request go into its stream, and may return."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import tg
import transaction
from sqlalchemy.orm import make_transient
from tg import TGController, expose

import tgstream
from tests.conftest import MakeApp, assert_clean
from tests.database.conftest import (
    Lines,
    ModelRoot,
    assert_thread_works,
    find_user,
    record_statements,
    seed_note,
    stream_or_plain,
)
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import get
from tgstream import Report, Stream

# Objects of the request.


class Metadata:
    """The ``authmetadata`` by which TG finds its users."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def get_user(self, identity: Any, userid: str) -> User:
        return find_user(self.model, userid)

    def get_groups(self, identity: Any, userid: str) -> list[str]:
        return []

    get_permissions = get_groups


def test_objects_of_the_request_keep_their_values(
    make_app: MakeApp, model: Model
) -> None:
    """The identity's user, and objects that ``_before`` and the controller loaded."""
    model.seed("ada", "bob", "cyd")
    kept: dict[str, User] = {}
    selects: list[str] = []

    class Loading(ModelRoot):
        def _before(self, *args: Any, **params: Any) -> None:
            kept["before"] = find_user(model, "bob")

        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept["body"] = find_user(model, "cyd")
            return super().index()

    def body() -> Iterator[str]:
        assert model.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        with record_statements(model) as seen:
            yield tg.request.identity["user"].name
            yield kept["before"].name + kept["body"].name
        selects.extend(seen)
        assert kept["body"] in model.DBSession
        kept["body"].notes.append(Note(text="lazy, and new"))
        yield str(len(tg.request.identity["user"].notes))

    root = Loading(model, body)
    app = make_app(root, model, sa_auth__authmetadata=Metadata(model))
    identity = {"repoze.who.userid": "ada"}
    call = get(app, "/", **{"repoze.who.identity": identity})
    assert call.text == "adabobcyd0"
    assert selects == []
    assert model.texts() == ["lazy, and new"]
    assert_clean(model)


def test_objects_of_the_request_cost_no_select(make_app: MakeApp, model: Model) -> None:
    """A stream reads 3,000 objects of its request without a SELECT."""
    model.seed(*(f"user{number}" for number in range(3000)))
    users: list[User] = []

    class Loading(ModelRoot):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            model.DBSession.add(Note(text="so that the request commits"))
            users.extend(model.DBSession.query(User))
            return super().index()

    def body() -> Iterator[str]:
        for each in users:
            yield each.name + "\n"

    app = make_app(Loading(model, body), model)
    with record_statements(model) as seen:
        assert len(get(app).text.splitlines()) == 3000
    assert [line for line in seen if line.startswith("SELECT")] == seen[1:]
    assert len(seen) == 2
    assert model.texts() == ["so that the request commits"]
    assert_clean(model)


def test_object_that_the_request_added_is_committed(
    make_app: MakeApp, model: Model
) -> None:
    """The stream can change it."""
    added = User(name="ada")

    class Adding(ModelRoot):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            model.DBSession.add(added)
            return super().index()

    def body() -> Iterator[str]:
        assert model.names() == ["ada"]
        yield str(added.id)
        added.name = "lovelace"
        yield added.name

    assert get(make_app(Adding(model, body), model)).text == "1lovelace"
    assert model.names() == ["lovelace"]
    assert_clean(model)


@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize("commit", ["end", "each"])
def test_objects_of_the_request_are_expired_by_a_rollback(
    make_app: MakeApp, model: Model, touched: bool, commit: str
) -> None:
    """After ``rollback()`` an object is read again on its next use."""
    model.seed("ada")
    kept: list[User] = []

    class Loading(ModelRoot):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept.append(find_user(model, "ada"))
            return super().index()

    def body() -> Iterator[str]:
        yield kept[0].name
        with model.outside.begin() as outside:
            outside.execute(sa.text("UPDATE users SET name = 'countess'"))
        yield kept[0].name
        if touched:
            kept[0].name = "undone"
        tgstream.rollback()
        yield kept[0].name

    app = make_app(Loading(model, body, commit=commit), model)
    assert get(app).text == "adaadacountess"
    assert model.names() == ["countess"]
    assert_clean(model)


@pytest.mark.parametrize("chunks", [0, 1])
def test_objects_return_to_the_request_for_after(
    make_app: MakeApp, model: Model, chunks: int
) -> None:
    """If the stream ends in its first pull, ``_after`` finds them in its session."""
    model.seed("ada")
    kept: list[User] = []

    class Loading(ModelRoot):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept.append(find_user(model, "ada"))
            return super().index()

        def _after(self, *args: Any, **params: Any) -> None:
            assert kept[0] in model.DBSession
            kept[0].name += "!"

    def body() -> Iterator[str]:
        kept[0].notes.append(Note(text="new"))
        yield from ["one"][:chunks]

    root = Loading(model, body, format=Lines, chunk_size=9)
    assert get(make_app(root, model)).text == "one" * chunks
    assert model.names() == ["ada!"]
    assert model.texts() == ["new"]
    assert_clean(model)


@pytest.mark.parametrize("read", [False, True])
def test_objects_return_to_the_request_for_the_error_page(
    make_app: MakeApp, model: Model, read: bool
) -> None:
    """If the first pull raises, the error page reads them, as without a stream."""
    model.seed("ada")
    kept: list[User] = []

    class Error(TGController):
        @expose(content_type="text/plain")
        def document(self, *args: Any, **params: Any) -> str:
            return "sorry, " + kept[0].name

    class Loading(ModelRoot):
        error = Error()

        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept.append(find_user(model, "ada"))
            return super().index()

        @expose(content_type="text/plain")
        def plain(self) -> None:
            kept.append(find_user(model, "ada"))
            raise ValueError("no")

    def body() -> Iterator[str]:
        if read:
            model.DBSession.query(Note).all()
        raise ValueError("no")
        yield ""

    app = make_app(
        Loading(model, body),
        model,
        errorpage__enabled=True,
        errorpage__status_codes=[500],
        errorpage__content_types=[],
    )
    for path in ("/plain", "/"):
        kept.clear()
        call = get(app, path)
        assert call.status.startswith("500")
        assert call.text == "sorry, ada"
    assert_thread_works(app, model)


def test_uncommitted_changes_do_not_return_to_the_request(
    make_app: MakeApp, model: Model
) -> None:
    """The request never commits a change that the stream did not commit."""
    model.seed("ada", "bob")
    kept: list[User] = []

    class Loading(ModelRoot):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept.extend(model.DBSession.query(User).order_by(User.id))
            return super().index()

    def body() -> Iterator[str]:
        kept[0].name = "flushed"
        model.DBSession.flush()
        kept[1].name = "pending"
        model.DBSession.add(User(name="new"))
        tg.redirect("/elsewhere")
        yield ""

    app = make_app(Loading(model, body, commit="manual"), model)
    assert get(app).status.startswith("302")
    assert model.names() == ["ada", "bob"]
    assert_thread_works(app, model)


# Objects outside of the session.


def masked(model: Model) -> Any:
    user = find_user(model, "ada")
    note = user.notes[0]
    model.DBSession.expunge(note)
    note.text = "***"
    return user


def copied(model: Model) -> Any:
    user = find_user(model, "ada")
    note = user.notes[0]
    model.DBSession.expunge(note)
    make_transient(note)
    del note.id
    return user


def previewed(model: Model) -> Any:
    user = find_user(model, "ada")
    list(user.notes)
    return user, Note(text="preview", user=user)


@pytest.mark.filterwarnings("ignore:Object of type <Note> not in session")
@pytest.mark.parametrize("way", ["plain", "stream"])
@pytest.mark.parametrize("body", [masked, copied, previewed])
def test_object_outside_the_session_is_not_stored(
    make_app: MakeApp, model: Model, body: Callable[[Model], Any], way: str
) -> None:
    """An expunged object, or one that was never added, is not added by relationship."""
    seed_note(model)
    app = make_app(stream_or_plain(model, lambda: body(model)), model)
    assert get(app, f"/{way}").text == "ab"
    assert model.texts() == ["secret"]
    assert_clean(model)


def test_object_outside_the_session_does_not_return(
    make_app: MakeApp, model: Model
) -> None:
    """It is not added when the objects return to the request, and TG commits."""

    def items() -> Iterator[str]:
        yield masked(model).name

    seed_note(model)

    class Root(TGController):
        @expose(content_type="text/plain")
        def short(self) -> Stream:
            return Stream(items(), chunk_size=1000)

    assert get(make_app(Root(), model), "/short").text == "ada"
    assert model.texts() == ["secret"]
    assert_clean(model)


# Transactions and sessions.


@pytest.mark.parametrize("way", ["plain", "stream"])
def test_before_commit_hook_finds_its_objects(
    make_app: MakeApp, model: Model, way: str
) -> None:
    """A hook of the request's transaction may read and write the loaded objects."""

    def body() -> None:
        user = find_user(model, "ada")

        def hook() -> None:
            user.name = f"{user.name} with {len(user.notes)}"
            model.DBSession.add(Note(text="audit", user=user))

        transaction.get().addBeforeCommitHook(hook)

    def items() -> Iterator[str]:
        yield "a"
        assert model.names() == ["ada with 1"]
        yield "b"

    seed_note(model)
    app = make_app(stream_or_plain(model, body, items), model)
    assert get(app, f"/{way}").text == "ab"
    assert model.names() == ["ada with 1"]
    assert model.texts() == ["secret", "audit"]
    assert_clean(model)


def test_session_that_is_closed_for_good_is_replaced(
    make_app: MakeApp, make_model: MakeModel, url: str
) -> None:
    """With ``close_resets_only=False`` the stream gets a new session with them."""
    model = make_model(url, close_resets_only=False)
    held: list[User] = []

    def items() -> Iterator[str]:
        yield f"{held[0].name} {len(held[0].notes)}"

    seed_note(model)
    app = make_app(
        stream_or_plain(model, lambda: held.append(find_user(model, "ada")), items),
        model,
    )
    assert get(app, "/stream").text == "ada 1"
    assert_clean(model)


def test_explicit_manager_is_supported(make_app: MakeApp, model: Model) -> None:
    """With ``manager.explicit`` on there is a transaction for TG to end."""

    def body() -> None:
        model.DBSession.add(User(name="ada"))

    app = make_app(stream_or_plain(model, body), model)
    transaction.manager.explicit = True
    try:
        assert get(app, "/stream").text == "ab"
    finally:
        transaction.manager.explicit = False
    assert model.names() == ["ada"]


def test_request_that_fails_before_its_stream_has_no_report(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """A stream does not start if its request cannot be committed."""
    closed = []

    class Items:
        def __iter__(self) -> Iterator[str]:
            raise AssertionError("it never began")

        def close(self) -> None:
            closed.append(True)

    def body() -> None:
        model.DBSession.add_all([User(name="ada"), User(name="ada")])

    app = make_app(stream_or_plain(model, body, Items), model, debug=False)
    assert get(app, "/stream").status.startswith("500")
    assert (reports, closed) == ([], [True])
    assert_clean(model)
