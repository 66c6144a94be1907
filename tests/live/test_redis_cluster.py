"""Channels on a Redis Cluster of two servers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import wait_until
from tests.live.listeners import id_of, receive
from tests.live.redis_servers import close_backends
from tests.valkey import Valkey
from tgstream import Event
from tgstream.formats.sse import Message
from tgstream.live.backends import redis_reader
from tgstream.live.backends.redis import RedisBackend
from tgstream.live.backends.redis_script import CLUSTER_PREFIX
from tgstream.live.listener import listen
from tgstream.live.protocols import ChannelSettings


class ClusterServer(Valkey):
    """A server of a cluster."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.bus_port: int = free.getsockname()[1]
        super().__init__(
            folder,
            cluster_enabled="yes",
            cluster_port=self.bus_port,
            cluster_require_full_coverage="no",
        )

    def cluster(self, *command: Any) -> Any:
        """Execute a command of the cluster."""
        return self.execute("CLUSTER", *command)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[ClusterServer]]:
    """Two servers with one half of the slots each. The first has that of tgstream."""
    with (
        ClusterServer(tmp_path / "1") as first,
        ClusterServer(tmp_path / "2") as second,
    ):
        slot = first.cluster("KEYSLOT", CLUSTER_PREFIX)
        halves = ("0", "8191"), ("8192", "16383")
        for server, (start, end) in zip((first, second), halves, strict=True):
            server.cluster("ADDSLOTSRANGE", start, end)
        first.cluster("MEET", "127.0.0.1", second.port, second.bus_port)
        wait_until(lambda: is_complete(first) and is_complete(second), "no cluster")
        yield [first, second] if slot < 8192 else [second, first]


def is_complete(server: ClusterServer) -> bool:
    """Whether the server knows the owner of each slot."""
    lines = server.cluster("INFO").split()
    return b"cluster_slots_ok:16384" in lines and b"cluster_state:ok" in lines


def url_of(*servers: ClusterServer) -> str:
    """The URL of a cluster."""
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in servers)
    return f"redis+cluster://{hosts}"


def publish(backend: RedisBackend, name: str, *texts: str) -> None:
    """Publish texts from the process of a back end."""
    backend.publish([Message(name, text) for text in texts])


def open_listener(backend: RedisBackend, name: str) -> Iterator[Event]:
    """A listener that has received its opening comment."""
    events = listen(backend, name, None, 60.0)
    assert next(events).comment == "open"
    return events


def test_channels_of_a_cluster_follow_their_slot(
    servers: list[ClusterServer], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The first server of the URL redirects. The slot then moves to this server."""
    monkeypatch.setattr(redis_reader, "CHECK_SECONDS", 0.1)
    owner, other = servers
    backends = [
        RedisBackend(url, ChannelSettings())
        for url in (url_of(other, owner), url_of(owner))
    ]
    first, second = backends
    events, others = open_listener(first, name), open_listener(second, f"{name}?")
    publish(second, name, "one", "two")
    publish(first, f"{name}?", "three")
    assert receive(others, 1) == ["three"]
    one = next(events)
    assert one.data == "one"
    assert receive(events, 1) == ["two"]
    resumed = listen(second, name, id_of(one), 60.0)
    assert receive(resumed, 2) == ["open", "two"]
    assert owner.execute("PUBSUB", "SHARDNUMSUB", CLUSTER_PREFIX + name)[1] == 2
    assert owner.execute("KEYS", "*") != []
    assert other.execute("KEYS", "*") == []
    owner.execute("FLUSHALL")
    slot, id = owner.cluster("KEYSLOT", CLUSTER_PREFIX), other.cluster("MYID")
    for server in other, owner:
        server.cluster("SETSLOT", slot, "NODE", id)
    assert [next(feed).event for feed in (events, resumed, others)] == ["reset"] * 3
    publish(second, name, "after")
    assert receive(events, 1) == receive(resumed, 1) == ["after"]
    assert other.execute("KEYS", "*") != []
    close_backends(backends)
