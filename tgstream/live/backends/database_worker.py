"""The work after commits with ``database://``: a thread that runs while there is any.

It notifies other processes, and removes old events. Requests do not wait for it.

A ``NOTIFY`` takes a lock that serialises all commits of the database until its own
transaction has committed. So it is never in the transaction of an application, and a
process sends at most one in ``PAUSE_SECONDS``.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import sqlalchemy as sa

from ...core.options import clock
from ...core.report import log
from ..protocols import ChannelSettings
from .database_changes import NOTIFY_CHANNEL
from .database_tables import SECRET_NAME, channels, events, is_connection_error
from .database_tables import clock as database_clock

PAUSE_SECONDS = 0.02
"""Minimum seconds between two notifications of a process."""
LINGER_SECONDS = 10.0
"""Seconds that the thread waits for more work."""
MAX_REMOVED = 1000
"""Maximum events that one statement removes, and channels that one reads."""
REMOVAL_SECONDS = 3600.0
"""Maximum seconds between two looks for channels without recent events."""

_NOTIFY = (
    f"SELECT pg_notify('{NOTIFY_CHANNEL}', '') "
    "FROM set_config('synchronous_commit', 'off', true)"
)
"""NOTIFY, but its commit does not wait for the disk, because it changes no row."""

_IDLE = channels.c.last_created < database_clock() - sa.bindparam("seconds")
_SELECT_IDLE = (
    sa.select(channels.c.name, channels.c.id, channels.c.last_number)
    .where(_IDLE, channels.c.name != SECRET_NAME)
    .limit(MAX_REMOVED)
)
_DELETE_IDLE = sa.delete(channels).where(
    channels.c.name == sa.bindparam("key"), channels.c.id == sa.bindparam("id"), _IDLE
)
_SELECT_LAST = sa.select(channels.c.last_number).where(
    channels.c.id == sa.bindparam("id")
)
_SELECT_FIRST = sa.select(sa.func.min(events.c.number)).where(
    events.c.channel_id == sa.bindparam("id")
)
_DELETE_EVENTS = sa.delete(events).where(
    events.c.channel_id == sa.bindparam("id"), events.c.number <= sa.bindparam("until")
)


class BackgroundWorker:
    """Notifies and removes for one back end.

    :param connect: returns a connection that commits each statement.
    :param notifies: whether the database reports notifications.
    """

    def __init__(
        self,
        connect: Callable[[], sa.Connection],
        settings: ChannelSettings,
        notifies: bool,
    ) -> None:
        self._connect = connect
        self._settings = settings
        self._notifies = notifies
        self._trims: set[int] = set()
        self._next_removal = 0.0
        self._lock = threading.RLock()  # re-entrant: a finaliser may publish
        self._queue: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_due = self._ends = False
        self._thread: threading.Thread | None = None

    def note_events(self, channel_id: int, before: int, after: int) -> None:
        """Note that events of a channel were inserted. They may be rolled back.

        The number decides who removes old events, so that processes share this work,
        and so that scripts that publish once take part in it.
        """
        step = max(self._settings.history // 10, 1)
        if after > self._settings.history and before // step != after // step:
            self._trims.add(channel_id)

    def start(self) -> None:
        """Work now, because a transaction has committed."""
        if self._is_due or not (
            self._notifies or self._trims or clock() >= self._next_removal
        ):
            return
        self._is_due = True
        self._queue.put(None)
        with self._lock:
            if self._thread is None:
                self._ends = False
                thread = threading.Thread(
                    target=self._run, name="tgstream-published", daemon=True
                )
                thread.start()
                self._thread = thread
                _running.add(self)

    def finish(self) -> None:
        """Wait until the work is done, at most a second."""
        thread = self._thread
        if thread is not None:
            self._ends = True
            self._queue.put(None)
            thread.join(1.0)

    def _run(self) -> None:
        while self._wait():
            self._is_due = False  # first: later work needs another round
            try:
                with self._connect() as connection:
                    self._work(connection)
            except Exception as error:
                # Listeners of other processes poll, and the next event tries again.
                if not is_connection_error(error):
                    log.warning(
                        "Old events of channels could not be removed: %s", error
                    )
            if not self._ends:
                time.sleep(PAUSE_SECONDS)

    def _wait(self) -> bool:
        """Wait for work. False if the thread must end."""
        if not self._ends:
            with suppress(queue.Empty):
                self._queue.get(timeout=LINGER_SECONDS)
        with self._lock:
            if not self._is_due:
                self._thread = None
            return self._is_due

    def _work(self, connection: sa.Connection) -> None:
        if self._notifies:
            connection.exec_driver_sql(_NOTIFY)
        while self._trims:
            self._trim(connection, self._trims.pop())
        if clock() >= self._next_removal:
            seconds = self._settings.seconds
            self._next_removal = clock() + min(seconds / 10, REMOVAL_SECONDS)
            remove_idle_channels(connection, seconds)

    def _trim(self, connection: sa.Connection, channel_id: int) -> None:
        last_number = connection.execute(_SELECT_LAST, {"id": channel_id}).scalar()
        if last_number is not None:
            until = last_number - self._settings.history
            _remove_events(connection, channel_id, until)


def remove_idle_channels(connection: sa.Connection, seconds: float) -> None:
    """Remove the channels whose last event is older than some seconds."""
    while True:
        idle = connection.execute(_SELECT_IDLE, {"seconds": seconds}).all()
        for name, id, last_number in idle:
            _remove_events(connection, id, last_number)
            # It may have an event by now. The database checks that again.
            values: dict[str, Any] = {"key": name, "id": id, "seconds": seconds}
            connection.execute(_DELETE_IDLE, values)
        if len(idle) < MAX_REMOVED:
            return


def _remove_events(connection: sa.Connection, channel_id: int, until: int) -> None:
    """Remove the events of a channel up to a number, a few at a time."""
    number = connection.execute(_SELECT_FIRST, {"id": channel_id}).scalar()
    while number is not None and number <= until:
        number += MAX_REMOVED
        values = {"id": channel_id, "until": min(number - 1, until)}
        connection.execute(_DELETE_EVENTS, values)


_running: WeakSet[BackgroundWorker] = WeakSet()


@atexit.register
def _finish_all() -> None:
    """Let a script that ends notify other processes first."""
    for worker in [*_running]:
        worker.finish()
