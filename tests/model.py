"""A database model like that of a quickstarted application, new for each test."""

from __future__ import annotations

import sqlite3
import types
from collections.abc import Callable
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    scoped_session,
    sessionmaker,
)
from zope.sqlalchemy import register


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(50), unique=True)
    notes: Mapped[list[Note]] = relationship(back_populates="user")


class Note(Base):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(sa.String(200))
    user_id: Mapped[int | None] = mapped_column(sa.ForeignKey("users.id"))
    user: Mapped[User | None] = relationship(back_populates="notes")


class Model(types.ModuleType):
    """The ``model`` module of an application, which a test can also read and change.

    The test uses connections of its own, which are outside of the application.

    :param url: the URL of an SQLite file, or of a PostgreSQL database.
    :param zope: whether the session is registered with zope.sqlalchemy.
    :param create: whether to drop and create the tables. Otherwise they must exist.
    :param session_options: the options of ``sessionmaker``.
    """

    def __init__(
        self, url: str, zope: bool = True, create: bool = True, **session_options: Any
    ) -> None:
        super().__init__("model")
        self.url = sa.make_url(url)
        self.maker = sessionmaker(**session_options)
        self.DBSession: scoped_session[Session] = scoped_session(self.maker)
        if zope:
            register(self.DBSession)
        self.outside = sa.create_engine(url, poolclass=sa.NullPool)
        self._skip_fsync(self.outside)
        if create:
            # A single connection, because connecting is slow.
            with self.outside.begin() as connection:
                Base.metadata.drop_all(connection)
                Base.metadata.create_all(connection, checkfirst=False)
        self.engine = self.outside
        self._reader: psycopg.Connection[Any] | None = None

    def _skip_fsync(self, engine: sa.Engine) -> None:
        """Make commits of SQLite fast. They are safe unless the machine crashes."""
        if self.sqlite:
            sa.event.listen(
                engine,
                "connect",
                lambda raw, _: raw.execute("PRAGMA synchronous = OFF").close(),
            )

    def init_model(self, engine: sa.Engine) -> None:
        """Bind the session. TG calls this with the engine of ``sqlalchemy.url``."""
        self.engine.dispose()  # the engine of an earlier application of the test
        self.engine = engine
        self._skip_fsync(engine)
        self.DBSession.configure(bind=engine)

    def dispose(self) -> None:
        """Close all connections."""
        self.DBSession.remove()
        self.engine.dispose()
        if self._reader is not None:
            self._reader.close()

    @property
    def sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    def fetch(self, statement: str) -> list[tuple[Any, ...]]:
        """Return the rows of ``statement``, read without SQLAlchemy."""
        if self.sqlite:
            with sqlite3.connect(str(self.url.database), timeout=5) as connection:
                rows = connection.execute(statement).fetchall()
            connection.close()
            return rows
        try:
            return self._read(statement)
        except psycopg.OperationalError:  # the server was restarted
            return self._read(statement)

    def _read(self, statement: str) -> list[tuple[Any, ...]]:
        """Execute a statement on PostgreSQL, each time over the same connection."""
        if self._reader is None or self._reader.closed:
            self._reader = psycopg.connect(
                **self.connection_options(), autocommit=True, prepare_threshold=None
            )
        return self._reader.execute(statement.encode()).fetchall()

    def execute(self, statements: str) -> None:
        """Execute and commit statements on another connection."""
        with self.outside.connect() as outside:
            outside.exec_driver_sql(statements)
            outside.commit()

    def connection_options(self) -> dict[str, Any]:
        """Return the parameters of ``psycopg.connect``."""
        url = self.url
        return {
            "host": url.query.get("host", url.host),
            "port": url.port,
            "user": url.username,
            "dbname": url.database,
        }

    def names(self) -> list[str]:
        """Return the names of the committed users, in order."""
        return [row[0] for row in self.fetch("SELECT name FROM users ORDER BY id")]

    def texts(self) -> list[str]:
        """Return the texts of the committed notes, in order."""
        return [row[0] for row in self.fetch("SELECT text FROM notes ORDER BY id")]

    def seed(self, *names: str) -> None:
        """Commit users with these names, from outside of the application."""
        with Session(self.outside) as session:
            session.add_all([User(name=name) for name in names])
            session.commit()

    def idle_in_transaction(self) -> int:
        """Return how many PostgreSQL backends are idle in transaction. 0 for SQLite."""
        if self.sqlite:
            return 0
        return int(
            self.fetch(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database()"
                " AND state LIKE 'idle in transaction%'"
            )[0][0]
        )


MakeModel = Callable[..., Model]
