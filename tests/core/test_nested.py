"""Streams that are pulled or ended inside of another request."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import tg
import transaction
from tg import TGController, expose

from tests.conftest import MakeApp, assert_clean
from tests.core.support import NamesController, pull, reasons
from tests.model import Model, User
from tests.wsgi import Call, get
from tgstream import Report, Stream, current_stream, stream


class Outer(TGController):
    """A page that changes the database, and then calls a function of the test."""

    def __init__(self, model: Model, act: Callable[[], None]) -> None:
        self.model, self.act = model, act
        self.inner = NamesController(model)
        # Not at import: the fixture make_app resets the milestones of TG.
        expose()(Outer.outer)

    def outer(self) -> str:
        session = self.model.DBSession()
        session.add(User(name="carl"))
        manager = transaction.manager.manager
        self.act()
        assert self.model.DBSession() is session
        assert transaction.manager.manager is manager
        return str(tg.request.path)


def test_stream_pulled_in_a_request_does_not_change_it(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """The request keeps its context, session and transaction."""
    sqlite_model.seed("ada", "bob")
    calls: list[Call] = []

    def act() -> None:
        assert next(calls[0]) == b"ada"

    app = make_app(Outer(sqlite_model, act), sqlite_model)
    calls.append(Call(app, "/inner/names"))
    assert get(app, "/outer").text == "/outer"
    assert sqlite_model.names() == ["ada", "bob", "carl"]
    assert calls[0].read() == b"bob"
    assert_clean(sqlite_model)


@pytest.mark.usefixtures("no_garbage_collector")
@pytest.mark.parametrize("pulls", [0, 1])
@pytest.mark.parametrize("method", ["drop", "close"])
def test_stream_ended_in_a_request_does_not_change_it(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    pulls: int,
    method: str,
) -> None:
    """The request keeps its context, session and transaction."""
    sqlite_model.seed("ada", "bob")
    calls: list[Call] = []

    def act() -> None:
        getattr(calls[0], method)()
        assert reasons(reports) == ["disconnected"]

    app = make_app(Outer(sqlite_model, act), sqlite_model)
    calls.append(Call(app, "/inner/names", checked=False))
    for _ in range(pulls):
        pull(calls[0])
    assert get(app, "/outer").text == "/outer"
    assert sqlite_model.names() == ["ada", "bob", "carl"]
    assert_clean(sqlite_model)


@pytest.mark.usefixtures("no_garbage_collector")
@pytest.mark.parametrize("tm", [True, False])
def test_session_of_a_request_that_closed_a_stream_is_removed(
    make_app: MakeApp, sqlite_model: Model, tm: bool
) -> None:
    """The request does not use its session after the close."""
    sqlite_model.seed("ada", "bob")
    streams: list[Stream] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def names(self) -> Iterator[str]:
            streams.append(current_stream())
            yield "one"
            yield "two"

        @expose()
        def stop(self) -> str:
            count = sqlite_model.DBSession.query(User).count()
            streams.pop().close()
            return str(count)

    app = make_app(Root(), sqlite_model, tm__enabled=tm)
    call = Call(app, "/names")
    pull(call)
    assert get(app, "/stop").text == "2"
    call.close()
    assert_clean(sqlite_model)
