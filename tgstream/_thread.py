"""What tgstream keeps of a thread: one record, for one look-up a pull.

Rule: a slot belongs to the module that is named beside it; nobody else touches it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from tg import request_local

if TYPE_CHECKING:
    from ._database import Database
    from ._registry import Registry


class Record:
    """The record of one thread (with gevent: of one greenlet, as TG's own stacks)."""

    __slots__ = ("config", "context", "database", "managers", "shielded")

    def __init__(self) -> None:
        # _context: TG's stacks of this thread, which are made once and never replaced.
        self.config = _stack(request_local.config)
        self.context = _stack(request_local.context)
        # _database: the running stream's database, if any; the dict of the thread-local
        # transaction manager, once needed; the registries, and how many removals
        # each is kept over.
        self.database: Database | None = None
        self.managers: dict[str, Any] | None = None
        self.shielded: dict[Registry, int] = {}


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
