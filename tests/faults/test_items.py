"""Items that their format cannot encode."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import tg
from sqlalchemy.orm import defer
from sqlalchemy.orm.exc import DetachedInstanceError, ObjectDeletedError

import tgstream
from tests.conftest import MakeApp, Root, assert_clean
from tests.faults.conftest import ErrorTypes, Fault, MakeFault
from tests.model import Model, Note, User
from tests.wsgi import get
from tgstream import CSV, NDJSON, JSONArray, Report

FORMATS = [NDJSON, JSONArray, CSV(header=["id", "name"])]


def half_loaded(model: Model, how: str) -> User:
    """Return a user whose name can no longer be loaded."""
    query = model.DBSession.query(User).filter_by(name="half")
    if how == "deferred":
        user = query.options(defer(User.name)).one()
        model.DBSession.expunge(user)
        return user
    user = query.one()
    if how == "expired":
        model.DBSession.expire(user)
        model.DBSession.expunge(user)
    else:  # its row is deleted before the user is loaded again
        with model.outside.begin() as outside:
            outside.execute(sa.delete(User).where(User.name == "half"))
        tgstream.commit()
    return user


@pytest.fixture
def halves(model: Model) -> Model:
    """A model with a user that ``half_loaded`` returns."""
    model.seed("ada", "half")
    return model


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("how", ["deferred", "expired", "deleted"])
@pytest.mark.parametrize("format", FORMATS, ids=["ndjson", "array", "csv"])
def test_half_loaded_object_is_an_error(
    make_fault: MakeFault, halves: Model, format: Any, how: str, late: bool
) -> None:
    """The format reads an attribute that cannot be loaded."""

    def body() -> Iterator[Any]:
        if late:
            yield [0, "one"]
        halves.DBSession.add(Note(text="lost"))
        tgstream.flush()
        if how == "deleted":
            halves.DBSession.rollback()  # SQLite has one writer
        user = half_loaded(halves, how)
        if isinstance(format, CSV):
            yield [1, user.name]
        yield user

    # TG's JSON encoder raises ValueError for a deferred attribute.
    errors = (DetachedInstanceError, ObjectDeletedError, ValueError)
    fault = make_fault(halves, body, format=format, chunk_size=0)
    assert_fails(fault, errors, late)
    assert halves.texts() == []
    fault.assert_leaves(*(["ada"] if how == "deleted" else ["ada", "half"]))


def assert_fails(fault: Fault, errors: ErrorTypes, late: bool) -> None:
    """Check that the stream fails. If ``late``, its first chunk has the word one."""
    if late:
        call = fault.call()
        assert b"one" in next(call)
        fault.assert_aborts(call, errors)
    else:
        fault.assert_fails_at_once(errors)


class FailingJSON:
    """An object whose ``__json__()`` returns a value without JSON."""

    def __json__(self) -> Any:
        return {"lock": threading.Lock()}


class Cyclic(list[Any]):
    """A list that contains itself."""

    def __init__(self) -> None:
        super().__init__([self])


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("format", [NDJSON, JSONArray], ids=["ndjson", "array"])
@pytest.mark.parametrize(
    "item", [float("nan"), threading.Lock(), FailingJSON(), Cyclic(), 1 + 1j]
)
def test_item_without_json_is_an_error(
    make_fault: MakeFault, model: Model, format: Any, item: Any, late: bool
) -> None:
    """The status is 500 for the first item. For a later item the transfer is aborted,
    and with ``commit='each'`` only the items before it are stored."""

    def body() -> Iterator[Any]:
        if late:
            model.DBSession.add(User(name="ada"))
            yield "one"
        model.DBSession.add(User(name="lost"))
        yield item
        yield "never"

    fault = make_fault(model, body, format=format, chunk_size=0, commit="each")
    assert_fails(fault, (TypeError, ValueError, RecursionError), late)
    fault.assert_leaves(*(["ada"] if late else []))


def test_session_that_cannot_be_pickled_is_an_ordinary_error(
    make_app: MakeApp, model: Model, tmp_path: Path, reports: list[Report]
) -> None:
    """TG saves ``tg.session`` after the first chunk is made, within the request."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        tgstream.flush()
        tg.session["lock"] = threading.Lock()
        tg.session.save()
        yield "one"
        yield "two"

    options = {
        "session__enabled": True,
        "session__type": "file",
        "session__data_dir": str(tmp_path / "sessions"),
        "session__secret": "not secret",
    }
    app = make_app(Root(body), model, **options)
    assert get(app).status.startswith("500 ")
    assert [report.reason for report in reports] in (["failed"], ["disconnected"])
    assert model.names() == []
    assert_clean(model)
