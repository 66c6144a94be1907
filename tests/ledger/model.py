"""The ledger: a row for each event, written in the transaction that publishes it.

This module is the ``model`` of the application.
"""

from __future__ import annotations

import sqlite3

import sqlalchemy as sa
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from zope.sqlalchemy import register


class Base(DeclarativeBase):
    pass


class Entry(Base):
    """An event."""

    __tablename__ = "ledger"
    id: Mapped[int] = mapped_column(primary_key=True)
    channel: Mapped[str]
    work: Mapped[str]
    """The name of its transaction."""
    publisher: Mapped[str]
    """The process and the client, which publish one event after the other."""
    published: Mapped[float | None]
    number: Mapped[int | None]
    """It grows with each event of a process."""


def text_of(entry: Entry, number: int | None) -> str:
    """Return the data of an event."""
    return f"{entry.channel} {entry.work} {number}"


DBSession: scoped_session[Session] = scoped_session(sessionmaker())
register(DBSession)


def init_model(engine: sa.Engine) -> None:
    """Bind the session. TG calls this with the engine of ``sqlalchemy.url``."""
    DBSession.configure(bind=engine)
    set_up(engine)


def set_up(engine: sa.Engine) -> None:
    """Make commits of SQLite fast. They are safe unless the machine crashes."""

    def connect(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous = OFF").close()

    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", connect)


IN_COMMIT_ORDER = {
    # A transaction of PostgreSQL that waits for a lock of another commits after it.
    "postgresql": "pg_xact_commit_timestamp(xmin), number",
    # SQLite has one writer at a time. It assigns all its ids before the next writer.
    "sqlite": "min(id) OVER (PARTITION BY publisher, work), number",
}


def read(url: str) -> list[Entry]:
    """Return the committed entries in the order of their commits."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    order = sa.text(IN_COMMIT_ORDER[engine.dialect.name])
    with Session(engine) as session:
        entries = session.scalars(sa.select(Entry).order_by(order)).all()
        session.expunge_all()
    return list(entries)
