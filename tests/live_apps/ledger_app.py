"""The application of the ledger: it publishes by plans, and listens.

``tests/ledger/plans.py`` explains the words of a plan.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import tg
import transaction
from tg import TGController, expose

import tgstream
from tests.application import make_wsgi_app
from tests.ledger import model
from tests.ledger.notes import follow, listen
from tests.ledger.work import execute
from tgstream import SSE, Stream, last_event_id

HISTORY = 300
"""How many events of a channel are stored."""


class RootController(TGController):
    """Requests that publish or listen."""

    @expose(content_type="text/plain")
    def request(self, plan: str, work: str, client: str) -> str:
        """Execute a transaction in this request."""
        execute(plan, work, client)
        return "done"

    @expose(content_type="text/plain")
    def thread(self, plan: str, work: str, client: str) -> str:
        """Execute a transaction in a thread of its own."""
        outcome = ["failed"]
        thread = threading.Thread(
            target=run_in_thread, args=(outcome, plan, work, client)
        )
        thread.start()
        thread.join()
        return outcome[-1]

    @expose(content_type="text/plain")
    def stream(self, plan: str, work: str, client: str, commit: Any) -> Stream:
        """Execute several transactions in a stream, and send a line after each."""
        plans = enumerate(plan.split(","))
        return Stream(steps(plans, work, client, commit == "manual"), commit=commit)

    @expose()
    def feed(self, channels: str) -> Stream:
        """Listen to channels."""
        plant = tg.config["ledger.plant"]
        return Stream(listen(channels.split(), last_event_id(), plant), SSE)

    @expose(content_type="text/plain")
    def position(self, channels: str) -> str:
        """Return the position of channels, as a page that begins to listen."""
        return tgstream.position(*channels.split())


def steps(plans: Any, work: str, client: str, manual: bool) -> Iterator[str]:
    """Execute the transactions of a stream. Yield the number of each."""
    for number, plan in plans:
        execute(plan, f"{work}.{number}", client)
        if manual:
            tgstream.commit()
        yield f"{number}\n"


def run_in_thread(outcome: list[str], *arguments: str) -> None:
    """Execute a transaction as a script does, and append ``done`` to the outcome."""
    try:
        with transaction.manager:
            execute(*arguments)
        outcome.append("done")
    except Exception as error:
        transaction.abort()  # a doomed one keeps its locks when ``with`` has raised
        outcome.append(f"failed: {error}")


def make_app(
    url: str, channels: str, folder: str, name: str, plant: str = "", **_: str
) -> Any:
    """Return the application, whose process also has a listener of its own.

    :param url: of its database.
    :param channels: the option ``tgstream.channels``.
    :param folder: the listener writes what it receives into a file of this folder.
    :param name: of the process. It seeds the listener's random choices.
    :param plant: a fault of ``notes.PLANTS``.
    """
    app = make_wsgi_app(
        {
            "root_controller": RootController(),
            "use_sqlalchemy": True,
            "sqlalchemy.url": url,
            "sqlalchemy.pool_pre_ping": True,
            "model": model,
            "tm.enabled": True,
            "tgstream.channels": channels,
            "tgstream.channel_history": str(HISTORY),
            "tgstream.heartbeat_seconds": "0.5",
            "ledger.folder": folder,
            "ledger.name": name,
            "ledger.plant": plant,
        },
        tgstream.plugme,
    )
    threading.Thread(target=follow, args=(folder, name, plant), daemon=True).start()
    return app
