"""A scoped session's registry, which hands a running stream its own session.

Rule: what the scoped session hands out is told here; how it ends, in ``_database``.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..core.context import thread
from ..core.settings import read_option

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


def scoped_sessions(config: Mapping[str, Any]) -> list[Any]:
    """The scoped sessions of an application, TG's own first.

    :raises ValueError: when the option ``tgstream.sessions`` names something else.
    """
    orm = sys.modules.get("sqlalchemy.orm")
    if orm is None:
        return []
    found: list[Any] = []
    for scoped in (config.get("SQLASession"), config.get("DBSession")):
        if isinstance(scoped, orm.scoped_session) and scoped not in found:
            found.append(scoped)
    if config.get("tgstream.sessions"):
        named = map(_resolve, read_option(config, "tgstream.sessions"))
        found += [scoped for scoped in named if scoped not in found]
    return found


@lru_cache
def _resolve(name: Any) -> Any:
    """A scoped session of the option ``tgstream.sessions``: an object, or a name."""
    found, what = name, "is no scoped session"
    if isinstance(name, str):
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            what = f"cannot be found ({error})"
    orm = sys.modules["sqlalchemy.orm"]
    if not isinstance(found, orm.scoped_session):
        raise ValueError(
            f"the option tgstream.sessions names {name}, which {what}; give scoped "
            "sessions, or their dotted names as myapp.model.DBSession"
        )
    return found
