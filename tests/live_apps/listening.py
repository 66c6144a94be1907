"""An application whose streams listen to channels that its clients name."""

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
from tgstream import SSE, Channel, Report, Stream, last_event_id, listen
from tgstream.core.body import Body

ended: Counter[str] = Counter()
"""How many streams ended, by ``"<channel> <reason>"``."""


class RootController(TGController):
    """Requests that listen, and requests that publish."""

    @expose()
    def feed(self, name: str, seconds: str = "", limit: str = "") -> Stream:
        return Stream(
            Channel(name).listen(after=last_event_id()),
            SSE,
            max_seconds=float(seconds) if seconds else None,
            limit=int(limit) if limit else None,
        )

    @expose()
    def long(self, name: str) -> Stream:
        """The events of the channel that have more than 10 characters."""
        events = listen(name, after=last_event_id(), comments=False)
        return Stream(
            (event for event in events if len(event.data) > 10), SSE(heartbeat=0.1)
        )

    @expose("json")
    def publish(self, name: str, first: str, count: str, size: str = "0") -> Any:
        """Publish ``count`` events: a number from ``first`` on, and ``size`` bytes."""
        for number in range(int(first), int(first) + int(count)):
            Channel(name).publish(f"{number} {'x' * int(size)}")
        return {}


class Monitored(Mounted):
    """Answers ``/vitals`` outside of the application."""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/vitals":
            answer: Iterable[bytes] = super().__call__(environ, start_response)
            return answer
        start_response("200 OK", [("Content-Type", "application/json")])
        gc.collect()
        vitals = {
            "ended": ended,
            # By type(): isinstance() would resolve the proxies of TG.
            "alive": sum(type(item) is Body for item in gc.get_objects()),
            "threads": threading.active_count(),
            "memory": psutil.Process().memory_info().rss,
        }
        return [json.dumps(vitals).encode()]


def count(report: Report) -> None:
    ended[f"{tg.request.params['name']} {report.reason}"] += 1


def make_app(
    redis: str = "", heartbeat: str = "15", history: str = "40", **_: str
) -> Any:
    """The application, once for each back end: ``/memory`` and ``/redis``.

    :param redis: the URL of a server. Without it there is only ``/memory``.
    :param heartbeat: seconds without an event until a listener receives a comment.
    :param history: how many events of a channel to store.
    """
    # TG warns when a second application of a process registers the same things.
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
                "tgstream.heartbeat_seconds": heartbeat,
                "tgstream.channel_history": history,
            },
        )
        for name, url in urls.items()
    }
    return Monitored(apps, {})
