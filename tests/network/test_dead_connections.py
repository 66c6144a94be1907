"""Dead connections: clients that vanish from the network without FIN, RST or ACK."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.conftest import LiveServer
from tests.faults.conftest import wait_until
from tests.faults.test_listeners import MANY, Listener, count_ended, get_json, publish
from tests.network.conftest import Network
from tests.test_servers import SEVERAL

Start = Callable[..., LiveServer]


@contextmanager
def disconnected_clients(
    network: Network, server: LiveServer, path: str
) -> Iterator[None]:
    """Open feeds in fifty clients, and disconnect their network."""
    command = sys.executable, "-m", "tests.network.clients"
    with network.start(
        *command, network.here, str(server.port), path, str(MANY)
    ) as clients:
        assert clients.stdout is not None
        assert clients.stdout.readline() == "open\n"
        network.cut()
        clients.kill()
        yield


@pytest.mark.parametrize("name", SEVERAL)
def test_dead_connections_expire_without_delaying_other_clients(
    live_server: Start, network: Network, name: str
) -> None:
    """``max_seconds`` ends all streams, and releases slots, threads and memory."""
    server = live_server(
        name, "listening", "host=0.0.0.0", "threads=64", "heartbeat=0.2"
    )
    before = get_json(server, "/vitals")
    path = f"/memory/feed?name=vanish&seconds=6&limit={MANY}"
    reader = Listener(server, "/memory/feed?name=vanish")
    slowest, number, started = 0.0, 0, time.monotonic()
    with disconnected_clients(network, server, path):
        while count_ended(server, "vanish", "expired") < MANY:
            assert time.monotonic() - started < 20
            sent = time.monotonic()
            publish(server, "vanish", number)
            assert reader.numbers(1) == [number]
            slowest, number = max(slowest, time.monotonic() - sent), number + 1
    took = time.monotonic() - started
    wait_until(lambda: get_json(server, "/vitals")["alive"] == 1, "streams are left")
    with ExitStack() as stack:
        for _ in range(MANY):  # this needs all slots and threads
            stack.callback(Listener(server, path).close)
        after = get_json(server, "/vitals")
        grown = (after["memory"] - before["memory"]) / 2**20
        assert grown < 32
        assert slowest < 1
    reader.close()
    print(f"{name}: {MANY} dead connections expired after {took:.1f} s, meanwhile")
    print(f"{number} events, slowest {1000 * slowest:.0f} ms, {grown:+.1f} MiB")


@pytest.mark.parametrize("name", SEVERAL)
def test_dead_connections_are_closed_by_the_kernel(
    live_server: Start, network: Network, name: str
) -> None:
    """Without ``max_seconds`` the streams end when sent data got no ACK for
    ``TCP_USER_TIMEOUT``. The kernel's default is about 17 minutes, which
    ``TGSTREAM_PATIENCE=0`` tests."""
    patience = int(os.environ.get("TGSTREAM_PATIENCE", 3))
    options = "host=0.0.0.0", "threads=64", f"patience={patience * 1000}"
    heartbeat = "heartbeat=0.2" if patience else "heartbeat=15"
    server = live_server(name, "listening", *options, heartbeat)
    started = time.monotonic()
    with disconnected_clients(network, server, "/memory/feed?name=given"):
        pause = 0.05 if patience else 5
        while get_json(server, "/vitals")["alive"]:
            assert time.monotonic() - started < (patience * 4 or 2400)
            time.sleep(pause)  # no event announces the end
    took = time.monotonic() - started
    assert count_ended(server, "given", "disconnected") == MANY
    print(f"{name}: with a timeout of {patience} s, {MANY} ended after {took:.1f} s")
