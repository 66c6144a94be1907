"""Finds what requests and streams have left behind, and changes nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import tg

from ..core.context import thread
from ..database.engines import get_factory_binds
from ..database.registry import scoped_sessions


def assert_clean() -> None:
    """Check that no request and no stream has left anything behind.

    On this thread there must be no context of TurboGears, no transaction that something
    has joined, and no session of the application's scoped sessions. In the pools of
    their engines no connection may be checked out, by any thread. To find the engines,
    it creates and closes a session of each factory.

    :raises AssertionError: otherwise, with a list of them.
    """
    leaks = [*_find_contexts(), *_find_transactions(), *_find_sessions()]
    if leaks:
        raise AssertionError(f"left behind: {', '.join(leaks)}")


def _find_contexts() -> Iterator[str]:
    if count := len(thread.record.context):
        yield f"{count} contexts of TurboGears on this thread"


def _find_transactions() -> Iterator[str]:
    transaction = sys.modules.get("transaction")
    if transaction is None:
        return
    from ..database.transaction import get_resources

    manager = transaction.manager.manager
    if type(manager) is not transaction.TransactionManager:
        yield "the transaction manager of a stream on this thread"
    elif resources := get_resources(manager):
        yield f"a transaction on this thread, joined by {resources}"


def _find_sessions() -> Iterator[str]:
    for scoped in scoped_sessions(tg.config):
        if scoped.registry.has():
            yield f"a session of {scoped} on this thread"
        for bind in get_factory_binds(scoped):
            pool = getattr(bind, "pool", None)  # a Connection has no pool
            count = getattr(pool, "checkedout", int)()
            if count:
                yield f"{count} connections checked out of {pool}"
