"""Several threads that pull, close or end one stream."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import tg
from tg import TGController, expose

from tests.conftest import MakeApp, assert_clean, assert_thread_clean
from tests.core.support import (
    NamesController,
    leave_clean,
    pull,
    reasons,
    run_on_another_thread,
)
from tests.model import Model, User
from tests.turbogears.support import WIRINGS, without_guard
from tests.wsgi import Call, get
from tgstream import Report, Stream, StreamError, commit, current_stream, drain, stream


@pytest.mark.parametrize("wiring", WIRINGS)
def test_pulls_and_close_may_run_on_different_threads(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
) -> None:
    """Each pull runs on a thread of its own, and so does the close."""
    sqlite_model.seed("ada", "bob", "eve")
    ended: list[str] = []
    app = make_app(NamesController(sqlite_model, ended), sqlite_model, **wiring)
    call = Call(app, "/names")
    for name in (b"ada", b"bob"):
        assert run_on_another_thread(partial(pull, call)) == name
    run_on_another_thread(partial(leave_clean, call.close))
    assert ended == ["/names True"]
    assert reasons(reports) == ["disconnected"]
    assert_clean(sqlite_model)


def test_pull_by_a_second_thread_is_rejected(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The pull that runs on the first thread gets its chunk."""
    entered, go = threading.Event(), threading.Event()

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def wait(self) -> Iterator[str]:
            yield "one"
            entered.set()
            assert go.wait(10)
            yield "two"

    bare = without_guard(
        make_app(Root(), registry_streaming=False, trace_errors__enable=False)
    )
    call = Call(bare, "/wait", checked=False)
    assert pull(call) == b"one"
    received: list[bytes] = []
    thread = threading.Thread(target=lambda: received.append(next(call)))
    thread.start()
    assert entered.wait(10)
    with pytest.raises(ValueError, match="already executing"):
        next(call)
    with pytest.raises(StreamError, match="iterated"):
        next(iter(call.body))
    assert_thread_clean()
    go.set()
    thread.join(10)
    assert received == [b"two"]
    assert call.read() == b""
    assert reasons(reports) == ["completed"]


@pytest.mark.parametrize("wiring", WIRINGS)
def test_close_during_a_pull_takes_effect_when_the_pull_returns(
    make_app: MakeApp, reports: list[Report], wiring: dict[str, Any]
) -> None:
    """The stream ends on the thread that pulls it, not on the thread that closes it."""
    entered, go = threading.Event(), threading.Event()
    ended: list[tuple[str, int]] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def wait(self) -> Iterator[str]:
            try:
                yield "one"
                entered.set()
                assert go.wait(10)
                yield "two"
                yield "three"
            finally:
                ended.append((tg.request.path, threading.get_ident()))

    call = Call(make_app(Root(), **wiring), "/wait", checked=False)
    assert pull(call) == b"one"
    received: list[bytes] = []
    thread = threading.Thread(target=lambda: received.append(next(call)))
    thread.start()
    assert entered.wait(10)
    call.close()
    assert ended == []
    go.set()
    thread.join(10)
    assert received == [b"two"]
    assert ended == [("/wait", thread.ident)]
    assert reasons(reports) == ["disconnected"]
    with contextlib.suppress(StreamError):
        assert list(call) == []
    call.close()
    assert reasons(reports) == ["disconnected"]


def test_close_on_many_threads_ends_a_stream_once(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """Four threads close each of fifty streams at the same time."""
    streams: list[Stream] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            streams.append(current_stream())
            yield "one"
            yield "two"

    app = make_app(Root())
    calls = [Call(app, "/words") for _ in range(50)]
    barrier = threading.Barrier(4)

    def close_all() -> None:
        for running in streams:
            barrier.wait(10)
            running.close()
        assert_thread_clean()

    threads = [threading.Thread(target=close_all) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    sys.setswitchinterval(interval)
    assert reasons(reports) == ["stopped"] * 50
    for call in calls:
        call.close()


@pytest.mark.parametrize("end", ["expired", "drained", "stopped"])
def test_generator_can_commit_in_its_finally_while_the_server_pulls(
    make_app: MakeApp, model: Model, next_report: Callable[[], Report], end: str
) -> None:
    """The stream stays the current stream of the thread that ends it."""
    ending, pulled = threading.Event(), threading.Event()
    streams: list[Stream] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(max_seconds=0.1 if end == "expired" else None)
        def words(self) -> Iterator[str]:
            streams.append(current_stream())
            try:
                yield "one"
                yield "two"
            finally:
                ending.set()
                assert pulled.wait(10)
                assert current_stream().items == 1
                model.DBSession.add(User(name="ada"))
                commit()

    call = Call(make_app(Root(), model), "/words", checked=False)
    assert pull(call) == b"one"
    with ThreadPoolExecutor(1) as other:
        if end == "drained":
            other.submit(drain)
        elif end == "stopped":
            other.submit(streams[0].close)
        assert ending.wait(10)
        with pytest.raises(StreamError, match="before its end"):
            pull(call)
        pulled.set()
        report = next_report()
    assert (report.reason, report.error, report.commits) == (end, None, 1)
    streams.clear()
    call.close()
    assert model.names() == ["ada"]
    assert_clean(model)


def test_commit_on_a_thread_without_a_stream_is_rejected(
    make_app: MakeApp, model: Model
) -> None:
    """A generator runs on one thread, and calls ``commit()`` on another."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            model.DBSession.add(User(name="ada"))
            with pytest.raises(StreamError, match=r"^commit\(\) was called where no"):
                run_on_another_thread(commit)
            yield "one"

    assert get(make_app(Root(), model), "/words").text == "one"
    assert model.names() == ["ada"]
