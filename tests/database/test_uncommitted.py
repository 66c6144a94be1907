"""``commit='manual'``, and the warning about changes that are not committed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

import tgstream
from tests.conftest import MakeApp, assert_clean
from tests.database.conftest import ModelRoot, assert_thread_works, find_user
from tests.model import MakeModel, Model, Note, User
from tests.wsgi import get
from tgstream import Channel


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings and errors in the log."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING
    ]


def test_uncommitted_changes_are_rolled_back_with_a_warning(
    make_app: MakeApp, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """Only commit() stores. The warning counts flushed and pending objects alike."""
    model.seed("ada", "bob", "cyd")

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="stored"))
        tgstream.commit()
        find_user(model, "ada").name = "flushed"
        model.DBSession.add(User(name="new, flushed"))
        model.DBSession.flush()
        yield "one"
        model.DBSession.add_all([User(name="new"), User(name="newer")])
        with model.DBSession.no_autoflush:
            model.DBSession.delete(find_user(model, "bob"))

    app = make_app(ModelRoot(model, body, commit="manual"), model)
    assert get(app).text == "one"
    assert model.names() == ["ada", "bob", "cyd", "stored"]
    [warning] = warnings(caplog)
    assert "3 new User, 1 changed User, 1 deleted User. With" in warning
    assert_thread_works(app, model)


@pytest.mark.parametrize("registered", [True, False])
def test_uncommitted_warning_counts_objects_and_events(
    make_app: MakeApp,
    make_model: MakeModel,
    url: str,
    caplog: pytest.LogCaptureFixture,
    registered: bool,
) -> None:
    """It counts only events that were published in the open transaction."""
    model = make_model(url, zope=registered)

    def body() -> Iterator[str]:
        users = Channel("users")
        users.publish("sent")
        tgstream.commit()
        users.publish("undone")
        tgstream.rollback()
        model.DBSession.add_all([User(name="ada"), Note(text="one"), Note(text="two")])
        users.publish("lost")
        users.publish("lost, too")
        yield "one"

    app = make_app(ModelRoot(model, body, commit="manual"), model)
    assert get(app).text == "one"
    [warning] = warnings(caplog)
    left = "2 new Note, 1 new User, 2 unsent events. With"
    assert left in warning
    assert (model.names(), model.texts()) == ([], [])
    assert_clean(model)


def test_uncommitted_event_alone_is_a_warning(
    make_app: MakeApp, sqlite_model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """The event is lost although no session was used."""

    def body() -> Iterator[str]:
        Channel("users").publish("lost")
        yield "one"

    root = ModelRoot(sqlite_model, body, commit="manual")
    assert get(make_app(root, sqlite_model)).text == "one"
    [warning] = warnings(caplog)
    assert "rolled back: 1 unsent event. With" in warning
    assert_clean(sqlite_model)


@pytest.mark.parametrize("end", [tgstream.commit, tgstream.rollback])
def test_uncommitted_warning_is_not_logged_without_changes(
    make_app: MakeApp,
    model: Model,
    caplog: pytest.LogCaptureFixture,
    end: Callable[[], None],
) -> None:
    """A stream that has committed or undone all its changes gets no warning."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        model.DBSession.flush()
        yield "one"
        end()
        yield "two"
        model.DBSession.query(User).all()

    app = make_app(ModelRoot(model, body, commit="manual"), model)
    assert get(app).text == "onetwo"
    assert model.names() == (["ada"] if end is tgstream.commit else [])
    assert warnings(caplog) == []
    assert_clean(model)
