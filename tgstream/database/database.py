"""The database of one stream: flush, commit, roll back, hand over, release."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import transaction

from ..core.cleanup import run_all
from . import handover
from .context import DatabaseContext
from .engines import log_unclosed_session
from .errors import closed_cursor_error
from .on_commit import count_unsent
from .registry import SessionRegistry
from .sessions import StreamSessions
from .transaction import use_manager


class StreamDatabase(StreamSessions):
    """The sessions and the transaction of one stream.

    Call its methods while the stream is bound to the thread, with the exceptions that
    are named below.

    :param registries: the registries of the application's scoped sessions, TG's first.
    :param removed: whether TG removes the first session when a body is closed.
    """

    _request_manager: Any = None

    def __init__(self, registries: tuple[SessionRegistry, ...], removed: bool) -> None:
        StreamSessions.__init__(self, registries)
        self._removed = removed

    # While the generator runs.

    @property
    def idle(self) -> bool:
        """Whether no session holds a connection, or an object to flush."""
        return not any(each.in_transaction for each in self.data_managers)

    @property
    def has_sessions(self) -> bool:
        """Whether the application has a session."""
        return bool(self.registries)

    @property
    def commits(self) -> int:
        """The number of committed transactions."""
        return self.manager.commits

    def flush(self) -> None:
        """Flush all sessions, as ``DBSession.flush()`` does."""
        for data_manager in self.data_managers:
            data_manager.session.flush()

    def commit(self) -> None:
        """Commit. Objects stay attached, and are read again on their next use."""
        self.manager.commit()

    def rollback(self) -> None:
        """Undo all changes that are not committed."""
        self.manager.abort()

    def commit_items(self) -> None:
        """Commit automatically, or abort a doomed transaction.

        It costs nothing if no session was used. Objects are expired only if something
        was written.
        """
        if self.manager.cursors:
            self._close_cursors()
        if self.idle and not self.manager.has_begun:
            return
        if self.manager.isDoomed():
            self.manager.abort()
        else:
            self.manager.commit_items()

    def _close_cursors(self) -> None:
        cursors, self.manager.cursors = self.manager.cursors, set()
        error = run_all(cursor.close for cursor in cursors)
        if error is not None:
            raise error

    def count_uncommitted(self) -> list[str]:
        """The changes that are not committed, as in ``1 new Post``."""
        actions = "new", "changed", "deleted"
        totals = [Counter[str]() for _ in actions]
        for data_manager in self.data_managers:
            counts = data_manager.count_uncommitted()
            for total, count in zip(totals, counts, strict=True):
                total.update(count)
        changes = [
            f"{count} {action} {name}"
            for action, total in zip(actions, totals, strict=True)
            for name, count in sorted(total.items())
        ]
        events = count_unsent(self.manager.get()) if self.manager.has_begun else 0
        if events:
            changes.append(f"{events} unsent event{'s' if events > 1 else ''}")
        return changes

    def translate_error(self, controller: str, error: BaseException) -> BaseException:
        """The error to report: a clear one if a commit has closed a cursor."""
        if self.manager.commits and self._is_of_closed_cursor(error):
            return closed_cursor_error(controller, error)
        return error

    def _is_of_closed_cursor(self, error: BaseException) -> bool:
        if not self.data_managers:
            return False  # SQLAlchemy may not be installed
        from sqlalchemy.exc import DBAPIError, ResourceClosedError

        if isinstance(error, DBAPIError):
            message, _, _ = str(error.orig).partition("\n")  # the statement follows
            return "cursor" in message.lower()
        return isinstance(error, ResourceClosedError)

    # The request.

    def make_context(self, tg_locals: Any) -> DatabaseContext:
        """The context in which the stream is pulled.

        :param tg_locals: TG's ``RequestLocals`` of the request.
        """
        return DatabaseContext(tg_locals, self)

    def make_separate(self) -> StreamDatabase:
        """Other sessions and another transaction, for a hook. They never commit."""
        other = StreamDatabase(self.registries, self._removed)
        other.ended = True  # so that events are published at once
        return other

    def adopt_request_sessions(
        self, tm_enabled: bool, vetoed: Callable[[], bool]
    ) -> None:
        """End the request's transaction by TG's rules, and adopt its sessions.

        The objects and queries that the controller holds then belong to the stream. If
        the request uses its sessions again, it gets new ones. Call it before the stream
        is bound to the thread.

        :param tm_enabled: whether TG would end the transaction. If not, changes that
            are not committed are rolled back.
        :param vetoed: whether ``tm.commit_veto`` refuses the commit.
        """
        self._request_manager = manager = transaction.manager.manager
        handover.adopt_request_sessions(self, manager, tm_enabled, vetoed)

    def remove_request_sessions(self) -> None:
        """Remove the request's sessions from the thread that its response leaves.

        Call it while the stream is not bound to the thread.
        """
        error = run_all(registry.remove for registry in self.registries)
        if error is not None:
            log_unclosed_session(error)

    def keep_over_next_remove(self) -> None:
        """Keep the thread's own session when TG removes it, after a body was closed.

        Call it on the thread that has closed the body, bound or not.
        """
        if self._removed:
            self.registries[0].keep_over_next_remove()

    # The end.

    def release(self, return_objects: bool) -> None:
        """Abort changes that are not committed, and close the sessions.

        Each step runs even if the step before failed. It can be called again.

        :param return_objects: whether the objects return to the request's sessions.
        :raises BaseException: the first error of all steps.
        """
        self.ended = True
        if not (self.manager.has_begun or self.data_managers):
            return
        steps = [self._close_cursors, self.manager.abort]
        if return_objects:
            # Before the abort, because it would expire them.
            unchanged = handover.remove_objects(self, lambda each: each.unchanged)
            steps.append(lambda: self._return_objects(unchanged))
        steps += [data_manager.release for data_manager in self.data_managers]
        error = run_all(steps)
        self.current.clear()
        self.data_managers.clear()
        if error is not None:
            raise error

    def _return_objects(self, unchanged: handover.Removed) -> None:
        aborted = handover.remove_objects(self, lambda each: True)
        with use_manager(self._request_manager):
            handover.return_objects(unchanged + aborted)
