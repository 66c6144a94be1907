"""The two tables of ``database://``, and how events are written to them.

A channel is a row that counts its events. A transaction that publishes updates this
row, so the next one that publishes in the same channel waits for its commit. So the
numbers of a channel have no gap, and their order is the order of the commits.

A channel has a random id. If its row is removed and created again, the id is another
one, so the event ids from before are recognised.

Texts are stored as bytes in UTF-8: PostgreSQL rejects NUL in text, and MariaDB compares
and stores text by the character set of a table and of a connection.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from ...core.errors import StreamError
from ...formats.sse import Message

T = TypeVar("T")

MYSQL = "mysql", "mariadb"
DIALECTS = "sqlite", "postgresql", *MYSQL
"""SQLAlchemy's names of the supported databases."""
MAX_NAMES = 500
"""Maximum channels of one statement."""
SECRET_NAME = b""
"""The name of the row whose id is a secret of the database. No channel has it."""
ADVICE = (
    "Run python -m tgstream create-tables config.ini, or migrate with Alembic and "
    "tgstream.channels.metadata"
)

metadata = sa.MetaData()

_name = sa.LargeBinary(1024).with_variant(mysql.VARBINARY(1024), *MYSQL)
_text = sa.LargeBinary().with_variant(mysql.LONGBLOB(), *MYSQL)
_key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

channels = sa.Table(
    "tgstream_channels",
    metadata,
    sa.Column("name", _name, primary_key=True),
    sa.Column("id", sa.BigInteger, nullable=False),
    sa.Column("last_number", sa.BigInteger, nullable=False),
    sa.Column("last_created", sa.Double, nullable=False),
    # Not unique: MariaDB locks gaps of unique indexes, in which publishers deadlock.
    sa.Index("tgstream_channels_id", "id"),
    mysql_engine="InnoDB",
    mariadb_engine="InnoDB",
)
"""The channels. ``last_created`` is in seconds, by the clock of the database."""

events = sa.Table(
    "tgstream_events",
    metadata,
    sa.Column("id", _key, primary_key=True, autoincrement=True),
    sa.Column("channel_id", sa.BigInteger, nullable=False),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("type", _text),
    sa.Column("is_json", sa.Boolean, nullable=False),
    sa.Column("data", _text, nullable=False),
    sa.UniqueConstraint("channel_id", "number", name="tgstream_events_number"),
    sqlite_autoincrement=True,  # the id of a removed event is not used again
    mysql_engine="InnoDB",
    mariadb_engine="InnoDB",
)
"""The events. ``id`` is only for the processes that read. No client sees it."""


class clock(FunctionElement[float]):
    """The time of the database, in seconds since 1970. Time zones do not affect it."""

    type = sa.Double()
    inherit_cache = True


_CLOCKS = {
    # now() would be the begin of the transaction.
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) AS DOUBLE PRECISION)",
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    "mysql": "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) / 1e6)",
}
_CLOCKS["mariadb"] = _CLOCKS["mysql"]


@compiles(clock)
def _compile_clock(element: clock, compiler: Any, **_: Any) -> str:
    return _CLOCKS[compiler.dialect.name]


class ChannelRow(NamedTuple):
    """A channel: its id, and the number of its newest event."""

    id: int
    last_number: int


# Statements.

_ROW = channels.c.name, channels.c.id, channels.c.last_number


def _count_on_conflict(insert: Any) -> Any:
    """Let the insert of a channel add its events if the channel exists."""
    changed = {
        "last_number": channels.c.last_number + insert.excluded.last_number,
        "last_created": clock(),
    }
    return insert.on_conflict_do_update(index_elements=["name"], set_=changed)


def _build_mysql_upsert(insert_class: Any) -> Any:
    insert = insert_class(channels).values(last_created=clock())
    return insert.on_duplicate_key_update(
        last_number=channels.c.last_number + insert.inserted.last_number,
        last_created=clock(),
    )


def _build_upserts() -> dict[str, Any]:
    """The statements that count new events of a channel, by dialect."""
    upserts: dict[str, Any] = {}
    for name, module in ("postgresql", postgresql), ("sqlite", sqlite):
        insert: Any = module.insert(channels).values(last_created=clock())
        upserts[name] = _count_on_conflict(insert)
    upserts["postgresql"] = upserts["postgresql"].returning(*_ROW)
    for name in MYSQL:
        upserts[name] = _build_mysql_upsert(mysql.Insert)
    return upserts


def _build_single_insert() -> Any:
    """The statement of PostgreSQL that counts and inserts one event.

    Its parameters have names beside those of the columns, which SQLAlchemy reserves.
    """
    insert = postgresql.insert(channels).values(
        name=sa.bindparam("new_name"),
        id=sa.bindparam("new_id"),
        last_number=1,
        last_created=clock(),
    )
    counted = _count_on_conflict(insert).returning(*_ROW).cte("counted")
    names = ["channel_id", "number", "created", "type", "is_json", "data"]
    values = sa.select(
        counted.c.id,
        counted.c.last_number,
        clock(),
        sa.bindparam("new_type", type_=sa.LargeBinary()),
        sa.bindparam("new_is_json", type_=sa.Boolean()),
        sa.bindparam("new_data", type_=sa.LargeBinary()),
    )
    single = sa.insert(events).from_select(names, values)
    return single.returning(events.c.channel_id, events.c.number)


class _UpsertOfNewerRows(mysql.Insert):
    """An upsert of rows that others have changed since the transaction has begun."""

    inherit_cache = True


@compiles(_UpsertOfNewerRows)
def _compile_upsert(element: mysql.Insert, compiler: Any, **options: Any) -> str:
    upsert = compiler.visit_insert(element, **options)
    return f"SET STATEMENT innodb_snapshot_isolation = OFF FOR {upsert}"


_UPSERTS = _build_upserts()
_UPSERT_OF_NEWER_ROWS = _build_mysql_upsert(_UpsertOfNewerRows)
_INSERT = sa.insert(events).values(created=clock()).inline()
_INSERT_ONE = _build_single_insert()
_SELECT_CHANNELS = sa.select(*_ROW).where(
    channels.c.name.in_(sa.bindparam("names", expanding=True))
)


def insert_events(
    connection: sa.Connection, messages: Sequence[Message]
) -> list[tuple[int, int, int]]:
    """Insert events in the transaction of a connection.

    The channels are locked until this transaction ends, in the order of their names, so
    that two publishers cannot deadlock.

    :returns: for each channel its id, and its number before and after.
    """
    if len(messages) == 1 and connection.dialect.name == "postgresql":
        return [_insert_one(connection, messages[0])]
    counts = Counter(message.channel.encode() for message in messages)
    rows = _count_events(connection, counts)
    numbers = {name: row.last_number - counts[name] for name, row in rows.items()}
    inserted = []
    for message in messages:
        name = message.channel.encode()
        numbers[name] += 1
        inserted.append(_event_values(message, rows[name].id, numbers[name]))
    _execute(connection, _INSERT, inserted)
    return [
        (row.id, row.last_number - counts[name], row.last_number)
        for name, row in rows.items()
    ]


def _insert_one(connection: sa.Connection, message: Message) -> tuple[int, int, int]:
    """Insert one event with one statement, which saves a round trip."""
    channel = _channel_values(message.channel.encode(), 1)
    event = _event_values(message, 0, 0)
    names = {"name", "id", "type", "is_json", "data"}
    values = {
        f"new_{name}": value
        for name, value in (channel | event).items()
        if name in names
    }
    id, number = _execute(connection, _INSERT_ONE, [values]).one()
    return id, number - 1, number


def _count_events(
    connection: sa.Connection, counts: Counter[bytes]
) -> dict[bytes, ChannelRow]:
    """Add the numbers of new events to their channels, and return the channels."""
    values = [_channel_values(name, counts[name]) for name in sorted(counts)]
    upsert = _UPSERTS[connection.dialect.name]
    if _refuses_newer_rows(connection):
        upsert = _UPSERT_OF_NEWER_ROWS
    result = _execute(connection, upsert, values)
    if connection.dialect.name == "postgresql":
        return {bytes(row.name): ChannelRow(*row[1:]) for row in result}
    return read_channels(connection, sorted(counts))


_snapshot_isolation: WeakKeyDictionary[sa.Dialect, bool] = WeakKeyDictionary()
"""By the dialect of an engine."""


def _refuses_newer_rows(connection: sa.Connection) -> bool:
    """Whether MariaDB refuses to change rows that are newer than the transaction.

    It does by default since version 11.6.2. Each transaction that has read something
    would fail if another one has published in its channels since then.
    """
    dialect = connection.dialect
    if dialect.name not in MYSQL:
        return False
    if dialect not in _snapshot_isolation:
        row = connection.exec_driver_sql(
            "SHOW GLOBAL VARIABLES LIKE 'innodb_snapshot_isolation'"
        ).first()
        _snapshot_isolation[dialect] = row is not None and row[1] == "ON"
    return _snapshot_isolation[dialect]


def _channel_values(name: bytes, count: int) -> dict[str, Any]:
    """A new channel with some events. They are added if the channel exists."""
    return {"name": name, "id": secrets.randbits(62) + 1, "last_number": count}


def _event_values(message: Message, channel_id: int, number: int) -> dict[str, Any]:
    data, type = message.data, message.event
    return {
        "channel_id": channel_id,
        "number": number,
        "type": None if type is None else type.encode(),
        "is_json": message.is_json,
        "data": message.text.encode() if data is None else data,
    }


def read_channels(
    connection: sa.Connection, names: Sequence[bytes]
) -> dict[bytes, ChannelRow]:
    """The channels with these names that exist."""
    found = {}
    for batch in batches(names, MAX_NAMES):
        for row in _execute(connection, _SELECT_CHANNELS, [{"names": batch}]):
            found[bytes(row.name)] = ChannelRow(row.id, row.last_number)
    return found


_OPTIONS: Any = {"schema_translate_map": None, "stream_results": False}
"""The application may set these for the connection of its session."""


def _execute(
    connection: sa.Connection, statement: Any, values: list[dict[str, Any]]
) -> Any:
    """Execute a statement on a connection that may be the application's."""
    return connection.execute(
        statement,
        values if len(values) > 1 else values[0],
        execution_options=_OPTIONS,
    )


def read_clock(connection: sa.Connection) -> float:
    """The time of the database in seconds."""
    seconds: float = connection.execute(sa.select(clock())).scalar_one()
    return seconds


def read_secret(connection: sa.Connection) -> int:
    """The secret of the database, created on the first call.

    :param connection: commits each statement.
    """
    found = read_channels(connection, [SECRET_NAME])
    if not found:
        values = {"name": SECRET_NAME, "id": secrets.randbits(62), "last_number": 0}
        # An upsert, because another process may create it now.
        connection.execute(_UPSERTS[connection.dialect.name], values)
        found = read_channels(connection, [SECRET_NAME])
    return found[SECRET_NAME].id


def batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """Lists of at most ``size`` items."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


# Errors.


def is_connection_error(error: BaseException) -> bool:
    """Whether a database cannot be reached, or is locked for too long."""
    lost = getattr(error, "connection_invalidated", False)
    return lost or isinstance(
        error,
        sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.TimeoutError | OSError,
    )


def create_tables(engine: sa.Engine) -> list[str]:
    """Create the tables that do not exist.

    :returns: the names of the created tables.
    """
    engine = engine.execution_options(schema_translate_map=None)
    missing = find_missing_tables(engine)
    metadata.create_all(engine)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        read_secret(connection)
    return missing


def find_missing_tables(engine: sa.Engine) -> list[str]:
    """The names of the tables that do not exist."""
    inspector = sa.inspect(engine)
    return [name for name in metadata.tables if not inspector.has_table(name)]


def is_locked(error: BaseException) -> bool:
    """Whether SQLite is locked for a moment by another connection."""
    original = getattr(error, "orig", None)
    return isinstance(original, sqlite3.OperationalError) and "locked" in str(original)


@contextmanager
def report_missing_tables(engine: sa.Engine) -> Iterator[None]:
    """Report an error as missing tables, if they are the reason.

    :raises StreamError: instead of the database's error.
    """
    try:
        yield
    except (sa.exc.ProgrammingError, sa.exc.OperationalError) as error:
        if error.connection_invalidated or is_locked(error):
            raise
        try:
            missing = find_missing_tables(engine)
        except sa.exc.SQLAlchemyError:
            raise error from None
        if not missing:
            raise
        url = engine.url.set(query={})
        raise StreamError(
            f"tgstream.channels is database://, but {url} has no table "
            f"{' and '.join(missing)}. {ADVICE}"
        ) from error
