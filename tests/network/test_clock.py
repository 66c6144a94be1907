"""The wall clock is set back by an hour, and forward, while streams are open."""

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
    """The time that a server has, as it says in its answers."""
    connection = http.client.HTTPConnection(*address(server), timeout=20)
    connection.request("GET", "/vitals", headers={"Connection": "close"})
    response = connection.getresponse()
    response.read()
    connection.close()
    return parsedate_to_datetime(response.headers["Date"]).timestamp()


@pytest.mark.parametrize("offset", [-HOUR, HOUR])
@pytest.mark.parametrize("name", SEVERAL)
def test_clock_that_is_set_does_streams_no_harm(
    live_server: Callable[..., LiveServer],
    clock: Clock,
    tmp_path: Path,
    name: str,
    offset: int,
) -> None:
    """Nothing is lost or held up, ids grow, beats come, and bounds are kept; neither
    the server nor the Valkey, whose clock is set with it, is harmed."""
    with DurableValkey(tmp_path / "valkey") as valkey:
        server = live_server(name, "listening", f"redis={valkey.url}", "heartbeat=0.2")
        feeds = {
            back_end: Listener(server, f"/{back_end}/feed?name=x")
            for back_end in ("memory", "redis")
        }
        bounded = Listener(server, "/memory/feed?name=bounded&seconds=2")
        begun = time.monotonic()
        ids: dict[str, list[str]] = {"memory": [], "redis": []}
        for number in range(6):
            if number == 3:
                clock.set(offset)
                wait_until(
                    lambda: abs(wall(server) - time.time() - offset) < 5, "is not set"
                )
            for back_end, feed in feeds.items():
                publish(server, "x", number, back_end=back_end)
                event = feed.next()
                assert event["data"] == f"{number} "
                ids[back_end].append(event["id"])
        for feed in feeds.values():
            sent = time.monotonic()
            feed.wait_for_heartbeat()
            assert time.monotonic() - sent < 2
        bounded.response.read()  # to its end
        assert 1.8 <= time.monotonic() - begun < 4
        assert count_ended(server, "bounded", "expired") == 1
        for back_end, each in ids.items():
            places = [[int(part, 16) for part in id.split("-")] for id in each]
            assert places == sorted(places)
            assert len({*each}) == 6
            assert receive_after(server, back_end, "x", each[1]) == [*"2345"]
        print(name, offset, ids["redis"])
        for feed in feeds.values():
            feed.close()
        bounded.close()
