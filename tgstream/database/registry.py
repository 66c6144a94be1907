"""A scoped session's registry, which hands a running stream its own session.

Rule: what the scoped session hands out is told here; how it ends, in ``_database``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..core._thread import thread

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session

_installing = threading.Lock()


class Registry:
    """A scoped session's registry, which hands a running stream its own session.

    Everything that a ``scoped_session`` does goes through its registry, so that
    nothing has to be exchanged around a pull, and no session exists before it is used.
    """

    def __init__(self, outer: Any) -> None:
        self.outer = outer
        self.createfunc: Callable[[], Session] = outer.createfunc

    def __getattr__(self, name: str) -> Any:
        return getattr(self.outer, name)

    def __call__(self) -> Session:
        record = thread.record
        record.shielded.pop(self, None)
        if record.database is not None:
            return record.database.session(self)
        session: Session = self.outer()
        return session

    def has(self) -> bool:
        record = thread.record
        if self in record.shielded:
            return False
        if record.database is not None:
            return self in record.database.members
        return bool(self.outer.has())

    def set(self, session: Session) -> None:
        record = thread.record
        record.shielded.pop(self, None)
        if record.database is not None:
            record.database.adopt(self, session)
        else:
            self.outer.set(session)

    def clear(self) -> None:
        record = thread.record
        if removals := record.shielded.pop(self, 0):
            if removals > 1:
                record.shielded[self] = removals - 1
        elif record.database is not None:
            record.database.forget(self)
        else:
            self.outer.clear()

    def shield(self) -> None:
        """Keep the session in use on this thread over the next ``remove()``.

        TG's ``DBSessionRemoverMiddleware`` removes the session of the thread on which a
        body is closed, for a dropped one maybe in the middle of another's request or
        pull. What is in use is not asked for: a ``scopefunc`` may need its request.
        """
        shielded = thread.record.shielded
        shielded[self] = shielded.get(self, 0) + 1

    def remove(self) -> None:
        """Close the thread's own session and take it off the thread."""
        if self.outer.has():
            session = self.outer()
            self.outer.clear()
            session.close()


def registry(scoped: scoped_session[Any]) -> Registry:
    """The registry of a scoped session that knows of streams, installed if need be."""
    if isinstance(scoped.registry, Registry):
        return scoped.registry
    with _installing:
        if not isinstance(scoped.registry, Registry):
            scoped.registry = Registry(scoped.registry)  # type: ignore[assignment]
        return scoped.registry  # type: ignore[return-value]
