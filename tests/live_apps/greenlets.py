"""Channels with gevent: many listeners and a publisher share one thread."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import sys  # noqa: E402  # gevent must patch first
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))

import gevent  # noqa: E402
import tg  # noqa: E402

from tests.valkey import Valkey  # noqa: E402
from tgstream import Channel  # noqa: E402


def check(channel: Channel, listeners: int, events: int) -> None:
    """Check that each listener receives each event, in order."""

    def receive(feed: object) -> list[object]:
        received = []
        for event in feed:  # type: ignore[attr-defined]
            received.append(event.data)
            if event.data == str(events - 1):
                return received
        return received

    feeds = [channel.listen() for _ in range(listeners)]
    greenlets = [gevent.spawn(receive, feed) for feed in feeds]
    for number in range(events):
        channel.publish(str(number))
        gevent.sleep(0)
    gevent.joinall(greenlets, timeout=30)
    expected = [None, *map(str, range(events))]
    assert [greenlet.value for greenlet in greenlets] == [expected] * listeners


def main() -> None:
    """Check memory:// and redis://."""
    check(Channel("memory"), 100, 20)
    with Valkey(Path(tempfile.mkdtemp())) as server:
        tg.config["tgstream.channels"] = server.url
        check(Channel("valkey"), 100, 20)


if __name__ == "__main__":
    main()
