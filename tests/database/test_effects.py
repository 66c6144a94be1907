"""Effects of a statement beside reading. An unknown effect counts as an effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import aliased

import tgstream
from tests.conftest import MakeApp, Root, assert_clean
from tests.model import MakeModel, Note, User
from tests.wsgi import get
from tgstream import rows
from tgstream.database.effects import is_query, only_reads
from tgstream.database.transaction import MAX_STATEMENTS

OTHER = aliased(User)


READS: list[Any] = [
    sa.select(User),
    sa.select(OTHER.name).join(Note, Note.user_id == OTHER.id),
    sa.select(User.id, sa.func.count()).group_by(User.id),
    sa.select(sa.func.count("*")).select_from(sa.select(User).subquery()),
    sa.select(User).where(sa.exists().where(Note.user_id == User.id)),
    sa.select(sa.func.coalesce(sa.func.max(User.id), 0)),
    sa.select(sa.case((User.id > 1, "a"), else_="b"), sa.cast(User.id, sa.String)),
    sa.select(sa.func.row_number().over(order_by=User.id)).order_by(User.name),
    sa.union(sa.select(User.id), sa.select(Note.id)),
    sa.select(sa.select(User.id).cte(recursive=True)),
]
"""Each of them certainly leaves nothing."""


OTHERS: list[Any] = [
    sa.text("SELECT 1"),
    sa.text("SELECT 1 AS id").columns(User.id),
    sa.select(sa.func.set_config("app.tenant", "a", True)),
    sa.select(User).where(sa.func.my_function(User.id) == 1),
    sa.select(sa.func.own.count(User.id)),
    sa.select(sa.func.unknown_series(1, 2).table_valued("value")),
    sa.select(User).where(sa.text("set_config('a.b', 'c', true) = 'c'")),
    sa.select(sa.literal_column("pg_advisory_xact_lock(1)")),
    sa.select(User).with_for_update(),
    sa.select(sa.select(User).with_for_update().subquery()),
    sa.select(User).suffix_with("FOR UPDATE"),
    sa.select(User).prefix_with("/* a hint */"),
    sa.select(sa.delete(User).returning(User.id).cte()),
    sa.select(User).execution_options(yield_per=10),
    sa.select(User).execution_options(stream_results=True),
    sa.union(sa.select(User.id).with_for_update(), sa.select(Note.id)),
]


@pytest.mark.parametrize("statement", READS)
def test_statement_of_known_parts_only_reads(statement: Any) -> None:
    """Its transaction need not go on over the batches of rows(key=...)."""
    assert only_reads(statement)


@pytest.mark.parametrize("statement", OTHERS)
def test_statement_of_unknown_parts_may_have_effects(statement: Any) -> None:
    """Functions, texts, locks and open cursors are not certain to have none."""
    assert not only_reads(statement)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SELECT 1", True),
        ("  -- INSERT INTO x\n ( select 1 )", True),
        ("WITH a AS (SELECT 1) SELECT * FROM a FOR UPDATE", True),
        ("SELECT 'INSERT INTO x', $a$ INTO $a$, \"INTO\"", True),
        ("TABLE users", True),
        ("WITH a AS (WITH b AS (SELECT 1) DELETE FROM users) SELECT 1", False),
        ("WITH a AS MATERIALIZED (\n update users SET id = 1) SELECT 1", False),
        ("WITH a AS (SELECT 1) MERGE INTO users USING a ON true", False),
        ("SELECT 1 INTO copied", False),
        ("DELETE FROM users RETURNING id", False),
        ("FETCH 10 FROM mine", False),
        ("EXPLAIN SELECT 1", False),
    ],
)
def test_text_that_only_selects_is_a_query(text: str, expected: bool) -> None:
    """Words in quotes and comments do not count."""
    assert is_query(sa.text(text)) is expected
    assert is_query(sa.text(text).columns(User.id)) is expected


@pytest.mark.parametrize("count", [MAX_STATEMENTS - 1, MAX_STATEMENTS])
def test_transaction_of_too_many_statements_goes_on(
    make_app: MakeApp, make_model: MakeModel, postgresql: str, count: int
) -> None:
    """tgstream keeps a limited number of statements to check."""
    model = make_model(postgresql)
    model.seed("ada", "bob", "cyd")

    def body() -> Iterator[str]:
        for _ in range(count):
            model.DBSession.scalars(sa.select(User.id)).all()
        for row in rows(sa.select(User), key=User.id, batch=1):
            assert (model.idle_in_transaction() == 1) is (count == MAX_STATEMENTS)
            yield row.name
        tgstream.commit()
        for _ in rows(sa.select(User), key=User.id, batch=1):
            assert model.idle_in_transaction() == 0

    assert get(make_app(Root(body), model)).text == "adabobcyd"
    assert_clean(model)
