"""The record that tgstream keeps for each thread: one look-up a pull.

Each slot names the module that changes it. No other module does.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from tg import request_local

if TYPE_CHECKING:
    from ..database.database import Database
    from ..database.registry import Registry
    from .body import Body


class Record:
    """The record of one thread (with gevent: of one greenlet, as TG's own stacks)."""

    __slots__ = ("body", "config", "context", "managers", "shielded")

    def __init__(self) -> None:
        # _context: TG's stacks of this thread, which are made once and never replaced.
        self.config = _stack(request_local.config)
        self.context = _stack(request_local.context)
        # _context: the body whose generator runs on this thread, if any.
        self.body: Body | None = None
        # _database: the dict of the thread-local transaction manager, once needed; the
        # registries, and how many removals each is kept over.
        self.managers: dict[str, Any] | None = None
        self.shielded: dict[Registry, int] = {}

    @property
    def database(self) -> Database | None:
        """The sessions and the transaction of the stream that runs on this thread."""
        body = self.body
        return None if body is None else body.database


def _stack(proxy: Any) -> list[tuple[Any, bool]]:
    """This thread's stack of a ``StackedObjectProxy``, made if it has none yet."""
    proxy._push_object(None)
    proxy._pop_object()
    stack: list[tuple[Any, bool]] = proxy.____local__.objects
    return stack


class _Thread(threading.local):
    def __init__(self) -> None:
        self.record = Record()


# Never keyed by a thread's ident: idents are reused.
thread = _Thread()
