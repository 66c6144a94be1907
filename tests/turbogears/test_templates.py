"""``render``: pages that are sent while they are rendered, compared with TG's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from gettext import NullTranslations
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import tg
from tg import TGController, expose
from tg.render import MissingRendererError
from tg.renderers.jinja import JinjaRenderer

from tests.conftest import MakeApp, assert_clean, assert_thread_clean
from tests.core.support import run_on_another_thread
from tests.model import Model, User
from tests.wsgi import Call, get
from tgstream import Stream, StreamError, stream
from tgstream.turbogears.templates import render

FOLDER = Path(__file__).parents[1] / "templates"
STREAMED = ["kajiki", "jinja", "genshi"]
ENGINES = [*STREAMED, "mako"]
USERS = ["ada", "<b>bob</b>", '\N{SNOWMAN} & "eve"', "mallory's"]


class Translations(NullTranslations):
    """A language with one word."""

    def gettext(self, message: str) -> str:
        return "Ahoy" if message == "Hello" else message


class Globals:
    name = "globals & co"


class Helpers:
    @staticmethod
    def shout(text: str) -> str:
        return f"{text.upper()}!"


def reversed_text(value: str) -> str:
    """A filter of the application's own."""
    return value[::-1]


@pytest.fixture
def make_page_app(make_app: MakeApp) -> MakeApp:
    """Makes applications with all the template engines and template variables."""

    def make(root: TGController, model: Model | None = None, **options: Any) -> Any:
        return make_app(
            root,
            model,
            **{
                "renderers": ["json", *ENGINES],
                "default_renderer": "kajiki",
                "app_globals": Globals,
                "helpers": Helpers,
                "jinja_filters": {"reversed": reversed_text},
                "variable_provider": lambda: {
                    "provided": "by <hook>",
                    "identity_of": lambda identity: f"nobody {identity}",
                },
                **options,
            },
        )

    return make


def prepare() -> None:
    """Do what a controller does before it renders."""
    tg.tmpl_context.mood = "fine"
    tg.request_local.context._current_obj().translator = Translations()


def pages(template: str, **exposed: Any) -> TGController:
    """A controller with the same page twice: ``whole``, by TG, and ``streamed``."""

    class Root(TGController):
        @expose(template, **exposed)
        def whole(self) -> dict[str, Any]:
            prepare()
            return {"title": "All & sundry", "users": iter(USERS)}

        @expose(**exposed)
        @stream
        def streamed(self) -> Iterator[str]:
            prepare()
            return render(template, title="All & sundry", users=iter(USERS))

    return Root()


def assert_same(app: Any) -> Call:
    """Check that both pages are the same, to the byte. Return the streamed one."""
    whole, streamed = get(app, "/whole"), get(app, "/streamed")
    assert streamed.text == whole.text
    assert streamed.headers["Content-Type"] == whole.headers["Content-Type"]
    return streamed


@pytest.mark.parametrize("engine", ENGINES)
def test_streamed_page_is_the_page_of_tg(make_page_app: MakeApp, engine: str) -> None:
    """Layout, include, escaping, i18n, helpers and TG's variables work as usual."""
    app = make_page_app(pages(f"{engine}:tests.templates.users"))
    streamed = assert_same(app)
    for text in (
        *("All &amp; sundry", "Ahoy", "HI!", "utf-8", "globals &amp; co", "fine"),
        *("by &lt;hook&gt;", "/a?b=1&amp;c=2", "nobody None", "127.0.0.1", "bob"),
    ):
        assert text in streamed.text
    assert "<b>" not in streamed.text
    assert streamed.headers["Content-Type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize("engine", ENGINES)
def test_page_is_sent_part_by_part(make_page_app: MakeApp, engine: str) -> None:
    """Three engines yield parts. A Mako page is one part."""
    app = make_page_app(pages(f"{engine}:tests.templates.users"))
    call = Call(app, "/streamed")
    count = len(list(call))
    call.close()
    assert count == 1 if engine == "mako" else count > 10


@pytest.mark.parametrize("engine", STREAMED)
def test_page_head_is_sent_before_the_query_starts(
    make_page_app: MakeApp, model: Model, engine: str
) -> None:
    """A generator among the variables starts when the template loops over it."""
    started: list[int] = []

    class Root(TGController):
        @expose()
        @stream
        def users(self) -> Iterator[str]:
            def names() -> Iterator[str]:
                started.append(1)
                for user in model.DBSession.query(User).order_by(User.id):
                    assert user in model.DBSession
                    yield user.name

            prepare()
            return render(f"{engine}:tests.templates.users", title="All", users=names())

    model.seed("ada", "bob")
    call = Call(make_page_app(Root(), model), "/users")
    head = ""
    while "</head>" not in head:
        head += next(call).decode()
    assert "<title>All</title>" in head
    for chunk in call:
        head += chunk.decode()
        if "HI!" in chunk.decode():
            break
    assert not started
    rest = call.read().decode()
    assert started
    assert "bob" in rest
    assert_clean(model)


@pytest.mark.parametrize(
    "template",
    [
        *("kajiki:tests.templates.users", "tests.templates.users"),
        *("kajiki:users.xhtml", "users.xhtml", "tests.templates.users!xhtml"),
    ],
)
def test_template_name_is_that_of_expose(make_page_app: MakeApp, template: str) -> None:
    """With or without the engine, dotted, or as a path in the folder of templates."""
    assert_same(make_page_app(pages(template), paths={"templates": [str(FOLDER)]}))


@pytest.mark.parametrize("engine", ENGINES)
def test_unknown_template_is_an_ordinary_error(
    make_page_app: MakeApp, engine: str
) -> None:
    """It is loaded in the request, before the response starts."""
    root = pages(f"{engine}:tests.templates.nowhere")
    app = make_page_app(root, trace_errors__enable=False)
    with pytest.raises(Exception, match="nowhere") as whole:
        Call(app, "/whole")
    with pytest.raises(type(whole.value), match="nowhere"):
        Call(app, "/streamed")
    assert_thread_clean()


def test_unknown_renderer_raises_the_error_of_tg(make_page_app: MakeApp) -> None:
    """The message explains how to add a renderer."""

    class Root(TGController):
        @expose()
        @stream
        def page(self) -> Iterator[str]:
            with pytest.raises(MissingRendererError, match="'genshi' templates"):
                render("genshi:tests.templates.users")
            with pytest.raises(
                TypeError, match="needs the name of a template as a str"
            ):
                render(None)  # type: ignore[arg-type]
            return render("tests.templates.page", name="ada")

    app = make_page_app(Root(), renderers=["json", "kajiki"])
    assert "Hello ada" in get(app, "/page").text


def test_render_outside_of_a_request_is_rejected() -> None:
    """A template needs the variables that TG has for a request."""
    with pytest.raises(StreamError, match="outside of a request"):
        render("tests.templates.page", name="ada")


@pytest.mark.parametrize("engine", STREAMED)
def test_error_in_a_template_aborts_the_page(
    make_page_app: MakeApp, engine: str
) -> None:
    """Its head has been sent, so that the response must not look complete."""

    class Root(TGController):
        @expose()
        def page(self) -> Stream:
            def users() -> Iterator[str]:
                yield "ada"
                raise LookupError("gone")

            prepare()
            template = f"{engine}:tests.templates.users"
            return Stream(render(template, title="All", users=users()))

    call = Call(make_page_app(Root()), "/page")
    with pytest.raises(LookupError, match="gone"):
        call.read()
    assert_thread_clean()


@pytest.mark.parametrize("engine", STREAMED)
def test_pages_are_rendered_on_any_thread(make_page_app: MakeApp, engine: str) -> None:
    """Two pages alternate, each part on a new thread. Each sees its own request."""

    class Root(TGController):
        @expose()
        @stream
        def page(self, title: str) -> Iterator[str]:
            def users() -> Iterator[str]:
                for name in USERS:
                    yield f"{tg.request.params['title']} {name}"

            prepare()
            return render(f"{engine}:tests.templates.users", title=title, users=users())

    app = make_page_app(Root())
    expected = {title: get(app, f"/page?title={title}").text for title in ("a", "b")}
    calls = {title: Call(app, f"/page?title={title}") for title in ("a", "b")}
    texts = dict.fromkeys(calls, "")
    while calls:
        for title, call in list(calls.items()):
            chunk = run_on_another_thread(partial(next, call, b""))
            texts[title] += chunk.decode()
            if not chunk:
                calls.pop(title).close()
    assert texts == expected


@pytest.mark.parametrize("end", ["read", "close", "drop"])
@pytest.mark.parametrize("engine", STREAMED)
def test_generator_of_a_page_is_closed_with_it(
    make_page_app: MakeApp, model: Model, engine: str, end: str
) -> None:
    """At its end, and when the client disconnects, in the context of the request."""
    closed: list[str] = []

    class Root(TGController):
        @expose()
        @stream
        def page(self) -> Iterator[str]:
            def users() -> Iterator[str]:
                try:
                    for _number in range(9):
                        yield model.DBSession.query(User).one().name
                finally:
                    closed.append(tg.request.path)

            prepare()
            return render(f"{engine}:tests.templates.users", title="All", users=users())

    model.seed("ada")
    call = Call(make_page_app(Root(), model), "/page", checked=False)
    while b"ada" not in next(call):
        assert not closed
    getattr(call, end)()
    assert closed == ["/page"]
    assert_clean(model)


def test_first_error_of_a_page_is_the_one_raised(make_page_app: MakeApp) -> None:
    """The error of the template comes before that of a generator that is closed."""

    class Root(TGController):
        @expose()
        @stream
        def page(self, fails: str) -> Iterator[str]:
            def broken() -> Iterator[str]:
                try:
                    yield ""
                finally:
                    raise OSError("closing")

            def name() -> str:
                raise LookupError("rendering")

            class Name:
                def __str__(self) -> str:
                    return name() if fails else "ada"

            opened = broken()
            next(opened)
            return render("tests.templates.page", name=Name(), opened=opened)

    app = make_page_app(Root(), trace_errors__enable=False)
    with pytest.raises(LookupError, match="rendering"):
        Call(app, "/page?fails=yes").read()
    with pytest.raises(OSError, match="closing"):
        Call(app, "/page?fails=").read()


@pytest.mark.parametrize(
    "options",
    [
        {"templating.genshi.doctype": "html5"},
        {"templating.genshi.method": "html"},
        {"templating.genshi.method": "xml"},
        {"templating.genshi.doctype": {"text/html": ("html5",)}},
        {"templating.genshi.doctype": "svg"},
    ],
)
@pytest.mark.parametrize("content_type", [None, "application/xhtml+xml", "text/html"])
def test_genshi_page_has_the_doctype_and_method_of_tg(
    make_page_app: MakeApp, options: dict[str, Any], content_type: str | None
) -> None:
    """They depend on the configuration and on the content type."""
    root = pages("genshi:tests.templates.users", content_type=content_type)
    assert_same(make_page_app(root, **options))


@pytest.mark.parametrize("engine", ENGINES)
def test_template_sees_the_content_type_of_the_controller(
    make_page_app: MakeApp, engine: str
) -> None:
    """It is set on the response before the page is rendered."""
    template = f"{engine}:tests.templates.users"

    class Root(TGController):
        @expose(template)
        def whole(self) -> dict[str, Any]:
            prepare()
            tg.response.content_type = "text/html; charset=latin-1"
            return {"title": "\xfc", "users": []}

        @expose()
        @stream
        def streamed(self) -> Iterator[str]:
            prepare()
            tg.response.content_type = "text/html; charset=latin-1"
            return render(template, title="\xfc", users=[])

    app = make_page_app(Root())
    whole, streamed = Call(app, "/whole"), Call(app, "/streamed")
    assert streamed.read() == whole.read()
    assert streamed.headers["Content-Type"] == whole.headers["Content-Type"]


@pytest.mark.parametrize("engine", ENGINES)
def test_page_in_a_row_does_not_change_the_content_type_of_the_stream(
    make_page_app: MakeApp, engine: str
) -> None:
    """A page can be a value in a stream of another format."""

    class Lines:
        content_type = "text/csv"

        def encode(self, items: Any) -> Iterator[str]:
            return (f"{len(item)}\r\n" for item in items)

    class Root(TGController):
        @expose()
        @stream(Lines)
        def mails(self) -> Iterator[str]:
            prepare()
            for name in USERS:
                template = f"{engine}:tests.templates.users"
                yield "".join(render(template, title=name, users=USERS))

    call = get(make_page_app(Root()), "/mails")
    assert call.headers["Content-Type"].startswith("text/csv")
    assert len(call.text.splitlines()) == len(USERS)


def test_content_type_that_the_template_sets_stays(make_page_app: MakeApp) -> None:
    """The template sets it in its first part, as in an ordinary page."""

    class Name:
        def __str__(self) -> str:
            tg.response.content_type = "text/plain"
            return "ada"

    class Root(TGController):
        @expose()
        @stream
        def page(self) -> Iterator[str]:
            return render("mako:tests.templates.name", name=Name())

    call = get(make_page_app(Root()), "/page")
    assert call.text == "ada\n"
    assert call.headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize("engine", ENGINES)
def test_flash_message_is_shown_once(make_page_app: MakeApp, engine: str) -> None:
    """The headers delete its cookie, and are sent after the message is rendered."""
    app = make_page_app(pages(f"{engine}:tests.templates.users"))
    cookie = "webflash=" + quote('{"message": "well done", "status": "ok"}')
    whole = get(app, "/whole", HTTP_COOKIE=cookie)
    streamed = get(app, "/streamed", HTTP_COOKIE=cookie)
    assert "well done" in streamed.text
    assert streamed.text == whole.text
    assert streamed.cookies == whole.cookies
    assert streamed.cookies[0].startswith("webflash=; Max-Age=0;")


def test_flash_message_stays_until_a_page_shows_it(make_page_app: MakeApp) -> None:
    """A page that does not show messages keeps the cookie. One chunk is buffered."""

    class Root(TGController):
        @expose()
        @stream
        def page(self) -> Iterator[str]:
            tg.flash("well done")
            return render("tests.templates.page", name="ada")

        @expose()
        @stream
        def long(self) -> Iterator[str]:
            tg.flash("well done")
            return render("kajiki:tests.templates.rows", rows=range(99))

    app = make_page_app(Root(), tgstream__chunk_size=200)
    page = get(app, "/page")
    assert "Hello ada" in page.text
    assert [cookie.partition("=")[0] for cookie in page.cookies] == ["webflash"]
    assert "Max-Age=0" not in page.cookies[0]
    chunks = list(Call(app, "/long", checked=False))
    assert 200 <= len(chunks[0]) < 300
    assert len(chunks) > 200


def test_hooks_of_rendering_are_called(make_page_app: MakeApp) -> None:
    """The hook after rendering cannot change the page, which has been sent."""
    calls: list[Any] = []

    def before(engine: str, name: str, variables: Any, options: Any) -> None:
        variables["name"] += ", my dear"
        calls.append(("before", engine, name, options["cache_key"]))

    def after(engine: str, name: str, variables: Any, options: Any) -> None:
        calls.append(("after", engine, name, options["result"]))
        options["result"] = "ignored"

    class Root(TGController):
        @expose()
        @stream
        def page(self) -> Iterator[str]:
            return render("tests.templates.page", name="ada")

    app = make_page_app(Root())
    tg.hooks.register("before_render_call", before)
    tg.hooks.register("after_render_call", after)
    try:
        assert "Hello ada, my dear, this is /page</p>" in get(app, "/page").text
    finally:
        tg.hooks.disconnect("before_render_call", before)
        tg.hooks.disconnect("after_render_call", after)
    assert calls == [
        ("before", "kajiki", "tests.templates.page", None),
        ("after", "kajiki", "tests.templates.page", ""),
    ]


def test_cached_page_is_one_part(make_page_app: MakeApp) -> None:
    """TG renders the page once for ``tg_cache``, and caches its text."""
    rendered: list[int] = []

    class Root(TGController):
        @expose()
        @stream
        def page(self) -> Iterator[str]:
            def users() -> Iterator[str]:
                rendered.append(1)
                yield "ada"

            prepare()
            cache = {"key": "all", "expire": "never", "type": "memory"}
            template = "kajiki:tests.templates.users"
            return render(template, title="All", users=users(), tg_cache=cache)

    app = make_page_app(Root(), cache__enabled=True)
    texts = []
    for _request in range(2):
        call = Call(app, "/page")
        texts.append([*call])
        call.close()
    assert texts[0] == texts[1]
    assert len(texts[0]) == 1
    assert rendered == [1]


def test_page_of_a_renderer_without_templates_is_one_part(
    make_page_app: MakeApp,
) -> None:
    """``json`` is also a renderer, and does not get TG's variables."""

    class Root(TGController):
        @expose(content_type="application/json")
        @stream
        def page(self) -> Iterator[str]:
            return render("json", name="ada")

    assert get(make_page_app(Root()), "/page").text == '{"name": "ada"}'


def test_page_of_a_custom_renderer_is_one_part(make_page_app: MakeApp) -> None:
    """A subclass of TG's renderer also renders the pages that are streamed."""

    class Shouting(JinjaRenderer):
        def __call__(self, *args: Any, **options: Any) -> str:
            return str(super().__call__(*args, **options)).upper()

    app = make_page_app(pages("jinja:tests.templates.users"))
    functions: dict[str, Any] = tg.config["render_functions"]
    functions["jinja"] = Shouting(functions["jinja"].jinja2_env)
    assert "<TABLE>" in assert_same(app).text


def test_long_page_is_sent_in_chunks(make_page_app: MakeApp) -> None:
    """After many fast parts in a row, the parts are buffered."""
    rows = range(20_000)

    class Root(TGController):
        @expose("kajiki:tests.templates.rows")
        def whole(self) -> dict[str, Any]:
            return {"rows": rows}

        @expose()
        @stream
        def streamed(self) -> Iterator[str]:
            return render("kajiki:tests.templates.rows", rows=rows)

    app = make_page_app(Root())
    whole = get(app, "/whole").text
    chunks = list(Call(app, "/streamed", checked=False))
    assert b"".join(chunks).decode() == whole
    assert len(chunks) < 256 + 2 * len(whole) // 32768 + 20


@pytest.mark.parametrize(
    "options", [{"tgstream.chunk_size": "0"}, {"tgstream.flush_seconds": "1e-9"}]
)
def test_slow_page_is_sent_part_by_part(
    make_page_app: MakeApp, options: dict[str, str]
) -> None:
    """After a slow part the parts are not buffered."""

    class Root(TGController):
        @expose()
        @stream
        def page(self) -> Iterator[str]:
            return render("kajiki:tests.templates.rows", rows=range(1000))

    app = make_page_app(Root(), **options)
    assert len(list(Call(app, "/page", checked=False))) > 2000


def test_head_request_renders_nothing(make_page_app: MakeApp) -> None:
    """The headers are those of the page, and the template uses no variable."""
    no_calls: list[Callable[[], None]] = []

    class Root(TGController):
        @expose()
        @stream
        def page(self) -> Iterator[str]:
            return render("tests.templates.page", name=no_calls.pop)

    call = get(make_page_app(Root()), "/page", method="HEAD")
    assert call.text == ""
    assert call.headers["Content-Type"] == "text/html; charset=utf-8"
