"""Wakes a generator that is blocked in a read from a socket.

``close()`` from another thread does not. Linux goes on waiting on a socket that was
closed, and the ``close()`` of a buffered file waits for the read that it should end.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from typing import Any


def shut_down_socket(callback: Any) -> bool:
    """Shut down the connection that ``callback`` closes, if it is a ``close`` method.

    It finds the sockets of ``http.client``, urllib3, requests and HTTPX, and of every
    object with a ``fileno()``. The read ends at once. The file stays open, so that
    ``callback`` is still to be called.

    :param callback: such as ``answer.close``.
    :returns: False if there is no such connection.
    """
    if getattr(callback, "__name__", None) != "close":
        return False
    try:
        return _shut_down(_find_source(callback.__self__))
    except Exception:  # closed meanwhile, or another object
        return False


def _find_source(response: Any) -> Any:
    """The object with the file descriptor."""
    extensions = getattr(response, "extensions", None)  # HTTPX
    if extensions and extensions.get("http_version") != b"HTTP/2":  # shared by streams
        return extensions["network_stream"].get_extra_info("socket")
    return getattr(response, "raw", response)  # requests


def _shut_down(source: Any) -> bool:
    number = source.fileno()
    copy = os.dup(number)
    # Another thread may have closed it meanwhile, and its number may be reused.
    if source.fileno() != number or not stat.S_ISSOCK(os.fstat(copy).st_mode):
        os.close(copy)
        return False
    with socket.socket(fileno=copy) as connection, suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    return True
