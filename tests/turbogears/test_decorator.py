"""``@stream`` on controllers: combinations, outputs and options."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
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
from tg.decorators import paginate
from webtest import TestApp

from tests.conftest import MakeApp, assert_clean
from tests.model import Model, User
from tests.turbogears.support import UNTRACED, Words, make_numbers
from tests.wsgi import Call, get, get_chunks
from tgstream import CSV, NDJSON, Report, Stream, StreamError, stream
from tgstream.core.files import BLOCK_SIZE

# Combinations with other decorators.


def make_combinations() -> TGController:
    """Return a controller that is decorated in every combination."""

    class Combinations(TGController):
        @expose(content_type="text/plain")
        @stream
        def bare_below(self) -> Iterator[str]:
            yield from make_numbers()

        @stream
        @expose(content_type="text/plain")
        def bare_above(self) -> Iterator[str]:
            yield from make_numbers()

        @expose(content_type="text/plain")
        @stream()
        def called_below(self) -> Iterator[str]:
            yield from make_numbers()

        @stream()
        @expose(content_type="text/plain")
        def called_above(self) -> Iterator[str]:
            yield from make_numbers()

        @expose(content_type="text/plain")
        @stream(chunk_size=100)
        def buffered(self) -> Iterator[str]:
            yield from make_numbers()

        @expose(content_type="text/plain")
        def helper(self) -> Stream:
            return Stream(make_numbers())

        @expose(content_type="text/plain")
        @stream
        def generator(self) -> Iterator[str]:
            return make_numbers()

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
    for name, value in vars(type(make_combinations())).items()
    if hasattr(value, "decoration")
]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_stream_works_with_other_decorators(make_app: MakeApp, name: str) -> None:
    """``@stream`` may be above or below the others, with or without parentheses."""
    call = get(make_app(make_combinations()), f"/{name}?count=2")
    assert (call.status, call.text) == ("200 OK", "12")
    assert call.headers["Content-Type"] == "text/plain; charset=utf-8"


def test_decode_params_works_with_stream(make_app: MakeApp) -> None:
    """The JSON body of a request becomes the parameters of the controller."""
    app = TestApp(make_app(make_combinations()))
    assert app.post_json("/all_of_them", {"count": 3}).text == "123"


def test_require_rejects_a_request_before_the_stream_starts(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The response is a 401, and there is no report of a stream."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        @require(predicates.not_anonymous())
        def secret(self) -> Iterator[str]:
            yield "secret"

    assert get(make_app(Root()), "/secret").status == "401 Unauthorized"
    assert reports == []


def test_error_handler_of_validate_can_stream(make_app: MakeApp) -> None:
    """A stream and its error handler can both be decorated."""

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


def test_methods_of_a_rest_controller_can_stream(make_app: MakeApp) -> None:
    """``get_all``, ``get_one`` and ``post`` stream like other controllers."""

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


# Functions, and the values that they return.


def test_stream_returns_the_function_unchanged() -> None:
    """Code can call and inspect a decorated controller as usual."""

    def controller(self: Any) -> Iterator[str]:
        yield "x"

    assert stream(controller) is controller
    assert stream(Words, commit="each")(controller) is controller
    assert list(controller(None)) == ["x"]


def test_async_function_without_yield_is_rejected() -> None:
    """The error is raised at decoration, and not at the first request."""

    async def coroutine(self: Any) -> None: ...

    async def generator(self: Any) -> Any:
        yield "x"

    with pytest.raises(TypeError, match="an async def must be a generator"):
        stream(coroutine)
    assert stream(generator) is generator


ORDINARY_OUTPUTS: dict[str, Callable[[], Any]] = {
    "text": lambda: "text",
    "bytes": lambda: b"bytes",
    "json": lambda: {"a": 1},
    "nothing": lambda: None,
    "response": lambda: tg.Response("response", content_type="text/x-own"),
}


@pytest.mark.parametrize("output", ORDINARY_OUTPUTS)
def test_output_that_is_not_streamable_goes_to_turbogears(
    make_app: MakeApp, output: str
) -> None:
    """The response is the same as without ``@stream``."""

    class Root(TGController):
        @expose("json")
        def plain(self) -> Any:
            return ORDINARY_OUTPUTS[output]()

        @expose("json")
        @stream
        def decorated(self) -> Any:
            return ORDINARY_OUTPUTS[output]()

    app = make_app(Root())
    plain, decorated = get(app, "/plain"), get(app, "/decorated")
    assert plain.status == decorated.status
    assert plain.headers == decorated.headers
    assert plain.text == decorated.text


@pytest.mark.parametrize(
    "value", [42, object, make_numbers, User(name="ada")], ids=type
)
@pytest.mark.parametrize("format", [None, NDJSON])
def test_output_of_a_wrong_type_is_an_error(
    make_app: MakeApp, value: Any, format: Any
) -> None:
    """TurboGears alone would send an empty page, which looks like a valid response."""

    class Root(TGController):
        @expose()
        @stream(format)
        def decorated(self) -> Any:
            return value

    with pytest.raises(
        TypeError, match=r"^Root.decorated must return a generator.* got "
    ):
        get(make_app(Root(), **UNTRACED), "/decorated")


def test_file_is_read_in_blocks_and_closed(make_app: MakeApp) -> None:
    """The blocks of an open binary file do not depend on its lines."""
    data = b"line\n" * 40_000
    files = []

    class Root(TGController):
        @expose(content_type="application/octet-stream")
        @stream
        def file(self) -> Any:
            files.append(io.BytesIO(data))
            return files[-1]

    blocks = get_chunks(make_app(Root()), "/file")
    assert b"".join(blocks) == data
    assert len(blocks) == 4
    assert files[0].closed


def test_file_can_be_returned_to_one_request_only(make_app: MakeApp) -> None:
    """The second request for the same open file gets an error, and no data."""
    file = io.BytesIO(b"data" * BLOCK_SIZE)

    class Root(TGController):
        @expose(content_type="application/octet-stream")
        @stream
        def file(self) -> Any:
            return file

    app = make_app(Root(), **UNTRACED)
    first = Call(app, "/file")
    with pytest.raises(StreamError, match="returned to a second request"):
        Call(app, "/file")
    assert first.read() == b"data" * BLOCK_SIZE


def test_iterator_without_a_hash_streams(make_app: MakeApp) -> None:
    """tgstream compares iterators by identity, because some are equal to everything."""

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
    """The lines of an open text file are encoded like other text."""
    file = io.StringIO("é\nb\n")

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def file(self) -> Any:
            return file

    assert get(make_app(Root()), "/file").text == "é\nb\n"
    assert file.closed


def test_cached_stream_can_be_returned_to_one_request_only(make_app: MakeApp) -> None:
    """``@cached`` above or below ``@stream`` is an error at the second request."""

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

    app = make_app(Root(), **UNTRACED)
    for path in ("/above", "/below"):
        assert get(app, path).text == "x"
        with pytest.raises(StreamError, match="returned to a second request"):
            get(app, path)


WRONG_ITEMS = [(1, "int"), (None, "NoneType"), ({"a": 1}, "dict"), (["x"], "list")]


@pytest.mark.parametrize(("item", "type_name"), WRONG_ITEMS)
def test_item_of_a_wrong_type_is_an_error(
    make_app: MakeApp, item: Any, type_name: str
) -> None:
    """Without a format, an item must be ``str`` or ``bytes``."""

    class Root(TGController):
        @expose()
        @stream
        def wrong(self) -> Iterator[Any]:
            yield ""
            yield item

    app = make_app(Root(), **UNTRACED)
    with pytest.raises(TypeError) as raised:
        get(app, "/wrong")
    assert str(raised.value) == (
        f"Root.wrong yielded {type_name} as item 2, but without a format a stream "
        "sends str and bytes. Yield those, or pass a format"
    )


def test_output_of_a_format_of_a_wrong_type_is_an_error(make_app: MakeApp) -> None:
    """The error names the custom format and the controller."""

    class Wrong(Words):
        def encode(self, items: Iterable[Any]) -> Iterator[Any]:
            yield from items

    class Root(TGController):
        @expose()
        @stream(Wrong)
        def wrong(self) -> Iterator[Any]:
            yield 1

    app = make_app(Root(), **UNTRACED)
    with pytest.raises(TypeError, match=r"Wrong.encode\(\) yielded int in Root.wrong"):
        get(app, "/wrong")


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": 1}, "tgstream.CSV has, got int: 1"),
        ({"format": "csv"}, "tgstream.CSV has, got str: 'csv'"),
        ({"speed": 1}, "unknown option speed. The options are busy, charset"),
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
    """The error at decoration names the controller, the value and valid values."""

    def controller(self: Any) -> Iterator[str]:
        yield "x"

    errors = (TypeError, ValueError)
    with pytest.raises(errors, match=r"^@stream( on controller)?: ") as decorator_error:
        stream(**options)(controller)
    with pytest.raises(errors, match=r"^Stream: ") as stream_error:
        Stream([], **options)
    assert message in str(decorator_error.value)
    assert message in str(stream_error.value)


def test_stream_of_items_that_are_not_iterable_is_rejected() -> None:
    """A generator function is not iterable, because it must be called first."""
    for value in (make_numbers, 1, "text", b"bytes", {"a": 1}, None):
        with pytest.raises(TypeError, match=r"^Stream: items must be iterable, got"):
            Stream(value)


# TG's proxies.


@pytest.mark.parametrize("format", [None, NDJSON])
def test_tg_response_can_be_returned(make_app: MakeApp, format: Any) -> None:
    """The controller's own response is sent, and not a stream of it."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(format)
        def proxy(self) -> Any:
            tg.response.text = "hello"
            return tg.response

    call = get(make_app(Root()), "/proxy")
    assert (call.status, call.text) == ("200 OK", "hello")


@pytest.mark.parametrize("name", ["tmpl_context", "app_globals"])
def test_proxy_of_an_object_that_is_not_iterable_is_rejected(
    make_app: MakeApp, name: str
) -> None:
    """The error is the same as for the object behind the proxy."""

    class Root(TGController):
        @expose()
        @stream
        def decorated(self) -> Any:
            return getattr(tg, name)

        @expose()
        def helped(self) -> Any:
            return Stream(tg.response)

    app = make_app(Root(), **UNTRACED)
    with pytest.raises(
        TypeError, match=r"^Root.decorated must return a generator.* got "
    ):
        get(app, "/decorated")
    with pytest.raises(TypeError, match="must be iterable, got Response"):
        get(app, "/helped")


# Values that cannot be decorated.


class Called:
    def __call__(self) -> Any:
        return make_numbers()


NOT_FUNCTIONS: dict[str, Any] = {
    "partial": functools.partial(make_numbers),
    "object": Called(),
    "class": Called,
    "builtin": len,
    "staticmethod": staticmethod(make_numbers),
    "classmethod": classmethod(make_numbers),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", NOT_FUNCTIONS)
@pytest.mark.parametrize("options", [None, {}, {"format": NDJSON}])
def test_value_that_is_not_a_function_is_rejected(name: str, options: Any) -> None:
    """TurboGears would not find a controller there, and the response would be a 404."""
    value = NOT_FUNCTIONS[name]
    decorate: Any = stream if options is None else stream(**options)
    with pytest.raises(TypeError, match=r"^@stream must .* got \w+: "):
        decorate(value)


def test_bound_method_can_be_decorated(make_app: MakeApp) -> None:
    """``@stream`` decorates the function of the method, which TurboGears calls."""

    class Root(TGController):
        @expose(content_type="text/plain")
        def page(self) -> Any:
            return make_numbers()

    root = Root()
    assert stream(limit=1)(root.page) == root.page
    app = make_app(root)
    call = Call(app, "/page")
    assert get(app, "/page").status_int == 503
    assert call.read() == b"12"


@pytest.mark.parametrize("value", [5, "csv", b"csv", object()])
def test_invalid_format_is_rejected_before_the_decoration(value: Any) -> None:
    """The traceback ends at the line of the decorator."""
    with pytest.raises(TypeError, match=r"^@stream: a format must have"):
        stream(value)


# Decorated controllers that return a Stream.


def test_options_of_the_decorator_complete_those_of_the_stream(
    make_app: MakeApp,
) -> None:
    """If both have an option, the option of the ``Stream`` is used."""

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
        @stream(chunk_size=100)
        def formatted(self) -> Stream:
            return Stream(make_numbers(), Words)

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
    assert get(app, "/formatted").text == "#\n1\n2\n."
    assert get(app, "/file").text == "#\nb'a\\n'\nb'b\\n'\n."
    assert get_chunks(app, "/sized") == [b"abc", b"d"]


def test_commit_of_the_decorator_applies_to_a_stream(
    make_app: MakeApp, model: Model
) -> None:
    """Each item is committed before the next, although the client disconnects."""

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


def test_stream_can_be_returned_to_one_request_only(
    make_app: MakeApp,
) -> None:
    """The second request gets an error, and the first response stays complete."""
    shared: list[Stream] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(limit=5)
        def same(self) -> Stream:
            if not shared:
                shared.append(Stream(make_numbers()))
            return shared[0]

    app = make_app(Root(), **UNTRACED)
    call = Call(app, "/same")
    with pytest.raises(StreamError, match="returned to a second request"):
        get(app, "/same")
    assert call.read() == b"12"


def test_dict_without_a_template_is_rejected(make_app: MakeApp) -> None:
    """TG has no page for it, and its own error would not name the cause."""

    class RootController(TGController):
        @expose()
        @stream(CSV)
        def page(self) -> dict[str, int]:
            return {"a": 1}

        @expose("json")
        @stream(CSV)
        def document(self) -> dict[str, int]:
            return {"a": 1}

    app = make_app(RootController(), trace_errors__enable=False)
    with pytest.raises(TypeError, match=r"page returned a dict, which @stream\(CSV\)"):
        get(app, "/page")
    assert get(app, "/document").text == '{"a": 1}'
