"""TG's request and context, which are bound in every pull and not between pulls."""

from __future__ import annotations

import contextvars
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tg
from tg import TGController, expose
from tg.configuration.auth import TGAuthMetadata
from tg.i18n import ugettext as _
from tg.request_local import config as tg_config
from tg.request_local import context

from tests.conftest import MakeApp, assert_clean, assert_thread_clean
from tests.core.support import run_on_another_thread
from tests.forks import run_python
from tests.model import Model, User
from tests.wsgi import Call
from tgstream import SSE, Channel, Report, current_stream, stream
from tgstream.core.context import Context, Record, thread

STACKS = [(True, False), (True, True), (False, False), (False, True)]

ROOT = Path(__file__).parents[2]


def read_context() -> str:
    """Return what a controller can read of its request, in one line."""
    environ = tg.request.environ
    rendered = tg.render_template({"name": "ada"}, "kajiki", "tests.templates.page")
    return "|".join(
        [
            tg.request.path,
            tg.request.params["who"],
            tg.response.status,
            str(tg.response.headers["X-Who"]),
            tg.tmpl_context.who,
            type(tg.app_globals._current_obj()).__name__,
            tg.config["which"],
            str(tg.session["who"]),
            tg.cache.get_cache("test").get(
                tg.request.params["who"], createfunc=lambda: "cached"
            ),
            _("text"),
            tg.url("/other", {"a": 1}),
            rendered.strip().splitlines()[-1],
            str(environ["tg.locals"].request is tg.request._current_obj()),
            str(current_stream().items),
        ]
    )


EXPECTED = (
    "/who|{0}|200 OK|{0}|{0}|AppGlobals|config|{0}|cached|text|/other?a=1|"
    "<p>Hello ada, this is /who</p>|True|{1}"
)


def make_root() -> TGController:
    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def who(self, who: str) -> Iterator[str]:
            tg.response.headers["X-Who"] = who
            tg.tmpl_context.who = who
            tg.session["who"] = who
            for _pull in range(4):
                yield read_context()

    return Root()


@pytest.mark.parametrize(("registry_streaming", "debug"), STACKS)
def test_context_is_bound_in_every_pull_on_any_thread(
    make_app: MakeApp, registry_streaming: bool, debug: bool
) -> None:
    """Streams take turns, on any thread, and each stream has its own request."""
    app = make_app(
        make_root(),
        registry_streaming=registry_streaming,
        debug=debug,
        which="config",
        renderers=["json", "kajiki"],
        session__type="memory",
        cache__enabled=True,
    )
    calls = {name: Call(app, f"/who?who={name}") for name in ("ada", "bob", "eve")}
    order = [name for name in calls for _pull in range(4)]
    random.Random(7).shuffle(order)
    for index, name in enumerate(order):
        call = calls[name]
        chunk = run_on_another_thread(call.__next__) if index % 2 else next(call)
        pulled = order[:index].count(name)
        assert chunk.decode() == EXPECTED.format(name, pulled)
        if not debug:  # TG's debugger calls the application only at the first pull
            assert_thread_clean()
    for call in calls.values():
        assert list(call) == []
        call.close()
    assert_thread_clean()


def test_identity_can_be_read_in_every_pull(make_app: MakeApp, model: Model) -> None:
    """``request.identity['user']`` is neither detached nor expired."""

    class AuthMetadata(TGAuthMetadata):
        authenticate = None

        def get_user(self, identity: Any, userid: str) -> User | None:
            return model.DBSession.query(User).filter_by(name=userid).first()

        def get_groups(self, identity: Any, userid: str) -> list[str]:
            return ["readers"]

        def get_permissions(self, identity: Any, userid: str) -> list[str]:
            return ["read"]

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def me(self) -> Iterator[str]:
            for _pull in range(3):
                user = tg.request.identity["user"]
                yield f"{user.name} {len(user.notes)} {tg.request.identity['groups']}"

    model.seed("ada")
    app = make_app(
        Root(),
        model,
        sa_auth__enabled=True,
        sa_auth__authmetadata=AuthMetadata(),
        skip_authentication=True,
    )
    call = Call(app, "/me", REMOTE_USER="ada")
    assert list(call) == [b"ada 0 ['readers']"] * 3
    call.close()
    assert_clean(model)


def test_config_of_each_application_is_bound(make_app: MakeApp) -> None:
    """Two applications run in a process. Each stream has its own configuration."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def which(self) -> Iterator[str]:
            for _pull in range(2):
                yield tg.config["which"]

    root = Root()
    calls = [Call(make_app(root, which=name), "/which") for name in ("one", "two")]
    assert [next(call) for call in calls] == [b"one", b"two"]
    assert [next(call) for call in calls] == [b"one", b"two"]
    for call in calls:
        call.close()


def test_context_that_the_generator_pushed_is_removed(make_app: MakeApp) -> None:
    """Objects that a generator pushes and does not pop do not stay on the thread."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def careless(self) -> Iterator[str]:
            yield "a"
            context._push_object(object())
            tg_config._push_object(object())
            yield "b"
            yield tg.request.path

    call = Call(make_app(Root()), "/careless")
    assert next(call) == b"a"
    assert next(call) == b"b"
    assert_thread_clean()
    assert next(call) == b"/careless"
    call.close()


def test_context_that_was_preserved_is_removed(make_app: MakeApp) -> None:
    """TG's debugger preserves the object on top of a stack. It is removed as well."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def preserved(self) -> Iterator[str]:
            yield "a"
            context._preserve_object()
            tg_config._preserve_object()
            yield "b"

    call = Call(make_app(Root()), "/preserved")
    assert list(call) == [b"a", b"b"]
    call.close()
    assert_thread_clean()


def test_context_is_not_bound_on_a_thread_without_a_request() -> None:
    """TG raises its usual error."""
    with pytest.raises(TypeError, match="No object"):
        run_on_another_thread(lambda: tg.request.path)
    assert Context.__slots__


LATE = """
import tg
from gevent import monkey
monkey.patch_all()
from tests.conftest import make_application
from tests.wsgi import get
from tgstream import stream

class Root(tg.TGController):
    @tg.expose(content_type="text/plain")
    @stream
    def words(self):
        yield "one"

app = make_application(Root(), trace_errors__enable=False)
try:
    get(app, "/words")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_late_patching_by_gevent_is_rejected() -> None:
    """All greenlets would share one request. The error names the options that help."""
    ran = run_python("-c", LATE)
    assert ran.stdout.startswith("StreamError gevent patched threads after")
    assert "--gevent-early-monkey-patch" in ran.stdout
    assert "--preload" in ran.stdout


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")


class Variables(TGController):
    """A stream that sets a context variable, and resets it when it ends."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen
        # Not at import: the fixture make_app resets the milestones of TG.
        expose(content_type="text/plain")(Variables.index)

    @stream(max_seconds=0.2)
    def index(self, name: str) -> Iterator[str]:
        token = variable.set(name)
        try:
            while True:
                yield variable.get()
        finally:
            self.seen.append(variable.get())
            variable.reset(token)
            self.seen.append(variable.get("none"))


@pytest.mark.parametrize("threads", [True, False], ids=["threads", "thread"])
def test_context_variable_of_a_stream_stays_in_that_stream(
    make_app: MakeApp, reports: list[Report], threads: bool
) -> None:
    """Streams take turns. Between pulls, the variable is not set on the thread."""
    seen: list[Any] = []
    app = make_app(Variables(seen))
    calls = [Call(app, f"/index?name={name}") for name in ("ada", "bob")]
    pull = run_on_another_thread if threads else lambda function: function()
    for _round in range(3):
        assert [pull(partial(next, call)) for call in calls] == [b"ada", b"bob"]
        assert pull(lambda: variable.get("none")) == "none"
    for call in calls:
        pull(call.close)
    assert seen == ["ada", "none", "bob", "none"]
    assert [report.error for report in reports] == [None, None]
    assert variable.get("none") == "none"


def test_context_variable_is_set_when_another_thread_ends_the_stream(
    make_app: MakeApp, next_report: Callable[[], Report]
) -> None:
    """The generator's ``finally`` can reset a variable that its first pull has set."""
    seen: list[Any] = []
    call = Call(make_app(Variables(seen)), "/index?name=ada")
    assert next(call) == b"ada"
    report = next_report()
    assert (report.reason, report.error) == ("expired", None)
    assert seen == ["ada", "none"]
    call.close()


def test_context_variable_of_the_controller_is_set_in_its_generator(
    make_app: MakeApp, next_report: Callable[[], Report]
) -> None:
    """The variable is also set in a hook, and with a heartbeat."""
    hooked: list[str] = []

    def hook(report: Report) -> None:
        hooked.append(variable.get("none"))

    def items() -> Iterator[str]:
        yield variable.get("none")
        yield variable.get("none")

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(SSE(heartbeat=20))
        def index(self) -> Iterator[str]:
            variable.set("set")
            return items()

    app = make_app(Root())
    tg.hooks.register("tgstream.finished", hook)
    call = contextvars.copy_context().run(Call, app, "/index")
    body = run_on_another_thread(call.read)
    next_report()
    tg.hooks.disconnect("tgstream.finished", hook)
    assert body == b"data: set\n\n" * 2
    assert hooked == ["set"]


def test_freed_listener_keeps_the_stacks_of_a_new_thread(
    make_app: MakeApp,
) -> None:
    """It may interrupt TG, or tgstream, at each byte code of their first use."""
    make_app(TGController())  # for channels
    channel = Channel("stacks")
    codes = {context._push_object.__func__.__code__, Record.__init__.__code__}

    def use(at: int, listener: Any) -> tuple[bool, Any, Any]:
        count = 0

        def interrupt(frame: Any, event: str, argument: Any) -> Any:
            nonlocal count
            if frame.f_code not in codes:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                count += 1
                if count == at:
                    sys.settrace(None)
                    listener.close()
            return interrupt

        sys.settrace(interrupt)
        try:
            context._push_object("request")
            stack = thread.record.context
        finally:
            sys.settrace(None)
        return count >= at, stack, context._object_stack()

    at, interrupted = 0, True
    while interrupted:
        at += 1
        listener = channel.listen()
        next(listener)
        channel.publish("hello", now=True)
        next(listener)
        interrupted, stack, expected = run_on_another_thread(partial(use, at, listener))
        assert stack == expected == [("request", False)], at
    assert at > 20
