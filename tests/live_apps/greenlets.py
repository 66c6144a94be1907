"""Channels on greenlets: many listen and publish on one thread, over each back end."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import sys  # noqa: E402  # gevent comes first
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))

import gevent  # noqa: E402
import tg  # noqa: E402

from tests.valkey import Valkey  # noqa: E402
from tgstream import Channel  # noqa: E402


def run(channel: Channel, listeners: int, events: int) -> None:
    """Each listener hears each event, in order, and nobody waits for another."""

    def hear(feed: object) -> list[object]:
        heard = []
        for event in feed:  # type: ignore[attr-defined]
            heard.append(event.data)
            if event.data == str(events - 1):
                return heard
        return heard

    feeds = [channel.listen() for _ in range(listeners)]
    hearing = [gevent.spawn(hear, feed) for feed in feeds]
    for number in range(events):
        channel.publish(str(number))
        gevent.sleep(0)
    gevent.joinall(hearing, timeout=30)
    expected = [None, *map(str, range(events))]
    assert [each.value for each in hearing] == [expected] * listeners


def main() -> None:
    """Over memory, and over a Valkey."""
    run(Channel("memory"), 100, 20)
    with Valkey(Path(tempfile.mkdtemp())) as server:
        tg.config["tgstream.channels"] = server.url
        run(Channel("valkey"), 100, 20)


if __name__ == "__main__":
    main()
