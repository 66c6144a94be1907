"""Whether the client of a request has left, where its server can tell.

Rule: asking waits for nothing and reads nothing; who has only ended its own sending is
still there, unless the server itself says that it is gone.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any

_CLOSED = 7
"""TCP_CLOSE of Linux: the client has reset the connection, or is given up."""

_STATE: int | None = getattr(socket, "TCP_INFO", None)
"""What asks a socket for its state; not every system has it."""


def has_left(environ: Mapping[str, Any]) -> bool:
    """Whether the client is known to be gone; False where nobody can tell.

    waitress looks for it with ``channel_request_lookahead``. gunicorn hands out the
    socket, whose state is asked: to read from it would be to wait for it, with gevent.
    """
    told: Callable[[], bool] | None = environ.get("waitress.client_disconnected")
    connection = environ.get("gunicorn.socket")
    try:
        if told is not None:
            return told()
        if connection is None or _STATE is None:
            return False
        state: bytes = connection.getsockopt(socket.IPPROTO_TCP, _STATE, 1)
    except Exception:  # no TCP, as a proxy's Unix socket; closed; or another's object
        return False
    return state == bytes([_CLOSED])
