"""The registry of a scoped session, which gives a running stream its own session.

Everything that a ``scoped_session`` does goes through its registry. tgstream replaces
the registry by one that looks whether a stream runs on the thread. So nothing has to be
exchanged around a pull, and no session exists before it is used.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from ..core.context import thread
from ..core.settings import read_option

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session

_installing = threading.Lock()


class SessionOwner(Protocol):
    """The sessions of a running stream, as a registry uses them."""

    @property
    def current(self) -> Mapping[SessionRegistry, object]:
        """The registries that have a session of the stream."""

    def get_session(self, registry: SessionRegistry) -> Session:
        """The stream's session, made on first use."""

    def adopt(self, registry: SessionRegistry, session: Session) -> object:
        """Make ``session`` the stream's."""

    def forget(self, registry: SessionRegistry) -> None:
        """Release the session after ``scoped_session.remove()`` has closed it."""


class _Thread(threading.local):
    """How many removals of its session each registry ignores on this thread."""

    def __init__(self) -> None:
        self.ignored_removals: dict[SessionRegistry, int] = {}


_thread = _Thread()


class SessionRegistry:
    """The registry of a scoped session, as SQLAlchemy calls it.

    :param underlying: the registry that it replaces. It has the sessions of requests.
    """

    def __init__(self, underlying: Any) -> None:
        self.underlying = underlying
        self.createfunc: Callable[[], Session] = underlying.createfunc

    def __getattr__(self, name: str) -> Any:
        return getattr(self.underlying, name)

    def __call__(self) -> Session:
        if _thread.ignored_removals:
            _thread.ignored_removals.pop(self, None)
        owner: SessionOwner | None = thread.record.database
        if owner is not None:
            return owner.get_session(self)
        session: Session = self.underlying()
        return session

    def has(self) -> bool:
        if self in _thread.ignored_removals:
            return False
        owner: SessionOwner | None = thread.record.database
        return bool(self.underlying.has()) if owner is None else self in owner.current

    def set(self, session: Session) -> None:
        _thread.ignored_removals.pop(self, None)
        owner: SessionOwner | None = thread.record.database
        if owner is None:
            self.underlying.set(session)
        else:
            owner.adopt(self, session)

    def clear(self) -> None:
        ignored = _thread.ignored_removals
        owner: SessionOwner | None = thread.record.database
        if removals := ignored.pop(self, 0):
            if removals > 1:
                ignored[self] = removals - 1
        elif owner is not None:
            owner.forget(self)
        else:
            self.underlying.clear()

    def keep_over_next_remove(self) -> None:
        """Ignore the next ``remove()`` on this thread, if no call comes before it.

        TG's ``DBSessionRemoverMiddleware`` removes the session of the thread on which a
        body is closed. If the body was dropped, that thread may run another request or
        stream. Nothing is called here: a ``scopefunc`` may need its request.
        """
        ignored = _thread.ignored_removals
        ignored[self] = ignored.get(self, 0) + 1

    def remove(self) -> None:
        """Close the thread's own session and take it off the thread."""
        if self.underlying.has():
            session = self.underlying()
            self.underlying.clear()
            session.close()


def install_registry(scoped: scoped_session[Any]) -> SessionRegistry:
    """The registry of a scoped session, replaced by one of ours on the first call."""
    if isinstance(scoped.registry, SessionRegistry):
        return scoped.registry
    with _installing:
        if not isinstance(scoped.registry, SessionRegistry):
            scoped.registry = SessionRegistry(scoped.registry)  # type: ignore[assignment]
        return scoped.registry  # type: ignore[return-value]


def scoped_sessions(config: Mapping[str, Any]) -> list[Any]:
    """The scoped sessions of an application, TG's own first.

    :raises ValueError: when the option ``tgstream.sessions`` is invalid.
    """
    orm = sys.modules.get("sqlalchemy.orm")
    if orm is None:
        return []
    sessions: list[Any] = []
    for scoped in (config.get("SQLASession"), config.get("DBSession")):
        if isinstance(scoped, orm.scoped_session) and scoped not in sessions:
            sessions.append(scoped)
    if config.get("tgstream.sessions"):
        named = map(_resolve, read_option(config, "tgstream.sessions"))
        sessions += [scoped for scoped in named if scoped not in sessions]
    return sessions


@lru_cache
def _resolve(name: Any) -> Any:
    """A scoped session of the option ``tgstream.sessions``.

    :param name: its dotted name, or the scoped session itself.
    """
    scoped, problem = name, "is not a scoped_session"
    if isinstance(name, str):
        module, _, attribute = name.rpartition(".")
        try:
            scoped = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            problem = f"cannot be imported ({error})"
    orm = sys.modules["sqlalchemy.orm"]
    if not isinstance(scoped, orm.scoped_session):
        raise ValueError(
            f"the option tgstream.sessions names {name}, which {problem}. List scoped "
            "sessions, or their dotted names such as myapp.model.DBSession"
        )
    return scoped
