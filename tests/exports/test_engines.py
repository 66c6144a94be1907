"""``rows(key=...)`` and ``copy()`` in a session that has several engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tests.exports.test_keyset import assert_same_rows
from tests.model import Model, User
from tgstream import StreamError, copy, rows


class Elsewhere(DeclarativeBase):
    pass


class Other(Elsewhere):
    """A class whose table is in another database."""

    __tablename__ = "others"
    id: Mapped[int] = mapped_column(primary_key=True)
    size: Mapped[int | None]


@pytest.fixture(params=["get_bind", "get_bind, mapper only", "binds", "execution"])
def routed(
    request: pytest.FixtureRequest, model: Model, postgresql: str, tmp_path: Path
) -> Iterator[Session]:
    """A session with ``Other`` in PostgreSQL and the rest in SQLite, or reversed."""
    there = postgresql if model.sqlite else f"sqlite:///{tmp_path}/other.db"
    engine = sa.create_engine(there, poolclass=sa.NullPool)
    Other.__table__.drop(engine, checkfirst=True)  # type: ignore[attr-defined]
    Other.__table__.create(engine)  # type: ignore[attr-defined]

    class Routed(Session):
        def get_bind(self, mapper: Any = None, **arguments: Any) -> Any:
            if mapper is None and request.param == "get_bind, mapper only":
                raise sa.exc.UnboundExecutionError("a mapper is needed")
            if request.param.startswith("get_bind"):
                is_other = mapper is not None and mapper.class_ is Other
                return engine if is_other else model.outside
            if request.param == "execution" and arguments.pop("there", False):
                return engine
            return super().get_bind(mapper, **arguments)

    def to_other(state: Any) -> None:
        if "others" in str(state.statement):
            state.bind_arguments["there"] = True

    both: dict[Any, Any] = {User: model.outside, Other: engine}
    binds = both if request.param == "binds" else None
    with Routed(bind=None if binds else model.outside, binds=binds) as session:
        if request.param == "execution":
            event.listen(session, "do_orm_execute", to_other)
        session.add_all([Other(size=n % 3 or None) for n in range(50)])
        if request.param != "execution":
            session.commit()
        else:
            session.rollback()
            with Session(engine) as outside:
                outside.add_all([Other(size=n % 3 or None) for n in range(50)])
                outside.commit()
        yield session
    Other.__table__.drop(engine)  # type: ignore[attr-defined]
    engine.dispose()


def test_order_of_nulls_is_that_of_the_executing_engine(
    routed: Session,
) -> None:
    """The session's other engine has another order of NULLs."""
    for key in [(Other.size, Other.id), (Other.size.desc(), Other.id)]:
        for batch in (3, 7, 1000):
            assert_same_rows(routed, sa.select(Other.id, Other.size), key, batch)


def test_copy_uses_the_executing_engine(
    routed: Session,
) -> None:
    """COPY is used if and only if that engine is PostgreSQL."""
    statement = sa.select(Other.id).order_by(Other.id)
    lines = b"".join(copy(statement, session=routed)).split()
    assert lines == [
        b"id",
        *(str(row.id).encode() for row in rows(statement, session=routed)),
    ]


def test_statement_on_two_engines_is_refused(
    model: Model, postgresql: str, tmp_path: Path
) -> None:
    """Two shards have no common order."""
    shards = {"one": model.outside, "two": model.outside}

    def all_shards(*args: Any, **options: Any) -> list[str]:
        return list(shards)

    with ShardedSession(
        shard_chooser=lambda *args, **options: "one",
        identity_chooser=all_shards,
        execute_chooser=all_shards,
        shards=shards,
    ) as session:
        with pytest.raises(StreamError, match="one engine"):
            list(rows(sa.select(User), key=User.id, session=session))
        if not model.sqlite:
            with pytest.raises(StreamError, match="one engine"):
                list(copy(sa.select(User), session=session))
