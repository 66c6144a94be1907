"""The end of a stream: its report, the order of cleanup, and its errors."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
import tg
import transaction
from tg import TGController, expose

from tests.conftest import MakeApp, assert_clean
from tests.core.support import NamesController, pull, reasons
from tests.model import Model, User
from tests.turbogears.support import WIRINGS
from tests.wsgi import Call, get
from tgstream import Report, Stream, StreamError, flush, stream

# Reports and cleanup.


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize(
    ("end", "level"),
    [("completed", "DEBUG"), ("failed", "ERROR"), ("disconnected", "DEBUG")],
)
def test_end_is_reported_and_logged_once(
    make_app: MakeApp,
    reports: list[Report],
    caplog: pytest.LogCaptureFixture,
    wiring: dict[str, Any],
    end: str,
    level: str,
) -> None:
    """Only the log line of a failed stream has a traceback."""
    caplog.set_level(logging.DEBUG, "tgstream")

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self, fail: bool = False) -> Iterator[str]:
            yield "one"
            yield "two"
            if fail:
                raise LookupError("no third")

    call = Call(make_app(Root(), **wiring), "/words" + "?fail=1" * (end == "failed"))
    assert pull(call) == b"one"
    with contextlib.suppress(LookupError):
        b"".join(call) if end != "disconnected" else call.close()
    call.close()
    call.close()
    # Error mails need the context of a failed stream. After other ends it is removed,
    # because it would be part of a cycle.
    assert ("tg.locals" in call.environ) is (end == "failed")
    (report,) = reports
    count = 1 if end == "disconnected" else 2
    assert (report.reason, report.items, report.chunks) == (end, count, count)
    assert (report.bytes, report.commits) == (3 * count, 0)
    assert (report.controller, report.path) == ("Root.words", "/words")
    assert report.first_chunk_seconds is not None
    assert 0 <= report.first_chunk_seconds <= report.seconds
    (line,) = [r for r in caplog.records if r.name == "tgstream"]
    assert line.levelname == level
    assert bool(line.exc_info) == isinstance(report.error, LookupError)
    assert line.getMessage().startswith(f"Root.words at /words {end}: {count} items")


def note_steps(model: Model, steps: list[str]) -> None:
    """Append a step at each commit, rollback and release of a connection."""
    sa.event.listen(model.engine, "commit", lambda c: steps.append("committed"))
    sa.event.listen(model.engine, "rollback", lambda c: steps.append("aborted"))
    sa.event.listen(model.engine, "checkin", lambda *a: steps.append("released"))


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("completed", ["closed", "committed", "released", "reported"]),
        ("failed", ["closed", "aborted", "released", "reported"]),
        ("disconnected", ["closed", "aborted", "released", "reported"]),
    ],
)
def test_end_runs_its_steps_in_order(
    make_app: MakeApp, sqlite_model: Model, end: str, expected: list[str]
) -> None:
    """The generator ends, then the transaction, then the session, then the report."""
    steps: list[str] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def write(self) -> Iterator[str]:
            try:
                sqlite_model.DBSession.add(User(name="ada"))
                sqlite_model.DBSession.flush()
                yield "one"
                yield "two"
                if end == "failed":
                    raise LookupError
            finally:
                assert tg.request.path == "/write"
                assert sqlite_model.DBSession.query(User).count() == 1
                steps.append("closed")

    app = make_app(Root(), sqlite_model)
    note_steps(sqlite_model, steps)
    tg.hooks.register("tgstream.finished", lambda report: steps.append("reported"))
    call = Call(app, "/write")
    pull(call)
    if end == "failed":
        with pytest.raises(LookupError):
            call.read()
    elif end == "completed":
        call.read()
    call.close()
    assert steps == expected
    tg.hooks._hooks.pop("tgstream.finished")
    assert_clean(sqlite_model)


class FailingDataManager:
    """A data manager that fails to abort."""

    transaction_manager = transaction.manager

    def abort(self, transaction: Any) -> None:
        raise ArithmeticError("no abort")

    def sortKey(self) -> str:
        return "failing"


def test_cleanup_continues_after_a_step_that_failed(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """The first error is reported, and the session is released in any case."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def write(self) -> Iterator[str]:
            transaction.get().join(FailingDataManager())
            sqlite_model.DBSession.add(User(name="ada"))
            flush()
            try:
                yield "one"
                yield "two"
            finally:
                raise LookupError("no end")

    call = Call(make_app(Root(), sqlite_model), "/write")
    pull(call)
    call.close()
    assert [type(report.error) for report in reports] == [LookupError]
    assert sqlite_model.names() == []
    assert_clean(sqlite_model)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_error_while_closing_is_reported_and_not_raised(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    caplog: pytest.LogCaptureFixture,
    wiring: dict[str, Any],
) -> None:
    """A generator whose ``finally`` fails leaves no session and no context behind."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def names(self) -> Iterator[str]:
            try:
                sqlite_model.DBSession.query(User).all()
                yield "one"
                yield "two"
            finally:
                raise LookupError("no end")

    call = Call(make_app(Root(), sqlite_model, **wiring), "/names")
    pull(call)
    call.close()
    (report,) = reports
    assert report.reason == "disconnected"
    assert isinstance(report.error, LookupError)
    (line,) = [r for r in caplog.records if r.name == "tgstream"]
    assert (line.levelname, line.exc_info and line.exc_info[1]) == (
        "ERROR",
        report.error,
    )
    assert_clean(sqlite_model)


def test_generator_that_ignores_generator_exit_is_reported(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """The stream ends in any case, and its connection is released."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def names(self) -> Iterator[str]:
            for name in "one", "two":
                sqlite_model.DBSession.query(User).all()
                with contextlib.suppress(BaseException):
                    yield name

    call = Call(make_app(Root(), sqlite_model), "/names")
    pull(call)
    call.close()
    (report,) = reports
    assert report.reason == "disconnected"
    assert "ignored GeneratorExit" in str(report.error)
    assert_clean(sqlite_model)


# Hooks that run at the end.


@pytest.mark.parametrize("wiring", WIRINGS)
def test_report_hook_that_fails_does_not_change_the_end(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
) -> None:
    """The error is logged, and the next hook is called."""
    sqlite_model.seed("ada", "bob")

    def fail(report: Report) -> None:
        raise LookupError("no report")

    app = make_app(NamesController(sqlite_model), sqlite_model, **wiring)
    tg.hooks.register("tgstream.finished", fail)
    tg.hooks._hooks["tgstream.finished"].reverse()
    try:
        assert get(app, "/names").text == "adabob"
    finally:
        tg.hooks.disconnect("tgstream.finished", fail)
    assert reasons(reports) == ["completed"]
    assert_clean(sqlite_model)


@pytest.mark.parametrize("end", ["completed", "failed", "closed", "dropped"])
def test_report_hook_may_use_the_database(
    make_app: MakeApp, model: Model, end: str
) -> None:
    """The hook's changes are not committed, and its connection is released."""
    model.seed("ada", "bob")
    counts = []

    def count(report: Report) -> None:
        model.DBSession.add(User(name="eve"))
        counts.append(model.DBSession.query(User).count())

    app = make_app(NamesController(model), model)
    tg.hooks.register("tgstream.finished", count)
    try:
        call = Call(app, f"/names{'?fail=1' * (end == 'failed')}", checked=False)
        pull(call)
        if end == "failed":
            with pytest.raises(LookupError):
                call.read()
        elif end == "completed":
            call.read()
        call.close() if end == "closed" else call.drop()
    finally:
        tg.hooks.disconnect("tgstream.finished", count)
    assert counts == [3]
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


# Exceptions that are not subclasses of ``Exception``.


BASE_EXCEPTIONS = [SystemExit, GeneratorExit]


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("error_class", [*BASE_EXCEPTIONS, KeyboardInterrupt])
def test_base_exception_in_a_pull_fails_the_stream(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
    error_class: type[BaseException],
) -> None:
    """The server gets a ``StreamError``, so its thread does not stop."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            sqlite_model.DBSession.add(User(name="ada"))
            flush()
            yield "one"
            raise error_class

    call = Call(make_app(Root(), sqlite_model, **wiring), "/words")
    assert pull(call) == b"one"
    with (
        ThreadPoolExecutor(1) as thread,
        pytest.raises(
            StreamError, match=f"words raised {error_class.__name__}"
        ) as raised,
    ):
        thread.submit(pull, call).result()
    call.close()
    assert type(raised.value.__cause__) is error_class
    assert [(r.reason, r.error) for r in reports] == [("failed", raised.value)]
    assert sqlite_model.names() == []
    assert_clean(sqlite_model)


@pytest.mark.parametrize("error_class", BASE_EXCEPTIONS)
def test_base_exception_before_the_first_chunk_is_an_ordinary_error(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    error_class: type[BaseException],
) -> None:
    """The request fails like after any exception, and nothing is committed."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            sqlite_model.DBSession.add(User(name="ada"))
            flush()
            raise error_class
            yield

    assert get(make_app(Root(), sqlite_model), "/words").status.startswith("500 ")
    assert [(r.reason, type(r.error)) for r in reports] == [("failed", StreamError)]
    assert sqlite_model.names() == []
    assert_clean(sqlite_model)


def test_keyboard_interrupt_in_the_main_thread_reaches_the_server(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """Ctrl-C stops a server that serves in its main thread, and fails the stream."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            yield "one"
            raise KeyboardInterrupt

    call = Call(make_app(Root(), sqlite_model), "/words")
    assert pull(call) == b"one"
    with pytest.raises(KeyboardInterrupt):
        pull(call)
    call.close()
    assert reasons(reports) == ["failed"]
    assert_clean(sqlite_model)


def test_response_while_the_generator_closes_leaves_no_source_open(
    make_app: MakeApp,
) -> None:
    """The source is closed if the ``finally`` of its generator aborts the request."""
    closed = threading.Event()

    class Source:
        def __iter__(self) -> Iterator[str]:
            try:
                yield "one"
                yield "two"
            finally:
                tg.abort(404)

        def close(self) -> None:
            closed.set()

    class First:
        content_type = "text/plain"

        def encode(self, items: Any) -> Iterator[str]:
            yield next(iter(items))

    class Root(TGController):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            return Stream(Source(), First(), chunk_size=10)

    assert get(make_app(Root())).status == "404 Not Found"
    assert closed.is_set()
