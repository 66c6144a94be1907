"""Clients that vanish from the network: no FIN, no RST, and no ACK of what is sent."""

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
def vanished(network: Network, server: LiveServer, path: str) -> Iterator[None]:
    """Fifty clients that had a feed open, and are gone with their network."""
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
def test_clients_that_vanish_expire_and_hold_up_nobody(
    live_server: Start, network: Network, name: str
) -> None:
    """With ``max_seconds`` all of them end, and all is back: slots, threads, memory."""
    server = live_server(
        name, "listening", "host=0.0.0.0", "threads=64", "heartbeat=0.2"
    )
    before = get_json(server, "/vitals")
    path = f"/memory/feed?name=vanish&seconds=6&limit={MANY}"
    reader = Listener(server, "/memory/feed?name=vanish")
    slowest, number, begun = 0.0, 0, time.monotonic()
    with vanished(network, server, path):
        while count_ended(server, "vanish", "expired") < MANY:
            assert time.monotonic() - begun < 20
            sent = time.monotonic()
            publish(server, "vanish", number)
            assert reader.numbers(1) == [number]
            slowest, number = max(slowest, time.monotonic() - sent), number + 1
    took = time.monotonic() - begun
    wait_until(lambda: get_json(server, "/vitals")["alive"] == 1, "streams are left")
    with ExitStack() as stack:
        for _ in range(MANY):  # as many slots are free, and threads
            stack.callback(Listener(server, path).close)
        after = get_json(server, "/vitals")
        grown = (after["memory"] - before["memory"]) / 2**20
        assert grown < 32
        assert slowest < 1
    reader.close()
    print(f"{name}: {MANY} vanished, and had expired after {took:.1f} s; meanwhile")
    print(f"{number} events, the slowest {1000 * slowest:.0f} ms; {grown:+.1f} MiB")


@pytest.mark.parametrize("name", SEVERAL)
def test_clients_that_vanish_are_given_up_by_the_kernel(
    live_server: Start, network: Network, name: str
) -> None:
    """Without ``max_seconds`` they end when what was sent has had no ACK for as long as
    ``TCP_USER_TIMEOUT`` says; the kernel's own patience is some 17 minutes, which
    TGSTREAM_PATIENCE=0 waits for."""
    patience = int(os.environ.get("TGSTREAM_PATIENCE", 3))
    options = "host=0.0.0.0", "threads=64", f"patience={patience * 1000}"
    heartbeat = "heartbeat=0.2" if patience else "heartbeat=15"
    server = live_server(name, "listening", *options, heartbeat)
    begun = time.monotonic()
    with vanished(network, server, "/memory/feed?name=given"):
        pause = 0.05 if patience else 5
        while get_json(server, "/vitals")["alive"]:
            assert time.monotonic() - begun < (patience * 4 or 2400)
            time.sleep(pause)  # nothing tells of it
    took = time.monotonic() - begun
    assert count_ended(server, "given", "disconnected") == MANY
    print(
        f"{name}: with a patience of {patience} s, {MANY} had ended after {took:.1f} s"
    )
