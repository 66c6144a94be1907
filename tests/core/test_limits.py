"""``limit=``: how many streams of a controller run at once in a process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tg import TGController, abort, expose, redirect

from tests.conftest import MakeApp, assert_clean
from tests.model import Model, User
from tests.wsgi import Call, get
from tgstream import SSE, Stream, stream


def root(model: Model, ran: list[str]) -> TGController:
    """Two controllers that may stream twice at once, and one without a limit."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(limit=2)
        def words(self, fail: str = "") -> Any:
            ran.append("words")
            if fail == "page":
                return "no stream"
            if fail:
                raise LookupError("no words")
            return self.items()

        def items(self) -> Iterator[str]:
            model.DBSession.query(User).count()
            yield "one"
            yield "two"

        @expose(content_type="text/plain")
        def helped(self) -> Stream:
            return Stream(self.items(), limit=2)

        @expose(content_type="text/plain")
        @stream
        def free(self) -> Iterator[str]:
            yield from self.items()

    return Root()


@pytest.mark.parametrize("path", ["/words", "/helped"])
def test_stream_above_the_limit_is_answered_with_503(
    make_app: MakeApp, sqlite_model: Model, path: str
) -> None:
    """The response has ``Retry-After``. Other controllers are not limited."""
    ran: list[str] = []
    app = make_app(root(sqlite_model, ran), sqlite_model)
    first, second = Call(app, path), Call(app, path)
    count = len(ran)
    refused = get(app, path)
    assert refused.status.startswith("503 ")
    assert refused.headers["Retry-After"] == "5"
    assert "Too many open streams. Please try again in 5 seconds." in refused.text
    assert len(ran) == count  # no code of the decorated controller has run
    assert get(app, "/free").text == "onetwo"
    assert first.read() == second.read() == b"onetwo"
    assert get(app, path).text == "onetwo"
    assert_clean(sqlite_model)


def statuses_without_gc(app: Any, path: str) -> list[int]:
    """The statuses of three responses, between which no garbage is collected."""
    gc.disable()
    try:
        return [get(app, path).status_int for _ in range(3)]
    finally:
        gc.enable()


@pytest.mark.parametrize("path", ["/refuse", "/send"])
def test_response_instead_of_a_stream_releases_its_slot(
    make_app: MakeApp, sqlite_model: Model, path: str
) -> None:
    """At once, although garbage holds the traceback of ``abort()`` for longer."""

    class Root(TGController):
        @expose()
        @stream(limit=1)
        def refuse(self) -> None:
            abort(404)

        @expose()
        @stream(limit=1)
        def send(self) -> None:
            redirect("/elsewhere")

    statuses = statuses_without_gc(make_app(Root(), sqlite_model), path)
    assert statuses == [404 if path == "/refuse" else 302] * 3
    assert_clean(sqlite_model)


@pytest.mark.parametrize("end", [Call.close, Call.drop, Call.read])
def test_slot_is_released_however_a_stream_ends(
    make_app: MakeApp, sqlite_model: Model, end: Callable[[Call], Any]
) -> None:
    """The stream is closed, dropped, or read to its end."""
    app = make_app(root(sqlite_model, []), sqlite_model)
    for _ in range(3):
        calls = [Call(app, "/words", checked=False) for _ in range(2)]
        assert [next(call) for call in calls] == [b"one", b"one"]
        for call in calls:
            end(call)
    assert_clean(sqlite_model)


@pytest.mark.parametrize("query", ["?fail=page", "?fail=1"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_slot_is_released_if_no_stream_starts(
    make_app: MakeApp, sqlite_model: Model, query: str, method: str
) -> None:
    """A page, an error and a ``HEAD`` release it with their response."""
    app = make_app(root(sqlite_model, []), sqlite_model)
    for _ in range(3):
        call = Call(app, f"/words{query}", method=method)
        assert call.status[:3] == ("200" if query == "?fail=page" else "500")
        call.read()
        Call(app, "/words", method="HEAD").read()
    assert get(app, "/words").text == "onetwo"


def test_slot_is_released_if_a_stream_cannot_be_started(make_app: MakeApp) -> None:
    """At once, although garbage holds the traceback of the error for longer."""

    class OnlyRead:
        def read(self, size: int) -> bytes:
            return b""

    class Root(TGController):
        @expose()
        @stream(SSE, limit=1)
        def events(self) -> OnlyRead:
            return OnlyRead()

    app = make_app(Root(), errorpage__enabled=True)
    # Not 503. The application lacks an error page, so that TG answers 404.
    assert statuses_without_gc(app, "/events") == [404] * 3


@pytest.mark.parametrize("limit", [0, -1, "9", True, 1.5])
def test_limit_that_is_not_a_number_of_streams_is_rejected(limit: Any) -> None:
    """The error is raised at decoration."""
    with pytest.raises(ValueError, match=r"limit must be an integer >= 1 or None, got"):
        stream(limit=limit)(lambda: None)


@pytest.mark.parametrize("own", [None, 1])
def test_limit_of_the_decorator_applies_to_a_stream(
    make_app: MakeApp, sqlite_model: Model, own: int | None
) -> None:
    """Its slot is the stream's, but is released if the stream has its own limit."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(limit=2 if own else 1)
        def returned(self, fail: str = "") -> Stream:
            if fail:
                abort(404)
            return Stream(iter(["one", "two"]), limit=own)

    app = make_app(Root(), sqlite_model)
    for _ in range(3):
        assert get(app, "/returned?fail=1").status_int == 404
        call = Call(app, "/returned")
        assert get(app, "/returned").status_int == 503
        assert call.read() == b"onetwo"
    assert get(app, "/returned").text == "onetwo"
