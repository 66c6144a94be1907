"""A script that publishes in ``with transaction.manager:``, until it gets SIGTERM.

    python -m tests.ledger.script script ledger_app url=... channels=... ...

At the end it publishes the last event of each channel. It takes the arguments of
``tests.live_apps.run``, and prints a port as servers do.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from pathlib import Path
from random import Random

import tg

from tests.ledger import plans
from tests.live_apps.ledger_app import run_in_thread
from tests.live_apps.run import make_named, print_port

THREADS = 2


def publish(name: str, done: int, savepoints: bool, closing: threading.Event) -> None:
    """Execute random transactions. Append those that were committed to a file."""
    random = Random(name)
    client = f"{name}.{os.getpid()}"
    for number in itertools.count():
        if closing.wait(random.expovariate(20)):
            return
        plan = plans.transaction(random, savepoints, "c", "d", "!")
        run(plan, f"{client}-{number}", client, done)


def run(plan: str, work: str, client: str, done: int) -> None:
    """Execute a transaction, and note that it was committed."""
    outcome: list[str] = []
    run_in_thread(outcome, plan, work, client)
    if outcome == ["done"]:
        os.write(done, f"{work}\n".encode())


def main(*words: str) -> None:
    closing = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: closing.set())
    make_named([*words])
    folder, name = tg.config["ledger.folder"], tg.config["ledger.name"]
    savepoints = tg.config["sqlalchemy.url"].startswith("postgresql")
    done = os.open(Path(folder, "done"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    threads = [
        threading.Thread(
            target=publish, args=(f"{name}-{n}", done, savepoints, closing)
        )
        for n in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    print_port(0)
    for thread in threads:
        thread.join()
    run(plans.LAST, f"end-{name}", name, done)


if __name__ == "__main__":
    main(*sys.argv[2:])
