"""A back end of channels that stores its messages in a table of the application."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from tests.model import Model
from tgstream.database.on_commit import send_on_commit

metadata = sa.MetaData()
MESSAGES = sa.Table(
    "messages",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("text", sa.String(100)),
)


class TableSender:
    """Inserts each message over the connection that it is given.

    :param model: has the table.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.checks = True
        """Whether committed messages must be visible from outside."""
        self.insertions: list[list[str]] = []
        """The messages of each call of ``insert``."""
        self.committed: list[list[str]] = []
        """The messages of each call of ``publish_committed``."""
        self.published: list[list[str]] = []
        """The messages of each call of ``publish``."""

    @property
    def engine(self) -> sa.Engine:
        return self.model.engine

    def insert(self, connection: sa.Connection, messages: Sequence[str]) -> None:
        self.insertions.append([*messages])
        rows = [{"text": text} for text in messages]
        connection.execute(sa.insert(MESSAGES), rows)

    def publish_committed(self, messages: Sequence[str]) -> None:
        assert not self.checks or {*messages} <= {*self.stored()}
        self.committed.append([*messages])

    def publish(self, messages: Sequence[str]) -> None:
        with self.model.outside.begin() as connection:
            connection.execute(
                sa.insert(MESSAGES), [{"text": each} for each in messages]
            )
        self.published.append([*messages])

    def send(self, text: str) -> None:
        """Publish a message, as ``Channel.publish()`` does."""
        if not send_on_commit(text, self):
            self.publish([text])

    def stored(self) -> list[str]:
        """The committed messages, in order."""
        rows: list[Any] = self.model.fetch("SELECT text FROM messages ORDER BY id")
        return [text for (text,) in rows]
