"""A slot of ``limit=`` is released however its request or its stream ends."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tg
import transaction
from tg import TGController, abort, expose, redirect
from tg.decorators import Decoration
from transaction.interfaces import TransientError

from tests.conftest import MakeApp, assert_clean
from tests.core.support import fork
from tests.model import Model
from tests.wsgi import Call, get
from tgstream import Report, Stream, StreamError, stream
from tgstream.core import limits

ROOT = Path(__file__).parents[2]
NextReport = Callable[[], Report]


def slots(root: TGController) -> list[int]:
    """The number of slots that are taken of each key, for all controllers of a root."""
    groups = [
        limits._groups.get(member)
        for member in vars(type(root)).values()
        if hasattr(member, "__code__")
    ]
    return [len(group) for each in groups if each for group in each.values()]


def items(mode: str) -> Iterator[str]:
    """Items that end, or fail, by ``mode``."""
    if mode == "abort first":
        abort(404)
    if mode == "redirect first":
        redirect("/elsewhere")
    if mode == "fail first":
        raise LookupError("no first")
    if mode == "late header":
        tg.response.headers["X-Broken"] = "a\nb"
    if mode == "exit first":
        raise SystemExit
    yield "one"
    if mode == "fail":
        raise LookupError("no second")
    yield "two"


class FailingToClose:
    """An iterable whose ``close()`` fails."""

    def __init__(self, mode: str) -> None:
        self.items = items(mode)

    def __iter__(self) -> Iterator[str]:
        return self.items

    def close(self) -> None:
        raise LookupError("cannot be closed")


def call_in_mode(mode: str, source: Callable[[str], Any]) -> Any:
    """The output of a controller, which fails or returns by ``mode``."""
    if mode == "abort":
        abort(404)
    if mode == "redirect":
        redirect("/elsewhere")
    if mode == "fail in the controller":
        raise LookupError("no stream")
    if mode == "page":
        return "no stream"
    if mode == "dict":
        return {}
    if mode == "header":
        tg.response.headers["X-Broken"] = "a\nb"
    if mode == "status":
        tg.response.status = 304
    return source(mode)


def make_root(action: str, **options: Any) -> TGController:
    """A root with a limit of one stream, for each way to give it."""

    def by_mode(request: Any) -> str:
        if request.params.get("mode") == "fail in limit_by":
            raise LookupError("no key")
        return "key"

    given: Any = {"limit": 1, "limit_by": by_mode, "limit_action": action, **options}

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(**given)
        def decorated(self, mode: str = "") -> Any:
            return call_in_mode(mode, items)

        @expose(content_type="text/plain")
        def returned(self, mode: str = "") -> Any:
            return call_in_mode(mode, lambda mode: Stream(items(mode), **given))

        @expose(content_type="text/plain")
        @stream(**given)
        def closing(self, mode: str = "") -> Any:
            return call_in_mode(mode, FailingToClose)

        @expose(content_type="text/plain")
        @stream(**given)
        async def asynchronous(self, mode: str = "") -> AsyncIterator[str]:
            for item in items(mode):
                yield item

    return Root()


MODES = [
    "",
    "abort",
    "abort first",
    "dict",
    "exit first",
    "fail",
    "fail first",
    "fail in limit_by",
    "fail in the controller",
    "header",
    "late header",
    "page",
    "redirect",
    "redirect first",
    "status",
]
PATHS = ["/decorated", "/returned", "/closing", "/asynchronous"]


@pytest.fixture(params=["refuse", "replace"])
def action(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Python collects no garbage, so that tracebacks keep what they have."""
    gc.disable()
    yield
    gc.enable()


def try_request(app: Any, path: str, method: str = "GET") -> None:
    """Make a request, and read its body, although it may fail."""
    call = Call(app, path, method, checked=False)
    with suppress(LookupError, StreamError):
        call.read()


@pytest.mark.parametrize(("debug", "spool"), [(True, None), (False, True)])
def test_slot_is_released_after_each_request(
    make_app: MakeApp,
    sqlite_model: Model,
    no_gc: None,
    action: str,
    debug: bool,
    spool: bool | None,
) -> None:
    """The controller and its generator may do anything, with each method.

    TG's debugger keeps the traceback of each error, and with it the stream.
    """
    root = make_root(action, spool=spool)
    app = make_app(root, sqlite_model, debug=debug)
    for path in PATHS:
        for mode in MODES:
            for method in "GET", "HEAD", "OPTIONS":
                try_request(app, f"{path}?mode={mode}", method)
                assert slots(root) == [], (path, mode, method)
    assert_clean(sqlite_model)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("end", [Call.close, Call.drop])
def test_slot_of_an_unread_stream_is_released(
    make_app: MakeApp,
    next_report: NextReport,
    no_gc: None,
    action: str,
    path: str,
    end: Callable[[Call], Any],
) -> None:
    """The response is closed or dropped, before or after its first chunk."""
    root = make_root(action)
    app = make_app(root)
    for pulls in 0, 1:
        call = Call(app, path, checked=False)
        for _ in range(pulls):
            next(call)
        assert slots(root) == [1]
        end(call)
        next_report()
        assert slots(root) == []


# Requests that fail outside of the stream.


def wrap_controller(controller: Any, wrapper: Callable[[Any], Any]) -> None:
    """Call ``wrapper`` with the output of the controller, outside of ``@stream``."""
    Decoration.get_decoration(controller)._register_controller_wrapper(
        lambda caller: lambda *args: wrapper(caller(*args))
    )


def fail(*_: Any) -> Any:
    raise LookupError("no response")


@pytest.mark.parametrize("path", ["/decorated", "/returned"])
@pytest.mark.parametrize(
    "wrapper",
    [fail, lambda output: "a page", lambda output: redirect("/elsewhere")],
    ids=["fails", "page", "redirect"],
)
def test_slot_of_a_stream_that_is_not_returned_is_released(
    make_app: MakeApp, no_gc: None, action: str, path: str, wrapper: Any
) -> None:
    """Another decorator drops the stream. A traceback may keep it."""
    root = make_root(action)
    wrap_controller(getattr(type(root), path[1:]), wrapper)
    app = make_app(root)
    for _ in range(3):
        call = get(app, path)
        assert call.status_int == {"fail": 500}.get(wrapper.__name__, call.status_int)
        assert slots(root) == []


@pytest.mark.parametrize("path", ["/decorated", "/returned"])
@pytest.mark.parametrize("hook", ["before_render", "after_render"])
def test_slot_is_released_if_a_hook_of_the_application_fails(
    make_app: MakeApp, no_gc: None, action: str, path: str, hook: str
) -> None:
    """The hook runs before or after the start of the stream."""
    root = make_root(action)
    app = make_app(root)
    hooks = tg.hooks._hooks.setdefault(hook, [])
    hooks.insert(0, fail)  # before tgstream's own
    try:
        for _ in range(3):
            assert get(app, path).status_int == 500
            assert slots(root) == []
    finally:
        hooks.remove(fail)


@pytest.mark.parametrize("path", ["/decorated", "/returned"])
def test_slot_is_released_if_a_middleware_drops_the_response(
    make_app: MakeApp, no_gc: None, next_report: NextReport, action: str, path: str
) -> None:
    """It answers itself, and does not close the stream."""
    root = make_root(action)
    inner = make_app(root)

    def drop(environ: Any, start_response: Any) -> Any:
        inner(environ, lambda *_: None)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"another body"]

    for _ in range(3):
        call = Call(drop, path)
        assert call.read() == b"another body"
        next_report()
        assert slots(root) == []


@pytest.mark.parametrize("path", ["/decorated", "/returned"])
def test_slot_of_a_stream_in_a_cycle_is_released_by_the_garbage_collector(
    make_app: MakeApp, next_report: NextReport, action: str, path: str
) -> None:
    """The monitor ends the stream. Meanwhile nothing waits."""
    root = make_root(action)
    call = Call(make_app(root), path, checked=False)
    next(call)
    cycle: list[Any] = [call.body, call._chunks]
    cycle.append(cycle)
    call.drop()
    assert slots(root) == [1]
    del cycle
    gc.collect()
    next_report()
    assert slots(root) == []


@pytest.mark.parametrize("path", ["/decorated", "/returned"])
def test_each_attempt_of_a_request_has_the_slot(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    action: str,
    path: str,
) -> None:
    """With ``tm.attempts``, the stream of the first attempt ends before the second."""
    root, failures = make_root(action), [1]

    class Retried(type(root)):  # type: ignore[misc]
        def _after(self, *_: Any, **__: Any) -> None:
            if failures:
                failures.pop()
                transaction.abort()
                raise TransientError("again")

    app = make_app(Retried(), sqlite_model, tm__attempts=2)
    assert get(app, path).text == "onetwo"
    assert [report.reason for report in reports] == ["disconnected", "completed"]
    assert slots(root) == []
    assert_clean(sqlite_model)


def test_spooled_stream_has_no_slot_while_it_is_sent(
    make_app: MakeApp, action: str
) -> None:
    """The limit counts the bodies that are made, so a slow client takes no slot."""
    root = make_root(action, spool=True)
    call = Call(make_app(root), "/decorated")
    assert slots(root) == []
    assert call.read() == b"onetwo"


def test_stream_without_a_request_has_no_slot() -> None:
    """A ``Stream`` that is made and never returned."""
    unused = [Stream(items(""), limit=1) for _ in range(3)]
    assert all(each._slot is None for each in unused)


def test_forked_process_counts_from_zero(make_app: MakeApp) -> None:
    """The streams of its parent are not its own."""
    app = make_app(make_root("refuse"))
    call = Call(app, "/decorated")
    assert get(app, "/decorated").status_int == 503
    if child := fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    else:
        try:
            status = get(app, "/decorated").status_int
        finally:
            os._exit(status != 200)
    assert call.read() == b"onetwo"


KILLED = """
from gevent import monkey
monkey.patch_all()
import gc, gevent, tg
from tests.conftest import make_application
from tests.wsgi import Call, get
from tgstream import SSE, Stream, stream
from tgstream.core import limits

def key(request):
    gevent.sleep(0)
    return "key"

def items():
    gevent.sleep(0)
    try:
        while True:
            yield "one"
            gevent.sleep(0)
    finally:
        gevent.sleep(0)

class Root(tg.TGController):
    @tg.expose()
    def words(self, heartbeat, action):
        gevent.sleep(0)
        format = SSE(heartbeat=5) if heartbeat == "yes" else None
        return Stream(items(), format, limit=1, limit_by=key, limit_action=action)

    @tg.expose(content_type="text/plain")
    @stream(limit=1, limit_by=key)
    def decorated(self):
        gevent.sleep(0)
        return items()

app = make_application(Root())
gc.disable()
path = ""

def close():
    call = Call(app, path, checked=False)
    try:
        for chunk in call:
            pass
    finally:
        call.close()

def drop():
    for chunk in Call(app, path, checked=False):
        pass

def taken():
    groups = [*limits._groups.values()]
    return [len(group) for each in groups for group in each.values()]

def wait_until_free():
    with gevent.Timeout(10):
        while taken():
            gevent.sleep(0.0001)

for path in (
    "/decorated",
    "/words?heartbeat=no&action=refuse",
    "/words?heartbeat=yes&action=refuse",
    "/words?heartbeat=yes&action=replace",
):
    for target in close, drop:
        for switches in range(14):
            greenlet = gevent.spawn(target)
            for _ in range(switches):
                gevent.sleep(0)
            greenlet.kill(timeout=5)
            assert greenlet.ready()
            wait_until_free()
        greenlets = [gevent.spawn(target) for _ in range(3)]
        gevent.joinall(greenlets, timeout=0.002)
        gevent.killall(greenlets)
        wait_until_free()
print("done", flush=True)
"""


def test_slot_of_a_killed_greenlet_is_released() -> None:
    """It is killed at any switch: in the key, the controller, the generator, its end.

    No garbage is collected.
    """
    command = [sys.executable, "-c", KILLED]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (ran.stdout, ran.returncode) == ("done\n", 0), ran.stderr
