"""``@stream`` and ``Stream`` on controllers, in every combination TG users write."""

from __future__ import annotations

import functools
import gc
import io
import json
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import tg
from tg import (
    RestController,
    TGController,
    decode_params,
    expose,
    predicates,
    require,
    validate,
)
from tg.decorators import Decoration, paginate
from webtest import TestApp

from tests.conftest import MakeApp, assert_clean
from tests.model import Model, User
from tests.wsgi import Call, get
from tgstream import CSV, NDJSON, Report, Stream, StreamError, copy, rows, stream
from tgstream.core.source import BLOCK_SIZE


class Words:
    """A format of a user's own: one item a line."""

    content_type = "text/x-words"

    def encode(self, items: Iterable[Any]) -> Iterator[str]:
        yield "#\n"
        for item in items:
            yield f"{item}\n"
        yield "."


def chunks(app: Any, path: str) -> list[bytes]:
    """The body of a response, as it was handed to the server."""
    call = Call(app, path)
    body = list(call)
    call.close()
    return body


def numbers() -> Iterator[str]:
    yield "1"
    yield "2"


def combinations() -> TGController:
    """Made in a test: what waits for TG's milestones is lost when they are reset."""

    class Combinations(TGController):
        @expose(content_type="text/plain")
        @stream
        def bare_below(self) -> Iterator[str]:
            yield from numbers()

        @stream
        @expose(content_type="text/plain")
        def bare_above(self) -> Iterator[str]:
            yield from numbers()

        @expose(content_type="text/plain")
        @stream()
        def called_below(self) -> Iterator[str]:
            yield from numbers()

        @stream()
        @expose(content_type="text/plain")
        def called_above(self) -> Iterator[str]:
            yield from numbers()

        @expose(content_type="text/plain")
        @stream(chunk_size=100)
        def gathered(self) -> Iterator[str]:
            yield from numbers()

        @expose(content_type="text/plain")
        def helper(self) -> Stream:
            return Stream(numbers())

        @expose(content_type="text/plain")
        @stream(chunk_size=100)
        def helper_below_decorator(self) -> Stream:
            return Stream(numbers(), Words)

        @expose(content_type="text/plain")
        @stream
        def generator(self) -> Iterator[str]:
            return numbers()

        @expose(content_type="text/plain")
        @stream
        def iterator(self) -> Iterator[str]:
            return map(str, range(1, 3))

        @expose(content_type="text/plain")
        @stream
        def list(self) -> Any:
            return ["1", b"2"]

        @expose(content_type="text/plain")
        @stream
        def bytes_like(self) -> Any:
            return [bytearray(b"1"), memoryview(b"2"), ""]

        @expose(content_type="text/plain")
        @stream
        @require(
            predicates.Any(
                predicates.not_anonymous(), predicates.Not(predicates.not_anonymous())
            )
        )
        @paginate("users")
        @decode_params("json")
        @validate({"count": tg.validation.Convert(int)})
        def all_of_them(self, count: int = 2) -> Iterator[str]:
            for number in range(count):
                yield str(number + 1)

        @stream
        @validate({"count": tg.validation.Convert(int)})
        @decode_params("json")
        @paginate("users")
        @require(predicates.Not(predicates.not_anonymous()))
        @expose(content_type="text/plain")
        def all_of_them_above(self, count: int = 2) -> Iterator[str]:
            for number in range(count):
                yield str(number + 1)

    return Combinations()


COMBINATIONS = [
    name
    for name, value in vars(type(combinations())).items()
    if hasattr(value, "decoration") and not name.startswith("helper_below")
]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_stream_works_in_every_combination(make_app: MakeApp, name: str) -> None:
    """Whatever stands above and below it, and whatever the controller returns."""
    call = get(make_app(combinations()), f"/{name}?count=2")
    assert (call.status, call.text) == ("200 OK", "12")
    assert call.headers["Content-Type"] == "text/plain; charset=utf-8"


def test_stream_helper_keeps_its_own_options_under_the_decorator(
    make_app: MakeApp,
) -> None:
    """A Stream that a decorated controller returns is not decorated again."""
    call = get(make_app(combinations()), "/helper_below_decorator")
    assert call.text == "#\n1\n2\n."


def test_decode_params_reaches_a_streamed_controller(make_app: MakeApp) -> None:
    """The JSON body of a request becomes parameters, as without @stream."""
    app = TestApp(make_app(combinations()))
    assert app.post_json("/all_of_them", {"count": 3}).text == "123"


def test_require_guards_a_streamed_controller(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """Who may not read a stream is told so before anything of it runs."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        @require(predicates.not_anonymous())
        def secret(self) -> Iterator[str]:
            yield "secret"

    assert get(make_app(Root()), "/secret").status == "401 Unauthorized"
    assert reports == []


def test_validate_error_handler_may_stream(make_app: MakeApp) -> None:
    """A failed validation goes to its error handler, which may be a stream itself."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def sorry(self, **params: Any) -> Iterator[str]:
            yield f"no number: {tg.request.validation.values['count']}"

        @expose(content_type="text/plain")
        @stream
        @validate({"count": tg.validation.Convert(int)}, error_handler=sorry)
        def count(self, count: int) -> Iterator[str]:
            yield str(count)

    app = make_app(Root())
    assert get(app, "/count?count=7").text == "7"
    assert get(app, "/count?count=x").text == "no number: x"


def test_rest_controller_methods_stream(make_app: MakeApp) -> None:
    """REST methods stream like any other."""

    class Movies(RestController):
        @expose(content_type="text/plain")
        @stream
        def get_all(self) -> Iterator[str]:
            yield "all"

        @expose(content_type="text/plain")
        @stream
        def get_one(self, movie: str) -> Iterator[str]:
            yield f"one: {movie}"

        @expose(content_type="text/plain")
        @stream
        def post(self, title: str) -> Iterator[str]:
            yield f"new: {title}"

    class Root(TGController):
        movies = Movies()

    app = TestApp(make_app(Root()))
    assert app.get("/movies").text == "all"
    assert app.get("/movies/5").text == "one: 5"
    assert app.post("/movies", {"title": "x"}).text == "new: x"


def test_stream_returns_the_function_unchanged() -> None:
    """A decorated controller is still what it was, to call and to inspect."""

    def controller(self: Any) -> Iterator[str]:
        yield "x"

    assert stream(controller) is controller
    assert stream(Words, commit="each")(controller) is controller
    assert list(controller(None)) == ["x"]


def test_stream_refuses_async_functions() -> None:
    """An async def is refused where it is written, not when it is called."""

    async def coroutine(self: Any) -> None: ...

    async def generator(self: Any) -> Any:
        yield "x"

    for function in (coroutine, generator):
        with pytest.raises(
            TypeError, match=rf"@stream on {function.__name__}: .* not async"
        ):
            stream(function)


PASSED_THROUGH: dict[str, Callable[[], Any]] = {
    "text": lambda: "text",
    "bytes": lambda: b"bytes",
    "json": lambda: {"a": 1},
    "nothing": lambda: None,
    "response": lambda: tg.Response("response", content_type="text/x-own"),
}


@pytest.mark.parametrize("kind", ["text", "bytes", "json", "nothing", "response"])
def test_stream_passes_on_what_is_no_stream(make_app: MakeApp, kind: str) -> None:
    """Text, bytes, a dict, None and a Response are answered as without @stream."""

    class Root(TGController):
        @expose("json")
        def plain(self) -> Any:
            return PASSED_THROUGH[kind]()

        @expose("json")
        @stream
        def decorated(self) -> Any:
            return PASSED_THROUGH[kind]()

    app = make_app(Root())
    plain, decorated = get(app, "/plain"), get(app, "/decorated")
    assert plain.status == decorated.status
    assert plain.headers == decorated.headers
    assert plain.text == decorated.text


@pytest.mark.parametrize("value", [42, object, numbers, User(name="ada")], ids=type)
@pytest.mark.parametrize("format", [None, NDJSON])
def test_what_nobody_can_send_is_named(
    make_app: MakeApp, value: Any, format: Any
) -> None:
    """TurboGears would make an empty page of it, which looks like an answer."""

    class Root(TGController):
        @expose()
        @stream(format)
        def decorated(self) -> Any:
            return value

    with pytest.raises(
        TypeError, match=r"^Root.decorated must return a generator.* got "
    ):
        get(make_app(Root(), trace_errors__enable=False), "/decorated")


@pytest.mark.parametrize("returned", ["select", "Query", "rows", "copy"])
def test_forgotten_decorator_is_told_of(
    make_app: MakeApp, sqlite_model: Model, returned: str
) -> None:
    """A statement would run when the request is over, and never end its transaction."""
    selected = sa.select(User.name)
    kinds: dict[str, Callable[[], Any]] = {
        "select": lambda: selected,
        "Query": lambda: sqlite_model.DBSession.query(User),
        "rows": lambda: rows(selected),
        "copy": lambda: copy(selected),
    }

    class Root(TGController):
        @expose()
        def plain(self) -> Any:
            return kinds[returned]()

    app = make_app(Root(), sqlite_model, trace_errors__enable=False)
    with pytest.raises(StreamError, match=r"^Root.plain returned a .*with @stream, or"):
        get(app, "/plain")
    assert_clean(sqlite_model)


def test_file_is_read_in_blocks_and_closed(make_app: MakeApp) -> None:
    """An open binary file goes out in blocks that do not follow its line ends."""
    data = b"line\n" * 40_000
    files = []

    class Root(TGController):
        @expose(content_type="application/octet-stream")
        @stream
        def file(self) -> Any:
            files.append(io.BytesIO(data))
            return files[-1]

    blocks = chunks(make_app(Root()), "/file")
    assert b"".join(blocks) == data
    assert len(blocks) == 4
    assert files[0].closed


def test_file_serves_one_request(make_app: MakeApp) -> None:
    """The second request for the same open file gets an error, and none of its data."""
    file = io.BytesIO(b"data" * BLOCK_SIZE)

    class Root(TGController):
        @expose(content_type="application/octet-stream")
        @stream
        def file(self) -> Any:
            return file

    app = make_app(Root(), trace_errors__enable=False)
    first = Call(app, "/file")
    with pytest.raises(StreamError, match="returned to a second request"):
        Call(app, "/file")
    assert first.read() == b"data" * BLOCK_SIZE


def test_iterator_without_a_hash_streams(make_app: MakeApp) -> None:
    """What can be iterated is claimed by what it is, not by what it equals."""

    class Odd:
        def __eq__(self, other: object) -> bool:
            return True

        def __iter__(self) -> Iterator[str]:
            return self

        def __next__(self) -> str:
            raise StopIteration

    class Root(TGController):
        @expose()
        @stream
        def odd(self) -> Any:
            return Odd()

    app = make_app(Root())
    assert [get(app, "/odd").status for _request in range(2)] == ["200 OK"] * 2


def test_text_file_is_read_by_lines_and_closed(make_app: MakeApp) -> None:
    """An open text file is an iterator of lines, encoded as any text."""
    file = io.StringIO("é\nb\n")

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def file(self) -> Any:
            return file

    assert get(make_app(Root()), "/file").text == "é\nb\n"
    assert file.closed


def test_head_closes_a_file_and_runs_nothing(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """A HEAD request gets the headers, and neither a body nor a report."""
    file = io.BytesIO(b"data")
    ran = []

    class Root(TGController):
        @expose(content_type="application/octet-stream")
        @stream(filename="data.bin")
        def file(self) -> Any:
            return file

        @expose()
        @stream(Words)
        def generator(self) -> Iterator[str]:
            ran.append(1)
            yield "x"

    app = make_app(Root())
    call = get(app, "/file", method="HEAD")
    assert call.text == ""
    assert call.headers["Content-Disposition"] == 'attachment; filename="data.bin"'
    assert file.closed
    call = get(app, "/generator", method="HEAD")
    assert (call.status, call.text) == ("200 OK", "")
    assert call.headers["Content-Type"] == "text/x-words; charset=utf-8"
    assert (ran, reports) == ([], [])


CONTENT_TYPES = {
    "format": (Words, "text/x-words; charset=utf-8"),
    "exposed": (Words, "application/x-own"),
    "rendered": (Words, "text/x-words; charset=utf-8"),
    "set": (Words, "text/x-mine; charset=UTF-8"),
    "set_late": (Words, "text/x-late; charset=UTF-8"),
    "raw": (None, "text/html; charset=utf-8"),
    "raw_charset": (None, "text/html; charset=latin-1"),
    "raw_exposed_charset": (None, "text/plain; charset=utf-16"),
}


def types() -> TGController:
    """Controllers that set their content type in every way."""

    class Types(TGController):
        @expose()
        @stream(Words)
        def format(self) -> Iterator[str]:
            yield "é"

        @expose(content_type="application/x-own")
        @stream(Words)
        def exposed(self) -> Iterator[str]:
            yield "é"

        @expose("json")
        @stream(Words)
        def rendered(self) -> Iterator[str]:
            yield "é"

        @expose(content_type="application/x-own")
        @stream(Words)
        def set(self) -> Iterator[str]:
            tg.response.content_type = "text/x-mine"
            return iter("é")

        @expose(content_type="application/x-own")
        @stream(Words)
        def set_late(self) -> Iterator[str]:
            tg.response.content_type = "text/x-late"
            yield "é"

        @expose()
        @stream
        def raw(self) -> Iterator[str]:
            yield "é"

        @expose()
        @stream(charset="latin-1")
        def raw_charset(self) -> Iterator[str]:
            yield "é"

        @expose(content_type="text/plain; charset=utf-16")
        @stream
        def raw_exposed_charset(self) -> Iterator[str]:
            yield "é"
            yield "ß"

    return Types()


@pytest.mark.parametrize("name", CONTENT_TYPES)
def test_content_type_is_what_the_user_set(make_app: MakeApp, name: str) -> None:
    """The response's own type wins, then what @expose says, then the format's."""
    format, content_type = CONTENT_TYPES[name]
    call = Call(make_app(types()), f"/{name}")
    body = call.read()
    assert call.headers["Content-Type"] == content_type
    charset = content_type.partition("charset=")[2] or "utf-8"
    text = {"raw_exposed_charset": "éß"}.get(name, "é" if format is None else "#\né\n.")
    assert body.decode(charset) == text


def test_format_leaves_only_with_an_item_or_the_end(make_app: MakeApp) -> None:
    """A header alone does not leave, so that an error before the first item is one."""

    class Root(TGController):
        @expose()
        @stream(Words, chunk_size=0)
        def late(self) -> Iterator[str]:
            tg.abort(404)
            yield "x"

        @expose()
        @stream(Words, chunk_size=0)
        def one(self) -> Iterator[str]:
            yield "x"
            yield "y"

        @expose()
        @stream(Words, chunk_size=0)
        def none(self) -> Any:
            return []

    app = make_app(Root())
    assert get(app, "/late").status == "404 Not Found"
    assert chunks(app, "/one") == [b"#\nx\n", b"y\n", b"."]
    assert get(app, "/none").text == "#\n."


def test_format_may_yield_nothing_for_an_item(make_app: MakeApp) -> None:
    """An empty piece is no chunk, and a stateful charset is closed at the end."""

    class Kanji(Words):
        def encode(self, items: Iterable[Any]) -> Iterator[str]:
            for item in items:
                yield ""
                yield item

    class Root(TGController):
        @expose()
        @stream(Kanji, chunk_size=0, charset="iso2022_jp")
        def kanji(self) -> Any:
            return ["日", "本"]

    text = b"".join(chunks(make_app(Root()), "/kanji"))
    assert text == "日本".encode("iso2022_jp")


class Greeting(Words):
    """A format with a header that depends on the request."""

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Name": tg.request.params["name"]}


class Short(tuple[int]):
    """A format that is equal to others, with another output."""

    content_type = "text/plain"

    def encode(self, items: Iterable[Any]) -> Iterator[str]:
        yield "short"


class Long(Short):
    """A format that is equal to ``Short``."""

    def encode(self, items: Iterable[Any]) -> Iterator[str]:
        yield "long"


def test_attributes_of_a_format_are_read_for_each_stream(make_app: MakeApp) -> None:
    """A client never gets a header that was made for the client before."""

    class Root(TGController):
        @expose()
        @stream(Greeting())
        def index(self, name: str) -> Iterator[str]:
            yield name

    app = make_app(Root())
    calls = [get(app, f"/?name={name}") for name in ("ada", "bob")]
    assert [call.headers["X-Name"] for call in calls] == ["ada", "bob"]


def test_formats_that_are_equal_are_not_exchanged(make_app: MakeApp) -> None:
    """Each stream uses its own format, although both have the same hash."""

    class Root(TGController):
        @expose()
        def index(self, long: str = "") -> Stream:
            return Stream(numbers(), Long([1]) if long else Short([1]))

    app = make_app(Root())
    assert get(app).text == "short"
    assert get(app, "/?long=yes").text == "long"


def test_format_of_a_request_is_freed_with_its_stream(make_app: MakeApp) -> None:
    """A format may hold objects of its request, such as a session."""
    formats: list[weakref.ref[Words]] = []

    class Root(TGController):
        @expose()
        def index(self) -> Stream:
            format = Words()
            formats.append(weakref.ref(format))
            return Stream(numbers(), format)

    call = Call(make_app(Root()))
    call.read()
    del call
    gc.collect()
    assert formats[0]() is None


def test_head_of_a_list_has_nothing_to_close(make_app: MakeApp) -> None:
    """Not everything that can be iterated can be closed."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def list(self) -> Any:
            return ["x"]

    assert get(make_app(Root()), "/list", method="HEAD").text == ""


def test_chunks_are_gathered_up_to_their_size(make_app: MakeApp) -> None:
    """A fast producer's items leave in blocks, of the option's or default size."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(chunk_size=10)
        def option(self) -> Any:
            return ["abc"] * 9

        @expose()
        @stream(Words)
        def configured(self) -> Any:
            return ["abc"] * 9

    app = make_app(Root(), tgstream__chunk_size=12, tgstream__flush_seconds=60)
    assert chunks(app, "/option") == [b"abcabcabcabc"] * 2 + [b"abc"]
    assert [len(chunk) for chunk in chunks(app, "/configured")] == [14, 12, 12, 1]


def test_slow_items_leave_one_by_one(make_app: MakeApp) -> None:
    """Where a pull has taken its time when an item arrives, the item leaves."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(chunk_size=1000)
        def slow(self) -> Any:
            return ["a", "b", "c"]

    app = make_app(Root(), tgstream__flush_seconds=0)
    assert chunks(app, "/slow") == [b"a", b"b", b"c"]


def test_cached_controller_does_not_serve_one_stream_twice(make_app: MakeApp) -> None:
    """What @cached keeps is refused at the second request, whichever is above."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @tg.cached(type="memory", key=None)
        @stream
        def above(self) -> Iterator[str]:
            yield "x"

        @expose(content_type="text/plain")
        @stream
        @tg.cached(type="memory", key=None)
        def below(self) -> Iterator[str]:
            yield "x"

    app = make_app(Root(), trace_errors__enable=False)
    for path in ("/above", "/below"):
        assert get(app, path).text == "x"
        with pytest.raises(StreamError, match="returned to a second request"):
            get(app, path)


WRONG_ITEMS = [(1, "int"), (None, "NoneType"), ({"a": 1}, "dict"), (["x"], "list")]


@pytest.mark.parametrize(("item", "kind"), WRONG_ITEMS)
def test_raw_items_of_another_type_are_named(
    make_app: MakeApp, item: Any, kind: str
) -> None:
    """The error says which controller, which item, what it was, and what to do."""

    class Root(TGController):
        @expose()
        @stream
        def wrong(self) -> Iterator[Any]:
            yield ""
            yield item

    app = make_app(Root(), trace_errors__enable=False)
    with pytest.raises(TypeError) as raised:
        get(app, "/wrong")
    assert str(raised.value) == (
        f"Root.wrong yielded {kind} as item 2, but without a format a stream sends "
        "str and bytes. Yield those, or pass a format"
    )


def test_format_that_yields_another_type_is_named(make_app: MakeApp) -> None:
    """A user's format that yields what is no text is told so by its name."""

    class Broken(Words):
        def encode(self, items: Iterable[Any]) -> Iterator[Any]:
            yield from items

    class Root(TGController):
        @expose()
        @stream(Broken)
        def wrong(self) -> Iterator[Any]:
            yield 1

    app = make_app(Root(), trace_errors__enable=False)
    with pytest.raises(TypeError, match=r"Broken.encode\(\) yielded int in Root.wrong"):
        get(app, "/wrong")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": 1}, "encode(items), got int: 1"),
        ({"format": "csv"}, "encode(items), got str: 'csv'"),
        ({"speed": 1}, "unknown option speed. The options are charset, chunk_size"),
        ({"commit": "never"}, "of items >= 1, got 'never'"),
        ({"commit": 0}, "of items >= 1, got 0"),
        ({"commit": True}, "of items >= 1, got True"),
        ({"commit": 1.5}, "of items >= 1, got 1.5"),
        ({"chunk_size": -1}, "an integer >= 0, or None, got -1"),
        ({"chunk_size": "1"}, "an integer >= 0, or None, got '1'"),
        ({"filename": b"x"}, "filename must be a str, got bytes: b'x'"),
        ({"charset": "nope"}, "text encoding of Python, got 'nope'. Omit"),
        ({"charset": "hex"}, "text encoding of Python, got 'hex'. Omit"),
        ({"charset": "rot13"}, "text encoding of Python, got 'rot13'. Omit"),
        (
            {"charset": "utf-8\r\n\r\n"},
            "text encoding of Python, got 'utf-8\\r\\n\\r\\n'. Omit",
        ),
        ({"charset": ""}, "text encoding of Python, got ''. Omit"),
        ({"charset": 8}, "text encoding of Python, got 8. Omit"),
    ],
)
def test_invalid_options_are_rejected(options: dict[str, Any], message: str) -> None:
    """At decoration, by an error that names the controller and the value."""

    def controller(self: Any) -> Iterator[str]:
        yield "x"

    with pytest.raises(
        (TypeError, ValueError), match=r"^@stream( on controller)?: "
    ) as a:
        stream(**options)(controller)
    with pytest.raises((TypeError, ValueError), match=r"^Stream: ") as b:
        Stream([], **options)
    assert message in str(a.value)
    assert message in str(b.value)


def test_stream_of_a_value_that_is_not_iterable_is_rejected() -> None:
    """The helper takes an iterable, and not the function that would give one."""
    for value in (numbers, 1, "text", b"bytes", {"a": 1}, None):
        with pytest.raises(TypeError, match=r"^Stream: items must be iterable, got"):
            Stream(value)


def test_controller_without_stream_is_as_ever(make_app: MakeApp) -> None:
    """Beside streams, an application answers as it did."""

    class Root(TGController):
        @expose("json")
        def plain(self) -> Any:
            return {"a": 1}

    call = get(make_app(Root()), "/plain")
    assert json.loads(call.text) == {"a": 1}
    assert Decoration.get_decoration(Root.plain).hooks["before_render"] == []


# Proxies of TG's.


@pytest.mark.parametrize("format", [None, NDJSON])
def test_response_proxy_is_a_response(make_app: MakeApp, format: Any) -> None:
    """A controller may set up ``tg.response``, and return it."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(format)
        def proxy(self) -> Any:
            tg.response.text = "hello"
            return tg.response

    call = get(make_app(Root()), "/proxy")
    assert (call.status, call.text) == ("200 OK", "hello")


@pytest.mark.parametrize("name", ["tmpl_context", "app_globals"])
def test_other_proxy_is_the_object_behind_it(make_app: MakeApp, name: str) -> None:
    """It can be iterated only where that object can."""

    class Root(TGController):
        @expose()
        @stream
        def decorated(self) -> Any:
            return getattr(tg, name)

        @expose()
        def helped(self) -> Any:
            return Stream(tg.response)

    app = make_app(Root(), trace_errors__enable=False)
    with pytest.raises(
        TypeError, match=r"^Root.decorated must return a generator.* got "
    ):
        get(app, "/decorated")
    with pytest.raises(TypeError, match="must be iterable, got Response"):
        get(app, "/helped")


# Things that cannot be decorated.


class Called:
    def __call__(self) -> Any:
        return numbers()


NO_FUNCTIONS: dict[str, Any] = {
    "partial": functools.partial(numbers),
    "object": Called(),
    "class": Called,
    "builtin": len,
    "staticmethod": staticmethod(numbers),
    "classmethod": classmethod(numbers),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", NO_FUNCTIONS)
@pytest.mark.parametrize("options", [None, {}, {"format": NDJSON}])
def test_decorating_no_function_is_refused(kind: str, options: Any) -> None:
    """TurboGears would find no controller there, and answer with 404."""
    value = NO_FUNCTIONS[kind]
    decorate: Any = stream if options is None else stream(**options)
    with pytest.raises(TypeError, match=r"^@stream must .* got \w+: "):
        decorate(value)


def test_bound_method_is_decorated(make_app: MakeApp) -> None:
    """Its function is what TurboGears calls."""

    class Root(TGController):
        @expose(content_type="text/plain")
        def page(self) -> Any:
            return numbers()

    root = Root()
    assert stream(root.page) == root.page
    assert get(make_app(root), "/page").text == "12"


@pytest.mark.parametrize("value", [5, "csv", b"csv", object()])
def test_invalid_format_is_refused_before_anything_is_decorated(value: Any) -> None:
    """The error names the line with the mistake."""
    with pytest.raises(TypeError, match=r"^@stream: a format must have"):
        stream(value)


# A decorator above a Stream.


def test_options_of_the_decorator_apply_where_the_stream_has_none(
    make_app: MakeApp,
) -> None:
    """The format, the name and all others; those of the Stream win."""

    class Root(TGController):
        @expose()
        @stream(CSV(header=["n"]), filename="a.csv", charset="latin-1")
        def merged(self) -> Stream:
            return Stream([["\u00e9"]])

        @expose()
        @stream(CSV(header=["n"]), filename="a.csv")
        def own(self) -> Stream:
            return Stream([1], Words(), filename="b.txt")

        @expose(content_type="text/plain")
        @stream(Words)
        def file(self) -> Stream:
            return Stream(io.BytesIO(b"a\nb\n"))

        @expose(content_type="text/plain")
        @stream(chunk_size=3, length=4)
        def sized(self) -> Stream:
            return Stream(iter(["a", "b", "c", "d"]))

    app = make_app(Root())
    call = Call(app, "/merged")
    assert call.read() == "n\r\n\u00e9\r\n".encode("latin-1")
    assert 'filename="a.csv"' in call.headers["Content-Disposition"]
    call = get(app, "/own")
    assert call.text == "#\n1\n."
    assert 'filename="b.txt"' in call.headers["Content-Disposition"]
    assert get(app, "/file").text == "#\nb'a\\n'\nb'b\\n'\n."
    assert chunks(app, "/sized") == [b"abc", b"d"]


def test_commit_of_the_decorator_applies_to_a_stream(
    make_app: MakeApp, model: Model
) -> None:
    """Each item is stored before the next, although the stream is not read on."""

    def items() -> Iterator[str]:
        for name in ("ada", "bob", "eve"):
            model.DBSession.add(User(name=name))
            yield name

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(commit="each")
        def each(self) -> Stream:
            return Stream(items())

    call = Call(make_app(Root(), model), "/each")
    assert [next(call), next(call)] == [b"ada", b"bob"]
    call.close()
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


def test_stream_of_a_decorated_controller_serves_one_request(
    make_app: MakeApp,
) -> None:
    """The second request is refused, and changes nothing of the first's stream."""
    shared: list[Stream] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(limit=5)
        def same(self) -> Stream:
            if not shared:
                shared.append(Stream(numbers()))
            return shared[0]

    app = make_app(Root(), trace_errors__enable=False)
    call = Call(app, "/same")
    with pytest.raises(StreamError, match="returned to a second request"):
        get(app, "/same")
    assert call.read() == b"12"


# Methods without content.


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE", "CONNECT"])
@pytest.mark.parametrize("path", ["/generator", "/returned", "/helped"])
def test_method_without_content_runs_no_generator(
    make_app: MakeApp, reports: list[Report], method: str, path: str
) -> None:
    """The controller's own headers and status stay, and there is no body."""
    ran = []

    def items() -> Iterator[str]:
        ran.append(1)
        yield "x"

    class Root(TGController):
        @expose()
        @stream(Words, length=3, limit=1)
        def generator(self) -> Iterator[str]:
            yield from items()

        @expose()
        @stream(Words, limit=1)
        def returned(self) -> Any:
            tg.response.headers["Access-Control-Allow-Origin"] = "*"
            return items()

        @expose()
        def helped(self) -> Any:
            tg.response.status = 202
            tg.response.headers["Access-Control-Allow-Origin"] = "*"
            return Stream(items(), Words, length=3, limit=1)

    app = make_app(Root())
    for _ in range(2):  # its slot is free again
        call = Call(app, path, method=method, checked=False)
        assert call.read() == b""
        assert call.headers["Content-Length"] == "0"
        assert call.status_int == (202 if path == "/helped" else 200)
        allowed = call.headers.get("Access-Control-Allow-Origin")
        assert allowed == (None if path == "/generator" else "*")
    assert (ran, reports) == ([], [])
