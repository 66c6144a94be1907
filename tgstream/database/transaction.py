"""A stream's own transaction, and the part that a database session takes in it.

Rule: of ``transaction`` and zope.sqlalchemy only their protocol is met here; whose
session it is, and when it ends, is told in ``_database``. The words are theirs: join,
begin, commit, abort.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import transaction
from transaction.weakset import WeakSet

from ._postgresql import refuse_failed
from .engines import binds_of, tell_not_atomic
from .errors import cursor_open

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


Counts: TypeAlias = tuple[Counter[str], Counter[str], Counter[str]]
"""Objects by the name of their class: new, changed and deleted."""

KEPT = 100
"""Maximum statements of a transaction that a member keeps for rows(key=...)."""


class Manager(transaction.TransactionManager):  # type: ignore[misc]
    """A transaction manager whose transactions begin with the stream's sessions."""

    def __init__(self, members: Collection[Member], application: Any) -> None:
        # As the base has it, but without a set for each stream: few ever register.
        self.explicit = False
        self._txn: Any = None
        self._members = members
        self.application = application  # any object of it, to warn once for each
        self.commits = 0
        self.settling = False
        self.cursors: set[Any] = set()  # open ones, which an end would end
        self._refused: list[Any] = []  # who took part in a commit that failed

    @cached_property
    def _synchs(self) -> Any:
        return WeakSet()

    @property
    def idle(self) -> bool:
        """True while no transaction has begun."""
        return self._txn is None

    def begin(self) -> Any:
        self.abort()  # also what the sessions did before a transaction was asked for
        self._refused = []
        super().begin()
        return self._join()

    def get(self) -> Any:
        if self._txn is not None:
            return self._txn
        super().get()
        return self._join()

    def _join(self) -> Any:
        for member in self._members:
            self._txn.join(member)
        return self._txn

    def abort(self) -> None:
        self._refuse_over_cursors()
        super().abort()

    def commit(self) -> None:
        self._refuse_over_cursors()
        try:
            super().commit()
        except BaseException:
            self._refused = list(self.get()._resources)
            # So that the stream can go on: a failed transaction refuses all work.
            with suppress(Exception):  # of a lost connection; the first error is told
                self.abort()
            raise
        self.commits += 1

    def _retryable(self, error_type: type[BaseException], error: Any) -> bool:
        """Whether ``attempts()`` and ``run()`` try again after ``error``.

        A commit that failed has aborted, so its data managers have left already.
        """
        retries = (getattr(each, "should_retry", None) for each in self._refused)
        if any(retry is not None and retry(error) for retry in retries):
            return True
        return bool(super()._retryable(error_type, error))

    def check_atomic(self, member: Member) -> None:
        """Warn if another session may commit, or has, and ``member`` be refused."""
        for other in self._members:
            if other is not member and other.changed and not other.session.twophase:
                tell_not_atomic(self.application)

    def _refuse_over_cursors(self) -> None:
        if self.cursors:
            raise cursor_open()

    def settle(self) -> None:
        """Commit at the cost of what was done: without a write, nothing is expired."""
        self.settling = True
        try:
            self.commit()
        finally:
            self.settling = False


class Member:
    """A session's data manager: at every end committed or rolled back, and kept open.

    It stands in for zope.sqlalchemy's, which closes or expires the session at every
    end, overlooks Core writes, and does not roll a kept session back.
    """

    transaction_manager = None
    watched = False  # also for what is written past the session
    held_in: Any = None
    """The session's transaction, if a lock or a setting in it must last."""
    released = False

    def __init__(self, session: Session, manager: Manager) -> None:
        from sqlalchemy import event  # here there is a session; an application may not

        self.session = session
        self.manager = manager
        self.changed = self._deleted = False
        self._flushed = _nothing()
        self.held_in = session.get_transaction()  # of which nothing is known
        self.connections: set[Any] = set()  # of the session's transaction
        # The statements of the transaction, with options. rows(key=...) checks them.
        self.statements: list[tuple[Any, Any]] = []
        session.connection = self._connection  # type: ignore[method-assign]
        self._parked = self._park()
        event.listen(session, "after_flush", self._after_flush)
        event.listen(session, "do_orm_execute", self._do_orm_execute)
        event.listen(session, "after_transaction_create", self._after_create)
        event.listen(session, "after_begin", self._after_begin)
        event.listen(session, "persistent_to_deleted", self._after_delete)

    def _park(self) -> Any:
        """Join the session where nothing ends, for zope.sqlalchemy to let it be."""
        zope = sys.modules.get("zope.sqlalchemy")
        if zope is None:
            return None
        parked = transaction.TransactionManager()
        begun = self.session.in_transaction()
        zope.mark_changed(self.session, parked, keep_session=True)
        if not begun:
            self.session.rollback()
        return parked

    def _after_flush(self, session: Session, flush_context: Any) -> None:
        for flushed, pending in zip(self._flushed, _pending(session), strict=True):
            flushed.update(type(each).__name__ for each in pending)

    def _after_delete(self, session: Session, instance: Any) -> None:
        self._deleted = True

    def _do_orm_execute(self, state: Any) -> None:
        self.changed = self.changed or not state.is_select
        if not self.watched and not self.released:
            if not self.session.in_transaction():
                self.statements.clear()
            if len(self.statements) < KEPT:
                self.statements.append((state.statement, state.local_execution_options))

    def _connection(self, *args: Any, **options: Any) -> Any:
        """``session.connection()``: statements on it are not seen by the session.

        A handler of after_begin may call it too, and runs again at each begin.
        """
        connection = type(self.session).connection(self.session, *args, **options)
        if self.connections:
            self.held_in = self.session.get_transaction()
        return connection

    def _after_create(self, session: Session, inner: Any) -> None:
        # A flush and the bulk methods work in a subtransaction, a read never does.
        self.changed = self.changed or inner.parent is not None
        if inner.parent is None:
            self.connections.clear()

    def _after_begin(self, session: Session, begun: Any, connection: Any) -> None:
        self.connections.add(connection)

    @property
    def idle(self) -> bool:
        """True while there is nothing to end: no connection, no pending object."""
        return not self.session.in_transaction()

    @property
    def unchanged(self) -> bool:
        """True if an abort would undo nothing that the session's objects show."""
        return not (self.changed or any(_pending(self.session)))

    def left(self) -> Counts:
        """The new, changed and deleted objects since the last commit, by class."""
        both = zip(self._flushed, _pending(self.session), strict=True)
        new, changed, deleted = (
            flushed + Counter(type(each).__name__ for each in pending)
            for flushed, pending in both
        )
        return new, changed, deleted

    def release(self) -> None:
        """Close the session, whatever state it is in.

        A transaction that goes on may still call: ``remove()`` in a generator.
        """
        session = self.session
        self.released = True
        del self.session  # which knows the member: a cycle, and it holds much
        try:
            if self._parked is not None:
                self._unpark()
        finally:
            vars(session).pop("connection", None)
            self.held_in = None
            session.close()

    def _unpark(self) -> None:
        with suppress(KeyError):  # zope's weak entry is gone: this is cyclic garbage
            for zopes in self._parked.get()._resources:
                zopes.abort(None)
            self._parked.abort()  # which would log that error

    def _can_end(self) -> bool:
        """Whether there is a session: the generator may have closed it for good."""
        from sqlalchemy.exc import InvalidRequestError

        if self.released:
            return False
        if self.idle:
            try:
                self.session.begin()  # commit() does not with autobegin=False
            except InvalidRequestError:
                return False
        return True

    def _commit(self) -> None:
        session, expires = self.session, self.session.expire_on_commit
        # With it SQLAlchemy expires all objects, again and again, and it alone
        # detaches those that were deleted.
        session.expire_on_commit = expires and self._deleted
        try:
            session.commit()
        finally:
            session.expire_on_commit = expires
        if expires and (self.changed or not self.manager.settling):
            self._expire()
        self._forget()

    def _expire(self) -> None:
        """Expire what is not, so that a commit costs what was used since the last."""
        for state in self.session.identity_map.all_states():
            if not state.expired and (used := state.obj()) is not None:
                self.session.expire(used)

    def _forget(self) -> None:
        self.changed = self._deleted = False
        self._flushed = _nothing()

    # The protocol of transaction's data managers.

    def abort(self, transaction: Any) -> None:
        if self.released:
            return
        self._forget()
        self.session.rollback()
        self.session.expire_all()  # also where no transaction had begun

    def tpc_begin(self, transaction: Any) -> None:
        if not self.released:
            self.session.flush()

    def commit(self, transaction: Any) -> None:
        """Nothing: the session is committed in the vote, as zope.sqlalchemy does."""

    def tpc_vote(self, transaction: Any) -> None:
        if not self._can_end():
            return
        if self.changed:
            refuse_failed(self.connections)
        if self.session.twophase:
            self.session.prepare()
        else:
            if self.changed:
                self.manager.check_atomic(self)
            self._commit()

    def tpc_finish(self, transaction: Any) -> None:
        if not self.released and self.session.twophase and self._can_end():
            self._commit()

    def tpc_abort(self, transaction: Any) -> None:
        self.abort(transaction)

    def should_retry(self, error: BaseException) -> bool:
        """Whether the work may succeed if it is done again, as zope.sqlalchemy has it.

        Its list of errors is used for sessions too that are not registered with it.
        """
        from zope.sqlalchemy.datamanager import SessionDataManager

        return bool(SessionDataManager.should_retry(self, error))

    def sortKey(self) -> str:
        """As zope.sqlalchemy: in one phase last, for the others can then be undone."""
        twophase = not self.released and self.session.twophase
        kind = "sqlalchemy.twophase" if twophase else "~sqlalchemy"
        return f"{kind}:{id(self)}"

    @property
    def savepoint(self) -> Any:
        """What ``transaction.savepoint()`` calls; not on SQLite, as zope.sqlalchemy."""
        if self._on_sqlite():
            raise AttributeError("savepoint")
        return self.session.begin_nested

    def _on_sqlite(self) -> bool:
        used = self.connections or binds_of(self.session)
        return any(bind.dialect.name == "sqlite" for bind in used)


def _nothing() -> Counts:
    return Counter(), Counter(), Counter()


def _pending(session: Session) -> tuple[Collection[Any], ...]:
    return session.new, session.dirty, session.deleted
