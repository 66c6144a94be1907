"""What an application adds to a stream's end fails: a hook, a finally, a session."""

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

KINDS = [LookupError, SystemExit, GeneratorExit]
ENDS = ["completed", "failed", "disconnected", "dropped"]


class Told(Exception):
    """What a stream of these tests fails with, when it is to fail by itself."""


def add(model: Model, *names: str) -> None:
    model.DBSession.add_all([User(name=name) for name in names])


def writer(model: Model, end: str) -> Callable[[], Iterator[str]]:
    """A stream that has stored ada, adds bob, and fails if that is to be its end."""

    def body() -> Iterator[str]:
        add(model, "ada")
        tgstream.commit()
        yield "one"
        add(model, "bob")
        tgstream.flush()
        yield "two"
        if end == "failed":
            raise Told("by itself")

    return body


def bring_about(fault: Fault, end: str) -> list[str]:
    """Let the stream end so.

    :returns: the names that are to be stored.
    """
    call = fault.call() if end != "dropped" else Call(fault.app, checked=False)
    assert [next(call), next(call)] == [b"one", b"two"]
    if end == "completed":
        assert call.read() == b""
    elif end == "failed":
        with pytest.raises(Told):
            next(call)
    if end == "dropped":
        call.drop()
    else:
        call.close()
    return ["ada", "bob"] if end == "completed" else ["ada"]


# A report hook.


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_hook_that_raises_changes_no_end(
    make_fault: MakeFault, model: Model, kind: type[BaseException], end: str
) -> None:
    """The stream ends as it does, and the hook's error is told beside it: by TG, or by
    tgstream where TG would let it through."""

    def fail(report: Report) -> None:
        raise kind("no report")

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
    if kind is LookupError:
        assert (more, fault.noise()) == ([], {"tg"})
    else:
        assert [each.levelname for each in more] == ["ERROR"]
        assert more[0].exc_info is not None
        assert (more[0].exc_info[0], fault.noise()) == (kind, set())
    fault.assert_leaves(*names)


# A finally.


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_finally_that_raises_is_told(
    make_fault: MakeFault, model: Model, kind: type[BaseException], end: str
) -> None:
    """At a stream's own end it breaks the transfer; nobody hears it when the client
    has left, but the log."""
    body = writer(model, end)

    def guarded() -> Iterator[str]:
        try:
            yield from body()
        finally:
            raise kind("in finally")

    fault = make_fault(model, guarded)
    if end in ("completed", "failed"):
        call = fault.call()
        assert [next(call), next(call)] == [b"one", b"two"]
        error = LookupError if kind is LookupError else StreamError
        fault.assert_breaks(call, error)
    elif kind is GeneratorExit:  # which is how a generator closes
        bring_about(fault, end)
        assert [(each.reason, each.error) for each in fault.reports] == [
            ("disconnected", None)
        ]
    else:
        bring_about(fault, end)
        fault.assert_told(kind, reason="disconnected")
    fault.assert_leaves("ada")


@pytest.mark.parametrize("kind", KINDS)
def test_close_that_raises_before_the_first_chunk_is_an_ordinary_error(
    make_fault: MakeFault, model: Model, kind: type[BaseException]
) -> None:
    """What an iterator's close() raises is an error while all can still be told."""

    class Items:
        def __iter__(self) -> Iterator[str]:
            add(model, "lost")
            return iter(["one"])

        def close(self) -> None:
            raise kind("in close")

    fault = make_fault(model, Items, chunk_size=100)
    fault.assert_fails_at_once(LookupError if kind is LookupError else StreamError)
    fault.assert_leaves()


class Falsy(LookupError):
    """An error that is false, as one is that counts what it holds."""

    def __len__(self) -> int:
        return 0


def test_finally_hides_no_error_that_is_false(
    make_fault: MakeFault, model: Model
) -> None:
    """The first error is the one told, whatever its truth."""

    class Items:
        def __iter__(self) -> Iterator[str]:
            yield "one"
            raise Falsy

        def close(self) -> None:
            raise Told("later")

    fault = make_fault(model, Items)
    call = fault.call()
    assert next(call) == b"one"
    fault.assert_breaks(call, Falsy)
    fault.assert_leaves()


# A session.


class Unclosable(Session):
    """A session whose close() does nothing but raise."""

    def close(self) -> None:
        raise LookupError("no close")


class Reluctant(Session):
    """A session whose close() raises when it is done."""

    def close(self) -> None:
        super().close()
        raise LookupError("no close")


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", [Unclosable, Reluctant])
def test_session_that_will_not_close_changes_no_end(
    make_fault: MakeFault, make_model: MakeModel, url: str, kind: Any, end: str
) -> None:
    """It is told and holds no connection; what was committed is."""
    model = make_model(url, class_=kind)
    fault = make_fault(model, writer(model, end))
    names = bring_about(fault, end)
    reason = "disconnected" if end == "dropped" else end
    fault.assert_told(Told if end == "failed" else LookupError, reason=reason)
    assert model.names() == names
    assert_clean(model)


@pytest.mark.parametrize("kind", [Unclosable, Reluctant])
def test_session_that_will_not_close_leaves_an_ordinary_error(
    make_fault: MakeFault, make_model: MakeModel, url: str, kind: Any
) -> None:
    """Before the first chunk the client is told of what the generator raised."""
    model = make_model(url, class_=kind)

    def body() -> Iterator[str]:
        add(model, "lost")
        tgstream.flush()
        raise Told("by itself")
        yield

    make_fault(model, body).assert_fails_at_once(Told)
    assert model.names() == []
    assert_clean(model)


@pytest.mark.parametrize("zope", [True, False])
def test_session_of_the_request_that_will_not_close_is_told(
    make_fault: MakeFault, make_model: MakeModel, url: str, zope: bool
) -> None:
    """Where TG's own commit would close it, the request fails, and the stream ends with
    it; else the stream goes on. No context is left in either case."""
    model = make_model(url, zope=zope, class_=Reluctant)

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
