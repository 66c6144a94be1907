"""How a process notices that another one has published with ``database://``.

PostgreSQL reports it over the connection of the reader (``LISTEN``), if the driver is
psycopg or psycopg2. Everywhere else, and in case a report is lost, the reader looks
every ``tgstream.channel_poll_seconds``. On SQLite such a look reads one number in
memory: ``PRAGMA data_version``.
"""

from __future__ import annotations

import selectors
import socket
from contextlib import suppress
from typing import Any

import sqlalchemy as sa

NOTIFY_CHANNEL = "tgstream"
"""The name for LISTEN and NOTIFY. A notification has no payload: it only wakes."""


class Wakeup:
    """Wakes a thread that waits, from any thread. It takes no lock."""

    def __init__(self) -> None:
        self.receiver, self._sender = socket.socketpair()
        self.receiver.setblocking(False)
        self._sender.setblocking(False)

    def set(self) -> None:
        """Wake the thread. Do nothing if it has ended."""
        with suppress(OSError):  # also if so many bytes wait that there is no room
            self._sender.send(b"x")

    def clear(self) -> None:
        """Forget all calls of :meth:`set`."""
        with suppress(BlockingIOError):
            self.receiver.recv(4096)

    def close(self) -> None:
        """Close the sockets."""
        self.receiver.close()
        self._sender.close()


class Changes:
    """Waits until there may be new events.

    :param connection: the connection of the reader, which commits each statement.
    :param wakeup: wakes the reader when its own process has published.
    """

    def __init__(self, connection: sa.Connection, wakeup: Wakeup) -> None:
        self.connection = connection
        self._wakeup = wakeup
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeup.receiver, selectors.EVENT_READ)

    def wait(self, seconds: float) -> bool:
        """Wait for a change, at most some seconds.

        :returns: False if it is certain that nothing has changed.
        """
        self._selector.select(seconds)
        self._wakeup.clear()
        return True

    def close(self) -> None:
        """Close what waits, but not the connection."""
        self._selector.close()


class SqliteChanges(Changes):
    """The changes of an SQLite file."""

    def __init__(self, connection: sa.Connection, wakeup: Wakeup) -> None:
        super().__init__(connection, wakeup)
        # The reader tries again. A longer wait would block all greenlets of gevent.
        connection.exec_driver_sql("PRAGMA busy_timeout = 100")
        self._version = self._read_version()

    def _read_version(self) -> Any:
        return self.connection.exec_driver_sql("PRAGMA data_version").scalar()

    def wait(self, seconds: float) -> bool:
        """Wait for a commit of another connection."""
        super().wait(seconds)
        # Before the events are read: a commit between the two is seen the next time.
        before, self._version = self._version, self._read_version()
        return bool(before != self._version)


class PostgresqlChanges(Changes):
    """The notifications of PostgreSQL, by psycopg or psycopg2."""

    def __init__(self, connection: sa.Connection, wakeup: Wakeup) -> None:
        super().__init__(connection, wakeup)
        driver: Any = connection.connection.dbapi_connection
        self._driver = driver
        self._is_psycopg2 = connection.dialect.driver == "psycopg2"
        self._notified = False  # while a statement was executed
        if not self._is_psycopg2:
            driver.add_notify_handler(self._note)
        connection.exec_driver_sql(f"LISTEN {NOTIFY_CHANNEL}")
        self._selector.register(driver.fileno(), selectors.EVENT_READ)

    def _note(self, notification: object) -> None:
        self._notified = True

    def wait(self, seconds: float) -> bool:
        """Wait for a notification."""
        # First: libpq may have read it with the result of a statement.
        if not self._take_notifications():
            super().wait(seconds)
            self._take_notifications()
        return True

    def _take_notifications(self) -> bool:
        """Remove the notifications that have arrived. False if there were none."""
        found, self._notified = self._notified, False
        if self._is_psycopg2:
            self._driver.poll()
            found = bool(self._driver.notifies)
            self._driver.notifies.clear()
        else:
            self._driver.pgconn.consume_input()
            while self._driver.pgconn.notifies() is not None:
                found = True
        return found


def watch_changes(connection: sa.Connection, wakeup: Wakeup) -> Changes:
    """Watch the database of a connection for changes."""
    if connection.dialect.name == "sqlite":
        return SqliteChanges(connection, wakeup)
    if connection.dialect.driver in ("psycopg", "psycopg2") and is_direct(connection):
        return PostgresqlChanges(connection, wakeup)
    return Changes(connection, wakeup)


def is_direct(connection: sa.Connection) -> bool:
    """Whether no pooler such as PgBouncer is between psycopg and PostgreSQL.

    In transaction mode a pooler gives each statement another connection, which would
    receive the notifications.
    """
    driver: Any = connection.connection.dbapi_connection
    pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
    return bool(pid == driver.info.backend_pid)
