"""The wall clock is set back or forward by an hour while streams are open."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

from tests.conftest import LiveServer
from tests.faults.conftest import wait_until
from tests.faults.test_listeners import (
    Listener,
    address,
    count_ended,
    publish,
    receive_after,
)
from tests.network.conftest import Clock
from tests.test_servers import SEVERAL
from tests.valkey import DurableValkey

HOUR = 3600


def wall(server: LiveServer) -> float:
    """Return a server's time, from the header ``Date`` of its response."""
    connection = http.client.HTTPConnection(*address(server), timeout=20)
    connection.request("GET", "/vitals", headers={"Connection": "close"})
    response = connection.getresponse()
    response.read()
    connection.close()
    return parsedate_to_datetime(response.headers["Date"]).timestamp()


@pytest.mark.parametrize("offset", [-HOUR, HOUR])
@pytest.mark.parametrize("name", SEVERAL)
def test_changed_clock_does_not_disturb_streams(
    live_server: Callable[..., LiveServer],
    clock: Clock,
    tmp_path: Path,
    name: str,
    offset: int,
) -> None:
    """No event is lost or late, ids grow, heartbeats arrive, and limits are kept. The
    clock is set for the server and for Valkey."""
    with DurableValkey(tmp_path / "valkey") as valkey:
        server = live_server(name, "listening", f"redis={valkey.url}", "heartbeat=0.2")
        feeds = {
            backend: Listener(server, f"/{backend}/feed?name=x")
            for backend in ("memory", "redis")
        }
        bounded = Listener(server, "/memory/feed?name=bounded&seconds=2")
        started = time.monotonic()
        ids: dict[str, list[str]] = {"memory": [], "redis": []}
        for number in range(6):
            if number == 3:
                clock.set(offset)
                wait_until(
                    lambda: abs(wall(server) - time.time() - offset) < 5,
                    "the clock is not set",
                )
            for backend, feed in feeds.items():
                publish(server, "x", number, back_end=backend)
                event = feed.next()
                assert event["data"] == f"{number} "
                ids[backend].append(event["id"])
        for feed in feeds.values():
            sent = time.monotonic()
            feed.wait_for_heartbeat()
            assert time.monotonic() - sent < 2
        bounded.response.read()  # to its end
        assert 1.8 <= time.monotonic() - started < 4
        assert count_ended(server, "bounded", "expired") == 1
        for backend, sent_ids in ids.items():
            positions = [[int(part, 16) for part in id.split("-")] for id in sent_ids]
            assert positions == sorted(positions)
            assert len({*sent_ids}) == 6
            assert receive_after(server, backend, "x", sent_ids[1]) == [*"2345"]
        print(name, offset, ids["redis"])
        for feed in feeds.values():
            feed.close()
        bounded.close()
