"""The application of the soak: one stream, which does what its client has planned.

What a letter of the script does is told in ``tests/soak/plans.py``.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
import tg
import transaction
from tg import FullStackApplicationConfigurator, TGController, expose

import tgstream
from tests.live_apps.stream_app import Mounted
from tests.model import Model, Note, User
from tgstream import NDJSON, Stream
from tgstream.core.body import Body

USERS = [f"user{number}" for number in range(20)]
MINE = sa.select(sa.func.set_config("soak.stream", sa.bindparam("stream"), True))
WHOSE = sa.select(sa.func.current_setting("soak.stream", True))


def make_app(url: str, endings: str) -> Any:
    """The application, as it is by default: with TG's error tracing.

    :param url: of its database.
    :param endings: a file, which gets a line for each stream that has ended.
    """
    # What fails here is meant to; but the text of it would be most of the work.
    logging.disable(logging.CRITICAL)
    model = Model(url)
    model.seed(*USERS)
    tg.hooks.register("tgstream.finished", teller(endings))
    base_config = FullStackApplicationConfigurator()
    base_config.update_blueprint(
        {
            "root_controller": make_root(model),
            "renderers": ["json"],
            "default_renderer": "json",
            "errorpage.enabled": False,
            "app_globals": SimpleNamespace,
            "helpers": SimpleNamespace,
            "i18n.enabled": False,
            "use_sqlalchemy": True,
            "sqlalchemy.url": url,
            "model": model,
        }
    )
    tgstream.plugme(base_config)
    return Kept({"soak": base_config.make_wsgi_app({}, {})}, {"soak": model})


class Kept(Mounted):
    """Tells also how many streams are alive in memory."""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Answer this one question; all others are answered below."""
        if environ["PATH_INFO"] != "/soak/alive":
            return super().__call__(environ, start_response)
        gc.collect()
        # By its type alone: isinstance() would wake TG's proxies.
        alive = sum(type(each) is Body for each in gc.get_objects())
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(alive).encode()]


def teller(path: str) -> Callable[[Any], None]:
    """Writes a line for each stream that has ended; it keeps nothing in memory."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(report: Any) -> None:
        """One write, so that lines of several threads do not mix."""
        stream = tg.request.params["stream"]
        os.write(file, f"{stream} {report.reason} {report.items}\n".encode())

    return tell


def make_root(model: Model) -> TGController:
    """The one controller of the application."""
    DBSession = model.DBSession

    class Root(TGController):
        """Loads the user in the request, as a controller does, and streams after it."""

        @expose(content_type="text/plain")
        def run(
            self, user: str, script: str, commit: Any, kind: str, **options: str
        ) -> Stream:
            """What the client has planned, as the path of its plan asks."""
            tg.tmpl_context.user = DBSession.query(User).filter_by(name=user).one()
            pace, pad = float(options["pace"]), int(options["pad"])
            items = steps(DBSession, script, pace, "x" * pad)
            return Stream(
                items if kind == "gathered" else (dumped(item) for item in items),
                NDJSON if kind == "gathered" else None,
                commit=int(commit) if commit.isdigit() else commit,
                max_seconds=float(options["max_seconds"]),
            )

    return Root()


def steps(DBSession: Any, script: str, pace: float, pad: str) -> Iterator[list[Any]]:
    """An item a step: whose request, whose user, and whose transaction it sees."""
    for number, letter in enumerate(script, 1):
        stream = tg.request.params["stream"]
        act(DBSession, letter, stream, f"{stream} {number}")
        whose = DBSession.scalar(WHOSE)
        yield [number, stream, tg.tmpl_context.user.name, whose or "", pad]
        if pace:
            time.sleep(pace)


def act(DBSession: Any, letter: str, stream: str, text: str) -> None:
    """One step, in the stream's own transaction, which is marked as its own."""
    user = tg.tmpl_context.user
    if letter in "ai":
        DBSession.execute(MINE, {"stream": stream})
    if letter == "a":
        DBSession.add(Note(text=text, user=user))
    elif letter == "i":
        values = {"text": text, "user_id": user.id}
        DBSession.execute(sa.insert(Note).values(values))
    elif letter == "!":
        raise LookupError(text)
    else:
        ENDS[letter]()


def dumped(item: list[Any]) -> str:
    """A line, for a stream without a format."""
    return json.dumps(item) + "\n"


ENDS: dict[str, Callable[[], None]] = {
    "c": tgstream.commit,
    "r": tgstream.rollback,
    "t": transaction.commit,
    "x": transaction.abort,
}
