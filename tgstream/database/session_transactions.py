"""The sessions in use here, and the ends of their transactions and savepoints.

SQLAlchemy has savepoints and rollbacks of its own, which ``transaction`` does not see.
A ``SessionTransaction`` shows if it is active, and not how it has ended. So the commits
of a session are recorded, from its first event on.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import tg

from ..core import context as _context
from ..core.context import thread
from .engines import get_binds
from .registry import scoped_sessions

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session, SessionTransaction

    from .sessions import StreamSessions

committed: WeakSet[SessionTransaction] = WeakSet()
"""The transactions and savepoints of tracked sessions that were committed."""
_tracked: WeakSet[Session] = WeakSet()


def find_sessions() -> list[Session]:
    """The sessions in use by the stream, the request or the job that runs here.

    They are those of the application, and those that have joined the transaction of
    this thread.
    """
    stream: StreamSessions | None = thread.record.database
    if stream is not None:
        return [data_manager.session for data_manager in stream.current.values()]
    sessions: list[Session] = []
    for scoped in scoped_sessions(_find_config()):
        try:
            if scoped.registry.has():
                sessions.append(scoped())
        except Exception:  # a scopefunc may need a request
            continue
    for session in find_joined_sessions():
        if session not in sessions:
            sessions.append(session)
    return sessions


def _find_config() -> Any:
    """The configuration of the request, or of the process."""
    try:
        return _context.current().config
    except TypeError:  # no request
        return tg.config


def find_joined_sessions() -> list[Session]:
    """The sessions that have joined the transaction of this thread."""
    manager, orm = find_manager(), sys.modules.get("sqlalchemy.orm")
    if manager is None or orm is None:
        return []
    from .transaction import get_resources

    return [
        resource.session
        for resource in get_resources(manager)
        if isinstance(getattr(resource, "session", None), orm.Session)
    ]


def find_begun_transaction() -> Any:
    """The transaction of this thread. None if none has begun."""
    manager = find_manager()
    if manager is None:
        return None
    from .transaction import get_begun

    return get_begun(manager)


def find_manager() -> Any:
    """The transaction manager of this thread. None if nothing has imported it."""
    package = sys.modules.get("transaction")
    return None if package is None else package.manager.manager


def find_main_session() -> Session | None:
    """The application's first session. It is made on first use."""
    scoped = next(iter(scoped_sessions(_find_config())), None)
    if scoped is not None:
        with suppress(Exception):  # a scopefunc may need a request
            session: Session = scoped()
            return session
    return None


def get_open_transactions(sessions: list[Session]) -> list[SessionTransaction]:
    """The transactions of sessions, and the savepoints in them, that are open now."""
    transactions = []
    for session in sessions:
        current = session.get_nested_transaction() or session.get_transaction()
        while current is not None:
            # Without those of a flush, and those that are committing: handlers run.
            if current.is_active and (current.nested or current.parent is None):
                track_commits(session)
                transactions.append(current)
            current = current.parent
    return transactions


def get_connection(session: Session, engine: Any = None) -> Connection:
    """The connection of a session. It begins a transaction if none has begun.

    The method of the class is called, because a stream replaces that of its session.

    :param engine: that of the connection. None for the session's choice, which may be
        a replica, or may fail if the session has an engine for each class.
    """
    if engine is None:
        return type(session).connection(session)
    # The session may be bound to a connection, or to a copy of the engine.
    same = (bind for bind in get_binds(session) if bind.engine.pool is engine.pool)
    arguments = {"bind": next(same, engine)}
    return type(session).connection(session, bind_arguments=arguments)


def track_commits(session: Session) -> None:
    """Record the commits of a session from now on."""
    if session not in _tracked:
        from sqlalchemy import event  # there is a session, so it is installed

        event.listen(session, "after_commit", _after_commit)
        _tracked.add(session)


def _after_commit(session: Session) -> None:
    transaction = session.get_nested_transaction() or session.get_transaction()
    assert transaction is not None
    committed.add(transaction)
