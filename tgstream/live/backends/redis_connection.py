"""Connections to Redis or Valkey: how they are made, and what their errors mean.

A connection belongs to the server to which the address of the URL leads when it
connects. So a connection to a server that is not the primary any more is closed, and
the next connection looks the address up again: in DNS for ``redis://``, with the
sentinels for ``redis+sentinel://``, and in the cluster for ``redis+cluster://``.

An error is an outage, or the server refuses one command. After an outage the same
command may succeed. A refused command is refused again, but other commands succeed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

try:
    import redis
    from redis import exceptions
    from redis.backoff import NoBackoff
    from redis.retry import Retry
    from redis.sentinel import Sentinel
except ImportError as error:
    raise ImportError(
        "tgstream.channels uses Redis or Valkey, but the package redis is not "
        "installed. Run: pip install 'tgstream[redis]'"
    ) from error

from ..protocols import UnknownUrlOption
from .redis_script import CLUSTER_PREFIX

CONNECTION_ERRORS = redis.RedisError, OSError
"""The errors of a connection, and of the answers of a server."""
SENTINEL_SCHEME = "redis+sentinel://"
CLUSTER_SCHEME = "redis+cluster://"
REDIS_PORT = 6379
"""The port of a server of a cluster whose address has none."""
MAX_REDIRECTIONS = 5
"""Maximum servers of a cluster to which a connection is redirected."""
SENTINEL_PORT = 26379
"""The port of a sentinel whose address has none."""

_find_outage = re.compile(
    # A replica, a server that starts, or a cluster that lacks a part.
    r"\b(READONLY|LOADING|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|NOREPLICAS"
    # The server cannot write now: no memory, no disk, or a script that does not end.
    r"|OOM|MISCONF|BUSY|UNKILLABLE"
    # The password was changed.
    r"|NOAUTH|WRONGPASS"
    # The package redis has classes for some of them, without the code in the text.
    r"|(ReadOnly|MasterDown|ClusterDown|TryAgain|OutOfMemory)Error)\b"
).search


def create_pool(
    url: str, seconds: float, pool_class: Any = redis.ConnectionPool, **options: Any
) -> Any:
    """Create a pool of connections. A new connection looks the address up again.

    :param url: the URL of the server, or of its sentinels.
    :param seconds: maximum time to connect, and to wait for an answer.
    :param pool_class: a class of pools of the package redis.
    :param options: more options of the pool and of its connections.
    :raises UnknownUrlOption: if the package redis does not have an option of the URL.
    """
    if url.startswith(SENTINEL_SCHEME):
        url, sentinel_options = _parse_sentinel_url(url)
        options |= sentinel_options
    elif url.startswith(CLUSTER_SCHEME):
        url, cluster_options = _parse_cluster_url(url)
        options |= cluster_options
    defaults = {
        "protocol": 2,
        "socket_connect_timeout": seconds,
        "socket_timeout": seconds,
        "retry": Retry(NoBackoff(), 0),  # no second attempt
    }
    pool = pool_class.from_url(url, **defaults | options)
    try:
        pool.connection_class(**pool.connection_kwargs)  # it does not connect
    except TypeError as error:
        raise UnknownUrlOption(
            "tgstream.channels has an unknown option after '?'. The package redis "
            f"raised TypeError: {error}. Remove the option from the URL"
        ) from None
    return pool


def is_outage(error: Exception) -> bool:
    """Whether the connection must be closed, because a new one may succeed.

    :param error: an error of the package redis. Redis 6 has the code of an error of a
        script in the middle of its text.
    """
    if not isinstance(error, exceptions.ResponseError):
        return True
    return _find_outage(f"{type(error).__name__} {error}") is not None


def explain_refusal(error: Exception, key: str) -> str:
    """A sentence about a command that a server has refused, and what to do about it.

    :param key: the key of the command.
    """
    text = f"{type(error).__name__}: {error}".rstrip(".")
    if re.search("NoPermission|NOPERM|ACL|permission", text):
        return f"{text}. {NEEDED_PERMISSIONS}"
    if "WRONGTYPE" in text:
        return f"{text}. Delete or rename the key {key!r}, which must be a stream"
    if "MovedError" in text:
        return f"{text}. The server is part of a cluster: use redis+cluster://"
    return text


NEEDED_PERMISSIONS = (
    "Give the user of tgstream.channels the permissions ~tgstream:* &tgstream:* "
    "+@stream +@pubsub +@scripting +@connection +pexpire +time"
)


# Sentinel.


class _SentinelConnection(redis.Connection):
    """A connection to the primary that the sentinels name when it connects."""

    def __init__(
        self, sentinels: Any, service: str, sentinel_options: Any, **options: Any
    ) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._sentinels = sentinels
        self._service = service
        self._sentinel_options = sentinel_options

    def connect(self) -> None:
        options = {
            "protocol": 2,
            "socket_connect_timeout": self.socket_connect_timeout,
            "socket_timeout": self.socket_timeout,
            "retry": Retry(NoBackoff(), 0),
        }
        sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
            self._sentinels, sentinel_kwargs=options | self._sentinel_options
        )
        try:
            self.host, self.port = sentinel.discover_master(self._service)
        finally:
            for client in sentinel.sentinels:
                client.close()
        super().connect()  # type: ignore[no-untyped-call]


def _parse_sentinel_url(url: str) -> tuple[str, dict[str, Any]]:
    """Read ``redis+sentinel://user:password@host:port,host:port/service/db?options``.

    The options ``sentinel_username`` and ``sentinel_password`` are for the sentinels.

    :returns: the URL of the primary, without its address, and the options of its pool.
    :raises ValueError: if the URL has no service.
    """
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    service, _, db = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError(
            "tgstream.channels: redis+sentinel:// needs the name of the primary. Use "
            "redis+sentinel://host:26379,host:26379/mymaster"
        )
    own, others = {}, []
    for name, value in parse_qsl(parts.query):
        if name.startswith("sentinel_"):
            own[name.removeprefix("sentinel_")] = value
        else:
            others.append((name, value))
    addresses = [urlsplit(f"//{host}") for host in hosts.split(",")]
    options = {
        "connection_class": _SentinelConnection,
        "sentinels": [
            (each.hostname, each.port or SENTINEL_PORT) for each in addresses
        ],
        "service": unquote(service),
        "sentinel_options": own,
    }
    return f"redis://{user}{at}sentinel/{db}?{urlencode(others)}", options


# Cluster.


class _ClusterConnection(redis.Connection):
    """A connection to the server of a cluster that has the slot of all channels."""

    def __init__(
        self, cluster_nodes: Sequence[tuple[str, int]], **options: Any
    ) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._cluster_nodes = cluster_nodes

    def connect(self) -> None:
        for host, port in self._cluster_nodes:
            self.host, self.port = host, port
            try:
                self._connect_to_owner()
            except CONNECTION_ERRORS as error:
                self.disconnect()  # type: ignore[no-untyped-call]
                last_error = error
            else:
                return
        raise last_error

    def _connect_to_owner(self) -> None:
        for _ in range(MAX_REDIRECTIONS):
            super().connect()  # type: ignore[no-untyped-call]
            self.send_command("XLEN", CLUSTER_PREFIX)  # type: ignore[no-untyped-call]
            try:
                super().read_response()
            except exceptions.MovedError as moved:
                self.disconnect()  # type: ignore[no-untyped-call]
                self.host, self.port = moved.host or self.host, moved.port
            else:
                return
        raise redis.ConnectionError("no server of the cluster has the slot")

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)
        except exceptions.AskError as error:  # or MovedError
            self.disconnect()  # type: ignore[no-untyped-call]
            raise redis.ConnectionError(
                f"the slot belongs to another server now: {error}"
            ) from error


def _parse_cluster_url(url: str) -> tuple[str, dict[str, Any]]:
    """Read ``redis+cluster://user:password@host:port,host:port?options``.

    :returns: the URL of a server, without its address, and the options of its pool.
    """
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    addresses = [urlsplit(f"//{host}") for host in hosts.split(",")]
    nodes = [(each.hostname, each.port or REDIS_PORT) for each in addresses]
    options = {"connection_class": _ClusterConnection, "cluster_nodes": nodes}
    return f"redis://{user}{at}cluster/0?{parts.query}", options
