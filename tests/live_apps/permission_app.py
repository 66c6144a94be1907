"""A feed for the members of a group, on SQLite and channels of the database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from tg import TGController, expose, predicates, require

import tgstream
from tests.application import database_options, make_wsgi_app
from tests.authentication import auth_options
from tests.model import Model
from tgstream import SSE, Channel, Event, stream

CHANNEL = Channel("staff")


class RootController(TGController):
    def __init__(self, model: Model) -> None:
        self.model = model

    @expose()
    @require(predicates.in_group("staff"))
    @stream(SSE, recheck_seconds=0.3)
    def feed(self) -> Iterator[Event]:
        """Its comments are sent more often than the permission is checked."""
        return CHANNEL.listen()

    @expose()
    @require(predicates.in_group("staff"))
    @stream(SSE(heartbeat=0.1), recheck_seconds=0.3)
    def chosen(self) -> Iterator[Event]:
        """The generator waits on a thread of its own."""
        yield from tgstream.listen("staff", comments=False)

    @expose()
    def publish(self) -> str:
        """Publish the time."""
        CHANNEL.publish(str(time.monotonic()))
        return ""


def make_app(url: str) -> Any:
    """The application on an SQLite file that has users."""
    model = Model(url, create=False)
    options = {name.replace("__", "."): v for name, v in auth_options(model).items()}
    return make_wsgi_app(
        {
            **database_options(model),
            **options,
            "root_controller": RootController(model),
            "tgstream.channels": "database://",
            "tgstream.heartbeat_seconds": 0.1,
        },
        tgstream.plugme,
    )
