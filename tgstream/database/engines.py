"""The engines of a session: which it has, and whether streams can share them."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

log = logging.getLogger("tgstream")

_warned: WeakSet[Any] = WeakSet()


def tell_shared(session: Session) -> None:
    """Warn, once an engine, that a stream cannot have a connection of its own there."""
    for bind in binds_of(session):
        if bind.engine not in _warned and is_shared(bind.engine):
            _warned.add(bind.engine)
            log.warning(
                "%s is one connection for all sessions of a thread: a stream's "
                "transaction cannot be kept apart from the request's. Use a file, in "
                "test.ini: sqlalchemy.url = sqlite:///%%(here)s/test.db",
                bind.engine.url.set(query={}),  # where a password may be, too
            )


def tell_not_atomic(application: Any) -> None:
    """Warn, once an application, that one commit may fail after another."""
    if application not in _warned:
        _warned.add(application)
        log.warning(
            "a stream commits changes of several sessions one after the other: if a "
            "database refuses its commit, those before it stay committed. Set "
            "twophase=True for these sessions, or commit() after each of them"
        )


def binds_of(session: Session) -> list[Any]:
    """The engines and connections that ``session`` is bound to, without a statement.

    A session that chooses by statement (``get_bind()``) may have no answer.
    """
    by_class: Any = getattr(session, "binds", None)
    if by_class is None:  # SQLAlchemy 2.0, which has no public name for it
        by_class = getattr(session, "_Session__binds", {})
    bound = dict.fromkeys([session.bind, *by_class.values()])
    binds = [each for each in bound if each is not None]
    if not binds:
        with suppress(Exception):  # UnboundExecutionError, or the application's own
            binds.append(session.get_bind())
    return binds


def binds_of_factory(scoped: Any) -> list[Any]:
    """The binds of a session that the factory of ``scoped`` makes, whatever it is."""
    with suppress(Exception):  # the factory may need a request
        session = scoped.session_factory()
        try:
            return binds_of(session)
        finally:
            session.close()
    return []


def is_shared(engine: Any) -> bool:
    """True where all sessions of a thread have one connection of ``engine``."""
    from sqlalchemy.pool import SingletonThreadPool, StaticPool

    return isinstance(engine.pool, SingletonThreadPool | StaticPool)


def tell_unclosed(error: BaseException) -> None:
    """Tell of a request's session that will not close: its context must go on."""
    log.error("a session could not be closed after its request", exc_info=error)
