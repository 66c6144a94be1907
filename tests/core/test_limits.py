"""``limit``: how many streams of a controller run at once in a process."""

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
    """Streams of which two may run at once, and one without a limit."""

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
    """It is told when to come back; other controllers go on."""
    ran: list[str] = []
    app = make_app(root(sqlite_model, ran), sqlite_model)
    first, second = Call(app, path), Call(app, path)
    count = len(ran)
    refused = get(app, path)
    assert refused.status.startswith("503 ")
    assert refused.headers["Retry-After"] == "5"
    assert len(ran) == count  # nothing of the decorated one has run
    assert get(app, "/free").text == "onetwo"
    assert first.read() == second.read() == b"onetwo"
    assert get(app, path).text == "onetwo"
    assert_clean(sqlite_model)


@pytest.mark.parametrize("path", ["/refuse", "/send"])
def test_answer_in_place_of_a_stream_leaves_its_seat(
    make_app: MakeApp, sqlite_model: Model, path: str
) -> None:
    """At once: the traceback of ``abort()`` goes when the garbage is collected."""

    class Root(TGController):
        @expose()
        @stream(limit=1)
        def refuse(self) -> None:
            abort(404)

        @expose()
        @stream(limit=1)
        def send(self) -> None:
            redirect("/elsewhere")

    app = make_app(Root(), sqlite_model)
    gc.disable()
    try:
        answers = [get(app, path).status_int for _ in range(3)]
    finally:
        gc.enable()
    assert answers == [answers[0]] * 3
    assert answers[0] in (302, 404)
    assert_clean(sqlite_model)


@pytest.mark.parametrize("leave", [Call.close, Call.drop, Call.read])
def test_seat_is_left_however_a_stream_ends(
    make_app: MakeApp, sqlite_model: Model, leave: Callable[[Call], Any]
) -> None:
    """Whole, closed or dropped."""
    app = make_app(root(sqlite_model, []), sqlite_model)
    for _ in range(3):
        calls = [Call(app, "/words", checked=False) for _ in range(2)]
        assert [next(call) for call in calls] == [b"one", b"one"]
        for call in calls:
            leave(call)
    assert_clean(sqlite_model)


@pytest.mark.parametrize("query", ["?fail=page", "?fail=1"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_seat_is_left_where_there_is_no_stream(
    make_app: MakeApp, sqlite_model: Model, query: str, method: str
) -> None:
    """A page, an error and a ``HEAD`` take none for long."""
    app = make_app(root(sqlite_model, []), sqlite_model)
    for _ in range(3):
        call = Call(app, f"/words{query}", method=method)
        assert call.status[:3] == ("200" if query == "?fail=page" else "500")
        call.read()
        Call(app, "/words", method="HEAD").read()
    assert get(app, "/words").text == "onetwo"


def test_seat_is_left_where_a_stream_cannot_be_started(make_app: MakeApp) -> None:
    """At once: the traceback of the error goes when the garbage is collected."""

    class OnlyRead:
        def read(self, size: int) -> bytes:
            return b""

    class Root(TGController):
        @expose()
        @stream(SSE, limit=1)
        def events(self) -> OnlyRead:
            return OnlyRead()

    app = make_app(Root(), errorpage__enabled=True)
    gc.disable()
    try:
        answers = [get(app, "/events").status_int for _ in range(3)]
    finally:
        gc.enable()
    assert answers == [404] * 3  # the error page, which this application lacks


@pytest.mark.parametrize("limit", [0, -1, "9", True, 1.5])
def test_limit_that_makes_no_sense_is_refused(limit: Any) -> None:
    """At decoration, in one sentence."""
    with pytest.raises(ValueError, match=r"limit=.*from 1 on, or None"):
        stream(limit=limit)(lambda: None)


@pytest.mark.parametrize("own", [None, 1])
def test_limit_of_the_decorator_applies_to_a_stream(
    make_app: MakeApp, sqlite_model: Model, own: int | None
) -> None:
    """Its slot is the stream's, or is released at once where that has its own limit."""

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
