"""``Stream``, ``current_stream`` and the hooks, as a generator calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import tg
from sqlalchemy import select
from sqlalchemy.orm import Session
from tg import TGController, expose

import tgstream
from tests.conftest import MakeApp, Root, assert_clean
from tests.core.test_context import on_another_thread
from tests.model import Model, Note, User
from tests.wsgi import Call, get
from tgstream import CSV, Report, Stream, StreamError, current_stream, stream

HOOKS: list[Callable[[], Any]] = [
    tgstream.commit,
    tgstream.flush,
    tgstream.rollback,
    current_stream,
]


def test_stream_of_text_is_encoded(make_app: MakeApp) -> None:
    """A generator that yields str, as TG's cookbook has it, arrives in UTF-8."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def text(self) -> Iterator[str]:
            yield "é"
            yield "ß"

    call = get(make_app(Root()), "/text")
    assert call.status == "200 OK"
    assert call.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert call.text == "éß"


def test_stream_writes_are_committed_at_its_end(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """What the generator adds is there when it has run to its end."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def write(self) -> Iterator[str]:
            model.DBSession.add(User(name="ada"))
            yield "one"
            model.DBSession.add(User(name="bob"))
            yield "two"

    app = make_app(Root(), model)
    assert get(app, "/write").text == "onetwo"
    assert model.names() == ["ada", "bob"]
    assert [report.reason for report in reports] == ["completed"]
    assert_clean(model)


def test_commit_each_without_a_database_streams(make_app: MakeApp) -> None:
    """There is nothing to commit, and nothing to complain of."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(commit="each")
        def text(self) -> Iterator[str]:
            yield "a"
            yield "b"

    assert get(make_app(Root(), tm__enabled=False), "/text").text == "ab"


def test_current_stream_counts(make_app: MakeApp) -> None:
    """A generator can read how many items, chunks and bytes have gone out."""
    seen = []

    def look() -> tuple[int, int, int]:
        running = current_stream()
        return running.items, running.chunks, running.bytes

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def count(self) -> Iterator[str]:
            seen.append(look())
            yield "ab"
            seen.append(look())
            yield ""
            yield "c"
            seen.append(look())

    assert get(make_app(Root()), "/count").text == "abc"
    assert seen == [(0, 0, 0), (1, 1, 2), (3, 2, 3)]


def test_stream_that_was_not_started_has_counted_nothing() -> None:
    """A Stream that no controller returned is empty, and can be closed."""
    lonely = Stream(["x"])
    assert (lonely.items, lonely.chunks, lonely.bytes) == (0, 0, 0)
    assert list(lonely) == []
    lonely.close()


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_hook_outside_of_a_stream_says_where_it_belongs(
    make_app: MakeApp, hook: Callable[[], Any]
) -> None:
    """Neither without a request, nor in a controller's body, nor on another thread."""
    message = rf"^{hook.__name__}\(\) was called where no stream is running"

    def refused() -> str:
        with pytest.raises(StreamError, match=message):
            hook()
        return "refused"

    class Root(TGController):
        @expose(content_type="text/plain")
        def plain(self) -> str:
            return refused()

        @expose(content_type="text/plain")
        @stream
        def body(self) -> Iterator[str]:
            refused()
            return iter(["refused"])

        @expose(content_type="text/plain")
        @stream
        def thread(self) -> Iterator[str]:
            yield on_another_thread(refused)

        def _after(self, *remainder: Any, **params: Any) -> None:
            refused()

    refused()
    app = make_app(Root())
    for path in ("/plain", "/body", "/thread"):
        assert get(app, path).text == "refused"
    refused()


@pytest.mark.parametrize("hook", HOOKS[:3], ids=lambda hook: hook.__name__)
def test_hook_without_a_database_says_so(
    make_app: MakeApp, hook: Callable[[], Any]
) -> None:
    """The message names the controller and the options that give it a session."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def write(self) -> Iterator[str]:
            with pytest.raises(StreamError) as raised:
                hook()
            yield str(raised.value)

    for enabled in (True, False):
        assert get(make_app(Root(), tm__enabled=enabled), "/write").text == (
            f"Root.write called {hook.__name__}(), but its application has no database "
            "session. Set use_sqlalchemy, or name a session in the option "
            "tgstream.sessions"
        )


def test_hook_reaches_the_stream_of_the_request_in_force(
    make_app: MakeApp, model: Model
) -> None:
    """In a request made inside of a generator there is no stream to commit."""

    class Inner(TGController):
        @expose(content_type="text/plain")
        def plain(self) -> str:
            with pytest.raises(StreamError):
                current_stream()
            return "inner"

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def outer(self) -> Iterator[str]:
            yield get(inner, "/plain").text
            yield str(current_stream().items)

    inner = make_app(Inner())
    assert get(make_app(Root(), model), "/outer").text == "inner1"


def test_result_of_the_body_is_refused(make_app: MakeApp, model: Model) -> None:
    """A Result ends with the request's transaction, and says what to do instead."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def rows(self) -> Any:
            return model.DBSession.execute(tg.config["statement"])

        @expose(content_type="text/plain")
        @stream
        def scalars(self) -> Any:
            return model.DBSession.scalars(tg.config["statement"])

        @expose(content_type="text/plain")
        def mappings(self) -> Any:
            return Stream(model.DBSession.execute(tg.config["statement"]).mappings())

    model.seed("ada")
    app = make_app(
        Root(), model, statement=select(User.name), trace_errors__enable=False
    )
    for path in ("/rows", "/scalars", "/mappings"):
        with pytest.raises(StreamError, match=r"Return the statement \(select"):
            Call(app, path)
    assert_clean(model)


def test_incremental_charset_says_its_mark_once(make_app: MakeApp) -> None:
    """UTF-16 has one byte order mark, and a stateful charset is closed at the end."""

    class Root(TGController):
        @expose()
        @stream(charset="utf-16")
        def marked(self) -> Iterator[str]:
            yield "a"
            yield "b"

        @expose()
        @stream(charset="iso2022_jp")
        def stateful(self) -> Iterator[str]:
            yield "日"
            yield "本"

    app = make_app(Root())
    assert Call(app, "/marked").read() == "ab".encode("utf-16")
    assert Call(app, "/stateful").read() == "日本".encode("iso2022_jp")


def test_query_runs_in_the_streams_own_session(make_app: MakeApp, model: Model) -> None:
    """A Query that a controller returns is run in the session that it is of."""

    class Names:
        content_type = "text/plain"

        def encode(self, items: Any) -> Iterator[str]:
            for user in items:
                assert model.DBSession().in_transaction()
                yield user.name

    class Root(TGController):
        @expose()
        @stream(Names)
        def users(self) -> Any:
            return model.DBSession.query(User).order_by(User.id)

    model.seed("ada", "bob")
    assert get(make_app(Root(), model), "/users").text == "adabob"
    assert_clean(model)


@pytest.mark.parametrize("path", ["query", "session", "expression", "first"])
def test_query_of_the_body_can_be_used_in_the_generator(
    make_app: MakeApp, model: Model, path: str
) -> None:
    """A query, a session and their objects are the stream's once the body returns."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def query(self) -> Iterator[str]:
            query = model.DBSession.query(User).order_by(User.id)

            def rows() -> Iterator[str]:
                for user in query:
                    yield f"{user.name}{len(user.notes)}"

            return rows()

        @expose(content_type="text/plain")
        @stream
        def session(self) -> Iterator[str]:
            session = model.DBSession()

            def rows() -> Iterator[str]:
                for user in session.query(User).order_by(User.id):
                    assert session is model.DBSession()
                    yield f"{user.name}{len(user.notes)}"

            return rows()

        @expose(content_type="text/plain")
        @stream
        def expression(self) -> Iterator[str]:
            users = model.DBSession.query(User).order_by(User.id)
            return (f"{user.name}{len(user.notes)}" for user in users)

        @expose(content_type="text/plain")
        @stream
        def first(self) -> Iterator[str]:
            query = model.DBSession.query(User)

            def rows() -> Iterator[str]:
                for name in ("ada", "bob"):
                    user = query.filter_by(name=name).one()
                    user.notes.append(Note(text=f"for {name}"))
                    yield f"{name}0"

            return rows()

    model.seed("ada", "bob")
    assert get(make_app(Root(), model), f"/{path}").text == "ada0bob0"
    if path == "first":
        assert model.texts() == ["for ada", "for bob"]
    assert_clean(model)


def test_query_of_a_foreign_session_is_left_to_it(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """A session that the user made by hand is the user's, in a stream as anywhere."""

    class Names:
        content_type = "text/plain"

        def encode(self, items: Any) -> Iterator[str]:
            for user in items:
                assert foreign.in_transaction()
                yield user.name

    class Root(TGController):
        @expose()
        @stream(Names)
        def users(self) -> Any:
            model.DBSession.query(User).all()
            return foreign.query(User)

    model = sqlite_model
    model.seed("ada")
    app = make_app(Root(), model)
    with Session(model.outside) as foreign:
        assert get(app, "/users").text == "ada"
    assert_clean(model)


def test_scoped_session_outside_of_streams_is_as_ever(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """Once it has served a stream, it still makes, takes and forgets sessions."""

    class Root(TGController):
        @expose()
        @stream
        def touch(self) -> Iterator[str]:
            yield str(model.DBSession.query(User).count())

    model = sqlite_model
    get(make_app(Root(), model), "/touch")
    session = model.DBSession(info={"mine": True})
    assert model.DBSession() is session
    assert model.DBSession.registry.registry.value is session
    model.DBSession.remove()
    assert not model.DBSession.registry.has()
    model.DBSession.registry.set(session)
    assert model.DBSession() is session
    model.DBSession.remove()


@pytest.mark.parametrize("kind", ["list", "generator", "batches"])
@pytest.mark.parametrize(
    "format", [None, CSV, CSV(["x", "y"])], ids=["raw", "csv", "header"]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"chunk_size": 100_000}, {"chunk_size": 0}, {"commit": 7}, {"commit": "each"}],
    ids=repr,
)
def test_character_outside_of_the_charset_is_found_in_its_item(
    make_app: MakeApp,
    reports: list[Report],
    kind: str,
    format: Any,
    options: dict[str, Any],
) -> None:
    """The error has the number of the item, and the place in there."""
    texts = ["plain, old\n"] * 1200
    texts[899] = "it costs 5 \N{EURO SIGN}"
    items: list[Any] = texts if format is None else [(text, 1) for text in texts]
    sources = {"list": items, "generator": (n for n in items), "batches": Big(items)}
    root = Root(lambda: sources[kind], format=format, charset="latin-1", **options)
    call = Call(make_app(root))
    with suppress(UnicodeEncodeError):
        call.read()
    error = reports[0].error
    assert isinstance(error, UnicodeEncodeError)
    assert "item 900 of Root.index" in str(error)
    assert f"position {11 + ('x,y' in error.object) * 5}" in str(error)
    assert error.object[error.start] == "\N{EURO SIGN}"


class Big(list[Any]):
    """A source of one batch."""

    fields = ("x", "y")

    def batches(self) -> Iterator[list[Any]]:
        yield self[:]


def test_lone_surrogate_is_found_in_its_item(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """Also where texts and bytes take turns, and UTF-8 is what cannot say it."""
    items = ["a", b"b"] * 10 + ["c\ud800"]
    get(make_app(Root(lambda: iter(items), chunk_size=1000)))
    assert "item 21 of Root.index" in str(reports[0].error)
    assert "position 1: surrogates not allowed" in str(reports[0].error)


@pytest.mark.parametrize("charset", ["rot13", "hex", "nope", "utf-8\r\n\r\n<b>"])
def test_charset_of_a_response_that_is_none_is_an_error_of_its_request(
    make_app: MakeApp, charset: str
) -> None:
    """Wherever the name comes from: no text is sent in what is not a charset."""

    class Odd:
        content_type = "text/plain"

        def encode(self, items: Any) -> Iterator[str]:
            yield from items

    Odd.charset = charset  # type: ignore[attr-defined]

    class RootController(TGController):
        @expose()
        @stream
        def response(self) -> Iterator[str]:
            tg.response.content_type = "text/plain"
            tg.response.charset = charset
            yield "a"

        @expose(content_type=f"text/plain; charset={charset}")
        @stream
        def exposed(self) -> Iterator[str]:
            yield "a"

        @expose()
        @stream(Odd)
        def format(self) -> Iterator[str]:
            yield "a"

    app = make_app(RootController())
    for name in ("response", "exposed", "format"):
        call = Call(app, f"/{name}", checked=False)
        call.read()
        if "\n" in charset and name == "exposed":
            continue  # what stands before the line end is what @expose says
        assert call.status.startswith("500"), name
        assert (
            "must be the name of a text encoding of Python, got"
            in call.errors.getvalue()
        )
