"""The newest events of a channel in this process, and how they are read.

The position of an event is the number of its channel's row, as counted by this process,
and its number in the channel. The row's number grows only if the row was removed and
created again. Events are appended only if they follow the newest one without a gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from ...core.options import clock
from ...formats.sse import Event, Message
from ..history import ChannelHistory, Position, reset_event
from .database_ids import format_id
from .database_tables import (
    MAX_NAMES,
    ChannelRow,
    batches,
    events,
    read_channels,
)
from .database_tables import clock as database_clock

MAX_PAGE = 100
"""Maximum events of one statement."""

Entry = tuple[Position, Event]

_COLUMNS = (
    events.c.channel_id,
    events.c.number,
    events.c.type,
    events.c.is_json,
    events.c.data,
)
_SELECT_BY_ID = (
    sa.select(*_COLUMNS)
    .where(events.c.id.in_(sa.bindparam("ids", expanding=True)))
    .order_by(events.c.id)
)
_AFTER = (
    events.c.channel_id == sa.bindparam("channel_id"),
    events.c.number > sa.bindparam("after"),
)
_SELECT_PAGE = (
    sa.select(*_COLUMNS)
    .where(*_AFTER)
    .order_by(events.c.number)
    .limit(sa.bindparam("count"))
)
_SELECT_NEWEST = (
    sa.select(*_COLUMNS)
    .where(*_AFTER, events.c.number <= sa.bindparam("until"))
    .order_by(events.c.number.desc())
    .limit(sa.bindparam("count"))
)
_SELECT_AGE = sa.select(database_clock() - events.c.created).where(
    events.c.channel_id == sa.bindparam("channel_id"),
    events.c.number == sa.bindparam("number"),
)


class DatabaseHistory(ChannelHistory):
    """The newest events of a channel.

    :param name: the name of the channel.
    :param row: the channel, or None if it does not exist yet.
    :param max_events: how many events to store.
    :param clock_offset: the seconds from the time of this process to that of the
        database.
    """

    def __init__(
        self, name: str, row: ChannelRow | None, max_events: int, clock_offset: float
    ) -> None:
        self.name = name
        self.key = name.encode()
        # By the first number of a position. None until there is a row.
        self._channel_ids = [None if row is None else row.id]
        self._clock_offset = clock_offset
        super().__init__((0, 0 if row is None else row.last_number), max_events)

    @property
    def channel_id(self) -> int | None:
        """The id of the channel. None if it does not exist yet."""
        return self._channel_ids[-1]

    @property
    def start(self) -> Position:
        """The position before the first event of the channel."""
        return len(self._channel_ids) - 1, 0

    def database_time(self) -> float:
        """The time of the database in seconds, without a statement."""
        return clock() + self._clock_offset

    @property
    def last_number(self) -> int:
        """The number of the newest event."""
        return self.last_position[1]

    def position_of(self, channel_id: int | None, number: int) -> Position | None:
        """The position of an event. None if this is another channel."""
        if channel_id is None or channel_id != self.channel_id:
            return None
        return len(self._channel_ids) - 1, number

    def id_of(self, position: Position) -> str | None:
        """The event id of a position. None before the first event."""
        channel_id = self._channel_ids[position[0]]
        if channel_id is None or not position[1]:
            return None
        return format_id(channel_id, position[1])

    def accepts(self, row: Any) -> bool:
        """Whether an event is the next one."""
        return bool(
            row.channel_id == self.channel_id and row.number == self.last_number + 1
        )

    def append_row(self, row: Any) -> None:
        """Append an event that was read."""
        self.append(*self.make_entry(row))

    def make_entry(self, row: Any) -> Entry:
        """The position and the event of a row. An invalid one is a reset."""
        id = format_id(row.channel_id, row.number)
        position = self.position_of(row.channel_id, row.number)
        assert position is not None
        try:
            type = None if row.type is None else row.type.decode()
            text = row.data.decode()
            message = Message(self.name, text, type, row.is_json, row.data)
            return position, message.with_id(id)
        except (ValueError, AttributeError):  # another program wrote it, maybe as text
            return position, reset_event(id, self.name)

    def follow(self, row: ChannelRow) -> None:
        """Take over the id of a row. If it is not the same row, send a reset."""
        if self.channel_id is None:
            self._channel_ids[-1] = row.id
        elif self.channel_id != row.id:
            self._channel_ids.append(row.id)
            self.reset(row)

    def reset(self, row: ChannelRow) -> None:
        """Continue after the newest event, and report that events are missing."""
        position = len(self._channel_ids) - 1, row.last_number
        id = format_id(row.id, row.last_number)
        self.restart(position, reset_event(id, self.name))


# Reading.


def read_by_ids(connection: sa.Connection, ids: Sequence[int]) -> Iterable[Any]:
    """The events with these ids of the table, in order."""
    for batch in batches(ids, MAX_PAGE):
        yield from connection.execute(_SELECT_BY_ID, {"ids": batch})


def read_page(
    connection: sa.Connection, channel_id: int, after: int, count: int = MAX_PAGE
) -> Sequence[Any]:
    """The next events after a number."""
    values = {"channel_id": channel_id, "after": after, "count": count}
    return connection.execute(_SELECT_PAGE, values).all()


def read_newest(
    connection: sa.Connection, channel_id: int, after: int, until: int, count: int
) -> Sequence[Any]:
    """The newest events after one number, up to and including another, in order."""
    values = {
        "channel_id": channel_id,
        "after": after,
        "until": until,
        "count": count,
    }
    return connection.execute(_SELECT_NEWEST, values).all()[::-1]


def read_age(connection: sa.Connection, channel_id: int, number: int) -> float | None:
    """The age of an event in seconds. None if it was removed."""
    values = {"channel_id": channel_id, "number": number}
    return connection.execute(_SELECT_AGE, values).scalar()


def update_histories(
    connection: sa.Connection, histories: Iterable[DatabaseHistory]
) -> None:
    """Read what is missing in histories, up to the newest event of each channel."""
    for batch in batches([*histories], MAX_NAMES):
        rows = read_channels(connection, [history.key for history in batch])
        for history in batch:
            if (row := rows.get(history.key)) is not None:
                history.follow(row)
                _fill(connection, history, row)


def _fill(connection: sa.Connection, history: DatabaseHistory, row: ChannelRow) -> None:
    if row.last_number < history.last_number:  # an older state was restored
        history.reset(row)
    while history.last_number < row.last_number:
        page = read_page(connection, row.id, history.last_number)
        for event in page:
            if not history.accepts(event):
                page = []
                break
            history.append_row(event)
        if not page:  # events were removed before this process has read them
            history.reset(row)
