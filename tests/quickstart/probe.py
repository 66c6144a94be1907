"""A controller that the tests add to the application of the tutorial."""

import logging
import time
from collections.abc import Iterator

import tg
from myapp.lib.base import BaseController
from myapp.model import DBSession, User
from tg import abort, expose, flash, request, require
from tg.predicates import has_permission, not_anonymous

from tgstream import CSV, SSE, current_stream, stream


class ProbeController(BaseController):
    @expose(content_type="text/plain")
    @require(not_anonymous())
    @stream
    def who(self) -> Iterator[str]:
        """The user of the request, with groups that are loaded lazily."""
        for number in range(3):
            user = request.identity["user"]
            groups = [group.group_name for group in user.groups]
            yield f"{number} {user.user_name} {groups}\n"

    @expose()
    @require(has_permission("manage"))
    @stream(SSE, recheck_seconds=0.1)
    def ticks(self) -> Iterator[str]:
        """Events without end, for those who may manage."""
        while True:
            yield request.identity["user"].user_name
            time.sleep(0.02)

    @expose(content_type="text/plain")
    @stream
    def welcome(self) -> Iterator[str]:
        flash("They are on their way")
        tg.session["seen"] = tg.session.get("seen", 0) + 1
        tg.session.save()
        yield f"{tg.session['seen']}\n"
        yield f"{DBSession.query(User).count() > 0}\n"

    @expose(content_type="text/plain")
    @stream
    def missing(self) -> Iterator[str]:
        abort(404, "There is no such export")
        yield ""

    @expose(content_type="text/plain")
    @stream
    def fails(self) -> Iterator[str]:
        if request.params.get("at") == "once":
            raise RuntimeError("it fails at once")
        yield "the first half\n"
        raise RuntimeError("it fails halfway")

    @expose()
    @stream(CSV(header=["number"]))
    def chunks(self) -> Iterator[list[str]]:
        logging.getLogger("myapp").info("chunks are made")
        for _ in range(100):
            yield ["x" * 98]

    @expose()
    @stream(SSE, limit=1, limit_by="user", max_seconds=3)
    def mine(self) -> Iterator[str]:
        """One stream for each user."""
        yield "open"
        while not current_stream().ending:
            time.sleep(0.02)
