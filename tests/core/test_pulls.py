"""Pulls: the state that they leave behind, and streams that take turns."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import tg
from tg import TGController, expose
from tg.decorators import cached

from tests.conftest import MakeApp, assert_clean
from tests.core.support import NamesController, pull, reasons
from tests.model import MakeModel, Model
from tests.turbogears.support import WIRINGS
from tests.wsgi import Call, get
from tgstream import Report, Stream, StreamError, stream


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("end", ["completed", "failed", "disconnected"])
def test_pull_leaves_nothing_on_the_thread(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
    end: str,
) -> None:
    """The context and the database are bound only while the generator runs."""
    sqlite_model.seed("ada", "bob", "eve")
    app = make_app(NamesController(sqlite_model), sqlite_model, **wiring)
    call = Call(app, "/names?fail=1" if end == "failed" else "/names")
    for name in [b"ada", b"bob", b"eve"][: 2 if end == "disconnected" else 3]:
        assert pull(call) == name
        assert not sqlite_model.DBSession.registry.has()
    if end != "disconnected":
        with pytest.raises(StopIteration if end == "completed" else LookupError):
            pull(call)
    call.close()
    assert reasons(reports) == [end]
    assert_clean(sqlite_model)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_stream_on_postgresql_leaves_no_connection_open(
    make_app: MakeApp,
    make_model: MakeModel,
    postgresql: str,
    wiring: dict[str, Any],
) -> None:
    """After any end, no connection is checked out or idle in transaction."""
    model = make_model(postgresql)
    model.seed("ada", "bob")
    app = make_app(NamesController(model), model, **wiring)
    assert get(app, "/names").text == "adabob"
    assert_clean(model)
    with pytest.raises(LookupError):
        get(app, "/names?fail=1")
    assert_clean(model)
    call = Call(app, "/names")
    pull(call)
    call.close()
    assert_clean(model)
    call = Call(app, "/names", checked=False)
    pull(call)
    call.drop()
    assert_clean(model)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_streams_that_take_turns_on_a_thread_do_not_mix(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
) -> None:
    """Each stream has its own request and session, although the order is random."""
    sqlite_model.seed("ada", "bob", "eve")
    app = make_app(NamesController(sqlite_model), sqlite_model, **wiring)
    calls = {prefix: Call(app, f"/names?prefix={prefix}") for prefix in "vwxyz"}
    received: dict[str, bytes] = dict.fromkeys(calls, b"")
    order = [prefix for prefix in calls for _ in range(3)]
    random.Random(7).shuffle(order)
    for prefix in order:
        received[prefix] += pull(calls[prefix])
    for prefix, call in calls.items():
        call.close()
        assert received[prefix] == f"{prefix}ada{prefix}bob{prefix}eve".encode()
    assert_clean(sqlite_model)


@pytest.mark.parametrize(
    ("path", "length"),
    [
        ("/words/0?size=100", "0"),
        ("/words/2?size=100", "6"),
        ("/words/2?size=3", None),
        ("/words/0?size=0", "0"),
        ("/words/1?size=0", None),
    ],
)
def test_stream_that_ends_in_its_first_pull_has_a_length(
    make_app: MakeApp, reports: list[Report], path: str, length: str | None
) -> None:
    """With ``chunk_size=0`` only an empty stream ends in its first pull."""

    class Root(TGController):
        @expose(content_type="text/plain")
        def words(self, count: str, size: str) -> Stream:
            return Stream(iter(["one"] * int(count)), chunk_size=int(size))

    call = Call(make_app(Root()), path)
    assert call.headers.get("Content-Length") == length
    assert len(call.read()) == 3 * int(path[7])
    assert reasons(reports) == ["completed"]


def test_stream_for_two_requests_is_rejected(make_app: MakeApp) -> None:
    """The second request fails, and the first request gets all data."""

    def letters() -> Iterator[str]:
        yield "a"
        yield "b"

    kept = Stream(letters())
    generator = letters()

    class Root(TGController):
        @expose(content_type="text/plain")
        def kept(self) -> Stream:
            return kept

        @expose(content_type="text/plain")
        def generator(self) -> Stream:
            return Stream(generator)

        @expose(content_type="text/plain")
        @stream
        def decorated(self) -> Iterator[str]:
            return generator

    app = make_app(Root(), trace_errors__enable=False)
    first = [Call(app, "/kept"), Call(app, "/generator")]
    for path in "/kept", "/generator", "/decorated":
        with pytest.raises(StreamError, match="serves one request"):
            Call(app, path, checked=False)
    assert [call.read() for call in first] == [b"ab", b"ab"]
    for path in "/kept", "/generator", "/decorated":
        with pytest.raises(StreamError, match="serves one request"):
            Call(app, path, checked=False)


@pytest.mark.parametrize("order", ["cached above", "cached below"])
def test_cached_stream_is_rejected(make_app: MakeApp, order: str) -> None:
    """The second request fails, and the error names ``@cached``."""

    def letters(self: Any) -> Iterator[str]:
        yield f"a{tg.request.headers['X-Of']}"
        yield "b"

    decorators: list[Any] = [stream, cached(type="memory")]
    if order == "cached below":
        decorators.reverse()
    for decorate in [*decorators, expose(content_type="text/plain")]:
        letters = decorate(letters)
    letters.__name__ = order

    class Root(TGController):
        pass

    Root.letters = letters
    app = make_app(
        Root(),
        trace_errors__enable=False,
        cache__enabled=True,
        cache__type="memory",
    )
    assert get(app, "/letters", HTTP_X_OF="1").text == "a1b"
    with pytest.raises(StreamError, match="remove @cached"):
        Call(app, "/letters", checked=False, HTTP_X_OF="2")
