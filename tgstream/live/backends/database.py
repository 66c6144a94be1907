"""The back end of ``database://``: channels in the database of the application.

An event is inserted in the transaction of the rows that it is about, so both are
committed or neither. The module of the tables explains how the numbers of a channel
prove that no event is missing. In each process one thread reads the new events of all
channels that have listeners, over one connection, and it runs only while there are
listeners.

``_lock`` is held while the thread reads, and while a channel gets its first listener:
an event is either part of the position where the channel starts, or is read later.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary, finalize, ref

import sqlalchemy as sa

from ...core.errors import StreamError
from ...core.options import clock
from ...core.report import log
from ...database.engines import (
    get_binds,
    get_factory_binds,
    has_one_connection,
    undo_failed_commits,
)
from ...database.registry import scoped_sessions
from ...database.session_transactions import get_connection
from ...database.writes import has_written
from ...formats.sse import Event, Message
from ..history import Backlog, Position, Subscription
from ..observation import add_backend, report_reconnect
from ..protocols import ChannelSettings, ConnectionLost
from .database_changes import Wakeup, watch_changes
from .database_history import (
    DatabaseHistory,
    read_age,
    read_newest,
    read_page,
    update_histories,
)
from .database_ids import format_id, format_start, parse_id, parse_start
from .database_reader import EventReader
from .database_tables import (
    DIALECTS,
    MYSQL,
    insert_events,
    is_connection_error,
    is_locked,
    read_channels,
    read_clock,
    read_secret,
    report_missing_tables,
)
from .database_worker import BackgroundWorker

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

T = TypeVar("T")

MIN_RECONNECT_SECONDS = 0.05
MAX_RECONNECT_SECONDS = 1.0
"""Seconds between two attempts to connect. They double from the minimum on."""
READ_PAUSE = 0.005
"""Minimum seconds between two reads, so that many publishers share one."""
LOCK_SECONDS = 5.0
"""Maximum seconds that a new listener waits for the reader, or for SQLite."""
MAX_PAGE = 20
"""Maximum events of one read for a single listener."""
START_SHARE = 0.9
"""The share of ``channel_seconds`` for which an id from before the first event is
valid. After that time the channel may have been removed and created again."""


def _find_session(config: Mapping[str, Any]) -> Any:
    """The scoped session of an application whose database has the channels.

    :raises ValueError: if the application has none.
    """
    sessions = scoped_sessions(config)
    if not sessions:
        raise ValueError(
            "tgstream.channels is database://, but the application has no scoped "
            "session. Set use_sqlalchemy and the model, or name the session in "
            "tgstream.sessions"
        )
    return sessions[0]


def find_engine(config: Mapping[str, Any]) -> tuple[Any, sa.Engine]:
    """The scoped session and the engine of an application, whose database is used.

    :raises ValueError: if there is none, or if it cannot have channels.
    """
    scoped = _find_session(config)
    binds = get_factory_binds(scoped)
    if not binds:
        raise ValueError(
            "tgstream.channels is database://, but the first scoped session of the "
            "application has no engine. Bind it to an engine"
        )
    engine: sa.Engine = binds[0].engine
    url = engine.url.set(query={})
    if engine.dialect.name not in DIALECTS:
        raise ValueError(
            f"tgstream.channels is database://, which supports SQLite, PostgreSQL and "
            f"MariaDB, but the application uses {url}. Use redis://"
        )
    if has_one_connection(engine):
        raise ValueError(
            f"tgstream.channels is database://, but {url} uses one connection for all "
            "sessions of a thread (typical of in-memory SQLite). Use a database file"
        )
    return scoped, engine


_backends: WeakKeyDictionary[Any, dict[tuple[Any, ...], DatabaseBackend]]
_backends = WeakKeyDictionary()


def find_backend(
    config: Mapping[str, Any], settings: ChannelSettings
) -> DatabaseBackend:
    """The back end of an application in this process.

    :raises ValueError: if its database cannot have channels.
    """
    scoped = _find_session(config)
    # Tests may bind it to another engine later.
    bind = getattr(scoped.session_factory, "kw", {}).get("bind")
    # A forked process needs its own back end.
    key = os.getpid(), settings, bind
    backends = _backends.get(scoped)
    if backends is None:
        backends = _backends.setdefault(scoped, {})
    backend = backends.get(key)
    if backend is None:
        # setdefault(), so that two threads get the same back end.
        new = add_backend(DatabaseBackend(*find_engine(config), settings))
        backend = backends.setdefault(key, new)
        for other in [*backends]:
            if other[2] is not bind:
                del backends[other]
    return backend


class DatabaseBackend:
    """The channels of an application's database, in this process.

    :param scoped: the scoped session of the application.
    :param engine: its engine.
    :param settings: the other options of the application.
    """

    def __init__(
        self, scoped: Any, engine: sa.Engine, settings: ChannelSettings
    ) -> None:
        self._scoped = ref(scoped)
        self.engine = engine
        self._settings = settings
        # Connections beside those of the application: a request that holds one would
        # otherwise wait for a second one, and many such requests would wait forever.
        self._engine = _create_own_engine(engine)
        url = settings.listen_url
        self._listen_engine = (
            sa.create_engine(url, poolclass=sa.NullPool) if url else self._engine
        )
        self._worker = BackgroundWorker(
            self._connect, settings, engine.dialect.name == "postgresql"
        )
        self._histories: WeakValueDictionary[str, DatabaseHistory] = (
            WeakValueDictionary()
        )
        self._lock = threading.Lock()
        self._wakeup: Wakeup | None = None  # while the reader runs
        self._connection_lost = False
        self._secret: int | None = None
        _close_with(engine, self)

    # Publishing.

    backlog = 0

    @property
    def scoped(self) -> Any:
        """The scoped session whose transactions contain the events."""
        return self._scoped()

    def owns(self, session: Session) -> bool:
        """Whether a session uses the database of the channels."""
        pool = self.engine.pool
        return any(bind.engine.pool is pool for bind in get_binds(session))

    def insert(self, connection: sa.Connection, messages: Sequence[Message]) -> None:
        """Insert events in the transaction of a connection.

        Others that publish in the same channels wait until this transaction ends, so
        call this as late as possible. After the commit call :meth:`publish_committed`.

        :raises StreamError: if the tables do not exist.
        """
        with report_missing_tables(self._engine):
            self._insert(connection, messages)

    def _insert(self, connection: sa.Connection, messages: Sequence[Message]) -> None:
        for row in insert_events(connection, messages):
            self._worker.note_events(*row)

    def publish(self, messages: Sequence[Message]) -> None:
        """Insert and commit events in a transaction of their own.

        :raises StreamError: if the tables do not exist, or if SQLite is locked.
        """
        seconds = self._settings.publish_timeout
        if self.engine.dialect.name == "sqlite":
            seconds = 0.0 if self._has_transaction() else seconds
            try:
                self._publish(messages, seconds)
            except sa.exc.OperationalError as error:
                if not is_locked(error):
                    raise
                raise self._report_lock(seconds) from error
        else:
            self._publish(messages, seconds)
        self._wake_listeners()

    def _publish(self, messages: Sequence[Message], seconds: float) -> None:
        # The connection is given back first: the pool may have only one.
        with report_missing_tables(self._engine), self._begin(seconds) as connection:
            self._insert(connection, messages)

    def publish_committed(self, messages: Sequence[Message]) -> None:
        """Wake the listeners, because a transaction with events has committed."""
        self._wake_listeners()

    def _wake_listeners(self) -> None:
        wakeup = self._wakeup  # the reader may end meanwhile
        if wakeup is not None:
            wakeup.set()
        self._worker.start()

    @contextmanager
    def _begin(self, seconds: float) -> Iterator[sa.Connection]:
        """A connection with a transaction that waits for locks at most some seconds."""
        statement = _limit_wait(self.engine.dialect.name, seconds)
        connection = self._engine.connect()
        try:
            connection.exec_driver_sql(statement)
        except sa.exc.DBAPIError as error:
            connection.close()
            if not error.connection_invalidated:
                raise
            connection = self._engine.connect()  # the server was restarted
            connection.exec_driver_sql(statement)
        with connection:
            yield connection
            connection.commit()

    def _has_transaction(self) -> bool:
        """Whether the application's session on this thread may have locked SQLite."""
        scoped = self.scoped
        if scoped is None or not scoped.registry.has():
            return False
        session = scoped()
        return session.in_transaction() and has_written(
            get_connection(session, self.engine)
        )

    def _report_lock(self, seconds: float) -> StreamError:
        if not seconds:
            return StreamError(
                "publish(now=True) cannot write to SQLite, because the transaction "
                "that runs here has locked the database. Omit now=True, so that the "
                "event is committed with it, or commit first"
            )
        return StreamError(
            f"The SQLite database is locked for more than {seconds:g} s by another "
            "transaction, so the event was not published. Shorten that transaction, or "
            "raise tgstream.publish_timeout"
        )

    def close(self) -> None:
        """Close the connections that are not in use. Later calls open others."""
        self._worker.finish()
        self._engine.dispose()

    # Listeners.

    def position(self, channel: str) -> str:
        """The id of the newest event of a channel."""
        name = channel.encode()

        def read(connection: sa.Connection) -> str:
            row = read_channels(connection, [name]).get(name)
            if row is not None:
                return format_id(*row)
            return format_start(
                self._secret_of(connection), name, read_clock(connection)
            )

        return self._read(read)

    def subscribe(
        self, channel: str, after: str | None, since: float | None = None
    ) -> Subscription:
        """Start a listener of a channel."""
        history = self._history(channel)
        if after is None:
            next_number, newest = history.snapshot()
            return Subscription(history, next_number, self._format_id(history, newest))
        position = self._find_position(history, after)
        if position is None or self._is_too_old(history, position, since):
            return self._subscribe_after_gap(history)
        number = history.number_after(position, exact=True)
        if number is None and position < history.first_position:
            if not self._load_backlog(history, position):
                return self._subscribe_after_gap(history)
            number = history.number_after(position, exact=True)
            if number is None:  # the backlog is longer than a history
                backlog = self._iter_backlog(history, position)
                return Subscription(history, id=after, backlog=backlog)
        if number is None:
            return self._subscribe_after_gap(history)
        return Subscription(history, number, after)

    def _subscribe_after_gap(self, history: DatabaseHistory) -> Subscription:
        next_number, newest = history.snapshot()
        id = self._format_id(history, newest)
        return Subscription(history, next_number, id, has_gap=True)

    def _format_id(self, history: DatabaseHistory, position: Position) -> str:
        id = history.id_of(position)
        if id is None:
            secret = self._read(self._secret_of)
            id = format_start(secret, history.key, history.database_time())
        return id

    def _secret_of(self, connection: sa.Connection) -> int:
        if self._secret is None:
            self._secret = read_secret(connection)
        return self._secret

    def _find_position(self, history: DatabaseHistory, after: str) -> Position | None:
        """The position of an event id. None if it is not of the channel's events."""
        event = parse_id(after)
        if event is None:
            return self._find_start(history, after)
        position = history.position_of(*event)
        if position is None or position > history.last_position:
            # This process may not have read the event yet.
            with self._locked():
                self._read(lambda connection: update_histories(connection, [history]))
            position = history.position_of(*event)
        if position is None or position > history.last_position:
            return None
        return position

    def _find_start(self, history: DatabaseHistory, after: str) -> Position | None:
        """The position before the first event, if the id proves it."""
        secret = self._read(self._secret_of)
        seconds = parse_start(after, secret, history.key)
        if seconds is None:
            return None
        age = history.database_time() - seconds
        return history.start if age < self._settings.seconds * START_SHARE else None

    def _is_too_old(
        self, history: DatabaseHistory, position: Position, since: float | None
    ) -> bool:
        """Whether the event after a position is older than ``since`` seconds."""
        channel_id = history.channel_id
        if since is None or channel_id is None:
            return False
        age = self._read(
            lambda connection: read_age(connection, channel_id, position[1] + 1)
        )
        return age is not None and age > since

    def _load_backlog(self, history: DatabaseHistory, position: Position) -> bool:
        """Read the events after a position into the history, for all listeners.

        :returns: False if some of them were removed. If it is True, the history has the
            newest of them, as many as there is room for.
        """
        with self._locked():  # one listener reads, and the others wait for its result
            if history.number_after(position, exact=True) is not None:
                return True
            channel_id, until = history.channel_id, history.first_position
            assert channel_id is not None
            # Read one more than fits: its position is that before the oldest that fits.
            count = self._settings.history + 1
            rows, is_complete = self._read(
                lambda connection: (
                    read_newest(connection, channel_id, position[1], until[1], count),
                    # After the read: what is complete now was complete then.
                    read_age(connection, channel_id, position[1] + 1) is not None,
                )
            )
            if not is_complete:
                return False
            entries = [history.make_entry(row) for row in rows]
            if len(entries) == count:
                (position, _), *entries = entries
            history.prepend(position, until, entries)
            return True

    def _iter_backlog(self, history: DatabaseHistory, position: Position) -> Backlog:
        """Read a backlog that is longer than a history page by page.

        If an event is missing, the listener ends. The browser then reconnects, and
        receives a reset.
        """
        while (number := history.number_after(position, exact=True)) is None:
            page = self._read_page(history, position)
            if not page:
                return None
            while page:
                position, event = page.popleft()
                yield event
                del event
        return number

    def _read_page(
        self, history: DatabaseHistory, position: Position
    ) -> deque[tuple[Position, Event]]:
        """The events after a position. None of them if the next one is missing."""
        channel_id, number = history.channel_id, position[1]
        if channel_id is None or position != history.position_of(channel_id, number):
            return deque()
        try:
            rows = self._read(
                lambda connection: read_page(connection, channel_id, number, MAX_PAGE)
            )
        except ConnectionLost:
            return deque()
        if not rows or rows[0].number != number + 1:
            return deque()
        return deque(history.make_entry(row) for row in rows)

    # Reading.

    def _connect(self) -> sa.Connection:
        """A connection that commits each statement."""
        connection = self._engine.connect()
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        if self.engine.dialect.name == "sqlite":
            connection.exec_driver_sql(_limit_wait("sqlite", LOCK_SECONDS))
        return connection

    def _read(self, function: Callable[[sa.Connection], T]) -> T:
        """The result of a function that reads.

        :raises ConnectionLost: if the database cannot be reached.
        """
        try:
            with report_missing_tables(self._engine):
                result = self._read_again(function)
        except (sa.exc.SQLAlchemyError, OSError) as error:
            if not is_connection_error(error):
                raise
            self._log_lost_connection(error)
            raise ConnectionLost from error
        self._log_reconnect()
        return result

    def _read_again(self, function: Callable[[sa.Connection], T]) -> T:
        """Read, and once more if the server was restarted since the last time."""
        try:
            with self._connect() as connection:
                return function(connection)
        except sa.exc.DBAPIError as error:
            if not error.connection_invalidated:
                raise
        with self._connect() as connection:
            return function(connection)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude the reader, which needs long only if the database does not answer."""
        if not self._lock.acquire(timeout=LOCK_SECONDS):
            error = TimeoutError(f"no answer for {LOCK_SECONDS:g} s")
            self._log_lost_connection(error)
            raise ConnectionLost from error
        try:
            yield
        finally:
            self._lock.release()

    # The reader: a thread.

    def _history(self, channel: str) -> DatabaseHistory:
        history = self._histories.get(channel)
        if history is not None:
            return history
        with self._locked():
            history = self._histories.get(channel)
            if history is None:
                history = self._read(
                    lambda connection: self._open_history(connection, channel)
                )
                self._histories[channel] = history
                if self._wakeup is None:
                    self._wakeup = Wakeup()
                    threading.Thread(
                        target=self._run_reader, name="tgstream-channels", daemon=True
                    ).start()
            return history

    def _open_history(self, connection: sa.Connection, channel: str) -> DatabaseHistory:
        name = channel.encode()
        row = read_channels(connection, [name]).get(name)
        return DatabaseHistory(
            channel, row, self._settings.history, read_clock(connection) - clock()
        )

    def _has_listeners(self) -> bool:
        """Whether the reader must go on. Otherwise it is no longer registered."""
        with self._lock:
            if self._histories:
                return True
            assert self._wakeup is not None
            self._wakeup.close()
            self._wakeup = None
            return False

    def _run_reader(self) -> None:
        reader, pause, is_due = None, MIN_RECONNECT_SECONDS, True
        while self._has_listeners():
            try:
                if reader is None:
                    reader, is_due = self._open_reader(), True
                is_due = is_due or reader.wait(self._settings.poll_seconds)
                if not (is_due or reader.needs_check):
                    continue
                is_due = True  # until it has succeeded
                with self._lock, report_missing_tables(self._engine):
                    reader.read()
                is_due = False
                self._log_reconnect()
                pause = MIN_RECONNECT_SECONDS
                time.sleep(READ_PAUSE)
            except Exception as error:  # all listeners depend on this thread
                if not is_locked(error):
                    self._log_lost_connection(error)
                    if reader is not None:
                        reader.close()
                        reader = None
                time.sleep(pause)
                pause = min(pause * 2, MAX_RECONNECT_SECONDS)
        if reader is not None:
            reader.close()

    def _open_reader(self) -> EventReader:
        assert self._wakeup is not None
        connection = self._listen_engine.connect()
        try:
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.detach()  # so that it takes no place in the pool
            changes = watch_changes(connection, self._wakeup)
            return EventReader(connection, changes, self._histories)
        except BaseException:
            connection.close()
            raise

    def _log_lost_connection(self, error: Exception) -> None:
        if not self._connection_lost:
            self._connection_lost = True
            reason = getattr(error, "orig", None) or error
            log.warning(
                "Lost the connection to the database (tgstream.channels): %s. "
                "Listeners wait until it reconnects",
                " ".join(str(reason).split()).rstrip("."),
            )

    def _log_reconnect(self) -> None:
        if self._connection_lost:
            self._connection_lost = False
            log.info("Reconnected to the database (tgstream.channels)")
            report_reconnect()


def _create_own_engine(engine: sa.Engine) -> sa.Engine:
    """An engine with the options and the pool events of the application's engine.

    Its transactions have the level at which publishers wait for each other and do not
    fail. On SQLite the application may have changed who begins transactions, by the
    driver's ``isolation_level`` or ``autocommit``. Here the driver begins them.
    """
    levels = {"postgresql": "READ COMMITTED", "sqlite": "SERIALIZABLE"}
    level: Any = levels.get(engine.dialect.name, "REPEATABLE READ")
    own = sa.create_engine(
        engine.url, pool=engine.pool.recreate(), isolation_level=level
    )
    if engine.dialect.name == "sqlite":
        sa.event.listen(own, "connect", _reset_autocommit)
        undo_failed_commits(own)
    return own


def _reset_autocommit(raw: Any, record: object) -> None:
    legacy = getattr(sqlite3, "LEGACY_TRANSACTION_CONTROL", None)
    if legacy is not None:  # Python 3.12
        raw.autocommit = True  # this ends a transaction that False has begun
        raw.autocommit = legacy


def _limit_wait(dialect: str, seconds: float) -> str:
    """A statement that limits how long later statements wait for a lock."""
    if dialect == "sqlite":
        return f"PRAGMA busy_timeout = {int(seconds * 1000)}"
    if dialect in MYSQL:
        return f"SET innodb_lock_wait_timeout = {max(int(seconds), 1)}"
    return f"SET LOCAL lock_timeout = {max(int(seconds * 1000), 1)}"


def _close_with(engine: sa.Engine, backend: DatabaseBackend) -> None:
    """Close the connections of a back end with those of the application.

    A forked process must not close the connections of its parent.
    """
    pid, reference, own = os.getpid(), ref(backend), backend._engine

    def close(_: object) -> None:
        found = reference()
        if found is not None and os.getpid() == pid:
            found.close()

    def dispose() -> None:
        if os.getpid() == pid:
            own.dispose()

    sa.event.listen(engine, "engine_disposed", close)
    finalize(backend, dispose).atexit = False
