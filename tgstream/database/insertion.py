"""Insertion of messages through a session, in the transaction of its rows.

The back end of channels may store its messages in the application's own database. They
are then inserted over the connection of the application's first session, immediately
before the connection commits: the two are committed together, or not at all.

The connection's own event is the only point that is late enough. A flush can publish
messages, by a handler such as ``after_insert``. It runs in ``tpc_begin``, when
``transaction`` has already fixed its list of data managers, and again in the commit of
the session. All flushes are over when the connection commits. It is also the only event
that a savepoint does not trigger, so the messages of rolled back savepoints are known.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..core.context import thread
from .engines import undo_failed_commits
from .session_transactions import find_main_session, get_connection

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session, SessionTransaction

    from .sessions import StreamSessions


def begin_insertion(
    engine: Any, may_begin: bool
) -> tuple[SessionTransaction, Connection] | None:
    """The transaction of the application's first session, which can insert messages.

    A session that has joined a transaction is marked as changed. Otherwise
    zope.sqlalchemy would not commit it.

    :param engine: has the messages.
    :param may_begin: whether the session may begin a transaction.
    :returns: the session's transaction, and its connection. None if nothing here can
        insert.
    """
    session = find_main_session()
    if session is None:
        return None
    before = session.get_transaction()
    can_begin = may_begin and session.autobegin
    if not (can_begin if before is None else before.is_active):
        return None
    # The session joins as it is registered.
    connection = get_connection(session, engine)
    root = session.get_transaction()
    assert root is not None
    if not ensure_commit(session) and before is None:
        root.close()  # nothing would commit it
        return None
    return root, connection


def ensure_commit(session: Session) -> bool:
    """Let a session be committed, although it may have written nothing so far.

    :returns: False if neither a stream nor zope.sqlalchemy commits the session.
    """
    stream: StreamSessions | None = thread.record.database
    if stream is not None:
        data_manager = stream.find_data_manager(session)
        if data_manager is not None:
            data_manager.pinned = session.get_transaction()
        return data_manager is not None
    if "zope.sqlalchemy" not in sys.modules:
        return False
    from .transaction import ensure_zope_commits

    return ensure_zope_commits(session)


def call_before_commit(
    connection: Connection, function: Callable[[Connection], None]
) -> None:
    """Call a function with a connection before it commits, or prepares to commit.

    If the function fails, nothing is committed.
    """
    from sqlalchemy import event

    undo_failed_commits(connection.engine)

    def commit(connection: Connection) -> None:
        try:
            function(connection)
        except BaseException:
            _roll_back(connection)
            raise

    def prepare(connection: Connection, xid: Any) -> None:
        function(connection)

    event.listen(connection, "commit", commit)
    event.listen(connection, "prepare_twophase", prepare)


def _roll_back(connection: Connection) -> None:
    """Roll back the driver's connection.

    SQLAlchemy does not, if an event of the commit has failed. The next request would
    get the connection with the open transaction, and commit its changes.
    """
    if connection.invalidated:
        return
    try:
        connection.connection.rollback()
    except Exception as error:
        connection.invalidate(error)
