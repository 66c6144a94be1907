"""The application of the soak test: one stream, which executes its client's plan.

``tests/soak/plans.py`` explains the letters of a plan's script.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa
import tg
import transaction
from prometheus_client import make_wsgi_app as make_metrics_app
from tg import TGController, expose

import tgstream
from tests.application import database_options, make_wsgi_app
from tests.live_apps.stream_app import Mounted
from tests.model import Model, Note, User
from tgstream import NDJSON, Report, Stream, metrics
from tgstream.core.body import Body

USERS = [f"user{number}" for number in range(20)]
SET_MARK = sa.select(sa.func.set_config("soak.stream", sa.bindparam("stream"), True))
READ_MARK = sa.select(sa.func.current_setting("soak.stream", True))


def make_app(url: str, endings: str) -> Any:
    """Return the application, with TG's error tracing, which is the default.

    :param url: of its database.
    :param endings: a file to which each stream appends a line when it starts and ends.
    """
    # Streams fail on purpose. Formatting their tracebacks would take most of the time.
    logging.disable(logging.CRITICAL)
    model = Model(url)
    model.seed(*USERS)
    register_writer(endings)
    metrics.register()
    options = {"root_controller": make_root(model), **database_options(model)}
    app = make_wsgi_app(options, tgstream.plugme)
    return CountingMounted({"soak": app}, {"soak": model})


class CountingMounted(Mounted):
    """Also reports how many streams are alive in memory, and the metrics."""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Answer two paths, and leave all other paths to the base class."""
        if environ["PATH_INFO"] == "/soak/metrics":
            return make_metrics_app()(environ, start_response)
        if environ["PATH_INFO"] != "/soak/alive":
            return super().__call__(environ, start_response)
        gc.collect()
        # Do not use isinstance(): it would resolve TG's proxies.
        alive = sum(type(value) is Body for value in gc.get_objects())
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(alive).encode()]


def register_writer(path: str) -> None:
    """Register hooks that append a line to a file for each start and end."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(*fields: object) -> None:
        """Write the line at once, so that lines of several threads do not mix."""
        line = " ".join(map(str, [tg.request.params["stream"], *fields]))
        os.write(file, f"{line}\n".encode())

    def write_start(stream: Stream) -> None:
        write("started", stream.items, stream.bytes)

    def write_end(report: Report) -> None:
        write(report.reason, report.items, report.bytes)

    tg.hooks.register("tgstream.started", write_start)
    tg.hooks.register("tgstream.finished", write_end)


def make_root(model: Model) -> TGController:
    """Return the controller of the application."""
    DBSession = model.DBSession

    class Root(TGController):
        """Loads a user during the request, and streams after it."""

        @expose(content_type="text/plain")
        def run(
            self, user: str, script: str, commit: Any, kind: str, **options: str
        ) -> Stream:
            """Execute the plan in the request's parameters."""
            tg.tmpl_context.user = DBSession.query(User).filter_by(name=user).one()
            pace, pad = float(options["pace"]), int(options["pad"])
            items = steps(DBSession, script, pace, "x" * pad)
            return Stream(
                items if kind == "buffered" else (line_of(item) for item in items),
                NDJSON if kind == "buffered" else None,
                commit=int(commit) if commit.isdigit() else commit,
                max_seconds=float(options["max_seconds"]),
            )

    return Root()


def steps(DBSession: Any, script: str, pace: float, pad: str) -> Iterator[list[Any]]:
    """Execute the script. Yield after each step its request, user and transaction."""
    for number, letter in enumerate(script, 1):
        stream = tg.request.params["stream"]
        execute(DBSession, letter, stream, f"{stream} {number}")
        mark = DBSession.scalar(READ_MARK)
        yield [number, stream, tg.tmpl_context.user.name, mark or "", pad]
        if pace:
            time.sleep(pace)


def execute(DBSession: Any, letter: str, stream: str, text: str) -> None:
    """Execute a step. A step that writes marks its transaction with the stream."""
    user = tg.tmpl_context.user
    if letter in "ai":
        DBSession.execute(SET_MARK, {"stream": stream})
    if letter == "a":
        DBSession.add(Note(text=text, user=user))
    elif letter == "i":
        values = {"text": text, "user_id": user.id}
        DBSession.execute(sa.insert(Note).values(values))
    elif letter == "!":
        raise LookupError(text)
    else:
        ENDS[letter]()


def line_of(item: list[Any]) -> str:
    """Return the item as a line, for a stream without a format."""
    return json.dumps(item) + "\n"


ENDS: dict[str, Callable[[], None]] = {
    "c": tgstream.commit,
    "r": tgstream.rollback,
    "t": transaction.commit,
    "x": transaction.abort,
}
