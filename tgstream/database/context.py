"""The context of a stream that has a database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transaction

from ..core.context import Context, Record, remove_from, thread

if TYPE_CHECKING:
    from ..core.context import BoundStream
    from .sessions import StreamSessions


class DatabaseContext(Context):
    """A context that also exchanges the thread's transaction manager.

    Both methods repeat those of the base, and do not call them: a call more costs a
    tenth of a pull.

    :param tg_locals: TG's ``RequestLocals`` of the request.
    :param sessions: their manager is the thread's while the stream is bound.
    """

    __slots__ = ("_manager", "_managers", "_outer_manager", "_record")

    def __init__(self, tg_locals: Any, sessions: StreamSessions) -> None:
        super().__init__(tg_locals)
        self._manager = sessions.manager
        # The record of the last thread that this was bound on, and the dict in which
        # transaction.manager has the manager of that thread. The attribute ``manager``
        # is documented, and meant to be exchanged. Its dict saves 70 of the 750 ns of a
        # pull.
        self._record: Record | None = None
        self._managers: dict[str, Any]
        self._outer_manager: Any

    def bind(self, body: BoundStream | None) -> Record:
        """Make this the context of the current thread, above what is bound there.

        :param body: the body that runs here until :meth:`unbind`, if it is one.
        :returns: the thread's record, for :meth:`unbind`.
        """
        record = thread.record
        record.config.append(self._config)
        record.context.append(self._context)
        self._outer = record.body
        record.body = body
        if record is not self._record:
            self._record, self._managers = record, transaction.manager.__dict__
        managers = self._managers
        self._outer_manager = managers["manager"]
        managers["manager"] = self._manager
        return record

    def unbind(self, record: Record) -> None:
        """Remove this context from the thread, and contexts that were left above it."""
        record.body = self._outer
        self._managers["manager"] = self._outer_manager
        if record.context.pop() is not self._context:
            remove_from(record.context, self._context)
        if record.config.pop() is not self._config:
            remove_from(record.config, self._config)
