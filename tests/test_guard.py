"""The way out of the application: errors, late changes, and the guard around TG."""

from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import tg
from tg import TGController, abort, expose, flash, redirect
from tg.appwrappers.base import ApplicationWrapper

from tests.conftest import MakeApp, assert_clean, assert_thread_clean
from tests.model import Model, User
from tests.wsgi import Call, get
from tgstream import Report, stream

TRACED = {"debug": False, "trace_errors__enable": True}
UNTRACED = {"debug": False, "trace_errors__enable": False}
DEBUGGED = {"debug": True}
WIRINGS = [
    pytest.param({**around, "registry_streaming": streaming}, id=f"{name}-{kind}")
    for (name, around), (kind, streaming) in itertools.product(
        [("traced", TRACED), ("untraced", UNTRACED), ("debugged", DEBUGGED)],
        [("streaming", True), ("buffered", False)],
    )
]


def root() -> TGController:
    """Made in a test: what waits for TG's milestones is lost when they are reset."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def fail(self) -> Iterator[str]:
            yield "one"
            yield "two"
            raise LookupError("no third")

        @expose(content_type="text/plain")
        @stream
        def fail_at_once(self) -> Iterator[str]:
            raise LookupError("no first")
            yield

        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            yield "one"
            yield "two"

        @expose()
        def plain(self) -> str:
            return "plain"

        @expose()
        def crash(self) -> str:
            raise LookupError("no page")

    return Root()


def unplugged(app: Any) -> Any:
    """The application as it is when it was made before tgstream was imported."""
    return app.app


# A failure after the first chunk.


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("plugged", [True, False], ids=["plugged", "unplugged"])
def test_failure_breaks_the_transfer(
    make_app: MakeApp,
    sqlite_model: Model,
    reports: list[Report],
    wiring: dict[str, Any],
    plugged: bool,
) -> None:
    """What the generator raises reaches the server, and no text but its own."""
    app = make_app(root(), sqlite_model, **wiring)
    call = Call(app if plugged else unplugged(app), "/fail")
    assert [next(call), next(call)] == [b"one", b"two"]
    with pytest.raises(LookupError, match="no third"):
        next(call)
    call.close()
    assert call.starts == 1
    assert [report.reason for report in reports] == ["failed"]
    assert_clean(sqlite_model)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_failure_breaks_without_a_database(
    make_app: MakeApp, wiring: dict[str, Any]
) -> None:
    """Without TG's generator for the database session it is the same."""
    for app in (app := make_app(root(), **wiring)), unplugged(app):
        call = Call(app, "/fail")
        assert [next(call), next(call)] == [b"one", b"two"]
        with pytest.raises(LookupError, match="no third"):
            next(call)
        call.close()
        assert_thread_clean()


@pytest.mark.parametrize("wiring", WIRINGS)
def test_guard_holds_on_a_lenient_server(
    make_app: MakeApp, wiring: dict[str, Any]
) -> None:
    """A server that takes a second ``start_response`` gets none, and no HTML."""
    call = Call(make_app(root(), **wiring), "/fail", lenient=True)
    assert [next(call), next(call)] == [b"one", b"two"]
    with pytest.raises(LookupError, match="no third"):
        next(call)
    call.close()
    assert call.starts == 1


@pytest.mark.parametrize(
    ("wiring", "appended", "broken"),
    [
        pytest.param(TRACED, b"Internal Server Error", True, id="traced"),
        pytest.param(
            {**TRACED, "registry_streaming": False},
            b"Internal Server Error",
            False,
            id="traced-buffered",
        ),
        pytest.param(DEBUGGED, b"<!DOCTYPE", True, id="debugged"),
        pytest.param(
            {**DEBUGGED, "registry_streaming": False},
            b"<!DOCTYPE",
            False,
            id="debugged-buffered",
        ),
        pytest.param(UNTRACED, b"", True, id="untraced"),
    ],
)
def test_unplugged_on_a_lenient_server_has_foreign_text(
    make_app: MakeApp, wiring: dict[str, Any], appended: bytes, broken: bool
) -> None:
    """Left open without the plug: backlash's text, and maybe a whole transfer."""
    call = Call(unplugged(make_app(root(), **wiring)), "/fail", lenient=True)
    received = [next(call), next(call)]
    error: BaseException | None = None
    try:
        received += call
    except LookupError as raised:
        error = raised
    call.close()
    assert appended in b"".join(received[2:])
    assert bool(appended) == bool(received[2:])
    assert (error is not None) is broken
