"""Reads the new events of all channels that have listeners, over one connection.

Each event has an id in the order of the inserts. A read selects the events after the
newest id that was seen, whatever their channel. So its cost does not depend on how many
channels have listeners. Only the events of these channels are then read.

Transactions do not commit in the order of their ids: an id that is missing may appear
later. Missing ids are looked for again for some seconds. The numbers of the channels
prove the rest: if a number does not follow the one before, the channel is read by its
numbers. The numbers of all channels with listeners are checked after each connect, if
the newest event that was seen is gone, and every ``CHECK_SECONDS`` for a transaction
that needed longer than ``MISSING_SECONDS`` to commit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import sqlalchemy as sa

from ...core.options import clock
from .database_changes import Changes
from .database_history import DatabaseHistory, read_by_ids, update_histories
from .database_tables import channels, events

MAX_READ = 1000
"""Maximum events of one read, and maximum missing ids."""
MISSING_SECONDS = 10.0
"""Seconds to look for an id that is missing."""
CHECK_SECONDS = 30.0
"""Seconds between two checks of all channels with listeners."""

_SELECT = (
    sa.select(events.c.id, events.c.channel_id, events.c.number, channels.c.name)
    .join(channels, channels.c.id == events.c.channel_id)
    .order_by(events.c.id)
)
_SELECT_NEW = _SELECT.where(events.c.id >= sa.bindparam("first")).limit(MAX_READ)
_SELECT_MISSING = _SELECT.where(
    events.c.id.in_(sa.bindparam("ids", expanding=True)),
)
_SELECT_NEWEST_ID = sa.select(sa.func.max(events.c.id))


class EventReader:
    """Reads new events into the histories of their channels.

    :param connection: commits each statement.
    :param changes: reports that there may be new events.
    :param histories: the channels with listeners, by name.
    """

    def __init__(
        self,
        connection: sa.Connection,
        changes: Changes,
        histories: Mapping[str, DatabaseHistory],
    ) -> None:
        self._connection = connection
        self._changes = changes
        self.wait = changes.wait
        self._histories = histories
        self._newest: Any = None  # the row of the newest id, which proves continuity
        self._newest_id = 0
        self._missing: dict[int, float] = {}  # until when to look for each id
        self._next_check = 0.0

    @property
    def needs_check(self) -> bool:
        """Whether all channels must be read, even if nothing seems to have changed."""
        return clock() >= self._next_check

    def read(self) -> None:
        """Read the events that are new since the last call."""
        if self.needs_check:
            self._check_all()
        if self._missing:
            ids = [*self._missing]
            self._append(self._connection.execute(_SELECT_MISSING, {"ids": ids}).all())
        while True:
            values = {"first": self._newest_id}
            rows = [*self._connection.execute(_SELECT_NEW, values)]
            is_full = len(rows) == MAX_READ
            if self._newest is not None:
                if not self._has_continued(rows):
                    self._newest = None
                    self._check_all()
                    return
                if rows[0] == self._newest:
                    del rows[0]
            self._note_ids(rows)
            self._append(rows)
            if not is_full:
                return

    def _has_continued(self, rows: Sequence[Any]) -> bool:
        """Whether the table is still the one in which the newest event was seen.

        Its row may have been removed, if later ones exist.
        """
        return bool(rows) and (rows[0] == self._newest or rows[0].id > self._newest_id)

    def close(self) -> None:
        """Close the connection."""
        self._changes.close()
        with suppress(sa.exc.SQLAlchemyError):
            self._connection.close()

    def _check_all(self) -> None:
        """Read all channels with listeners by their numbers."""
        self._next_check = clock() + CHECK_SECONDS
        if self._newest is None:
            # Before the channels, so that each later event has a larger id, or is one
            # of the newest that are missing.
            newest = self._connection.execute(_SELECT_NEWEST_ID).scalar() or 0
            self._newest_id = max(newest - MAX_READ // 2, 0)
            self._missing.clear()
        update_histories(self._connection, [*self._histories.values()])

    def _note_ids(self, rows: Sequence[Any]) -> None:
        """Note which ids are missing before and between new ones."""
        now = clock()
        if rows and self._newest is None:
            self._next_check = now  # others may have been removed since the last one
        for row in rows:
            first = self._newest_id + 1
            if row.id - first > MAX_READ:  # of a very large transaction
                self._next_check = min(self._next_check, now + 1.0)
                first = row.id - MAX_READ
            for id in range(first, row.id):
                self._missing[id] = now + MISSING_SECONDS
            self._newest, self._newest_id = row, row.id
        for id in [*self._missing]:
            if len(self._missing) <= MAX_READ and self._missing[id] > now:
                break
            del self._missing[id]

    def _append(self, rows: Sequence[Any]) -> None:
        """Append the events of channels with listeners."""
        wanted: list[int] = []
        numbers: dict[int, int] = {}
        # By the id of the channel.
        histories: dict[int, DatabaseHistory] = {}
        incomplete: dict[int, DatabaseHistory] = {}
        for row in rows:
            self._missing.pop(row.id, None)
            name = bytes(row.name).decode(errors="replace")
            history = self._histories.get(name)
            if history is None:
                continue
            number = numbers.get(row.channel_id, history.last_number)
            if row.channel_id != history.channel_id or row.number > number + 1:
                incomplete[row.channel_id] = history
            elif row.number == number + 1:
                wanted.append(row.id)
                numbers[row.channel_id] = row.number
                histories[row.channel_id] = history
        for row in read_by_ids(self._connection, wanted):
            history = histories[row.channel_id]
            if history.accepts(row):
                history.append_row(row)
            else:  # an event before it was removed
                incomplete[row.channel_id] = history
        update_histories(self._connection, incomplete.values())
