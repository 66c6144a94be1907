"""Messages that are sent when, and only when, a transaction commits.

They are the events of channels. A message follows the first of these that there is:

1. the transaction of the stream that runs here,
2. the transaction that TG or repoze.tm2 has begun for the request,
3. the transaction that a script, a job or a controller has begun on this thread with
   the package ``transaction``, unless the application's sessions are in transactions
   that have not joined it,
4. the transaction that the application's session is in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tg.support.converters import asbool

from ..core import context as _context
from ..core.context import thread
from .pending_messages import PendingMessages, Sender
from .session_transactions import (
    find_begun_transaction,
    find_joined_sessions,
    find_sessions,
)
from .transaction_messages import find_messages, is_over, join_transaction

if TYPE_CHECKING:
    from .sessions import StreamSessions


def send_on_commit(message: Any, sender: Sender) -> bool:
    """Send a message when the transaction that runs here commits.

    :returns: False if there is no transaction, or if it has ended and its hooks run.
        The message is then not registered.
    """
    pending = _find_pending()
    if pending is None:
        return False
    pending.add(message, sender)
    return True


def is_tm_enabled(tg_locals: Any) -> bool:
    """True if the request runs in a transaction, of TG or of repoze.tm2."""
    config, environ = tg_locals.config, tg_locals.request.environ
    return asbool(config.get("tm.enabled")) or "repoze.tm.active" in environ


def count_unsent(txn: Any) -> int:
    """The number of messages that wait for ``txn`` to commit."""
    messages = find_messages(txn)
    return 0 if messages is None else len(messages.entries)


def _find_pending() -> PendingMessages | None:
    """The messages of the transaction that runs here, if any."""
    stream: StreamSessions | None = thread.record.database
    if stream is not None:
        if stream.ended:
            return None  # a hook of tgstream.finished: nothing will commit any more
    else:
        tg_locals = _find_request()
        if tg_locals is None or not is_tm_enabled(tg_locals):
            return _find_pending_of_job(tg_locals and tg_locals.request)
    import transaction  # an application without transactions may not have it

    txn = transaction.manager.get()
    return None if is_over(txn) else join_transaction(txn)


def _find_request() -> Any:
    """TG's ``RequestLocals`` of the request that runs here, if any."""
    try:
        return _context.current()
    except TypeError:
        return None


def _find_pending_of_job(request: Any) -> PendingMessages | None:
    """The messages of a transaction that the application has begun itself.

    :param request: the transaction must end before it. None outside of requests.
    """
    txn = find_begun_transaction()
    if txn is not None and is_over(txn):
        return None
    active = [
        session
        for session in find_sessions()
        if (root := session.get_transaction()) is not None and root.is_active
    ]
    if txn is not None and (not active or find_joined_sessions()):
        messages = join_transaction(txn)
        messages.warn_if_lost(request)
        return messages
    if not active:
        return None
    from .session_messages import join_session

    return join_session(active[0])
