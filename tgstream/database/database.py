"""One stream's sessions and transaction: flush, commit, roll back, release.

Rule: only this file touches the thread's transaction manager, and through their
registries the scoped sessions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import transaction

from ..core.cleanup import first_error
from .engines import tell_shared, tell_unclosed
from .errors import cursor_ended
from .handover import attach, keeping_values, take
from .on_commit import unsent
from .registry import Registry
from .transaction import Manager, Member

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


class Database:
    """The sessions and the transaction of one stream.

    :param registries: the registries of the application's scoped sessions, TG's first.
    :param removed: whether TG removes the first at the end of each body.
    """

    def __init__(self, registries: tuple[Registry, ...], removed: bool) -> None:
        self.registries = registries
        self._removed = removed
        self.members: dict[Registry, Member] = {}
        self.parts: list[Member] = []  # with those that set() replaced
        self.manager = Manager(self.parts, registries[0] if registries else None)
        self.outer_manager: Any = None
        self.over = False  # its stream has ended, and its report is being told

    @property
    def idle(self) -> bool:
        return all(member.idle for member in self.parts)

    @property
    def commits(self) -> int:
        return self.manager.commits

    @property
    def has_sessions(self) -> bool:
        return bool(self.registries)

    @staticmethod
    def managers_of_thread() -> dict[str, Any]:
        """Where the thread-local manager keeps this thread's, under ``manager``.

        That attribute is documented, and meant to be exchanged; its dict, kept in the
        thread's record, spares a look-up a pull.
        """
        managers: dict[str, Any] = transaction.manager.__dict__
        return managers

    def session(self, registry: Registry) -> Session:
        """The stream's session of a scoped session, made on first use."""
        member = self.members.get(registry)
        if member is None:
            member = self.adopt(registry, registry.createfunc())
        return member.session

    def adopt(self, registry: Registry, session: Session) -> Member:
        """Make ``session`` the stream's; one that it replaces stays so to the end."""
        member = self.member_of(session)
        if member is None:
            tell_shared(session)
            member = Member(session, self.manager)
            if not self.manager.idle:
                self.manager.get().join(member)
            self.parts.append(member)
        self.members[registry] = member
        return member

    def forget(self, registry: Registry) -> None:
        """Let go of the session that ``scoped_session.remove()`` has closed."""
        member = self.members.pop(registry, None)
        if member is not None and member not in self.members.values():
            self.parts.remove(member)
            member.release()

    def member_of(self, session: Session) -> Member | None:
        """The part that ``session`` takes in the transaction, if it is the stream's."""
        for member in self.parts:
            if member.session is session:
                return member
        return None

    def flush(self) -> None:
        """Send what is pending to the database, as ``DBSession.flush()`` does."""
        for member in self.parts:
            member.session.flush()

    def commit(self) -> None:
        """Commit; objects stay attached, and are read again on their next use."""
        self.manager.commit()

    def close_cursors(self) -> None:
        """Close what is still read from: the stream itself ends the transaction."""
        cursors, self.manager.cursors = self.manager.cursors, set()
        error = first_error(each.close for each in cursors)
        if error is not None:
            raise error

    def rollback(self) -> None:
        """Undo what is not committed."""
        self.manager.abort()

    def commit_items(self) -> None:
        """End the transaction: committed unless doomed; free if nothing was done."""
        self.close_cursors()
        if self.manager.idle and all(member.idle for member in self.parts):
            return
        if self.manager.isDoomed():
            self.manager.abort()
        else:
            self.manager.settle()

    def count_uncommitted(self) -> list[str]:
        """The changes that are not committed, in words: ``1 new Post``."""
        kinds = "new", "changed", "deleted"
        counts = [Counter[str]() for _ in kinds]
        for member in self.parts:
            for total, count in zip(counts, member.left(), strict=True):
                total.update(count)
        left = [
            f"{count} {kind} {name}"
            for kind, total in zip(kinds, counts, strict=True)
            for name, count in sorted(total.items())
        ]
        events = 0 if self.manager.idle else unsent(self.manager.get())
        if events:
            left.append(f"{events} unsent event{'s' if events > 1 else ''}")
        return left

    def translate_error(self, controller: str, error: BaseException) -> BaseException:
        """The error to report: a cursor that a commit ended gets a clear message."""
        if self._is_ended_cursor(error):
            return cursor_ended(controller, error)
        return error

    def _is_ended_cursor(self, error: BaseException) -> bool:
        if not self.parts:
            return False  # nor is there SQLAlchemy, maybe
        from sqlalchemy.exc import DBAPIError, ResourceClosedError

        if isinstance(error, DBAPIError):
            said = str(error.orig).partition("\n")[0]  # before it shows the statement
            return self.manager.commits > 0 and "cursor" in said.lower()
        return self.manager.commits > 0 and isinstance(error, ResourceClosedError)

    def release(self, give_back: bool) -> None:
        """Abort what is not committed, and close the sessions.

        The first error is raised when all is done.

        :param give_back: whether the objects go back to the request's sessions first.
        """
        self.over = True
        if self.manager.idle and not self.parts:
            return
        ends = (self.close_cursors, self.manager.abort)
        steps = [*ends, *(each.release for each in self.parts)]
        if give_back:
            unchanged = self._take(lambda member: member.unchanged)
            steps.insert(len(ends), lambda: self._give_back(unchanged))
        error = first_error(steps)
        self.members.clear()
        self.parts.clear()
        if error is not None:
            raise error

    def take_over(self, tm_enabled: bool, vetoed: Callable[[], bool]) -> None:
        """End the request's transaction by TG's rules, and take over its sessions.

        Call it unbound. What the controller holds of them, objects and queries, is the
        stream's from here on; the request gets new ones where it asks for more.

        :param tm_enabled: whether TG would end it; else what is not committed is gone.
        :param vetoed: whether ``tm.commit_veto`` says no.
        """
        manager = transaction.manager.manager
        sources = [(each, each.outer()) for each in self.registries if each.outer.has()]
        if sources or not tm_enabled or not _is_empty(manager):
            commits = tm_enabled and not (manager.isDoomed() or vetoed())
            self._move(sources, manager.commit if commits else manager.abort, commits)
            if tm_enabled:
                manager.begin()
        if tm_enabled:
            _never_again(manager)

    def _move(
        self,
        sources: list[tuple[Registry, Session]],
        end: Callable[[], None],
        commits: bool,
    ) -> None:
        for _, session in sources:
            session.flush() if commits else session.rollback()
        objects = [list(session.identity_map.values()) for _, session in sources]
        with ExitStack() as stack:
            for _, session in sources:
                stack.enter_context(keeping_values(session))
            end()
        for (each, session), held in zip(sources, objects, strict=True):
            known = not session.in_transaction()  # to a transaction manager
            each.outer.clear()
            adopted = self._adopt_or_make(each, session)
            attach(adopted, held)
            if not known:
                adopted.expire_all()

    def _adopt_or_make(self, registry: Registry, session: Session) -> Session:
        from sqlalchemy.exc import InvalidRequestError

        session.rollback()
        try:
            return self.adopt(registry, session).session
        except InvalidRequestError:  # closed for good: close_resets_only=False
            return self.session(registry)

    def _take(
        self, which: Callable[[Member], bool]
    ) -> list[tuple[Registry, list[Any]]]:
        return [
            (each, take(member.session))
            for each, member in self.members.items()
            if which(member)
        ]

    def _give_back(self, unchanged: list[tuple[Registry, list[Any]]]) -> None:
        """Move the stream's objects into the request's sessions.

        :param unchanged: those that keep their values over an abort.
        """
        aborted = self._take(lambda member: True)
        managers = self.managers_of_thread()
        managers["manager"] = self.outer_manager  # which the request's sessions join
        try:
            for each, objects in unchanged + aborted:
                if objects:
                    attach(each.outer(), objects)
        finally:
            managers["manager"] = self.manager

    def clear_thread(self) -> None:
        """Remove the request's sessions from the thread that its response leaves."""
        error = first_error(each.remove for each in self.registries)
        if error is not None:
            tell_unclosed(error)

    def shield(self) -> None:
        """Keep the thread's own session over TG's removal, which follows a close."""
        if self._removed:
            self.registries[0].shield()


def _is_empty(manager: Any) -> bool:
    """True if to commit a thread's transaction would do nothing, as is mostly so."""
    txn = manager.get()
    return not (
        txn._resources
        or any(txn.getBeforeCommitHooks())
        or any(txn.getAfterCommitHooks())
        or manager.registeredSynchs()
    )


def _never_again(manager: Any) -> None:
    """Let ``tm.attempts`` not run the controller again: what it wrote is committed."""
    manager.get().isRetryableError = _no


def _no(error: BaseException) -> bool:
    return False
