"""``database://`` with gevent: listeners, a reader and a publisher share one thread."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import sys  # noqa: E402  # gevent must patch first
import time  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))

import gevent  # noqa: E402
import sqlalchemy as sa  # noqa: E402
import tg  # noqa: E402
from sqlalchemy.orm import scoped_session, sessionmaker  # noqa: E402

from tests.live_apps.greenlets import check  # noqa: E402
from tgstream import Channel  # noqa: E402


def main(url: str) -> None:
    """Check all listeners, and that the waiting reader does not block the hub."""
    engine = sa.create_engine(url)
    tg.config["DBSession"] = scoped_session(sessionmaker(bind=engine))
    tg.config["tgstream.channels"] = "database://"
    tg.config["tgstream.channel_poll_seconds"] = 5
    check(Channel("greenlets"), 100, 20)
    events = Channel("greenlets").listen()
    next(events)
    before = time.perf_counter()
    for _ in range(10):
        gevent.sleep(0.01)
    assert time.perf_counter() - before < 5
    engine.dispose()


if __name__ == "__main__":
    main(sys.argv[1])
