"""Failures of an application's own code at the end: hook, ``finally`` and session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tg
from sqlalchemy.orm import Session

import tgstream
from tests.conftest import assert_clean
from tests.faults.conftest import Fault, MakeFault
from tests.model import MakeModel, Model, User
from tests.wsgi import Call, get
from tgstream import Report, StreamError

ERRORS = [LookupError, SystemExit, GeneratorExit]
ENDS = ["completed", "failed", "disconnected", "dropped"]


class StreamFailed(Exception):
    """The stream's own failure."""


def add(model: Model, *names: str) -> None:
    model.DBSession.add_all([User(name=name) for name in names])


def writer(model: Model, end: str) -> Callable[[], Iterator[str]]:
    """Return a body that commits ada and flushes bob, and may fail after that."""

    def body() -> Iterator[str]:
        add(model, "ada")
        tgstream.commit()
        yield "one"
        add(model, "bob")
        tgstream.flush()
        yield "two"
        if end == "failed":
            raise StreamFailed("by itself")

    return body


def bring_about(fault: Fault, end: str) -> list[str]:
    """Let the stream end in a way.

    :returns: the names that must be stored after that.
    """
    call = fault.call() if end != "dropped" else Call(fault.app, checked=False)
    assert [next(call), next(call)] == [b"one", b"two"]
    if end == "completed":
        assert call.read() == b""
    elif end == "failed":
        with pytest.raises(StreamFailed):
            next(call)
    if end == "dropped":
        call.drop()
    else:
        call.close()
    return ["ada", "bob"] if end == "completed" else ["ada"]


# Report hooks.


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("error", ERRORS)
def test_error_in_a_hook_does_not_change_the_end(
    make_fault: MakeFault, model: Model, error: type[BaseException], end: str
) -> None:
    """The hook's error is logged."""

    def fail(report: Report) -> None:
        raise error("no report")

    fault = make_fault(model, writer(model, end))
    tg.hooks.register("tgstream.finished", fail)
    try:
        names = bring_about(fault, end)
    finally:
        tg.hooks.disconnect("tgstream.finished", fail)
    reason = "disconnected" if end == "dropped" else end
    assert [report.reason for report in fault.reports] == [reason]
    line, *more = fault.lines()
    assert f" {reason}: " in line.getMessage()
    [record] = more
    assert record.exc_info is not None
    assert (record.exc_info[0], fault.noise()) == (error, set())
    failed = "Root.index: a hook of tgstream.finished failed"
    assert (record.levelname, record.getMessage()) == ("ERROR", failed)
    fault.assert_leaves(*names)


# ``finally`` and ``close()``.


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("error", ERRORS)
def test_error_in_finally_is_reported(
    make_fault: MakeFault, model: Model, error: type[BaseException], end: str
) -> None:
    """It aborts the transfer, or is only logged if the client has disconnected."""
    body = writer(model, end)

    def body_with_finally() -> Iterator[str]:
        try:
            yield from body()
        finally:
            raise error("in finally")

    fault = make_fault(model, body_with_finally)
    if end in ("completed", "failed"):
        call = fault.call()
        assert [next(call), next(call)] == [b"one", b"two"]
        expected = LookupError if error is LookupError else StreamError
        fault.assert_aborts(call, expected)
    elif error is GeneratorExit:  # the normal end of a closed generator
        bring_about(fault, end)
        assert [(report.reason, report.error) for report in fault.reports] == [
            ("disconnected", None)
        ]
    else:
        bring_about(fault, end)
        fault.assert_reported(error, reason="disconnected")
    fault.assert_leaves("ada")


@pytest.mark.parametrize("error", ERRORS)
def test_error_in_close_before_the_first_chunk_is_an_ordinary_error(
    make_fault: MakeFault, model: Model, error: type[BaseException]
) -> None:
    """The status is 500 if an iterator's ``close()`` raises before the first chunk."""

    class Items:
        def __iter__(self) -> Iterator[str]:
            add(model, "lost")
            return iter(["one"])

        def close(self) -> None:
            raise error("in close")

    fault = make_fault(model, Items, chunk_size=100)
    fault.assert_fails_at_once(LookupError if error is LookupError else StreamError)
    fault.assert_leaves()


class Falsy(LookupError):
    """An error whose truth value is false."""

    def __len__(self) -> int:
        return 0


def test_error_that_is_false_is_reported(make_fault: MakeFault, model: Model) -> None:
    """The first error is reported, whatever its truth value."""

    class Items:
        def __iter__(self) -> Iterator[str]:
            yield "one"
            raise Falsy

        def close(self) -> None:
            raise StreamFailed("later")

    fault = make_fault(model, Items)
    call = fault.call()
    assert next(call) == b"one"
    fault.assert_aborts(call, Falsy)
    fault.assert_leaves()


# Sessions.


class UnclosableSession(Session):
    """A session whose ``close()`` only raises."""

    def close(self) -> None:
        raise LookupError("no close")


class FailingSession(Session):
    """A session whose ``close()`` closes and then raises."""

    def close(self) -> None:
        super().close()
        raise LookupError("no close")


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("session_class", [UnclosableSession, FailingSession])
def test_error_in_session_close_does_not_change_the_end(
    make_fault: MakeFault, make_model: MakeModel, url: str, session_class: Any, end: str
) -> None:
    """The error is reported, commits stay, and the connection is released."""
    model = make_model(url, class_=session_class)
    fault = make_fault(model, writer(model, end))
    names = bring_about(fault, end)
    reason = "disconnected" if end == "dropped" else end
    error = StreamFailed if end == "failed" else LookupError
    fault.assert_reported(error, reason=reason)
    assert model.names() == names
    assert_clean(model)


@pytest.mark.parametrize("session_class", [UnclosableSession, FailingSession])
def test_error_in_session_close_does_not_hide_the_first_error(
    make_fault: MakeFault, make_model: MakeModel, url: str, session_class: Any
) -> None:
    """Before the first chunk, the generator's own error is the one reported."""
    model = make_model(url, class_=session_class)

    def body() -> Iterator[str]:
        add(model, "lost")
        tgstream.flush()
        raise StreamFailed("by itself")
        yield

    make_fault(model, body).assert_fails_at_once(StreamFailed)
    assert model.names() == []
    assert_clean(model)


@pytest.mark.parametrize("zope", [True, False])
def test_error_in_close_of_the_request_session_is_logged(
    make_fault: MakeFault, make_model: MakeModel, url: str, zope: bool
) -> None:
    """If TG's commit closes the session, the request fails and the stream ends with it.
    Otherwise the stream continues. No context remains in either case."""
    model = make_model(url, zope=zope, class_=FailingSession)

    def use(response: Any) -> None:
        model.DBSession.query(User).all()

    fault = make_fault(model, writer(model, "completed"))
    tg.hooks.register("after_render", use)
    try:
        call = get(fault.app)
    finally:
        tg.hooks.disconnect("after_render", use)
    first, second = fault.lines()
    assert {first.levelname, second.levelname} == {"ERROR"}
    if zope:
        assert call.status.startswith("500 ")
        assert fault.reports[0].reason == "disconnected"
        assert "could not be closed after its request" in second.getMessage()
    else:
        assert call.text == "onetwo"
        assert fault.reports[0].reason == "completed"
        assert "could not be closed after its request" in first.getMessage()
    assert len(fault.reports) == 1
    assert model.names() == (["ada"] if zope else ["ada", "bob"])
    assert_clean(model)
