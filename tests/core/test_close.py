"""``close()``: before the first pull, by the generator, and in its ``finally``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tg import TGController, expose

from tests.conftest import MakeApp, assert_clean
from tests.core.support import NamesController, pull, reasons
from tests.model import Model, User
from tests.turbogears.support import WIRINGS
from tests.wsgi import Call, get
from tgstream import Report, Stream, StreamError, commit, current_stream, stream


@pytest.mark.parametrize("wiring", WIRINGS)
def test_stream_closed_before_its_first_pull_ends(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
) -> None:
    """A client that disconnects at once leaves nothing open."""
    sqlite_model.seed("ada", "bob")
    app = make_app(NamesController(sqlite_model), sqlite_model, **wiring)
    call = Call(app, "/names", checked=False)
    call.close()
    call.close()
    assert reasons(reports) == ["disconnected"] * (not wiring["debug"])
    assert_clean(sqlite_model)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("chunks", [0, 1])
def test_stream_that_closes_itself_is_aborted(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any], chunks: int
) -> None:
    """The next pull raises, so no client takes the response as complete."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            yield from ["one"] * chunks
            current_stream().close()
            yield "two"
            yield "three"

    call = Call(make_app(Root(), **wiring), "/words", checked=False)
    assert reasons(reports) == ["disconnected"] * (not (chunks or wiring["debug"]))
    with pytest.raises(StreamError, match="closed before its end"):
        while True:
            pull(call)
    call.close()
    assert reasons(reports) == ["disconnected"]


def test_stream_that_closes_itself_in_its_last_pull_is_complete(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """Nothing is missing, with one chunk or with several."""

    class Root(TGController):
        @expose(content_type="text/plain")
        def words(self, size: str) -> Stream:
            def words() -> Iterator[str]:
                yield "one"
                current_stream().close()

            return Stream(words(), chunk_size=int(size))

    app = make_app(Root())
    assert get(app, "/words/100").text == "one"
    assert get(app, "/words/0").text == "one"
    assert reasons(reports) == ["completed"] * 2


@pytest.mark.usefixtures("no_garbage_collector")
@pytest.mark.parametrize("method", ["close", "drop"])
def test_generator_may_commit_while_it_closes(
    make_app: MakeApp, sqlite_model: Model, method: str
) -> None:
    """Its ``finally`` may call ``commit()``, whether the body is closed or dropped."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def write(self) -> Iterator[str]:
            try:
                yield "one"
                yield "two"
            finally:
                sqlite_model.DBSession.add(User(name=f"ada{current_stream().items}"))
                commit()

    call = Call(make_app(Root(), sqlite_model), "/write", checked=False)
    pull(call)
    getattr(call, method)()
    assert sqlite_model.names() == ["ada1"]
    assert_clean(sqlite_model)
