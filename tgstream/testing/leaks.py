"""What requests and streams have left behind, for tests to look for.

Rule: it looks, and mends nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import tg

from ..core.context import thread
from ..database.engines import get_factory_binds
from ..database.registry import scoped_sessions


def assert_clean() -> None:
    """Check that no request and no stream has left anything behind.

    That is: on this thread no context of TG, no transaction that something has joined,
    and no session of the application's scoped sessions; and in the pools of their
    engines no connection that is checked out, by whatever thread. A session of each
    factory is made to find its engines.

    :raises AssertionError: when there is; it names what.
    """
    left = [*_contexts(), *_transactions(), *_sessions()]
    if left:
        raise AssertionError(f"left behind: {', '.join(left)}")


def _contexts() -> Iterator[str]:
    if count := len(thread.record.context):
        yield f"{count} contexts of TG on this thread"


def _transactions() -> Iterator[str]:
    transaction = sys.modules.get("transaction")
    if transaction is None:
        return
    manager = transaction.manager.manager
    if type(manager) is not transaction.TransactionManager:
        yield "a stream's transaction manager on this thread"
    elif manager._txn is not None and manager._txn._resources:
        yield f"a transaction that {manager._txn._resources} have joined"


def _sessions() -> Iterator[str]:
    for scoped in scoped_sessions(tg.config):
        if scoped.registry.has():
            yield f"a session of {scoped} on this thread"
        for bind in get_factory_binds(scoped):
            pool = getattr(bind, "pool", None)  # a Connection has none
            count = getattr(pool, "checkedout", int)()
            if count:
                yield f"{count} connections checked out of {pool}"
