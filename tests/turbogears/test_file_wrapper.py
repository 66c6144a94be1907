"""Files that waitress sends with its own ``wsgi.file_wrapper``."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tg
from tg import TGController, expose, predicates, require
from waitress.buffers import (
    ReadOnlyFileBasedBuffer,
)

from tests.conftest import MakeApp, assert_clean
from tests.model import Model
from tests.turbogears.support import (
    HOOKS,
    WIRINGS,
    Middleware,
    install_middleware,
    plug_with_wrapper,
    use_upper_case,
    without_guard,
)
from tests.wsgi import Call
from tgstream import Report, StreamError, drain, send_file, stream
from tgstream.turbogears.file_wrapper import MIN_BYTES

DATA = random.Random(1).randbytes(MIN_BYTES + 100_000)
NextReport = Callable[[], Report]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that is large enough for the wrapper."""
    file = tmp_path / "data.bin"
    file.write_bytes(DATA)
    return file


def make_root(path: Path, max_seconds: float | None = None) -> TGController:
    class Root(TGController):
        @expose()
        @stream(max_seconds=max_seconds)
        def index(self) -> Any:
            return send_file(path)

    return Root()


def ask(app: Any, wrapper: Any = ReadOnlyFileBasedBuffer, **environ: Any) -> Call:
    """Send a request, like waitress does."""
    environ["wsgi.file_wrapper"] = wrapper
    return Call(app, checked=False, **environ)


def is_wrapped(call: Call) -> bool:
    return type(call.body) is ReadOnlyFileBasedBuffer


def send(call: Call, size: int = 10**6) -> Iterator[bytes]:
    """The bytes that waitress sends, if the client takes some at a time."""
    body: Any = call.body
    assert body.prepare(int(call.headers["Content-Length"])) == len(body)
    while len(body):
        data = body.get(size)[:50_000]
        body.skip(len(data), True)
        yield data


def test_file_whose_permission_is_checked_again_is_sent_in_chunks(
    make_app: MakeApp, path: Path, next_report: NextReport
) -> None:
    """The wrapper would read the file without a check."""
    permitted = [True]

    class Permitted(predicates.Predicate):
        message = "You are not permitted"

        def evaluate(self, environ: Any, credentials: Any) -> None:
            if not permitted[-1]:
                self.unmet()

    class Root(TGController):
        @expose()
        @require(Permitted())
        @stream(recheck_seconds=1e-9)
        def index(self) -> Any:
            return send_file(path)

    app = make_app(Root())
    call = ask(app)
    assert not is_wrapped(call)
    assert call.read() == DATA
    assert next_report().reason == "completed"
    call = ask(app)
    assert next(call)
    permitted.append(False)
    with pytest.raises(StreamError, match=r"Root.index was refused before its end"):
        next(call)
    call.close()
    assert next_report().reason == "refused"


@pytest.mark.parametrize("wiring", WIRINGS)
def test_file_is_sent_by_the_wrapper(
    make_app: MakeApp, path: Path, next_report: NextReport, wiring: dict[str, Any]
) -> None:
    """All bytes are sent, and the stream completes."""
    app = make_app(make_root(path), **wiring)
    call = ask(app)
    if not is_wrapped(call):
        assert wiring.get("debug")  # a debugger responds when its body is iterated
        call.close()
        return
    assert b"".join(send(call)) == DATA
    call.close()
    report = next_report()
    assert (report.reason, report.bytes) == ("completed", len(DATA))


def test_range_is_sent_by_the_wrapper(
    make_app: MakeApp, path: Path, next_report: NextReport
) -> None:
    """Nothing after the range is sent."""
    call = ask(make_app(make_root(path)), HTTP_RANGE=f"bytes=7-{MIN_BYTES + 9}")
    assert is_wrapped(call)
    assert b"".join(send(call)) == DATA[7 : MIN_BYTES + 10]
    call.close()
    report = next_report()
    assert (report.reason, report.bytes) == ("completed", MIN_BYTES + 3)


def test_spooled_stream_is_sent_by_the_wrapper(
    make_app: MakeApp, next_report: NextReport
) -> None:
    """Its report has the items of the generator, and the bytes that were sent."""

    class Root(TGController):
        @expose()
        @stream(spool=True)
        def index(self) -> Iterator[bytes]:
            for start in range(0, len(DATA), 1000):
                yield DATA[start : start + 1000]

    app = make_app(Root())
    call = ask(app, HTTP_RANGE="bytes=9-")
    assert is_wrapped(call)
    assert b"".join(send(call)) == DATA[9:]
    call.close()
    report = next_report()
    assert (report.reason, report.bytes) == ("completed", len(DATA) - 9)
    assert report.items == len(DATA) // 1000 + 1


def test_wrapper_can_be_iterated(
    make_app: MakeApp, path: Path, next_report: NextReport
) -> None:
    """A middleware outside of the application gets the same bytes."""
    call = ask(make_app(make_root(path)))
    assert is_wrapped(call)
    assert call.read() == DATA
    assert next_report().reason == "completed"


class FileWrapper:
    """The wrapper of another server."""


@pytest.mark.parametrize(
    ("wrapper", "environ"),
    [
        (FileWrapper, {}),
        (None, {}),
        (ReadOnlyFileBasedBuffer, {"HTTP_RANGE": "bytes=0-99"}),
        (ReadOnlyFileBasedBuffer, {"HTTP_RANGE": "bytes=0-1,9-1100000"}),
        (ReadOnlyFileBasedBuffer, {"HTTP_IF_NONE_MATCH": "*"}),
        (ReadOnlyFileBasedBuffer, {"method": "HEAD"}),
    ],
)
def test_wrapper_is_not_used(
    make_app: MakeApp, path: Path, wrapper: Any, environ: dict[str, Any]
) -> None:
    """It is for one large part of a file, and for waitress alone."""
    call = ask(make_app(make_root(path)), wrapper, **environ)
    assert not is_wrapped(call)
    call.read()


class Upper(Middleware):
    """Changes the bytes, and not their number."""

    def __call__(self, environ: Any, start_response: Any) -> Iterator[bytes]:
        body = self.app(environ, start_response)
        try:
            for chunk in body:
                yield chunk.upper()
        finally:
            body.close()


class Eager(Upper):
    """Like ``Upper``, but calls the application at once."""

    def __call__(self, environ: Any, start_response: Any) -> Iterator[bytes]:
        return self.change(self.app(environ, start_response))

    def change(self, body: Any) -> Iterator[bytes]:
        try:
            for chunk in body:
                yield chunk.upper()
        finally:
            body.close()


class Removing(Middleware):
    """Must see all chunks."""

    def __call__(self, environ: Any, start_response: Any) -> Any:
        del environ["wsgi.file_wrapper"]
        return self.app(environ, start_response)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("middleware", [Upper, Eager])
def test_middleware_that_changes_the_bytes_is_not_passed_over(
    make_app: MakeApp, path: Path, reports: list[Report], hook: str, middleware: Any
) -> None:
    """The server gets its chunks."""
    with install_middleware(middleware, hook):
        app = make_app(make_root(path))
    call = ask(app)
    assert not is_wrapped(call)
    assert call.read() == DATA.upper()
    assert [report.reason for report in reports] == ["completed"]


def test_application_wrapper_that_changes_the_bytes_is_not_passed_over(
    make_app: MakeApp, path: Path
) -> None:
    """Its body takes the place of the file's."""
    app = make_app(make_root(path), plug=plug_with_wrapper(use_upper_case))
    call = ask(app)
    assert not is_wrapped(call)
    assert call.read() == DATA.upper()


def test_middleware_can_remove_the_wrapper(make_app: MakeApp, path: Path) -> None:
    """It then sees all chunks."""
    with install_middleware(Removing):
        app = make_app(make_root(path))
    call = ask(app)
    assert not is_wrapped(call)
    assert call.read() == DATA


def test_application_without_a_guard_sends_chunks(
    make_app: MakeApp, path: Path
) -> None:
    """It was made before tgstream was imported."""
    call = ask(without_guard(make_app(make_root(path))))
    assert not is_wrapped(call)
    assert call.read() == DATA


@pytest.mark.parametrize("size", [0, 100_000, len(DATA) - 1])
def test_file_that_shrinks_fails_the_wrapper(
    make_app: MakeApp, path: Path, next_report: NextReport, size: int
) -> None:
    """waitress closes the connection if a read raises."""
    call = ask(make_app(make_root(path)))
    sent = send(call)
    next(sent)
    os.truncate(path, size)
    with pytest.raises(StreamError, match="has become shorter"):
        list(sent)
    call.close()
    assert next_report().reason == "failed"


def test_client_that_disconnects_ends_the_stream(
    make_app: MakeApp, sqlite_model: Model, path: Path, next_report: NextReport
) -> None:
    """The report has the bytes that were sent."""
    call = ask(make_app(make_root(path), sqlite_model))
    sent = send(call)
    size = len(next(sent)) + len(next(sent))
    call.close()
    report = next_report()
    assert (report.reason, report.bytes) == ("disconnected", size)
    assert_clean(sqlite_model)


def test_dropped_wrapper_ends_the_stream(
    make_app: MakeApp, path: Path, next_report: NextReport
) -> None:
    """The server forgot to close it."""
    call = ask(make_app(make_root(path)))
    assert is_wrapped(call)
    call.drop()
    assert next_report().reason == "disconnected"


def test_max_seconds_end_the_wrapper(
    make_app: MakeApp, path: Path, next_report: NextReport
) -> None:
    """The next read fails, so that the transfer is aborted."""
    call = ask(make_app(make_root(path, max_seconds=0.1)))
    sent = send(call)
    next(sent)
    assert next_report().reason == "expired"
    with pytest.raises(StreamError, match="max_seconds"):
        next(sent)
    call.close()


def test_drain_ends_the_wrapper(
    make_app: MakeApp, path: Path, next_report: NextReport
) -> None:
    """The next read fails, as for other downloads."""
    call = ask(make_app(make_root(path)))
    sent = send(call)
    next(sent)
    assert drain(5)
    with pytest.raises(StreamError, match="was drained"):
        next(sent)
    call.close()
    assert next_report().reason == "drained"


class Draining(Middleware):
    """Passes on the chunks, and drains the process after the first one."""

    def __call__(self, environ: Any, start_response: Any) -> Any:
        return self.drain(self.app(environ, start_response))

    def drain(self, body: Any) -> Iterator[bytes]:
        for chunk in body:
            assert drain(5)
            yield chunk


def test_drain_before_the_first_read_fails_that_read(
    make_app: MakeApp, path: Path
) -> None:
    """The stream may end between its first chunk and the wrapper."""
    with install_middleware(Draining):
        app = make_app(make_root(path))
    call = ask(app)
    with pytest.raises(StreamError, match="was drained"):
        next(send(call))
    call.close()


def test_report_is_made_on_a_thread_of_its_own(
    make_app: MakeApp, path: Path, next_report: NextReport, reports: list[Report]
) -> None:
    """A slow hook must not stop waitress's main thread."""
    threads: list[str] = []

    def note(report: Report) -> None:
        threads.append(threading.current_thread().name)

    app = make_app(make_root(path))
    tg.hooks.register("tgstream.finished", note)
    call = ask(app)
    list(send(call))
    call.close()
    next_report()
    tg.hooks.disconnect("tgstream.finished", note)
    assert threads == ["tgstream-end"]
