"""Async generators: their items are made on an event loop, and sent by any server."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tg
from tg import TGController, abort, expose, redirect

import tgstream
from tests.conftest import MakeApp, assert_clean, assert_thread_clean
from tests.core.support import reasons
from tests.forks import run_python
from tests.model import Model, Note, User
from tests.wsgi import Call, get
from tgstream import (
    CSV,
    NDJSON,
    SSE,
    XLSX,
    Report,
    Stream,
    StreamError,
    current_stream,
    drain,
    stream,
)
from tgstream.core.heartbeat import HEARTBEAT

SHORT = 0.02
variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")


def page(function: Callable[[], Any], *decorators: Any, **options: Any) -> TGController:
    """A root controller whose index page is an async generator function."""

    class Root(TGController):
        pass

    async def index(self: Any) -> AsyncIterator[Any]:
        async for item in function():
            yield item

    Root.index = expose(content_type="text/plain")(
        stream(*decorators, **options)(index)
    )
    return Root()


def has_request() -> bool:
    """Whether a request of TurboGears is bound to this thread."""
    try:
        return bool(tg.request.path)
    except TypeError:
        return False


async def wait_forever() -> None:
    await asyncio.Event().wait()


async def count(number: int) -> AsyncIterator[str]:
    for item in range(number):
        await asyncio.sleep(0)
        yield str(item)


# Items, formats and errors.


def test_items_of_an_async_generator_are_sent(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """They are made on the thread of the loop, one for each pull, and none ahead."""
    made: list[tuple[int, str]] = []

    async def items() -> AsyncIterator[str]:
        for number in range(3):
            made.append((number, threading.current_thread().name))
            yield str(number)

    call = Call(make_app(page(items)))
    for number in range(3):
        assert next(call) == str(number).encode()
        assert_thread_clean()
        assert made[-1] == (number, "tgstream-async")
    assert call.read() == b""
    assert [(r.reason, r.items, r.chunks) for r in reports] == [("completed", 3, 3)]


class Numbers:
    """An async iterable without a generator, whose ``aclose()`` is counted."""

    def __init__(self) -> None:
        self.number = self.closed = 0

    def __aiter__(self) -> Numbers:
        return self

    async def __anext__(self) -> str:
        await asyncio.sleep(0)
        self.number += 1
        if self.number > 3:
            raise StopAsyncIteration
        return str(self.number)

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self.closed += 1


class Both:
    """An iterable that can also be iterated on an event loop."""

    def __iter__(self) -> Iterator[bytes]:
        yield b"without a loop"

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"on a loop"


@pytest.mark.parametrize("decorated", [True, False])
def test_iterable_that_needs_no_loop_is_sent_without_one(
    make_app: MakeApp, decorated: bool
) -> None:
    """TurboGears itself can send it, too."""

    class Root(TGController):
        def index(self) -> Any:
            return Both()

    if decorated:
        stream(Root.index)
    expose(content_type="text/plain")(Root.index)
    assert get(make_app(Root())).text == "without a loop"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("decorated", [True, False])
def test_controller_may_return_an_async_iterator(
    make_app: MakeApp, decorated: bool, method: str
) -> None:
    """With the decorator or in a ``Stream``. It is closed, also for HEAD."""
    numbers = Numbers()

    class Root(TGController):
        def index(self) -> Any:
            return numbers if decorated else Stream(numbers)

    if decorated:
        stream(Root.index)
    expose(content_type="text/plain")(Root.index)
    body = Call(make_app(Root()), method=method).read()
    assert (body, numbers.closed) == (b"123" if method == "GET" else b"", 1)


def test_head_runs_nothing_of_an_async_generator(make_app: MakeApp) -> None:
    """The loop gets no task."""
    ran: list[int] = []

    async def items() -> AsyncIterator[str]:
        ran.append(1)
        yield "never"

    call = Call(make_app(page(items)), method="HEAD")
    assert (call.status, call.read(), ran) == ("200 OK", b"", [])


@pytest.mark.parametrize("chunk_size", [0, 64, None])
@pytest.mark.parametrize(
    ("format", "text"),
    [
        (CSV, "0\r\n1\r\n"),
        (NDJSON, '["0"]\n["1"]\n'),
        (CSV(bom=True), "\ufeff0\r\n1\r\n"),
    ],
)
def test_formats_encode_async_items(
    make_app: MakeApp, format: Any, text: str, chunk_size: int | None
) -> None:
    """Each format takes them like those of a generator."""

    async def items() -> AsyncIterator[list[str]]:
        async for item in count(2):
            yield [item]

    app = make_app(page(items, format, chunk_size=chunk_size))
    assert get(app).text == text


def test_sheets_and_spooled_streams_take_async_items(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """A mapping of async sources is a sheet for each, and ``spool=True`` works."""

    class Root(TGController):
        @expose()
        @stream(XLSX)
        def sheets(self) -> Any:
            return {"a": rows(), "b": [[3]]}

        @expose(content_type="text/plain")
        @stream(spool=True)
        async def spooled(self) -> AsyncIterator[str]:
            async for item in count(3):
                yield item

    async def rows() -> AsyncIterator[list[int]]:
        yield [1]
        yield [2]

    app = make_app(Root())
    assert Call(app, "/sheets").read().startswith(b"PK")
    call = Call(app, "/spooled")
    assert (call.headers["Content-Length"], call.read()) == ("3", b"012")
    assert [(r.reason, r.items) for r in reports] == [
        ("completed", 3),
        ("completed", 3),
    ]


def test_errors_before_the_first_item_are_ordinary_responses(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """``abort()``, ``redirect()``, headers and error pages work as in a controller."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        async def index(self, then: str = "") -> AsyncIterator[str]:
            await asyncio.sleep(0)
            if then == "abort":
                abort(404, "no such page")
            if then == "redirect":
                redirect("/elsewhere")
            if then == "fail":
                raise LookupError("no items")
            tg.response.headers["X-Late"] = "set"
            tg.response.status = 202
            yield "first"

    app = make_app(Root(), sqlite_model)
    call = get(app)
    assert (call.status, call.headers["X-Late"]) == ("202 Accepted", "set")
    assert get(app, "/?then=abort").status == "404 Not Found"
    call = get(app, "/?then=redirect")
    assert (call.status, call.headers["Location"]) == (
        "302 Found",
        "http://127.0.0.1/elsewhere",
    )
    assert get(app, "/?then=fail").status.startswith("500")
    assert reasons(reports) == ["completed", "failed"]
    assert_clean(sqlite_model)


def test_error_halfway_aborts_the_transfer(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """Uncommitted changes are rolled back."""

    async def items() -> AsyncIterator[str]:
        sqlite_model.DBSession.add(Note(text="lost"))
        yield "first"
        await asyncio.sleep(0)
        raise LookupError("no more")

    call = Call(make_app(page(items), sqlite_model))
    assert next(call) == b"first"
    with pytest.raises(LookupError, match="no more"):
        next(call)
    call.close()
    assert reasons(reports) == ["failed"]
    assert sqlite_model.texts() == []
    assert_clean(sqlite_model)


@pytest.mark.parametrize(
    "error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError]
)
@pytest.mark.parametrize("in_task", [True, False])
def test_errors_that_stop_a_thread_do_not_stop_the_loop(
    make_app: MakeApp, reports: list[Report], error: type[BaseException], in_task: bool
) -> None:
    """Only the stream that raised them fails, with a sentence."""

    async def fail() -> None:
        raise error

    async def items() -> AsyncIterator[str]:
        yield "first"
        await (asyncio.gather(fail()) if in_task else fail())

    call = Call(make_app(page(items)))
    next(call)
    with pytest.raises(StreamError, match=f"raised {error.__name__}, which would stop"):
        next(call)
    call.close()
    assert reasons(reports) == ["failed"]
    assert get(make_app(page(lambda: count(2)))).text == "01"


class Failing:
    """An async iterable with ordinary methods, one of which raises StopIteration."""

    def __init__(self, at: str) -> None:
        self.at = at

    def __aiter__(self) -> Failing:
        if self.at == "start":
            raise StopIteration
        return self

    def __anext__(self) -> Any:
        if self.at == "item":
            raise StopIteration
        raise StopAsyncIteration

    def aclose(self) -> Any:
        if self.at == "close":
            raise StopIteration
        return asyncio.sleep(0)


@pytest.mark.parametrize("at", ["start", "item", "close"])
def test_stop_iteration_is_an_error(
    make_app: MakeApp, reports: list[Report], at: str
) -> None:
    """It does not make a complete response of the items so far."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def index(self) -> Any:
            return Failing(at)

    assert get(make_app(Root())).status.startswith("500")
    [report] = reports
    assert (report.reason, type(report.error)) == ("failed", RuntimeError)
    assert "raised StopIteration" in str(report.error)


# The context.


def test_context_is_bound_around_each_step(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """Streams that take turns on the loop see their own request and session."""
    turns = [threading.Event(), threading.Event()]
    seen: list[list[Any]] = [[], []]

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        async def index(self, number: str) -> AsyncIterator[str]:
            mine = int(number)
            variable.set(number)
            for _ in range(20):
                await asyncio.sleep(0)
                session = sqlite_model.DBSession()
                seen[mine].append(
                    (tg.request.params["number"], variable.get(), session)
                )
                assert current_stream()._body is not None
                yield number
                turns[mine].set()
                while not turns[1 - mine].is_set():
                    await asyncio.sleep(0.001)

    app = make_app(Root(), sqlite_model)
    calls = [Call(app, f"/?number={number}") for number in range(2)]
    readers = [threading.Thread(target=call.read) for call in calls]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(10)
    for number in range(2):
        [(param, value, _)] = set(seen[number])
        assert (param, value) == (str(number), str(number))
    assert seen[0][0][2] is not seen[1][0][2]
    assert_clean(sqlite_model)


def test_tasks_of_a_stream_have_its_context(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """So do the tasks of ``gather()`` and ``wait_for()``, and threads."""

    async def read() -> str:
        await asyncio.sleep(0)
        user = sqlite_model.DBSession.get(User, 1)
        assert user is not None
        return f"{tg.request.path} {user.name}"

    def read_in_thread() -> str:
        user = sqlite_model.DBSession.get(User, 1)
        assert user is not None
        assert threading.current_thread().name.startswith("tgstream-to-thread")
        assert current_stream().items == 0
        return f"{tg.request.path} {user.name} {variable.get()}"

    async def items() -> AsyncIterator[str]:
        variable.set("in a thread")
        both = await asyncio.gather(read(), asyncio.wait_for(read(), 10))
        in_thread = await asyncio.to_thread(read_in_thread)
        bare = await asyncio.get_running_loop().run_in_executor(None, has_request)
        yield ", ".join([*both, in_thread, str(bare)])

    sqlite_model.seed("Ann")
    app = make_app(page(items), sqlite_model)
    assert get(app).text == "/ Ann, / Ann, / Ann in a thread, False"
    assert_clean(sqlite_model)


def test_task_that_outlives_its_stream_has_no_context(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """It goes on, and cannot use what has ended."""
    ended, found = threading.Event(), threading.Event()
    seen: list[bool] = []

    async def outlive() -> None:
        while not ended.is_set():
            await asyncio.sleep(0.001)
        seen.append(has_request())
        try:
            tgstream.commit()
        except StreamError:
            seen.append(False)
        seen.append(await asyncio.to_thread(has_request))
        found.set()

    tasks: list[Any] = []

    async def items() -> AsyncIterator[str]:
        tasks.append(asyncio.create_task(outlive()))
        yield "first"

    assert get(make_app(page(items), sqlite_model)).text == "first"
    ended.set()
    assert found.wait(10)
    assert seen == [False, False, False]


def test_task_of_a_stream_must_be_of_a_coroutine(make_app: MakeApp) -> None:
    """The error is that of asyncio."""

    async def items() -> AsyncIterator[str]:
        future: Any = asyncio.get_running_loop().create_future()
        try:
            await asyncio.create_task(future)
        except TypeError as error:
            yield str(error)

    assert "coroutine was expected" in get(make_app(page(items))).text


def test_dropped_nested_generator_is_closed_in_its_own_context(
    make_app: MakeApp, no_garbage_collector: None
) -> None:
    """Also if Python collects it in a step of another stream."""
    users: list[str] = []
    closed = threading.Event()

    async def nested() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            users.append(tg.request.params["user"] if has_request() else "nobody")
            closed.set()

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        async def index(self, user: str) -> AsyncIterator[str]:
            if user == "Ann":
                cycle: list[Any] = [nested()]
                await anext(cycle[0])
                cycle.append(cycle)
                del cycle
            else:
                gc.collect()
            yield user

    app = make_app(Root())
    call = Call(app, "/?user=Ann")
    assert next(call) == b"Ann"
    assert get(app, "/?user=Bob").text == "Bob"
    assert closed.wait(10)
    assert call.read() == b""
    assert users == ["Ann"]


@pytest.mark.parametrize("read", [True, False])
def test_stream_ends_after_the_nested_generators_that_it_has_dropped(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report], read: bool
) -> None:
    """``async for`` does not close the generator. Its ``finally`` has the session."""
    seen: list[tuple[str, int]] = []

    async def nested() -> AsyncIterator[str]:
        try:
            yield "first"
            yield "second"
        finally:
            await asyncio.sleep(SHORT)
            sqlite_model.DBSession.add(Note(text="added at the end"))
            seen.append((tg.request.path, len(reports)))

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        async def index(self) -> AsyncIterator[str]:
            async for item in nested():
                yield item
                break

    call = Call(make_app(Root(), sqlite_model))
    assert next(call) == b"first"
    if read:
        assert call.read() == b""
    call.close()
    assert seen == [("/", 0)]
    assert reasons(reports) == ["completed" if read else "disconnected"]
    assert sqlite_model.texts() == (["added at the end"] if read else [])
    assert_clean(sqlite_model)


@pytest.mark.parametrize("caught", [True, False])
def test_timeout_that_is_over_at_a_yield_reaches_the_generator(
    make_app: MakeApp, reports: list[Report], caught: bool
) -> None:
    """It may yield more items, which are made one for each pull, or fail."""
    over, made = threading.Event(), list[str]()

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        async def index(self) -> AsyncIterator[str]:
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_soon(task.cancel)  # as asyncio.timeout()
            try:
                yield "first"
            except asyncio.CancelledError:
                over.set()
                if not caught:
                    raise TimeoutError("too slow") from None
            for item in "second", "third":
                made.append(item)
                yield item

    call = Call(make_app(Root(), trace_errors__enable=False), checked=False)
    assert next(call) == b"first"
    assert over.wait(10)
    if caught:
        assert (next(call), made) == (b"second", ["second"])
        assert (next(call), made) == (b"third", ["second", "third"])
        assert call.read() == b""
    else:
        with pytest.raises(TimeoutError, match="too slow"):
            next(call)
    assert reasons(reports) == ["completed" if caught else "failed"]


@pytest.mark.parametrize("in_thread", [True, False])
def test_cancellation_after_the_last_step_hides_no_error(
    make_app: MakeApp, reports: list[Report], in_thread: bool
) -> None:
    """The response of the items so far must not look complete."""
    runs, go = threading.Event(), threading.Event()

    def work() -> None:
        runs.set()
        go.wait(10)

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        async def index(self) -> AsyncIterator[str]:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            yield "first"
            if in_thread:
                context = contextvars.copy_context()
                loop.run_in_executor(None, context.run, work)
                assert runs.wait(10)
                loop.call_later(SHORT, go.set)
            loop.call_soon(task.cancel)
            raise LookupError("no more items")

    call = Call(make_app(Root()), checked=False)
    with pytest.raises(LookupError, match="no more items"):
        call.read()
    assert reasons(reports) == ["failed"]
    assert go.is_set() == in_thread


def test_timeouts_and_tasks_work_across_a_yield(make_app: MakeApp) -> None:
    """All steps of a stream are in one task."""
    tasks: set[Any] = set()

    async def items() -> AsyncIterator[str]:
        for number in range(3):
            tasks.add(asyncio.current_task())
            yield str(number)
            await asyncio.sleep(0)
        tasks.add(asyncio.current_task())

    assert get(make_app(page(items))).text == "012"
    assert len(tasks) == 1


# The database.


@pytest.mark.parametrize("commit", ["each", 2, "end", "manual"])
def test_commits_are_those_of_a_generator(
    make_app: MakeApp, model: Model, reports: list[Report], commit: Any
) -> None:
    """An item is committed before its chunk is sent."""
    stored: list[int] = []

    async def items() -> AsyncIterator[str]:
        for number in range(4):
            await asyncio.sleep(0)
            model.DBSession.add(Note(text=f"note {number}"))
            if number == 2 and commit == "manual":
                tgstream.flush()
                tgstream.commit()
                tgstream.rollback()
            yield str(number)

    call = Call(make_app(page(items, commit=commit), model))
    for _ in call:
        stored.append(len(model.texts()))
    call.close()
    assert (
        stored
        == {
            "each": [1, 2, 3, 4],
            2: [0, 2, 2, 4],
            "end": [0, 0, 0, 0],
            "manual": [0, 0, 3, 3],
        }[commit]
    )
    assert len(model.texts()) == (3 if commit == "manual" else 4)
    assert_clean(model)


def test_session_is_released_after_the_functions_in_threads(
    make_app: MakeApp, model: Model, next_report: Callable[[], Report]
) -> None:
    """A stream whose client disconnects does not close the session in use."""
    go, runs = threading.Event(), threading.Event()
    seen: list[Any] = []

    def work() -> None:
        runs.set()
        assert go.wait(10)
        seen.append(model.DBSession.query(User).count())

    async def items() -> AsyncIterator[str]:
        yield "first"
        try:
            await asyncio.to_thread(work)
        finally:
            seen.append("finally")
            go.set()

    call = Call(make_app(page(items, SSE(heartbeat=SHORT)), model), checked=False)
    next(call)
    next(call)
    assert runs.wait(10)
    call.close()
    assert next_report().reason == "disconnected"
    assert seen == ["finally", 0]
    assert_clean(model)


def test_call_in_a_thread_after_the_last_step_has_no_session(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """The stream waits for the calls before its end, and not for those of its tasks."""
    runs, go, ended = threading.Event(), threading.Event(), threading.Event()
    seen: list[bool] = []

    def wait() -> None:
        runs.set()
        go.wait(10)

    def work() -> None:
        seen.append(has_request())
        ended.set()

    async def outlive() -> None:
        await asyncio.to_thread(wait)
        context = contextvars.copy_context()
        asyncio.get_running_loop().run_in_executor(None, context.run, work)
        assert ended.wait(10)  # in the step after which the stream ends

    async def items() -> AsyncIterator[str]:
        task = asyncio.create_task(outlive())
        yield "first"
        await asyncio.to_thread(runs.wait, 10)
        assert not task.done()
        asyncio.get_running_loop().call_later(SHORT, go.set)

    assert get(make_app(page(items), sqlite_model)).text == "first"
    assert ended.wait(10)
    assert seen == [False]
    assert_clean(sqlite_model)


# The end.


class Ends(TGController):
    """Async streams that wait after their first item."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.waits = threading.Event()
        self.seen: list[str] = []
        for name in ("lines", "events", "expiring"):
            expose(content_type="text/plain")(getattr(Ends, name))

    async def _make(self) -> AsyncIterator[str]:
        path = tg.request.path
        try:
            self.model.DBSession.add(Note(text="uncommitted"))
            yield "open"
            self.waits.set()
            await wait_forever()
        except BaseException as error:
            self.seen.append(type(error).__name__)
            raise
        finally:
            await asyncio.sleep(0)  # a clean-up may wait, and is not cancelled again
            self.seen.append(f"closed {tg.request.path == path}")

    @stream
    def lines(self) -> Any:
        return self._make()

    @stream(SSE(heartbeat=SHORT), commit="end")
    def events(self) -> Any:
        return self._make()

    @stream(SSE(heartbeat=SHORT), commit="end", max_seconds=0.1)
    def expiring(self) -> Any:
        return self._make()


@pytest.fixture
def ends(sqlite_model: Model) -> Ends:
    return Ends(sqlite_model)


@pytest.mark.parametrize("end", [Call.close, Call.drop])
@pytest.mark.parametrize("pulls", [0, 1])
@pytest.mark.parametrize("path", ["/lines", "/events"])
def test_generator_at_its_yield_is_closed(
    make_app: MakeApp,
    sqlite_model: Model,
    ends: Ends,
    next_report: Callable[[], Report],
    end: Callable[[Call], None],
    pulls: int,
    path: str,
) -> None:
    """It gets a ``GeneratorExit``, and the stream has ended then."""
    call = Call(make_app(ends, sqlite_model), path, checked=False)
    for _ in range(pulls):
        next(call)
    end(call)
    assert next_report().reason == "disconnected"
    assert ends.seen == ["GeneratorExit", "closed True"]
    assert sqlite_model.texts() == []
    assert_clean(sqlite_model)


@pytest.mark.parametrize("end", [Call.close, Call.drop])
def test_generator_that_waits_is_cancelled(
    make_app: MakeApp,
    sqlite_model: Model,
    ends: Ends,
    next_report: Callable[[], Report],
    end: Callable[[Call], None],
) -> None:
    """It gets one ``CancelledError`` when its client disconnects."""
    call = Call(make_app(ends, sqlite_model), "/events", checked=False)
    next(call)
    assert next(call) == HEARTBEAT
    assert ends.waits.wait(10)
    end(call)
    del call
    gc.collect()
    report = next_report()
    assert (report.reason, report.error) == ("disconnected", None)
    assert ends.seen == ["CancelledError", "closed True"]
    assert sqlite_model.texts() == []
    assert_clean(sqlite_model)


def test_max_seconds_cancel_a_generator_that_waits(
    make_app: MakeApp,
    sqlite_model: Model,
    ends: Ends,
    next_report: Callable[[], Report],
) -> None:
    """An event stream ends normally, so that browsers reconnect."""
    body = Call(make_app(ends, sqlite_model), "/expiring").read()
    assert body.replace(HEARTBEAT, b"") == b"data: open\n\n"
    report = next_report()
    assert (report.reason, report.error) == ("expired", None)
    assert ends.seen == ["CancelledError", "closed True"]
    assert_clean(sqlite_model)


def test_drain_cancels_generators_that_wait(
    make_app: MakeApp, sqlite_model: Model, ends: Ends, reports: list[Report]
) -> None:
    """It returns when they have ended. Their responses are aborted."""
    call = Call(make_app(ends, sqlite_model), "/lines", checked=False)
    next(call)
    failed: list[BaseException] = []

    def read() -> None:
        try:
            list(call)
        except StreamError as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert ends.waits.wait(10)
    assert drain()
    reader.join(10)
    call.close()
    assert "was drained before its end" in str(failed[0])
    assert reasons(reports) == ["drained"]
    assert ends.seen == ["CancelledError", "closed True"]
    assert_clean(sqlite_model)


def test_cancelled_generator_may_yield_a_last_item(
    make_app: MakeApp, next_report: Callable[[], Report]
) -> None:
    """Like a generator that checks ``ending``. The item is sent."""

    async def items() -> AsyncIterator[str]:
        yield "first"
        try:
            await wait_forever()
        except asyncio.CancelledError:
            yield "last"
        yield "never"

    call = Call(make_app(page(items, SSE, max_seconds=0.1)))
    assert call.read() == b"data: first\n\ndata: last\n\n"
    assert next_report().reason == "expired"


def test_generator_that_ignores_its_close_is_reported(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The error is Python's, and the stream has ended."""

    async def items() -> AsyncIterator[str]:
        try:
            yield "first"
        finally:
            yield "another"

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def index(self) -> Any:
            return items()

    call = Call(make_app(Root()), checked=False)
    next(call)
    call.close()
    [report] = reports
    assert report.reason == "disconnected"
    assert "ignored GeneratorExit" in str(report.error)


def test_dropped_async_stream_ends_at_once(
    make_app: MakeApp, sqlite_model: Model, no_garbage_collector: None
) -> None:
    """The task keeps neither the stream nor, after its end, the body."""
    kept: list[weakref.ref[Any]] = []

    async def items() -> AsyncIterator[str]:
        kept.append(weakref.ref(current_stream()))
        kept.append(weakref.ref(current_stream()._body))
        yield "first"
        yield "second"

    call = Call(make_app(page(items), sqlite_model), checked=False)
    next(call)
    call.drop()
    assert [reference() for reference in kept] == [None, None]
    assert_clean(sqlite_model)


def test_async_stream_cannot_be_read_on_the_event_loop(make_app: MakeApp) -> None:
    """It would wait for itself. In a thread it works."""
    inner = make_app(page(lambda: count(2)), trace_errors__enable=False)

    async def items() -> AsyncIterator[str]:
        try:
            get(inner)
        except StreamError as error:
            yield str(error)
        yield (await asyncio.to_thread(lambda: get(inner))).text

    text = get(make_app(page(items))).text
    assert "was read on the event loop" in text
    assert text.endswith("01")


def test_stream_that_is_dropped_on_the_event_loop_is_ended_elsewhere(
    make_app: MakeApp, next_report: Callable[[], Report]
) -> None:
    """The loop does not wait for itself."""
    other = [Call(make_app(page(lambda: count(5))), checked=False)]
    next(other[0])
    next(other[0])

    async def items() -> AsyncIterator[str]:
        other.pop().drop()
        yield "first"

    assert get(make_app(page(items))).text == "first"
    assert sorted(next_report().reason for _ in range(2)) == [
        "completed",
        "disconnected",
    ]


@pytest.mark.parametrize("decorated", [True, False])
def test_async_generator_is_claimed_by_one_request(
    make_app: MakeApp, decorated: bool
) -> None:
    """A second request gets an error, and no item of the first request."""
    items = count(3)

    class Root(TGController):
        def index(self) -> Any:
            return items if decorated else Stream(items)

    if decorated:
        stream(Root.index)
    expose(content_type="text/plain")(Root.index)
    app = make_app(Root(), trace_errors__enable=False)
    assert get(app).text == "012"
    with pytest.raises(StreamError, match="serves one request"):
        get(app)


def test_async_generator_without_a_stream_is_an_error(make_app: MakeApp) -> None:
    """TurboGears cannot send it. The error has the remedy."""

    class Root(TGController):
        @expose(content_type="text/plain")
        def index(self) -> Any:
            return count(3)

    with pytest.raises(StreamError, match=r"returned a async_generator.*@stream"):
        get(make_app(Root(), trace_errors__enable=False))


def test_limit_counts_async_streams(make_app: MakeApp) -> None:
    """A slot is free again when the stream has ended."""
    app = make_app(page(lambda: count(3), limit=1))
    call = Call(app, checked=False)
    next(call)
    assert get(app).status.startswith("503")
    call.close()
    assert get(app).text == "012"


def test_many_async_streams_wait_at_once(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """All of them are tasks of one thread, and end together."""
    number = 50
    waiting: list[int] = []
    all_wait = threading.Event()

    async def items() -> AsyncIterator[str]:
        yield "first"
        waiting.append(1)
        if len(waiting) == number:
            all_wait.set()
        await wait_forever()

    app = make_app(page(items, SSE), sqlite_model)
    readers = [
        threading.Thread(target=lambda: Call(app).read(), daemon=True)
        for _ in range(number)
    ]
    for reader in readers:
        reader.start()
    assert all_wait.wait(20)
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("tgstream-async") == 1
    assert drain(20)
    for reader in readers:
        reader.join(10)
    assert reasons(reports) == ["drained"] * number


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_forked_process_has_an_event_loop_of_its_own() -> None:
    """The parent's stream goes on. A child that comes out of a step exits."""
    script = """
import asyncio, os, sys, tg
from tests.conftest import make_application
from tests.wsgi import Call, get
from tgstream import stream

class Root(tg.TGController):
    @tg.expose(content_type="text/plain")
    @stream
    async def index(self, fork=""):
        for number in range(3):
            if fork and number == 1 and os.fork() == 0:
                await asyncio.sleep(0)
                print("never")
            await asyncio.sleep(0.001)
            yield f"{number} "

app = make_application(Root())
call = Call(app, checked=False)
next(call)
if os.fork() == 0:
    print("child", get(app).text, flush=True)
    sys.exit()
print("child ended", os.wait()[1], flush=True)
print("parent", call.read().decode(), flush=True)
print("parent", get(app, "/?fork=1").text, os.wait()[1] >> 8, flush=True)
"""
    ran = run_python("-c", script)
    assert ran.stdout.splitlines() == [
        "child 0 1 2 ",
        "child ended 0",
        "parent 1 2 ",
        "parent 0 1 2  1",
    ], ran.stderr


def test_process_with_async_streams_exits_without_warnings() -> None:
    """Neither the loop nor a stream that waits keeps it, nor a call in a thread."""
    script = """
import asyncio, sys, tg, threading, time
from tests.conftest import make_application
from tests.wsgi import Call, get
from tgstream import stream

assert "tgstream.core.event_loop" not in sys.modules  # which imports asyncio

class Root(tg.TGController):
    @tg.expose(content_type="text/plain")
    @stream
    async def index(self):
        yield await asyncio.to_thread(str, 1)
        await asyncio.to_thread(wait_for, 60)

def wait_for(seconds):
    called.set()
    time.sleep(seconds)

called = threading.Event()
calls = [Call(make_application(Root()), checked=False) for _ in range(3)]
threading.Thread(target=list, args=calls[:1], daemon=True).start()
called.wait()
"""
    command = [sys.executable, "-X", "dev", "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 0
    for word in ("ResourceWarning", "never awaited", "pending", "Traceback"):
        assert word not in ran.stderr


def test_async_streams_work_with_greenlets() -> None:
    """The loop is a greenlet, too: kills, timeouts and other loops are handled."""
    script = Path(__file__).parents[1] / "live_apps" / "async_greenlets.py"
    command = [sys.executable, str(script)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    ended = Counter(ran.stdout.split())
    assert ended == {"failed": 2, "drained": 2, "disconnected": 1, "completed": 1}


@pytest.mark.parametrize("names", [["news"], ["news", "chat"]], ids=len)
def test_listener_that_would_block_the_event_loop_is_refused(
    make_app: MakeApp, names: list[str], reports: list[Report]
) -> None:
    """It would stop all async streams of the process."""

    async def listening() -> AsyncIterator[Any]:
        for event in tgstream.listen(*names):
            yield event

    call = Call(make_app(page(listening, SSE)), "/")
    assert next(call).startswith(b": open")
    with pytest.raises(StreamError, match="Listen in an ordinary generator"):
        next(call)
    call.close()
    assert [report.reason for report in reports] == ["failed"]
