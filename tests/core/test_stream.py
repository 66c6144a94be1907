"""``Stream``, ``current_stream()``, ``commit()``, ``flush()`` and ``rollback()``."""

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
from tests.core.support import run_on_another_thread
from tests.model import Model, Note, User
from tests.wsgi import Call, get
from tgstream import CSV, XLSX, Report, Stream, StreamError, current_stream, stream

FUNCTIONS: list[Callable[[], Any]] = [
    tgstream.commit,
    tgstream.flush,
    tgstream.rollback,
    current_stream,
]


def test_stream_of_text_is_encoded(make_app: MakeApp) -> None:
    """A generator that yields str, like in TG's cookbook, is sent in UTF-8."""

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


def test_changes_of_the_generator_are_committed_at_its_end(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """The changes are visible when the response is complete."""

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


def test_commit_each_works_without_a_database(make_app: MakeApp) -> None:
    """Nothing is committed, and nothing fails."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(commit="each")
        def text(self) -> Iterator[str]:
            yield "a"
            yield "b"

    assert get(make_app(Root(), tm__enabled=False), "/text").text == "ab"


def test_current_stream_has_counters(make_app: MakeApp) -> None:
    """A generator can read how many items, chunks and bytes have been sent."""
    seen = []

    def read_counters() -> tuple[int, int, int]:
        running = current_stream()
        return running.items, running.chunks, running.bytes

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def count(self) -> Iterator[str]:
            seen.append(read_counters())
            yield "ab"
            seen.append(read_counters())
            yield ""
            yield "c"
            seen.append(read_counters())

    assert get(make_app(Root()), "/count").text == "abc"
    assert seen == [(0, 0, 0), (1, 1, 2), (3, 2, 3)]


def test_stream_that_was_not_started_can_be_closed() -> None:
    """A stream that no controller has returned has counted nothing."""
    unstarted = Stream(["x"])
    assert (unstarted.items, unstarted.chunks, unstarted.bytes) == (0, 0, 0)
    unstarted.close()


def test_stream_is_not_a_source_of_another_one(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """It would be empty, so it is an error, also as a sheet of a workbook."""

    def yield_from() -> Iterator[Any]:
        yield from Stream([(1, 2)], CSV)

    for root in (
        Root(yield_from, format=CSV),
        Root(lambda: Stream([(1, 2)], CSV), format=CSV),
        Root(lambda: {"A": Stream([(1, 2)])}, format=XLSX),
    ):
        assert get(make_app(root)).status.startswith("500")
        assert "cannot be iterated as a source" in str(reports.pop().error)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_function_outside_of_a_stream_is_rejected(
    make_app: MakeApp, function: Callable[[], Any]
) -> None:
    """A controller, ``_after()`` and another thread have no stream."""
    message = rf"^{function.__name__}\(\) was called where no stream is running"

    def reject() -> str:
        with pytest.raises(StreamError, match=message):
            function()
        return "rejected"

    class Root(TGController):
        @expose(content_type="text/plain")
        def plain(self) -> str:
            return reject()

        @expose(content_type="text/plain")
        @stream
        def body(self) -> Iterator[str]:
            reject()
            return iter(["rejected"])

        @expose(content_type="text/plain")
        @stream
        def thread(self) -> Iterator[str]:
            yield run_on_another_thread(reject)

        def _after(self, *remainder: Any, **params: Any) -> None:
            reject()

    reject()
    app = make_app(Root())
    for path in ("/plain", "/body", "/thread"):
        assert get(app, path).text == "rejected"
    reject()


@pytest.mark.parametrize(
    "function", FUNCTIONS[:3], ids=lambda function: function.__name__
)
def test_function_without_a_database_is_rejected(
    make_app: MakeApp, function: Callable[[], Any]
) -> None:
    """The error names the controller and the options that set a session."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def write(self) -> Iterator[str]:
            with pytest.raises(StreamError) as raised:
                function()
            yield str(raised.value)

    for enabled in (True, False):
        assert get(make_app(Root(), tm__enabled=enabled), "/write").text == (
            f"Root.write called {function.__name__}(), but its application has no "
            "database session. Set use_sqlalchemy, or name a session in the option "
            "tgstream.sessions"
        )


def test_current_stream_belongs_to_the_innermost_request(
    make_app: MakeApp, model: Model
) -> None:
    """A generator makes a request, whose controller does not stream."""

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


def test_result_of_the_controller_is_rejected(make_app: MakeApp, model: Model) -> None:
    """A ``Result`` ends with the transaction of the request. Stream its statement."""

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


def test_charset_with_a_state_encodes_items_like_one_text(make_app: MakeApp) -> None:
    """UTF-16 has one byte order mark, and ISO-2022-JP is reset at the end."""

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


def test_query_is_executed_in_the_session_of_the_stream(
    make_app: MakeApp, model: Model
) -> None:
    """The controller returns the query."""

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
def test_query_of_the_controller_can_be_used_in_the_generator(
    make_app: MakeApp, model: Model, path: str
) -> None:
    """The stream keeps the session of its controller, and the session's objects."""

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


def test_query_of_another_session_is_executed_there(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """A stream does not replace a session that the application has made itself."""

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


def test_scoped_session_works_as_usual_after_a_stream(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """The session can be created, read, set and removed."""

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


@pytest.mark.parametrize("source", ["list", "generator", "batches"])
@pytest.mark.parametrize(
    "format", [None, CSV, CSV(["x", "y"])], ids=["raw", "csv", "header"]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"chunk_size": 100_000}, {"chunk_size": 0}, {"commit": 7}, {"commit": "each"}],
    ids=repr,
)
def test_unencodable_character_is_reported_with_its_item(
    make_app: MakeApp,
    reports: list[Report],
    source: str,
    format: Any,
    options: dict[str, Any],
) -> None:
    """The error has the number of the item, and the position in the item."""
    texts = ["plain, old\n"] * 1200
    texts[899] = "it costs 5 \N{EURO SIGN}"
    items: list[Any] = texts if format is None else [(text, 1) for text in texts]
    sources = {
        "list": items,
        "generator": (n for n in items),
        "batches": OneBatch(items),
    }
    root = Root(lambda: sources[source], format=format, charset="latin-1", **options)
    call = Call(make_app(root))
    with suppress(UnicodeEncodeError):
        call.read()
    error = reports[0].error
    assert isinstance(error, UnicodeEncodeError)
    assert "item 900 of Root.index" in str(error)
    assert f"position {11 + ('x,y' in error.object) * 5}" in str(error)
    assert error.object[error.start] == "\N{EURO SIGN}"


class OneBatch(list[Any]):
    """A source of one batch."""

    fields = ("x", "y")

    def batches(self) -> Iterator[list[Any]]:
        yield self[:]


def test_lone_surrogate_is_reported_with_its_item(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """UTF-8 cannot encode it. The items before it are text and bytes in turn."""
    items = ["a", b"b"] * 10 + ["c\ud800"]
    get(make_app(Root(lambda: iter(items), chunk_size=1000)))
    assert "item 21 of Root.index" in str(reports[0].error)
    assert "position 1: surrogates not allowed" in str(reports[0].error)


@pytest.mark.parametrize("charset", ["rot13", "hex", "nope", "utf-8\r\n\r\n<b>"])
def test_invalid_charset_of_a_response_is_an_ordinary_error(
    make_app: MakeApp, charset: str
) -> None:
    """The charset is set in the response, in ``@expose`` or in the format."""

    class OddFormat:
        content_type = "text/plain"

        def encode(self, items: Any) -> Iterator[str]:
            yield from items

    OddFormat.charset = charset  # type: ignore[attr-defined]

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
        @stream(OddFormat)
        def format(self) -> Iterator[str]:
            yield "a"

    app = make_app(RootController())
    for name in ("response", "exposed", "format"):
        call = Call(app, f"/{name}", checked=False)
        call.read()
        message = "must be the name of a text encoding of Python, got"
        if "\n" in charset and name == "exposed":  # the whole header is checked first
            message = "Content-Type must be Latin-1 without line breaks"
        assert call.status.startswith("500"), name
        assert message in call.errors.getvalue()
