"""Automatic commits: ``commit='end'``, ``'each'``, and a number of items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import transaction
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from tg import TGController, expose

import tgstream
from tests.conftest import MakeApp, assert_clean
from tests.database.conftest import (
    USERS,
    Lines,
    ModelRoot,
    assert_thread_works,
    count_users_after_chunks,
    defer_unique_names,
    find_user,
    record_statements,
)
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import Call, get
from tgstream import Report, StreamError, stream

# At the end.


def test_commit_comes_before_the_end_of_the_format(
    make_app: MakeApp, model: Model
) -> None:
    """All changes are stored before the last byte is sent."""
    seen: list[list[str]] = []

    class Format:
        content_type = "text/plain"

        def encode(self, items: Any) -> Iterator[str]:
            yield from items
            seen.append(model.names())
            yield "."

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        yield "one"
        assert model.names() == []

    app = make_app(ModelRoot(model, body, format=Format(), chunk_size=0), model)
    assert get(app).text == "one."
    assert seen == [["ada"]]
    assert_clean(model)


def test_commit_of_a_doomed_transaction_is_an_abort(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """A stream that dooms its transaction completes, and stores nothing."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        yield "one"
        transaction.doom()
        yield "two"

    app = make_app(ModelRoot(model, body), model)
    assert get(app).text == "onetwo"
    assert model.names() == []
    assert [report.reason for report in reports] == ["completed"]
    assert_thread_works(app, model)


def test_commit_that_fails_at_the_end_aborts_the_transfer(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """A unique violation in the last flush or commit is raised in the last pull."""
    defer_unique_names(model)
    model.seed("ada")

    def body() -> Iterator[str]:
        yield "one"
        model.DBSession.add(User(name="ada"))
        yield "two"

    app = make_app(ModelRoot(model, body), model)
    call = Call(app)
    assert [next(call), next(call)] == [b"one", b"two"]
    with pytest.raises(IntegrityError):
        next(call)
    call.close()
    assert model.names() == ["ada"]
    assert [report.reason for report in reports] == ["failed"]
    assert_thread_works(app, model)


def test_commit_that_fails_in_the_first_pull_is_an_ordinary_error(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """A stream that ends within its first pull and cannot commit is a 500."""
    defer_unique_names(model)
    model.seed("ada")

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        yield from ()

    app = make_app(ModelRoot(model, body), model)
    call = get(app)
    assert call.status.startswith("500")
    assert "IntegrityError" in call.errors.getvalue()
    assert model.names() == ["ada"]
    assert [report.reason for report in reports] == ["failed"]
    assert_thread_works(app, model)


def test_changes_of_a_stream_that_raises_are_rolled_back(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """Changes that ``commit()`` has stored stay."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        tgstream.commit()
        model.DBSession.add(User(name="bob"))
        model.DBSession.flush()
        yield "one"
        raise ValueError("no")

    app = make_app(ModelRoot(model, body), model)
    with pytest.raises(ValueError, match="no"):
        get(app)
    assert model.names() == ["ada"]
    assert [(report.reason, report.commits) for report in reports] == [("failed", 1)]
    assert_thread_works(app, model)


@pytest.mark.parametrize("leave", [Call.close, Call.drop])
@pytest.mark.parametrize("pulls", [0, 1, 2])
def test_changes_are_rolled_back_when_the_client_disconnects(
    make_app: MakeApp,
    model: Model,
    reports: list[Report],
    leave: Callable[[Call], None],
    pulls: int,
) -> None:
    """Closed or dropped, only the changes that ``commit()`` has stored stay."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        tgstream.commit()
        model.DBSession.add(User(name="bob"))
        model.DBSession.flush()
        yield "one"
        yield "two"
        yield "three"

    app = make_app(ModelRoot(model, body), model)
    call = Call(app, checked=False)
    for _ in range(pulls):
        next(call)
    leave(call)
    assert model.names() == ["ada"]
    assert [report.reason for report in reports] == ["disconnected"]
    assert_thread_works(app, model)


@pytest.mark.parametrize("commit", ["end", "each", 3])
def test_commit_follows_a_format_that_stops_early(
    make_app: MakeApp, model: Model, commit: Any
) -> None:
    """A format may end before its items do. The changes so far are committed."""

    class First(Lines):
        def encode(self, items: Iterable[Any]) -> Iterator[str]:
            for number, item in enumerate(items, 1):
                yield f"{item}\n"
                if number == 2:
                    return

    def body() -> Iterator[str]:
        try:
            for name in ("ada", "bob", "carl"):
                model.DBSession.add(User(name=name))
                yield name
        finally:
            model.DBSession.add(User(name="finally"))

    app = make_app(ModelRoot(model, body, format=First, commit=commit), model)
    assert get(app).text == "ada\nbob\n"
    assert model.names() == ["ada", "bob", "finally"]
    assert_clean(model)


# After items.


@pytest.mark.parametrize("format", [None, Lines])
def test_commit_each_comes_before_the_chunk_is_sent(
    make_app: MakeApp, model: Model, format: Any, reports: list[Report]
) -> None:
    """A client gets only items that are stored. No connection is held meanwhile."""

    def body() -> Iterator[str]:
        for name in ("ada", "bob", "cyd"):
            model.DBSession.add(User(name=name))
            yield name

    root = ModelRoot(model, body, commit="each", format=format, chunk_size=0)
    assert count_users_after_chunks(Call(make_app(root, model)), model) == [1, 2, 3]
    assert [report.commits for report in reports] == [3]
    assert_clean(model)


def test_commit_each_returns_the_connection_after_a_read(
    make_app: MakeApp, model: Model
) -> None:
    """A stream that only reads returns its connection after every item, too."""
    model.seed("ada", "bob", "cyd")

    def body() -> Iterator[str]:
        for name in ("ada", "bob", "cyd"):
            yield find_user(model, name).name

    call = Call(make_app(ModelRoot(model, body, commit="each"), model))
    assert count_users_after_chunks(call, model) == [3, 3, 3]
    assert_clean(model)


def test_commit_number_comes_after_so_many_items(
    make_app: MakeApp, model: Model
) -> None:
    """With ``commit=2`` every second item commits, and the end of the stream."""

    def body() -> Iterator[str]:
        for number in range(5):
            model.DBSession.add(User(name=f"user{number}"))
            yield "item"

    call = Call(make_app(ModelRoot(model, body, commit=2), model))
    assert [len(model.names()) for _ in call] == [0, 2, 2, 4, 4]
    call.close()
    assert len(model.names()) == 5
    assert_clean(model)


def test_commit_number_comes_before_a_buffered_chunk_is_sent(
    make_app: MakeApp, model: Model
) -> None:
    """All items in a chunk are stored, but for the last chunk."""

    def body() -> Iterator[str]:
        for number in range(6):
            model.DBSession.add(User(name=f"user{number}"))
            yield "x" * 10

    root = ModelRoot(model, body, format=Lines, commit=3, chunk_size=30)
    call = Call(make_app(root, model))
    assert count_users_after_chunks(call, model) == [3, 6]
    assert_clean(model)


def test_commit_option_of_the_decorator_is_the_same(
    make_app: MakeApp, model: Model
) -> None:
    """``@stream(commit='each')`` commits like ``Stream(commit='each')``."""

    class Decorated(TGController):
        @expose(content_type="text/plain")
        @stream(commit="each")
        def index(self) -> Iterator[str]:
            for name in ("ada", "bob"):
                model.DBSession.add(User(name=name))
                yield name

    call = Call(make_app(Decorated(), model))
    assert count_users_after_chunks(call, model) == [1, 2]
    assert_clean(model)


def test_commit_each_does_nothing_for_an_unused_session(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """A session that was made and not used has nothing to commit."""

    def body() -> Iterator[str]:
        for _ in range(3):
            assert model.DBSession() is not None
            yield "item"

    assert (
        get(make_app(ModelRoot(model, body, commit="each"), model)).text == "item" * 3
    )
    assert [report.commits for report in reports] == [0]
    assert_clean(model)


def test_commit_each_of_a_doomed_transaction_aborts_one_item(
    make_app: MakeApp, model: Model
) -> None:
    """The next item begins a transaction of its own."""

    def body() -> Iterator[str]:
        for name in ("ada", "bob", "cyd"):
            model.DBSession.add(User(name=name))
            if name == "bob":
                transaction.doom()
            yield name

    call = Call(make_app(ModelRoot(model, body, commit="each"), model))
    assert count_users_after_chunks(call, model) == [1, 1, 2]
    assert model.names() == ["ada", "cyd"]
    assert_clean(model)


def test_commit_each_that_fails_sends_no_item(make_app: MakeApp, model: Model) -> None:
    """An item that cannot be stored is not sent, and the transfer is aborted."""
    defer_unique_names(model)

    def body() -> Iterator[str]:
        for name in ("ada", "ada"):
            model.DBSession.add(User(name=name))
            yield name

    app = make_app(ModelRoot(model, body, commit="each"), model)
    call = Call(app)
    assert next(call) == b"ada"
    with pytest.raises(IntegrityError):
        next(call)
    call.close()
    assert model.names() == ["ada"]
    assert_thread_works(app, model)


@pytest.mark.parametrize("commit", ["each", "end"])
def test_commit_that_closes_a_cursor_is_explained(
    make_app: MakeApp, postgresql: str, make_model: MakeModel, commit: str
) -> None:
    """The error of the driver becomes a StreamError that names the controller."""
    model = make_model(postgresql)
    model.seed(*(f"user{number}" for number in range(10)))

    def body() -> Iterator[str]:
        for each in model.DBSession.query(User).yield_per(2):
            yield each.name
            if commit == "end":
                tgstream.commit()

    app = make_app(ModelRoot(model, body, commit=commit), model)
    with pytest.raises(StreamError, match="the cursor") as raised:
        get(app)
    assert "Root.index" in str(raised.value)
    assert isinstance(raised.value.__cause__, sa.exc.SQLAlchemyError)
    assert_thread_works(app, model)


# Objects that are expired.


def test_commit_each_without_a_change_expires_nothing(
    make_app: MakeApp, model: Model
) -> None:
    """Objects keep their values over the commits of a stream that only reads."""
    model.seed(*(f"user{number}" for number in range(50)))

    def body() -> Iterator[str]:
        users = model.DBSession.query(User).order_by(User.id).all()
        for each in users:
            yield each.name
            for other in users:
                assert other.name

    with_statements = make_app(ModelRoot(model, body, commit="each"), model)
    with record_statements(model) as seen:
        get(with_statements)
    assert len(seen) == 1
    assert_clean(model)


@pytest.mark.parametrize("kind", ["text", "core", "orm"])
def test_commit_each_after_a_core_statement_expires_objects(
    make_app: MakeApp, model: Model, kind: str
) -> None:
    """The session does not know which objects the statement has changed."""
    model.seed("ada")
    update: Any = {
        "text": sa.text("UPDATE users SET name = name || '!'"),
        "core": sa.update(USERS).values(name=USERS.c.name + "!"),
        "orm": sa.update(User).values(name=User.name + "!"),
    }[kind]

    def body() -> Iterator[str]:
        ada = find_user(model, "ada")
        for number in range(3):
            assert ada.name == "ada" + "!" * number
            model.DBSession.execute(
                update, execution_options={"synchronize_session": False}
            )
            yield "item"

    app = make_app(ModelRoot(model, body, commit="each"), model)
    assert get(app).text == "item" * 3
    assert model.names() == ["ada!!!"]
    assert_clean(model)


class CountingSession(Session):
    """A session that counts the objects that it expires."""

    expired = 0

    def expire(self, *args: Any, **options: Any) -> None:
        self.expired += 1
        super().expire(*args, **options)


@pytest.mark.parametrize("held", [10, 200])
def test_commit_each_expires_only_objects_that_were_used(
    make_app: MakeApp, make_model: MakeModel, url: str, held: int
) -> None:
    """Its cost does not grow with the number of objects in the session."""
    model = make_model(url, class_=CountingSession)
    model.seed(*(f"user{number}" for number in range(held)))
    expired: list[int] = []

    def body() -> Iterator[str]:
        users = model.DBSession.query(User).order_by(User.id).limit(held).all()
        for each in users[:5]:
            model.DBSession.add(Note(text=each.name))
            yield each.name
            expired.append(model.DBSession().expired)  # type: ignore[attr-defined]

    app = make_app(ModelRoot(model, body, commit="each"), model)
    with record_statements(model) as seen:
        get(app)
    selects = [line for line in seen if line.startswith("SELECT")]
    assert len(selects) == 1 + 4
    assert expired[-1] - expired[0] <= 2 * 4
    assert len(model.texts()) == 5
    assert_clean(model)
