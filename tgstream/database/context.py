"""The context of a stream with a database: it also binds the stream's transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.context import Context, Record, remove_from, thread

if TYPE_CHECKING:
    from ..core.context import RunningStream
    from .database import Database


class DatabaseContext(Context):
    """Binds the stream's transaction manager on the thread, beside TG's context.

    Both are bound in one method: an extra call per pull costs about 10 %.

    :param database: the stream's sessions and transaction.
    """

    __slots__ = ("_database",)

    def __init__(self, tg_locals: Any, database: Database) -> None:
        super().__init__(tg_locals)
        self._database = database

    def bind(self, body: RunningStream) -> Record:
        record = thread.record
        record.config.append(self._config)
        record.context.append(self._context)
        self._outer = record.body
        record.body = body
        database = self._database
        managers = record.managers
        if managers is None:
            managers = record.managers = database.managers_of_thread()
        database.outer_manager = managers["manager"]
        managers["manager"] = database.manager
        return record

    def unbind(self, record: Record) -> None:
        record.body = self._outer
        record.managers["manager"] = self._database.outer_manager  # type: ignore[index]
        if record.context.pop() is not self._context:
            remove_from(record.context, self._context)
        if record.config.pop() is not self._config:
            remove_from(record.config, self._config)
