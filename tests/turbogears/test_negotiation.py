"""``@stream([...])``: each request chooses one of several formats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import tg
from tg import TGController, expose
from tg.decorators import before_call, require
from tg.predicates import Predicate

from tests.conftest import MakeApp
from tests.wsgi import Call, get
from tgstream import CSV, NDJSON, JSONArray, Stream, stream


class Denied(Predicate):
    """A predicate that nobody fulfils."""

    message = "denied"

    def evaluate(self, environ: Any, credentials: Any) -> None:
        self.unmet()


class Lines:
    """A format without a suffix."""

    content_type = "text/x-lines"

    def encode(self, items: Iterable[Any]) -> Iterator[str]:
        return (f"{item}\n" for item in items)


def make_export_app(make_app: MakeApp, **config: Any) -> tuple[Any, list[str]]:
    """An application with several controllers, and a list of those that ran."""
    ran: list[str] = []

    class RootController(TGController):
        @expose()
        @stream([CSV, NDJSON, JSONArray], filename="users")
        def users(self, *args: str) -> Any:
            ran.append("users")
            return [{"id": 1}]

        @stream([CSV(header=["id"]), Lines()], filename="users.csv")
        @expose(content_type="text/csv")
        def lines(self) -> Any:
            yield (1,)

        @expose()
        @stream([CSV, NDJSON])
        def own(self) -> Any:
            return Stream([[1]], JSONArray)

        @expose("json")
        @stream([CSV, NDJSON])
        def page(self) -> Any:
            return {"page": True}

        @expose()
        @require(Denied())
        @stream([CSV])
        def secret(self) -> Any:
            return []

        @expose()
        @stream([CSV, NDJSON])
        def varied(self, vary: str = "Cookie, accept") -> Any:
            tg.response.headers["Vary"] = vary
            return [{"id": 1}]

    return make_app(RootController(), **config), ran


def describe(call: Call) -> tuple[int, str | None, str]:
    """The status, the content type and the body of a response."""
    return int(call.status[:3]), call.headers.get("Content-Type"), call.text


CSV_ANSWER = 200, "text/csv; charset=utf-8", "id\r\n1\r\n"
NDJSON_ANSWER = 200, "application/x-ndjson", '{"id":1}\n'
ARRAY_ANSWER = 200, "application/json", '[{"id":1}]'

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.mark.parametrize(
    ("path", "accept", "answer"),
    [
        ("/users", None, CSV_ANSWER),
        ("/users", "*/*", CSV_ANSWER),
        ("/users", BROWSER, CSV_ANSWER),
        ("/users", "application/x-ndjson", NDJSON_ANSWER),
        ("/users", "application/*;q=0.5", NDJSON_ANSWER),
        ("/users", "text/csv;q=0.5, application/json", ARRAY_ANSWER),
        ("/users", "not an accept header,,", CSV_ANSWER),
        ("/users", "text/csv;q=0, application/json;q=0.1", ARRAY_ANSWER),
        ("/users", "application/json; charset=utf-8", ARRAY_ANSWER),
        ("/users", "application/json;q=0.9, text/csv;header=present", CSV_ANSWER),
        ("/users", 'application/json; charset="UTF-8"; q=0.9, */*;q=0.1', ARRAY_ANSWER),
        ("/users", "", CSV_ANSWER),
        ("/users.csv", "application/json", CSV_ANSWER),
        ("/users.json", "text/csv", ARRAY_ANSWER),
        ("/users.JSON", "image/png", ARRAY_ANSWER),
        ("/users.ndjson", None, NDJSON_ANSWER),
        ("/users/john.doe1", "application/json", ARRAY_ANSWER),
    ],
)
def test_format_is_chosen_by_extension_then_accept_then_order(
    make_app: MakeApp, path: str, accept: str | None, answer: tuple[int, str, str]
) -> None:
    """An extension outranks Accept. Without both, the first format is sent."""
    app, _ = make_export_app(make_app)
    environ = {} if accept is None else {"HTTP_ACCEPT": accept}
    call = get(app, path, **environ)
    assert describe(call) == answer
    assert call.headers["Vary"] == "Accept"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/users.csv", "users.csv"),
        ("/users.json", "users.json"),
        ("/lines.csv", "users.csv"),
    ],
)
def test_file_name_gets_the_suffix_of_the_chosen_format(
    make_app: MakeApp, path: str, name: str
) -> None:
    """The name of the download ends with the suffix of its format."""
    app, _ = make_export_app(make_app)
    call = get(app, path)
    assert call.headers["Content-Disposition"] == f'attachment; filename="{name}"'


def test_content_type_of_expose_does_not_replace_the_chosen_one(
    make_app: MakeApp,
) -> None:
    """The client gets the content type that it accepts, without a wrong suffix."""
    app, _ = make_export_app(make_app)
    call = get(app, "/lines", HTTP_ACCEPT="text/x-lines")
    assert describe(call) == (200, "text/x-lines; charset=utf-8", "(1,)\n")
    assert call.headers["Content-Disposition"] == 'attachment; filename="users"'


@pytest.mark.parametrize(
    ("path", "accept"),
    [
        ("/users", "text/html"),
        ("/users", "image/png;q=0.9, text/csv;q=0, application/*;q=0"),
        ("/users", "a/b," * 2500 + "c/d"),
        ("/users.pdf", "text/csv"),
        ("/users.html", None),
    ],
)
def test_request_that_accepts_no_format_gets_406_before_the_controller_runs(
    make_app: MakeApp, path: str, accept: str | None
) -> None:
    """The page lists the formats, and the controller has not run."""
    app, ran = make_export_app(make_app)
    call = get(app, path, **({} if accept is None else {"HTTP_ACCEPT": accept}))
    assert call.status.startswith("406")
    assert "text/csv (.csv), application/x-ndjson (.ndjson)" in call.text
    reason = f"as {path[6:]}." if "." in path else "in a type that you accept."
    assert f"This resource is not available {reason} It is" in call.text
    assert call.headers["Vary"] == "Accept"
    assert ran == []


def test_head_has_the_headers_of_get(make_app: MakeApp) -> None:
    """HEAD chooses the same format, and runs nothing."""
    app, _ = make_export_app(make_app)
    for path in ("/users.json", "/users", "/users.pdf"):
        response = get(app, path)
        head = Call(app, path, "HEAD")
        assert head.read() == b""
        names = ("Content-Type", "Content-Disposition", "Vary")
        for name in names:
            if name in response.headers and "406" not in response.status:
                assert head.headers[name] == response.headers[name]
        assert head.status == response.status


def test_stream_with_its_own_format_keeps_it(make_app: MakeApp) -> None:
    """The list is a default, like every option of the decorator."""
    app, _ = make_export_app(make_app)
    assert describe(get(app, "/own")) == (200, "application/json", "[[1]]")


def test_dict_is_still_a_page(make_app: MakeApp) -> None:
    """A controller may answer with a page in place of the download."""
    app, _ = make_export_app(make_app)
    status, content_type, text = describe(get(app, "/page"))
    assert (status, text) == (200, '{"page": true}')
    assert content_type is not None and content_type.startswith("application/json")


def test_require_is_checked_before_the_format(make_app: MakeApp) -> None:
    """A visitor without a permission does not learn the formats."""
    app, _ = make_export_app(make_app)
    assert get(app, "/secret.pdf").status.startswith(("401", "403"))


def test_vary_of_the_controller_is_kept(make_app: MakeApp) -> None:
    """The name is in the header once, whatever its case."""
    app, _ = make_export_app(make_app)
    assert get(app, "/varied").headers["Vary"] == "Cookie, accept"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_vary_that_the_controller_replaces_has_accept(
    make_app: MakeApp, method: str
) -> None:
    """Without it a cache sends one format to clients of the other."""
    app, _ = make_export_app(make_app)
    call = get(app, "/varied?vary=Cookie", method=method)
    assert call.headers["Vary"] == "Cookie, Accept"


def test_extensions_may_be_disabled(make_app: MakeApp) -> None:
    """With disable_request_extensions only Accept chooses."""
    app, _ = make_export_app(make_app, disable_request_extensions=True)
    assert describe(get(app, "/users/a.json", HTTP_ACCEPT="text/csv")) == CSV_ANSWER


@pytest.mark.parametrize(
    ("formats", "error", "message"),
    [
        ([], ValueError, "at least one format"),
        ([CSV, None], ValueError, "only formats"),
        ([CSV, CSV(bom=True)], ValueError, "different content types"),
        ([CSV, "json"], TypeError, "got str: 'json'"),
    ],
)
def test_invalid_list_of_formats_is_rejected(
    formats: Any, error: type[Exception], message: str
) -> None:
    """The error is raised where the controller is decorated."""
    with pytest.raises(error, match=f"^@stream.*{message}"):
        stream(formats)


def test_hooks_of_the_controller_run_once(make_app: MakeApp) -> None:
    """A choice of the format changes nothing of the way of a request."""
    calls: list[Any] = []

    class RootController(TGController):
        @expose()
        @before_call(lambda *args: calls.append(args))
        @stream([CSV])
        def index(self) -> Any:
            return [[1]]

    assert get(make_app(RootController())).text == "1\r\n"
    assert len(calls) == 1
