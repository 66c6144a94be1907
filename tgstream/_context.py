"""TG's request context, bound around one call and off the thread in between.

Rule: beside the record of a thread, only this file touches the stacks of
``tg.request_local``. A stream's database goes on and off with it, for each call more
around a pull is a tenth of its cost.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from tg import request_local

from ._options import StreamError
from ._thread import Record, thread

if TYPE_CHECKING:
    from ._database import Database


class Context:
    """The context of one request, to be bound on any thread, as often as needed.

    :param tg_locals: TG's ``RequestLocals`` of the request.
    :param database: what goes in place of the thread's sessions and transaction.
    """

    __slots__ = ("_config", "_context", "_database", "environ", "tg_locals")

    def __init__(self, tg_locals: Any, database: Database | None) -> None:
        self.tg_locals = tg_locals
        self._database = database
        self.environ: dict[str, Any] = tg_locals.request.environ
        self._config = (tg_locals.config, False)
        self._context = (tg_locals, False)

    def bind(self) -> Record:
        """Make this the context of the current thread, above what is bound there.

        :returns: the thread's record, for :meth:`unbind`.
        """
        record = thread.record
        record.config.append(self._config)
        record.context.append(self._context)
        database = self._database
        if database is not None:
            managers = record.managers
            if managers is None:
                managers = record.managers = database.managers_of_thread()
            database.outer = record.database
            database.outer_manager = managers["manager"]
            record.database = database
            managers["manager"] = database.manager
        return record

    def unbind(self, record: Record) -> None:
        """Take the context off the thread again, and what was left above it."""
        database = self._database
        if database is not None:
            record.database = database.outer
            record.managers["manager"] = database.outer_manager  # type: ignore[index]
        if record.context.pop()[0] is not self._context[0]:
            _remove(record.context, self._context[0])
        if record.config.pop()[0] is not self._config[0]:
            _remove(record.config, self._config[0])


def _remove(stack: list[tuple[Any, bool]], bound: Any) -> None:
    for index in range(len(stack) - 1, -1, -1):
        if stack[index][0] is bound:
            del stack[index:]
            return


def check_locals() -> None:
    """Refuse to stream where TG's context is not kept for each greenlet.

    :raises StreamError: when gevent has patched threads after TG was imported: another
        user's request would then be seen in the middle of a pull.
    """
    if not isinstance(request_local.context.____local__, threading.local):
        raise StreamError(
            "gevent patched threads after TurboGears was imported, so all requests "
            "share one tg.request. Patch before TurboGears is imported. uWSGI: use "
            "--gevent-early-monkey-patch instead of --gevent-monkey-patch. gunicorn: "
            "do not use --preload, or begin gunicorn.conf.py with 'from gevent import "
            "monkey; monkey.patch_all()', and import neither tg nor tgstream above it"
        )


def current() -> Any:
    """TG's ``RequestLocals`` of the request that runs on this thread.

    :raises TypeError: when none does.
    """
    return request_local.context._current_obj()
