"""An application whose streams listen to channels that their clients name."""

from __future__ import annotations

import gc
import json
import logging
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

import psutil  # type: ignore[import-untyped]
import tg
from tg import TGController, expose

from tests.live_apps.stream_app import Mounted, variant
from tgstream import SSE, Channel, Report, Stream, last_event_id
from tgstream.core.body import Body

ended: Counter[str] = Counter()
"""How the streams of each channel have ended: ``"<channel> <reason>"``."""


class RootController(TGController):
    """What listens, what publishes, and what the process is made of."""

    @expose()
    def feed(self, name: str, seconds: str = "", limit: str = "") -> Stream:
        return Stream(
            Channel(name).listen(after=last_event_id()),
            SSE,
            max_seconds=float(seconds) if seconds else None,
            limit=int(limit) if limit else None,
        )

    @expose("json")
    def publish(self, name: str, first: str, count: str, size: str = "0") -> Any:
        """So many events, numbered from the first on, of so many bytes more."""
        for number in range(int(first), int(first) + int(count)):
            Channel(name).publish(f"{number} {'x' * int(size)}")
        return {}


class Asked(Mounted):
    """Tells of itself on a path that needs no application, ``/vitals``."""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/vitals":
            answer: Iterable[bytes] = super().__call__(environ, start_response)
            return answer
        start_response("200 OK", [("Content-Type", "application/json")])
        gc.collect()
        vitals = {
            "ended": ended,
            # By its type alone: isinstance() would wake TG's proxies.
            "alive": sum(type(each) is Body for each in gc.get_objects()),
            "threads": threading.active_count(),
            "memory": psutil.Process().memory_info().rss,
        }
        return [json.dumps(vitals).encode()]


def count(report: Report) -> None:
    ended[f"{tg.request.params['name']} {report.reason}"] += 1


def make_app(redis: str = "", beat: str = "15", history: str = "40", **_: str) -> Any:
    """The application, once for each back end: ``/memory`` and ``/redis``.

    :param redis: the URL of a server; none, and there is but ``/memory``.
    :param beat: seconds of silence after which a listener is sent a comment.
    :param history: how many events of a channel are kept.
    """
    # TG warns of what it registers anew for the second application of a process.
    logging.getLogger("tg.configurator.application").setLevel("ERROR")
    logging.basicConfig(stream=sys.stdout, level="WARNING")
    tg.hooks.register("tgstream.finished", count)
    urls = {"memory": "memory://"} | ({"redis": redis} if redis else {})
    apps = {
        name: variant(
            "yes",
            root_controller=RootController(),
            **{
                "tgstream.channels": url,
                "tgstream.heartbeat_seconds": beat,
                "tgstream.channel_history": history,
            },
        )
        for name, url in urls.items()
    }
    return Asked(apps, {})
