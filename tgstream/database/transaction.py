"""A stream's own transaction, and the part that each of its sessions takes in it.

The words are those of the packages ``transaction`` and zope.sqlalchemy: a transaction
manager begins, commits and aborts transactions. A data manager joins a transaction and
takes part in its two phases. There are two classes here:

- ``StreamTransactionManager`` stands in for the thread's manager while a stream is
  pulled, so that ``transaction.commit()`` in a generator commits the stream. It begins
  a transaction on first use. All sessions of the stream join it at once, because a Core
  statement would not make its session join.
- ``StreamDataManager`` stands in for the data manager of zope.sqlalchemy, which closes
  or expires its session at each end, does not notice Core writes, and does not roll
  back a session that it keeps. This one commits or rolls back, and keeps the session
  open for the rest of the stream.

A commit calls the data managers in the order of their ``sortKey``. Each step is called
for all of them before the next step:

1. ``tpc_begin`` flushes.
2. ``commit`` does nothing.
3. ``tpc_vote`` commits a session, or prepares it if it has ``twophase=True``. A session
   in one phase votes last: until then, all others can be undone. If two sessions in one
   phase have changes, the second may fail after the first has committed. So there is a
   warning.
4. ``tpc_finish`` commits the prepared sessions.

Three things can happen in between:

- *A step fails.* ``transaction`` aborts all data managers, and the transaction then
  refuses all work. The manager aborts the transaction, too, so that the stream can go
  on with another one. ``attempts()`` and ``run()`` look for data managers that allow
  another try, which an abort removes. So the manager keeps them until the next begin.
- *The generator has closed or removed its session*, also in the middle of a transaction
  that the session has joined. A data manager without a session does nothing.
- *A cursor of rows() or copy() is open.* A commit or an abort would close it, so both
  are refused. The end of the stream closes its cursors first.

An end expires objects only if they may have changed. A commit of the generator expires
all that was used. An automatic commit expires nothing if nothing was written, so that a
stream that only reads can hold its objects over its commits.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import transaction
from transaction.weakset import WeakSet

from ..core.errors import StreamError
from .engines import get_binds, warn_not_atomic
from .errors import open_cursor_error

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, SessionTransaction

Counts: TypeAlias = tuple[Counter[str], Counter[str], Counter[str]]
"""Objects by the name of their class: new, changed and deleted."""

MAX_STATEMENTS = 100
"""Maximum statements of a transaction that are kept for rows(key=...) to check."""


class StreamTransactionManager(transaction.TransactionManager):  # type: ignore[misc]
    """A transaction manager whose transactions begin with the stream's sessions.

    :param data_managers: those of the sessions. The collection may grow.
    :param application: any object that the application has once, to warn once.
    """

    explicit = False
    _txn: Any = None
    commits = 0
    """The number of committed transactions."""
    keeps_unchanged = False
    """Whether a commit expires no object of a session that wrote nothing."""
    _failed_resources: Collection[Any] = ()

    def __init__(
        self, data_managers: Collection[StreamDataManager], application: Any
    ) -> None:
        # The base is not called: it would make a set of synchronizers, in 0.9 of the
        # 50 us that a stream adds to its request, and few streams register one.
        self._data_managers = data_managers
        self._application = application
        self.cursors: set[Any] = set()
        """The open cursors of rows() and copy()."""

    @cached_property
    def _synchs(self) -> Any:
        return WeakSet()

    @property
    def has_begun(self) -> bool:
        """True while there is a transaction."""
        return self._txn is not None

    def begin(self) -> Any:
        self.abort()  # also of sessions that were used before a transaction began
        self._failed_resources = ()
        super().begin()
        return self._join()

    def get(self) -> Any:
        if self._txn is not None:
            return self._txn
        super().get()
        return self._join()

    def _join(self) -> Any:
        for data_manager in self._data_managers:
            self._txn.join(data_manager)
        return self._txn

    def join_again(self, data_manager: StreamDataManager) -> None:
        """Let a session that begins join the transaction if it has dropped the session.

        The rollback of a savepoint drops a data manager that has joined after it.
        """
        txn = self._txn
        if (
            txn is not None
            and data_manager in self._data_managers
            and data_manager not in txn._resources
        ):
            txn.join(data_manager)

    def abort(self) -> None:
        self._refuse_over_cursors()
        super().abort()

    def commit(self) -> None:
        self._refuse_over_cursors()
        try:
            super().commit()
        except BaseException:
            self._failed_resources = list(get_resources(self))
            # A lost connection makes the abort fail, too. The first error is reported.
            with suppress(Exception):
                self.abort()
            raise
        self.commits += 1

    def _refuse_over_cursors(self) -> None:
        if self.cursors:
            raise open_cursor_error()

    def _retryable(self, error_type: type[BaseException], error: Any) -> bool:
        """Whether ``attempts()`` and ``run()`` try again after ``error``."""
        for resource in self._failed_resources:
            should_retry = getattr(resource, "should_retry", None)
            if should_retry is not None and should_retry(error):
                return True
        return bool(super()._retryable(error_type, error))

    def warn_if_not_atomic(self, data_manager: StreamDataManager) -> None:
        """Warn if another session has changes, which may be committed without these."""
        for other in self._data_managers:
            if (
                other is not data_manager
                and other.changed
                and not other.session.twophase
            ):
                warn_not_atomic(self._application)

    def commit_items(self) -> None:
        """Commit automatically. A session that wrote nothing keeps its values."""
        self.keeps_unchanged = True
        try:
            self.commit()
        finally:
            self.keeps_unchanged = False

    def commit_alone(self, data_manager: StreamDataManager) -> None:
        """Commit a session that wrote nothing, in a transaction of its own.

        Other sessions go on, and so does a doomed transaction.
        """
        alone = transaction.TransactionManager()
        alone.get().join(data_manager)
        self.keeps_unchanged = True
        try:
            # zope.sqlalchemy checks that the thread's transaction is committing.
            with use_manager(alone):
                alone.commit()
        finally:
            self.keeps_unchanged = False


# The thread's manager.


@contextmanager
def use_manager(manager: Any) -> Iterator[None]:
    """Make ``manager`` this thread's transaction manager meanwhile."""
    local = transaction.manager
    outer, local.manager = local.manager, manager
    try:
        yield
    finally:
        local.manager = outer


def is_empty(manager: Any) -> bool:
    """True if a commit of the thread's transaction would do nothing."""
    txn = manager.get()
    return not (
        txn._resources
        or any(txn.getBeforeCommitHooks())
        or any(txn.getAfterCommitHooks())
        or manager.registeredSynchs()
    )


def disable_retry(manager: Any) -> None:
    """Prevent ``tm.attempts`` from running the controller again."""
    manager.get().isRetryableError = _is_never_retryable


def _is_never_retryable(error: BaseException) -> bool:
    return False


def get_begun(manager: Any) -> Any:
    """The transaction of a manager. None if none has begun."""
    return manager._txn


def get_resources(manager: Any) -> list[Any]:
    """The data managers that have joined a manager's transaction, if it has begun."""
    txn = get_begun(manager)
    return [] if txn is None else txn._resources


def ensure_zope_commits(session: Session) -> bool:
    """Let zope.sqlalchemy commit a session that has written nothing that it has seen.

    :returns: False if the session has not joined a transaction, or as read-only.
    """
    from zope.sqlalchemy import datamanager

    state = datamanager._SESSION_STATE.get(session)
    if state is None or state is datamanager.STATUS_READONLY:
        return False
    datamanager.mark_changed(session)
    return True


class StreamDataManager:
    """The data manager of one session of a stream.

    :param session: becomes the stream's, until :meth:`release`.
    :param manager: that of the stream.
    """

    transaction_manager = None
    released = False
    tracks_connections = False
    """Whether statements on the session's connections are seen, too."""
    pinned: SessionTransaction | None = None
    """The session's transaction, if it must go on for a lock or a setting in it."""

    def __init__(self, session: Session, manager: StreamTransactionManager) -> None:
        from sqlalchemy import event  # an application without a session may not have it

        self.session = session
        self.manager = manager
        self.changed = self._deleted = False
        self._flushed = _no_counts()
        self.pinned = session.get_transaction()  # its statements are not known
        self.connections: set[Any] = set()  # of the session's transaction
        # The statements of the transaction, with options. rows(key=...) checks them.
        self.statements: list[tuple[Any, Any]] = []
        session.connection = self._connection  # type: ignore[method-assign]
        self._zope_manager = self._detach_from_zope()
        event.listen(session, "after_flush", self._after_flush)
        event.listen(session, "do_orm_execute", self._do_orm_execute)
        event.listen(session, "after_transaction_create", self._after_create)
        event.listen(session, "after_begin", self._after_begin)
        event.listen(session, "persistent_to_deleted", self._after_delete)

    def _detach_from_zope(self) -> Any:
        """Join the session to a transaction that never ends.

        zope.sqlalchemy joins a session only once, so that it leaves this one alone.
        """
        zope = sys.modules.get("zope.sqlalchemy")
        if zope is None:
            return None
        manager = transaction.TransactionManager()
        in_transaction = self.session.in_transaction()
        zope.mark_changed(self.session, manager, keep_session=True)
        if not in_transaction:
            self.session.rollback()
        return manager

    def _release_from_zope(self) -> None:
        with suppress(KeyError):  # zope's weak entry is gone: this is cyclic garbage
            for data_manager in get_resources(self._zope_manager):
                data_manager.abort(None)
            self._zope_manager.abort()  # this alone would log the KeyError

    # Handlers of SQLAlchemy's events.

    def _after_flush(self, session: Session, flush_context: Any) -> None:
        for flushed, pending in zip(self._flushed, _pending(session), strict=True):
            flushed.update(type(instance).__name__ for instance in pending)

    def _after_delete(self, session: Session, instance: Any) -> None:
        self._deleted = True

    def _do_orm_execute(self, state: Any) -> None:
        self.changed = self.changed or not state.is_select
        if not self.tracks_connections and not self.released:
            if not self.session.in_transaction():
                self.statements.clear()
            if len(self.statements) < MAX_STATEMENTS:
                self.statements.append((state.statement, state.local_execution_options))

    def _connection(self, *args: Any, **options: Any) -> Any:
        """``session.connection()``: the session does not see the statements on it.

        A handler of after_begin may call it too, and runs again at each begin.
        """
        connection = type(self.session).connection(self.session, *args, **options)
        if self.connections:
            self.pinned = self.session.get_transaction()
        return connection

    def _after_create(self, session: Session, inner: Any) -> None:
        # A flush and the bulk methods work in a subtransaction. A read never does.
        self.changed = self.changed or inner.parent is not None
        if inner.parent is None and not self.released:
            self.connections.clear()
            self.manager.join_again(self)

    def _after_begin(self, session: Session, begun: Any, connection: Any) -> None:
        self.connections.add(connection)

    # The state of the session.

    @property
    def in_transaction(self) -> bool:
        """False if there is nothing to end: no connection and no pending object."""
        return self.session.in_transaction()

    @property
    def unchanged(self) -> bool:
        """True if an abort would undo nothing that the session's objects show."""
        return not (self.changed or any(_pending(self.session)))

    def count_uncommitted(self) -> Counts:
        """The new, changed and deleted objects since the last commit, by class."""
        both = zip(self._flushed, _pending(self.session), strict=True)
        new, changed, deleted = (
            flushed + Counter(type(instance).__name__ for instance in pending)
            for flushed, pending in both
        )
        return new, changed, deleted

    def release(self) -> None:
        """Close the session, whatever state it is in.

        A transaction that goes on may still call this data manager: the generator may
        have called ``remove()``.
        """
        session = self.session
        self.released = True
        del self.session  # it refers to this: a cycle, which would keep its objects
        try:
            if self._zope_manager is not None:
                self._release_from_zope()
        finally:
            vars(session).pop("connection", None)
            self.pinned = None
            session.close()

    # The ends.

    def _ensure_transaction(self) -> bool:
        """False if the session is closed, so that nothing can end."""
        from sqlalchemy.exc import InvalidRequestError

        if self.released:
            return False
        if not self.in_transaction:
            try:
                self.session.begin()  # commit() does not with autobegin=False
            except InvalidRequestError:
                return False
        return True

    def _commit(self) -> None:
        session, expires = self.session, self.session.expire_on_commit
        # SQLAlchemy would expire all objects, also those that are expired. But only so
        # it detaches the deleted ones.
        session.expire_on_commit = expires and self._deleted
        try:
            session.commit()
        finally:
            session.expire_on_commit = expires
        if expires and (self.changed or not self.manager.keeps_unchanged):
            self._expire()
        self._reset_changes()

    def _expire(self) -> None:
        """Expire the objects that were used since the last commit."""
        for state in self.session.identity_map.all_states():
            if not state.expired and (instance := state.obj()) is not None:
                self.session.expire(instance)

    def _reset_changes(self) -> None:
        self.changed = self._deleted = False
        self._flushed = _no_counts()

    # The protocol of transaction's data managers.

    def abort(self, transaction: Any) -> None:
        if self.released:
            return
        self._reset_changes()
        self.session.rollback()
        self.session.expire_all()  # also where no transaction had begun

    def tpc_begin(self, transaction: Any) -> None:
        if not self.released:
            self.session.flush()

    def commit(self, transaction: Any) -> None:
        """Do nothing: the vote commits, as in zope.sqlalchemy."""

    def tpc_vote(self, transaction: Any) -> None:
        if not self._ensure_transaction():
            return
        if self.changed:
            _check_not_failed(self.connections)
        if self.session.twophase:
            self.session.prepare()
        else:
            if self.changed:
                self.manager.warn_if_not_atomic(self)
            self._commit()

    def tpc_finish(self, transaction: Any) -> None:
        if not self.released and self.session.twophase and self._ensure_transaction():
            self._commit()

    def tpc_abort(self, transaction: Any) -> None:
        self.abort(transaction)

    def should_retry(self, error: BaseException) -> bool:
        """Whether the work may succeed on the next attempt.

        zope.sqlalchemy has a list of errors. It is used for all sessions, registered
        with zope.sqlalchemy or not.
        """
        from zope.sqlalchemy.datamanager import SessionDataManager

        return bool(SessionDataManager.should_retry(self, error))

    def sortKey(self) -> str:
        """In one phase last, as in zope.sqlalchemy: until then others can be undone."""
        twophase = not self.released and self.session.twophase
        prefix = "sqlalchemy.twophase" if twophase else "~sqlalchemy"
        return f"{prefix}:{id(self)}"

    @property
    def savepoint(self) -> Any:
        """The method that ``transaction.savepoint()`` calls.

        :raises AttributeError: on SQLite, as in zope.sqlalchemy.
        """
        if self._is_on_sqlite():
            raise AttributeError("savepoint")
        return self.session.begin_nested

    def _is_on_sqlite(self) -> bool:
        binds = self.connections or get_binds(self.session)
        return any(bind.dialect.name == "sqlite" for bind in binds)


def _no_counts() -> Counts:
    return Counter(), Counter(), Counter()


def _pending(session: Session) -> tuple[Collection[Any], ...]:
    """The objects that the next flush inserts, updates and deletes."""
    return session.new, session.dirty, session.deleted


# PostgreSQL.


_INERROR = 3
"""libpq's status of a transaction that has failed. psycopg 3 and 2 use it, too."""


def _check_not_failed(connections: Iterable[Any]) -> None:
    """Refuse a commit that PostgreSQL would turn into a rollback without an error.

    :raises StreamError: when a statement has failed, and its error was caught.
    """
    for connection in connections:
        if connection.closed or connection.invalidated:
            continue
        info = getattr(connection.connection.driver_connection, "info", None)
        if getattr(info, "transaction_status", None) == _INERROR:
            raise StreamError(
                "cannot commit: a statement failed in this transaction, and PostgreSQL "
                "would undo all of it without an error. If you catch a database error, "
                "call rollback(), or run the statement in DBSession.begin_nested()"
            )
