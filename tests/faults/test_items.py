"""An item that is no longer, or not yet, what its format needs."""

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
from tests.faults.conftest import MakeFault
from tests.model import Model, Note, User
from tests.wsgi import get
from tgstream import CSV, NDJSON, JSONArray, Report

FORMATS = [NDJSON, JSONArray, CSV(header=["id", "name"])]


def half_loaded(model: Model, how: str) -> User:
    """A user whose name cannot be loaded any more."""
    query = model.DBSession.query(User).filter_by(name="half")
    if how == "deferred":
        user = query.options(defer(User.name)).one()
        model.DBSession.expunge(user)
        return user
    user = query.one()
    if how == "expired":
        model.DBSession.expire(user)
        model.DBSession.expunge(user)
    else:  # its row is gone when the commit's expiry is made good
        with model.outside.begin() as outside:
            outside.execute(sa.delete(User).where(User.name == "half"))
        tgstream.commit()
    return user


@pytest.fixture
def halves(model: Model) -> Model:
    """A model in which one user will be half loaded."""
    model.seed("ada", "half")
    return model


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("how", ["deferred", "expired", "deleted"])
@pytest.mark.parametrize("format", FORMATS, ids=["ndjson", "array", "csv"])
def test_half_loaded_object_is_not_sent_as_a_whole_one(
    make_fault: MakeFault, halves: Model, format: Any, how: str, late: bool
) -> None:
    """Its format asks for what is not there: an error, early or late."""

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

    # The last from TG's JSON, of what is deferred.
    kinds = (DetachedInstanceError, ObjectDeletedError, ValueError)
    fault = make_fault(halves, body, format=format, chunk_size=0)
    if late:
        call = fault.call()
        assert b"one" in next(call)
        fault.assert_breaks(call, kinds)
    else:
        fault.assert_fails_at_once(kinds)
    assert halves.texts() == []
    fault.assert_leaves(*(["ada"] if how == "deleted" else ["ada", "half"]))


class Unready:
    """An object whose own way to JSON fails."""

    def __json__(self) -> Any:
        return {"lock": threading.Lock()}


class Cyclic(list[Any]):
    """A list that holds itself."""

    def __init__(self) -> None:
        super().__init__([self])


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("format", [NDJSON, JSONArray], ids=["ndjson", "array"])
@pytest.mark.parametrize(
    "item", [float("nan"), threading.Lock(), Unready(), Cyclic(), 1 + 1j]
)
def test_item_that_is_no_json_is_an_error(
    make_fault: MakeFault, model: Model, format: Any, item: Any, late: bool
) -> None:
    """A 500 where it is the first, else a break; with ``commit='each'`` the items
    before it are stored, and this one is not."""

    def body() -> Iterator[Any]:
        if late:
            model.DBSession.add(User(name="ada"))
            yield "one"
        model.DBSession.add(User(name="lost"))
        yield item
        yield "never"

    fault = make_fault(model, body, format=format, chunk_size=0, commit="each")
    kinds = (TypeError, ValueError, RecursionError)
    if late:
        call = fault.call()
        assert b'"one"' in next(call)
        fault.assert_breaks(call, kinds)
    else:
        fault.assert_fails_at_once(kinds)
    fault.assert_leaves(*(["ada"] if late else []))


def test_session_that_cannot_be_pickled_is_an_ordinary_error(
    make_app: MakeApp, model: Model, tmp_path: Path, reports: list[Report]
) -> None:
    """``tg.session`` is stored when the stream has begun; it ends with the request."""

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
        "session__secret": "not one",
    }
    app = make_app(Root(body), model, **options)
    assert get(app).status.startswith("500 ")
    assert [report.reason for report in reports] in (["failed"], ["disconnected"])
    assert model.names() == []
    assert_clean(model)
