"""The context of a stream, bound around one call and off the thread in between.

It has three parts: TG's request context, the stream's database, and a copy of the
request's context variables (:mod:`contextvars`), in which every call of the generator
runs. Beside the record of a thread, only this file touches the stacks of
``tg.request_local``. The database is swapped here too: an extra call per pull costs
about 10 %.
"""

from __future__ import annotations

import contextvars
import threading
from typing import TYPE_CHECKING, Any

from tg import request_local

from .errors import StreamError

if TYPE_CHECKING:
    from ..database.database import StreamDatabase
    from ..database.registry import SessionRegistry
    from .body import Body


class Record:
    """The record of one thread (with gevent: of one greenlet, as TG's own stacks)."""

    __slots__ = ("body", "config", "context", "managers", "shielded")

    def __init__(self) -> None:
        # _context: TG's stacks of this thread, which are made once and never replaced.
        self.config = _stack(request_local.config)
        self.context = _stack(request_local.context)
        # _context: the body whose generator runs on this thread, if any.
        self.body: Body | None = None
        # _database: the dict of the thread-local transaction manager, once needed; the
        # registries, and how many removals each is kept over.
        self.managers: dict[str, Any] | None = None
        self.shielded: dict[SessionRegistry, int] = {}

    @property
    def database(self) -> StreamDatabase | None:
        """The sessions and the transaction of the stream that runs on this thread."""
        body = self.body
        return None if body is None else body.database


def _stack(proxy: Any) -> list[tuple[Any, bool]]:
    """This thread's stack of a ``StackedObjectProxy``, made if it has none yet."""
    proxy._push_object(None)
    proxy._pop_object()
    stack: list[tuple[Any, bool]] = proxy.____local__.objects
    return stack


class _Thread(threading.local):
    def __init__(self) -> None:
        self.record = Record()


# Never keyed by a thread's ident: idents are reused.
thread = _Thread()


class Context:
    """The context of one stream, which can be bound on any thread, as often as needed.

    ``run`` calls a function in the stream's own copy of the context variables. The
    generator's variables stay there, so that the thread does not see them between two
    calls.

    :param tg_locals: TG's ``RequestLocals`` of the request.
    :param database: what goes in place of the thread's sessions and transaction.
    """

    __slots__ = (
        *("_config", "_context", "_database", "_outer"),
        *("environ", "run", "tg_locals"),
    )

    def __init__(self, tg_locals: Any, database: StreamDatabase | None) -> None:
        self.tg_locals = tg_locals
        self._database = database
        self.environ: dict[str, Any] = tg_locals.request.environ
        self._config = (tg_locals.config, False)
        self._context = (tg_locals, False)
        self._outer: Body | None = None
        self.run = contextvars.copy_context().run

    def bind(self, body: Body) -> Record:
        """Make this the context of the current thread, above what is bound there.

        :param body: the body that runs here until :meth:`unbind`.
        :returns: the thread's record, for :meth:`unbind`.
        """
        record = thread.record
        record.config.append(self._config)
        record.context.append(self._context)
        self._outer = record.body
        record.body = body
        database = self._database
        if database is not None:
            managers = record.managers
            if managers is None:
                managers = record.managers = database.managers_of_thread()
            database.outer_manager = managers["manager"]
            managers["manager"] = database.manager
        return record

    def unbind(self, record: Record) -> None:
        """Take the context off the thread again, and what was left above it."""
        record.body = self._outer
        database = self._database
        if database is not None:
            record.managers["manager"] = database.outer_manager  # type: ignore[index]
        if record.context.pop() is not self._context:
            _remove(record.context, self._context)
        if record.config.pop() is not self._config:
            _remove(record.config, self._config)


def _remove(stack: list[tuple[Any, bool]], bound: tuple[Any, bool]) -> None:
    for index in range(len(stack) - 1, -1, -1):
        if stack[index] is bound:
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
