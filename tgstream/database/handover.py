"""The handover of a request's sessions, and their objects, to its stream and back.

The objects that the controller has loaded stay in use: the stream adopts the request's
sessions, and the request gets new ones if it uses them again. The request's transaction
ends first, by TG's rules, so that the stream begins with a transaction of its own. If
the stream ends inside the request, its objects return to the request's sessions, for an
error page or ``_after``.

A session gets only objects that were in a session before. Objects keep their values
over the end of the request's transaction, so that 3,000 of them cost no SELECT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from .engines import prepare_engines
from .registry import SessionRegistry
from .session_messages import end_unchanged
from .sessions import StreamSessions
from .transaction import StreamDataManager, disable_retry, is_empty

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

Removed: TypeAlias = list[tuple[SessionRegistry, list[Any]]]
"""Objects that were removed from the session of a registry."""


def adopt_request_sessions(
    stream: StreamSessions, manager: Any, tm_enabled: bool, vetoed: Callable[[], bool]
) -> None:
    """End the request's transaction by TG's rules, and adopt its sessions.

    :param stream: adopts the sessions.
    :param manager: the transaction manager of the request.
    :param tm_enabled: whether TG would end the transaction. If not, changes that are
        not committed are rolled back.
    :param vetoed: whether ``tm.commit_veto`` refuses the commit.
    """
    sources = [
        (registry, registry.underlying())
        for registry in stream.registries
        if registry.underlying.has()
    ]
    if sources or not tm_enabled or not is_empty(manager):
        if tm_enabled and not (manager.isDoomed() or vetoed()):
            for _, session in sources:
                prepare_engines(session)  # the commit may fail
                session.flush()
            _move(stream, sources, manager.commit)
        else:
            for _, session in sources:
                end_unchanged(session)
                session.rollback()
            _move(stream, sources, manager.abort)
        if tm_enabled:
            manager.begin()
    if tm_enabled:
        disable_retry(manager)  # the controller's changes are committed


def _move(
    stream: StreamSessions,
    sources: list[tuple[SessionRegistry, Session]],
    end_transaction: Callable[[], None],
) -> None:
    """Move sessions and their objects to the stream when the transaction has ended."""
    objects = [list(session.identity_map.values()) for _, session in sources]
    with ExitStack() as stack:
        for _, session in sources:
            stack.enter_context(_keep_values(session))
        end_transaction()
    for (registry, session), loaded in zip(sources, objects, strict=True):
        # Without zope.sqlalchemy the transaction manager did not end the session.
        has_ended = not session.in_transaction()
        registry.underlying.clear()
        adopted = _adopt_or_make(stream, registry, session)
        _add(adopted, loaded)
        if not has_ended:
            adopted.expire_all()


def _adopt_or_make(
    stream: StreamSessions, registry: SessionRegistry, session: Session
) -> Session:
    from sqlalchemy.exc import InvalidRequestError

    session.rollback()
    try:
        return stream.adopt(registry, session).session
    except InvalidRequestError:  # it is closed for good: close_resets_only=False
        return stream.get_session(registry)


def remove_objects(
    stream: StreamSessions, accepts: Callable[[StreamDataManager], bool]
) -> Removed:
    """Remove the persistent objects of the stream's sessions, as they are.

    :param accepts: whether to remove the objects of a session.
    """
    return [
        (registry, _remove(data_manager.session))
        for registry, data_manager in stream.current.items()
        if accepts(data_manager)
    ]


def return_objects(removed: Removed) -> None:
    """Add objects to the request's sessions. Call it with the request's manager."""
    for registry, objects in removed:
        if objects:
            _add(registry.underlying(), objects)


def _remove(session: Session) -> list[Any]:
    objects = list(session.identity_map.values())
    session.expunge_all()
    return objects


def _add(session: Session, objects: list[Any]) -> None:
    """Add ``objects`` to a session, and nothing else.

    ``add()`` follows relationships. It would also add objects that the application has
    made and not added, or has expunged to change a copy, and they would be stored.
    """
    session.add_all(objects)
    added = {id(instance) for instance in objects}
    for instance in [*session.new, *session.identity_map.values()]:
        if id(instance) not in added:
            session.expunge(instance)


@contextmanager
def _keep_values(session: Session) -> Iterator[None]:
    """Let a commit expire no object of a session meanwhile."""
    expires = session.expire_on_commit
    session.expire_on_commit = False
    try:
        yield
    finally:
        session.expire_on_commit = expires
