"""The engines of a session, and what makes it safe for streams to use them."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

log = logging.getLogger("tgstream")

_warned: WeakSet[Any] = WeakSet()
"""Applications that were warned about."""
_prepared: WeakSet[Any] = WeakSet()
"""Engines that streams use."""
_undoing: WeakSet[Any] = WeakSet()
"""Engines whose failed commits are rolled back."""


def prepare_engines(session: Session) -> None:
    """Prepare each engine of a session once, before a stream uses it.

    It warns if a stream cannot have a connection of its own.
    """
    for bind in get_binds(session):
        if bind.engine in _prepared:
            continue
        _prepared.add(bind.engine)
        undo_failed_commits(bind.engine)
        if has_one_connection(bind.engine):
            log.warning(
                "%s uses one connection for all sessions of a thread (typical of "
                "in-memory SQLite), so a stream cannot have its own transaction. Use a "
                "database file, in test.ini: sqlalchemy.url = "
                "sqlite:///%%(here)s/test.db",
                bind.engine.url.set(query={}),  # without a password in the query
            )


def undo_failed_commits(engine: Any) -> None:
    """Roll back each commit that SQLite refuses, for example because it is locked.

    SQLite keeps the transaction open, so that the commit can be tried again. SQLAlchemy
    considers it as ended. If the session is then closed, as by zope.sqlalchemy, the
    next user of the connection would commit the changes.
    """
    if engine.dialect.name == "sqlite" and engine not in _undoing:
        _undoing.add(engine)
        from sqlalchemy import event

        event.listen(engine, "handle_error", _undo_failed_commit)


def _undo_failed_commit(context: Any) -> None:
    if context.statement is None and context.connection is not None:
        with suppress(Exception):  # the first error is reported
            context.connection.connection.rollback()


def warn_not_atomic(application: Any) -> None:
    """Warn, once an application, that a commit may fail after another one succeeded.

    :param application: any object that the application has once.
    """
    if application not in _warned:
        _warned.add(application)
        log.warning(
            "a stream commits the changes of several sessions one after the other. If "
            "a database refuses its commit, the earlier commits stay. Set "
            "twophase=True for these sessions, or call commit() after the changes of "
            "each session"
        )


def log_unclosed_session(error: BaseException) -> None:
    """Log the error of a request's session that could not be closed."""
    log.error("a session could not be closed after its request", exc_info=error)


def get_binds(session: Session) -> list[Any]:
    """The engines and connections that a session is bound to.

    For a session that chooses its engine by statement, this is the engine that it
    writes to. The list may be empty.
    """
    by_class: Any = getattr(session, "binds", None)
    if by_class is None:  # SQLAlchemy 2.0 has no public name for it
        by_class = getattr(session, "_Session__binds", {})
    bound = dict.fromkeys([session.bind, *by_class.values()])
    binds = [bind for bind in bound if bind is not None]
    if not binds:
        # A session that overrides get_bind() may read from replicas.
        flushing, session._flushing = session._flushing, True
        with suppress(Exception):  # UnboundExecutionError, or the application's own
            binds.append(session.get_bind())
        session._flushing = flushing
    return binds


def get_factory_binds(scoped: Any) -> list[Any]:
    """The engines and connections of the sessions that ``scoped`` makes.

    It makes a session and closes it. The list is empty if that fails, for example
    because the factory needs a request.
    """
    with suppress(Exception):
        session = scoped.session_factory()
        try:
            return get_binds(session)
        finally:
            session.close()
    return []


def has_one_connection(engine: Any) -> bool:
    """True if all sessions of a thread use the same connection of ``engine``."""
    from sqlalchemy.pool import SingletonThreadPool, StaticPool

    return isinstance(engine.pool, SingletonThreadPool | StaticPool)
