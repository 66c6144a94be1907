"""The context of a stream, bound around one call and off the thread in between.

It has two parts: TG's request context, and a copy of the request's context variables
(:mod:`contextvars`), in which every call of the generator runs. Only this file touches
the stacks of ``tg.request_local``.
"""

from __future__ import annotations

import contextvars
import threading
from typing import TYPE_CHECKING, Any, Protocol

from tg import request_local

from .errors import StreamError

if TYPE_CHECKING:
    from collections.abc import Callable


class StreamTransaction(Protocol):
    """The sessions and the transaction of one stream."""

    @property
    def commits(self) -> int:
        """The number of committed transactions."""

    @property
    def has_sessions(self) -> bool:
        """Whether the application has a session."""

    def flush(self) -> None: ...
    def commit(self) -> None: ...
    def rollback(self) -> None: ...

    def commit_items(self) -> None:
        """Commit the items so far. It costs nothing where nothing was done."""

    def count_uncommitted(self) -> list[str]:
        """The uncommitted changes, such as ``1 new Post``."""

    def translate_error(self, controller: str, error: BaseException) -> BaseException:
        """A clearer error in place of a driver's, or the error itself."""

    @property
    def idle(self) -> bool:
        """Whether no connection and no change is held."""

    def remove_request_sessions(self) -> None:
        """Remove the request's sessions from the thread that its response leaves."""

    def keep_over_next_remove(self) -> None:
        """Keep the thread's own session over the next removal, which is TG's."""

    def make_separate(self) -> StreamTransaction:
        """Other sessions and another transaction, for a hook. They never commit."""

    def make_context(self, tg_locals: Any) -> Context:
        """A context in which the sessions and the transaction are bound, too."""

    def release(self, return_objects: bool) -> None:
        """Roll back the uncommitted changes, and close the sessions.

        :param return_objects: whether the objects return to the request's sessions.
        :raises BaseException: the first error, after all sessions were closed.
        """


class BoundStream(Protocol):
    """The stream whose generator runs on a thread."""

    transaction: StreamTransaction | None


class Record:
    """The record that tgstream keeps for each thread: one look-up a pull.

    With gevent it is the record of a greenlet, like TG's own stacks.
    """

    __slots__ = ("body", "checking", "config", "context")

    def __init__(self) -> None:
        # TG's stacks of this thread, which are made once and never replaced.
        self.config = _stack_of(request_local.config)
        self.context = _stack_of(request_local.context)
        # The body whose generator runs on this thread.
        self.body: Any = None
        # The sessions and the transaction of a check of a permission that runs here.
        self.checking: StreamTransaction | None = None

    @property
    def database(self) -> Any:
        """The sessions and the transaction of the stream that runs on this thread."""
        body = self.body
        return self.checking if body is None else body.transaction


def _stack_of(proxy: Any) -> list[tuple[Any, bool]]:
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
    """

    __slots__ = ("_config", "_context", "_outer", "environ", "run", "tg_locals")

    def __init__(self, tg_locals: Any) -> None:
        self.tg_locals = tg_locals
        self.environ: dict[str, Any] = tg_locals.request.environ
        self._config = (tg_locals.config, False)
        self._context = (tg_locals, False)
        self._outer: BoundStream | None = None
        self.run: Callable[..., Any] = contextvars.copy_context().run

    def keep_environ(self) -> None:
        """Copy the environ, because uWSGI clears its own when the response has ended.

        The generator of a stream with a heartbeat may run for longer.
        """
        self.environ = self.environ.copy()
        self.tg_locals.request.__dict__["environ"] = self.environ

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
        return record

    def unbind(self, record: Record) -> None:
        """Take the context off the thread again, and what was left above it."""
        record.body = self._outer
        if record.context.pop() is not self._context:
            remove_from(record.context, self._context)
        if record.config.pop() is not self._config:
            remove_from(record.config, self._config)


def remove_from(stack: list[tuple[Any, bool]], bound: tuple[Any, bool]) -> None:
    """Remove the newest entry that is ``bound``, and everything above it."""
    for index in range(len(stack) - 1, -1, -1):
        if stack[index] is bound:
            del stack[index:]
            return


_checked_class: Any = None


def check_locals() -> None:
    """Refuse to stream where TG's context is not kept for each greenlet.

    :raises StreamError: when gevent has patched threads after TG was imported: another
        user's request would then be visible in the middle of a pull.
    """
    global _checked_class
    if _checked_class is threading.local:  # gevent replaces it
        return
    if isinstance(request_local.context.____local__, threading.local):
        _checked_class = threading.local
    else:
        raise StreamError(
            "gevent patched threads after TurboGears was imported, so all requests "
            "share one tg.request. Patch before TurboGears is imported. uWSGI: use "
            "--gevent-early-monkey-patch instead of --gevent-monkey-patch. gunicorn: "
            "do not use --preload, or begin gunicorn.conf.py with 'from gevent import "
            "monkey; monkey.patch_all()', and import neither tg nor tgstream above it"
        )


def current() -> Any:
    """TG's ``RequestLocals`` of the request that runs on this thread.

    :raises TypeError: when no request runs.
    """
    stack = thread.record.context
    return stack[-1][0] if stack else request_local.context._current_obj()
