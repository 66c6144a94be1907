"""``tgstream.testing``: streams that are opened in process."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx_sse
import pytest
import sqlalchemy as sa
import tg
import webtest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from tg import TGController, expose

from tests.conftest import MakeApp
from tests.model import MakeModel, Model, User
from tgstream import CSV, NDJSON, SSE, Event, JSONArray, Stream, drain, health, stream
from tgstream.testing import OpenStream, assert_clean, open_stream
from tgstream.testing.decoders import decode_text, parse_array, parse_events

DOCS = Path(__file__).parents[2] / "docs"
FORMATS: dict[str, Any] = {"array": JSONArray, "lines": NDJSON, "csv": CSV, "sse": SSE}

pytest_plugins = ["tgstream.pytest_plugin"]


@pytest.fixture(autouse=True)
def is_not_draining() -> None:
    """Not the fixture of the suite, so that only the plugin does it."""


@pytest.mark.parametrize("attempt", [1, 2])
def test_process_is_not_draining_in_the_next_test(attempt: int) -> None:
    """The plugin lets each test start streams."""
    assert not health()["draining"]
    assert drain()


DRAINED = """
import pytest
import tgstream

def test_drain():
    assert tgstream.drain()

@pytest.fixture(scope="module")
def health():
    return tgstream.health()

def test_fixture(health):
    assert not health["draining"]
"""


def test_plugin_lets_fixtures_start_streams_after_a_test_has_drained(
    tmp_path: Path,
) -> None:
    """A fixture of a module is made before those of a test."""
    (tmp_path / "test_drained.py").write_text(DRAINED)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tgstream.pytest_plugin"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=60,
    )
    assert ran.returncode == 0, ran.stdout


class Endless(TGController):
    """An endless stream in each format, and streams that end."""

    def __init__(self, model: Model | None = None) -> None:
        self.model = model
        for name in "items", "words", "whoami", "missing":  # TG forgets it
            expose()(getattr(Endless, name))

    def items(self, format: str, end: str = "") -> Stream:
        """One item a chunk: ``end`` items, or endless without it."""
        return Stream(self.numbers(end), FORMATS[format], chunk_size=0)

    def numbers(self, end: str) -> Iterator[Any]:
        number = 0
        while str(number) != end:
            number += 1
            if self.model is not None:
                self.model.DBSession.add(User(name=f"user {number}"))
                self.model.DBSession.flush()
            yield [number, "é\n"]

    def words(self) -> Stream:
        return Stream(["one", "two"])

    def whoami(self) -> Stream:
        counted = int(tg.request.cookies.get("count", 0)) + 1
        tg.response.set_cookie("count", str(counted))
        return Stream([tg.request.environ.get("REMOTE_USER", "nobody"), str(counted)])

    def missing(self) -> Stream:
        def items() -> Iterator[str]:
            tg.abort(404)
            yield ""

        return Stream(items())


@pytest.mark.parametrize(
    ("path", "read", "items"),
    [
        ("/items?format=array", "json", [[1, "é\n"], [2, "é\n"]]),
        ("/items?format=lines", "json", [[1, "é\n"], [2, "é\n"]]),
        ("/items?format=csv", "rows", [["1", "é\n"], ["2", "é\n"]]),
        ("/items?format=sse", "events", [Event('[1,"é\\n"]'), Event('[2,"é\\n"]')]),
    ],
)
def test_items_of_an_endless_stream_are_read_in_turn(
    make_app: MakeApp, model: Model, path: str, read: str, items: list[Any]
) -> None:
    """As rows, documents or events. No more is read than the next item needs."""
    with open_stream(make_app(Endless(model), model), path) as response:
        parsed = getattr(response, read)()
        assert [next(parsed), next(parsed)] == items
    assert response.report().reason == "disconnected"
    assert response.report().items <= 3  # an array's comma comes with the next item
    assert_clean()


@pytest.mark.parametrize("path", ["/items?format=array", "/items?format=lines"])
def test_items_of_a_stream_that_ends_are_read_to_its_end(
    make_app: MakeApp, path: str
) -> None:
    """The iterator ends with the stream."""
    with open_stream(make_app(Endless()), f"{path}&end=3") as response:
        assert list(response.json()) == [[1, "é\n"], [2, "é\n"], [3, "é\n"]]
    assert response.report().reason == "completed"


def test_failure_is_read_before_the_error(make_app: MakeApp) -> None:
    """The items have the incident of the report, and then the error is raised."""

    def fail() -> Iterator[str]:
        yield "one"
        raise LookupError("no second")

    class Root(TGController):
        @expose()
        @stream(SSE(failed="failed"))
        def events(self) -> Iterator[str]:
            return fail()

        @expose()
        @stream(NDJSON(end=True), chunk_size=0)
        def lines(self) -> Iterator[str]:
            return fail()

    app = make_app(Root())
    with open_stream(app, "/events") as response:
        events = response.events()
        assert next(events) == Event("one")
        failed = next(events)
        with pytest.raises(LookupError):
            next(events)
    assert failed == Event(response.report().incident, event="failed")
    with open_stream(app, "/lines") as response:
        documents = response.json()
        assert next(documents) == "one"
        last = next(documents)
        with pytest.raises(LookupError):
            next(documents)
    assert last == {"end": False, "incident": response.report().incident}


def test_response_has_status_and_headers_before_the_first_chunk(
    make_app: MakeApp,
) -> None:
    """The body has not been read."""
    app = make_app(Endless())
    with open_stream(app, "/missing") as response:
        assert (response.status_int, response.status[:4]) == (404, "404 ")
    with open_stream(app, "/words", method="HEAD") as response:
        assert (response.status, response.read()) == ("200 OK", b"")
        assert response.headers["content-type"].startswith("text/html")


def test_chunks_are_read_in_turn_on_any_thread(make_app: MakeApp) -> None:
    """After ``close()``, reading is an error."""
    with open_stream(make_app(Endless()), "/words") as response:
        assert next(response) == b"one"
        assert response.pull_on_thread() == b"two"
        with pytest.raises(StopIteration):
            response.pull_on_thread()
    assert response.report().chunks == 2
    with pytest.raises(
        AssertionError, match="/words: cannot read a stream that was closed"
    ):
        next(response)


@pytest.mark.parametrize("abort", [OpenStream.disconnect, OpenStream.abandon])
def test_aborted_stream_commits_nothing(
    make_app: MakeApp, model: Model, abort: Callable[[OpenStream], None]
) -> None:
    """The server may close the body or drop it."""
    app = make_app(Endless(model), model)
    response = open_stream(app, "/items?format=array")
    next(response)
    abort(response)
    assert response.report(timeout=0).reason == "disconnected"
    assert model.names() == []
    assert_clean()


def test_leaks_of_a_stream_without_tgstream_are_found(
    make_app: MakeApp, model: Model
) -> None:
    """``assert_clean()`` can fail: TurboGears alone leaves everything behind."""

    class Root(TGController):
        @expose(content_type="text/plain")
        def words(self) -> Iterator[bytes]:
            model.DBSession.query(User).count()
            yield b"one"
            yield b"two"

    response = open_stream(make_app(Root(), model), "/words")
    assert next(response) == b"one"
    leaks = (
        "left behind: 1 contexts of TurboGears on this thread, a transaction on this "
        "thread, joined by .*, a session of .* on this thread, 1 connections"
    )
    with pytest.raises(AssertionError, match=leaks):
        assert_clean()
    response.close()
    tg.config["tm.enabled"] = True
    import transaction

    transaction.abort()
    assert_clean()


def bound_by_get_bind(engine: sa.Engine) -> Any:
    class Routing(Session):
        def get_bind(self, *args: Any, **options: Any) -> sa.Engine:
            return engine

    return Routing


def bound_by_class(engine: sa.Engine) -> Any:
    class Bound(Session):
        def __init__(self) -> None:
            super().__init__(engine)

    return Bound


FACTORIES: dict[str, Callable[[sa.Engine], Any]] = {
    "lambda": lambda engine: lambda: Session(engine),
    "class": bound_by_class,
    "partial": lambda engine: partial(Session, engine),
    "partial of a sessionmaker": lambda engine: partial(sessionmaker(engine)),
    "binds": lambda engine: sessionmaker(binds={User: engine}),
    "get_bind": bound_by_get_bind,
}


@pytest.mark.parametrize("factory", FACTORIES)
def test_connections_of_any_session_factory_are_counted(
    make_app: MakeApp,
    make_model: MakeModel,
    url: str,
    factory: str,
    request: pytest.FixtureRequest,
) -> None:
    """A stream leaves none of them behind, and a checked-out connection is found."""
    model = make_model(url)
    engine = sa.create_engine(url)
    scoped = scoped_session(FACTORIES[factory](engine))

    class Root(TGController):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            return Stream(self.items())

        def items(self) -> Iterator[str]:
            scoped.add(User(name="ada"))
            yield "one"

    app = make_app(Root(), model, tgstream__sessions=[scoped])
    with request.getfixturevalue("open_stream")(app) as response:
        assert response.read() == b"one"
    assert model.names() == ["ada"]
    assert_clean()
    with engine.connect(), pytest.raises(AssertionError, match="1 connections"):
        assert_clean()
    engine.dispose()


JOIN_BY_SAVEPOINT: dict[str, Any] = {"join_transaction_mode": "create_savepoint"}


def test_connection_that_a_session_is_bound_to_is_not_a_leak(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """The test holds it, for an outer transaction that it rolls back."""
    engine = sa.create_engine(sqlite_model.url)
    with engine.connect() as connection, connection.begin() as outer:
        factory: Any = partial(Session, connection, **JOIN_BY_SAVEPOINT)
        scoped: scoped_session[Session] = scoped_session(factory)

        class Root(TGController):
            @expose(content_type="text/plain")
            def index(self) -> Stream:
                scoped.add(User(name="ada"))
                return Stream(user.name for user in scoped.query(User))

        app = make_app(Root(), sqlite_model, tgstream__sessions=[scoped])
        with open_stream(app) as response:
            response.read()
        assert_clean()
        outer.rollback()
    assert sqlite_model.names() == []
    engine.dispose()


def test_session_factory_that_needs_a_request_is_skipped(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """Outside of a request its engine is unknown."""
    factory: Any = lambda: Session(tg.request.engine)  # noqa: E731
    scoped: scoped_session[Session] = scoped_session(factory)
    make_app(Endless(sqlite_model), sqlite_model, tgstream__sessions=[scoped])
    assert_clean()


def test_report_waits_for_a_stream_on_another_thread(make_app: MakeApp) -> None:
    """The error after ``timeout`` has the path and the status."""
    may_end = threading.Event()

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            yield "one"
            assert may_end.wait(10)

    response = open_stream(make_app(Root()), "/words")
    assert next(response) == b"one"
    reader = threading.Thread(target=response.read)
    reader.start()
    with pytest.raises(
        AssertionError, match=r"/words \(200 OK\): no stream .* 0\.01 s"
    ):
        response.report(timeout=0.01)
    may_end.set()
    assert response.report().reason == "completed"
    reader.join()
    response.close()


def test_cookies_and_environ_of_a_webtest_app_are_sent(make_app: MakeApp) -> None:
    """After a login, a test opens streams as the same user."""
    app = webtest.TestApp(make_app(Endless()), extra_environ={"REMOTE_USER": "ada"})
    assert app.get("/whoami").body == b"ada1"
    with open_stream(app, "/whoami") as response:
        assert response.read() == b"ada2"
    with open_stream(app, "/whoami", headers={"Cookie": "count=8"}) as response:
        assert response.read() == b"ada9"


@pytest.mark.parametrize("read", ["json", "events", "rows"])
def test_reading_another_content_type_is_an_error(make_app: MakeApp, read: str) -> None:
    """The error has both content types."""
    with open_stream(make_app(Endless()), "/words") as response:
        message = rf"/words: {read}\(\) reads .*, but the content type is text/html \("
        with pytest.raises(TypeError, match=message):
            getattr(response, read)()


def test_second_call_of_start_response_is_an_error() -> None:
    """With ``exc_info``, and after the first chunk, it raises that error (PEP 3333)."""

    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        if environ["PATH_INFO"] == "/once":
            yield b"one"
            start_response("500 No", [], (None, LookupError("late"), None))
        start_response("500 No", [])

    with (
        open_stream(app) as response,
        pytest.raises(AssertionError, match="start_response was called twice"),
    ):
        next(response)
    with open_stream(app, "/once") as response:
        next(response)
        with pytest.raises(LookupError, match="late"):
            next(response)


def test_fixture_closes_open_streams(
    make_app: MakeApp, sqlite_model: Model, request: pytest.FixtureRequest
) -> None:
    """Then it calls ``assert_clean()``, which would fail in the teardown."""
    response = request.getfixturevalue("open_stream")(
        make_app(Endless(sqlite_model), sqlite_model), "/items?format=lines"
    )
    assert next(response.json()) == [1, "é\n"]


# Items that are split between chunks.


def split(text: str, at: list[int]) -> list[str]:
    """The parts of a text, split at some positions."""
    ends = sorted({min(end, len(text)) for end in at} | {0, len(text)})
    return [text[start:end] for start, end in itertools.pairwise(ends)]


documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(st.lists(documents, max_size=5), st.lists(st.integers(0, 99)), st.booleans())
def test_array_is_parsed_however_it_is_split(
    items: list[Any], at: list[int], has_spaces: bool
) -> None:
    """The items are those that ``json`` has written."""
    text = json.dumps(items, indent=2 if has_spaces else None)
    assert list(parse_array(split(text, at))) == items


@pytest.mark.parametrize("text", ["[1,2", "[1,", "[", '["a', "[1] 2", "", "[1 2]"])
def test_truncated_array_is_an_error(text: str) -> None:
    """A test must not pass with a part of the items."""
    with pytest.raises(ValueError):
        list(parse_array([text]))


def test_document_that_is_not_an_array_is_one_item() -> None:
    """It may be a page that TurboGears renders as JSON."""
    assert list(parse_array([" ", '{"a"', ": 1}"])) == [{"a": 1}]


lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"))


@given(st.lists(st.tuples(lines, lines, st.integers(0))), st.lists(st.integers(0, 200)))
def test_events_are_those_that_another_client_parses(
    events: list[tuple[str, str, int]], at: list[int]
) -> None:
    """The text may be split anywhere, and have any line ends."""
    text = "".join(
        f": hidden\r\nevent:{name}\rdata: {data}\ndata\nretry: {retry}\nother: x\n\n"
        for name, data, retry in events
    )
    ours = list(parse_events(split(text, at)))
    decoder = httpx_sse._decoders.SSEDecoder()
    decoded = map(decoder.decode, re.split("\r\n|\r|\n", text))
    theirs = [event for event in decoded if event is not None]
    assert [event.comment for event in ours] == ["hidden"] * len(events)
    assert [(e.event or "message", e.data, e.retry) for e in ours] == [
        (e.event or "message", e.data, e.retry) for e in theirs
    ]


def test_text_is_decoded_across_chunks() -> None:
    """A character may be split, and a byte order mark is removed."""
    data = "\ufeffé€".encode()
    chunks = [data[i : i + 1] for i in range(len(data))]
    assert "".join(decode_text(chunks, None)) == "é€"
    assert "".join(decode_text([b"\xe9"], "latin-1")) == "é"


# The page of the docs.


def test_tests_of_the_page_pass(make_app: MakeApp, sqlite_model: Model) -> None:
    """They run on the controller that the page shows."""
    page = (DOCS / "testing.rst").read_text()
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", page)
    shown: dict[str, Any] = {
        "BaseController": TGController,
        "DBSession": sqlite_model.DBSession,
        "User": User,
    }
    for block in blocks:
        exec(re.sub(r"^    ", "", block, flags=re.M), shown)
    sqlite_model.seed("ada", "bob")
    app = make_app(shown["RootController"](), sqlite_model)
    fixtures = SimpleNamespace(
        app=app, client=webtest.TestApp(app), open_stream=open_stream
    )
    tests = [name for name in shown if name.startswith("test_")]
    assert len(tests) >= 8
    for name in tests:
        arguments = inspect.signature(shown[name]).parameters
        shown[name](*[getattr(fixtures, fixture) for fixture in arguments])
        assert_clean()
