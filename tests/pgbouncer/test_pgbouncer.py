"""Streams through PgBouncer in transaction mode, with and without prepared statements.

psycopg 3 prepares a statement when it executes it for the sixth time, on the backend of
that transaction. PgBouncer gives the next transaction another backend.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import tgstream
from tests.conftest import MakeApp, Root, assert_clean
from tests.model import Model, Note, User
from tests.pgbouncer.conftest import PgBouncer
from tests.wsgi import get
from tgstream import rows
from tgstream.doctor.settings_checks import check_settings

EXPORTS = Path(tgstream.__file__).parents[1] / "docs" / "exports.rst"
(LINE,) = re.findall(r'"sqlalchemy.connect_args": (\{.*?\})', EXPORTS.read_text())
AS_DOCUMENTED = {"sqlalchemy__connect_args": eval(LINE)}


def by_key(model: Model) -> Iterator[str]:
    for row in rows(sa.select(User), key=User.id, batch=2):
        yield f"{row.name} "


def writing(model: Model) -> Iterator[str]:
    for number in range(60):
        model.DBSession.add(Note(text=f"note{number}"))
        yield f"user{number} "


def by_cursor(model: Model) -> Iterator[str]:
    for row in rows(sa.select(User).order_by(User.id), batch=2):
        yield f"{row.name} "


STREAMS: dict[str, tuple[Callable[[Model], Any], dict[str, Any]]] = {
    "rows(key=...)": (by_key, {}),
    "commit='each'": (writing, {"commit": "each"}),
    "rows()": (by_cursor, {}),
}


@pytest.fixture
def make_pooled_app(
    make_app: MakeApp, model: Model, pgbouncer: PgBouncer
) -> Callable[..., Any]:
    """Creates an application whose connections go through PgBouncer."""

    def make(name: str, **options: Any) -> Any:
        body, stream_options = STREAMS[name]
        root = Root(lambda: body(model), **stream_options)
        model.url, direct = sa.make_url(pgbouncer.url), model.url
        app = make_app(root, model, trace_errors__enable=False, **options)
        model.url = direct
        return app

    return make


@pytest.mark.parametrize("name", ["rows(key=...)", "commit='each'"])
def test_prepared_statements_break_a_stream(
    make_pooled_app: Callable[..., Any], name: str
) -> None:
    """With psycopg's defaults the backend does not have the prepared statement."""
    app = make_pooled_app(name)
    with pytest.raises(sa.exc.DBAPIError, match="prepared statement"):
        get(app)


@pytest.mark.parametrize("name", STREAMS)
def test_stream_is_complete_with_the_line_of_the_docs(
    make_pooled_app: Callable[..., Any], model: Model, name: str
) -> None:
    """Without prepared statements every backend works."""
    app = make_pooled_app(name, **AS_DOCUMENTED)
    assert get(app).text.split() == [f"user{number}" for number in range(60)]
    if name == "commit='each'":
        assert model.texts() == [f"note{number}" for number in range(60)]
    assert_clean(model)


@pytest.mark.parametrize("line", [False, True])
def test_doctor_reports_the_pooler(
    make_pooled_app: Callable[..., Any], model: Model, line: bool
) -> None:
    """It does not warn if prepared statements are switched off."""
    make_pooled_app("rows()", **(AS_DOCUMENTED if line else {}))
    findings = check_settings({"DBSession": model.DBSession})
    [finding] = [each for each in findings if each.check == "prepared statements"]
    assert finding.mark == ("ok" if line else "warn")
    assert line or "PgBouncer" in finding.result
    assert line or LINE in finding.advice
    model.DBSession.remove()
