"""Processes that are killed while a request publishes and commits.

Each one is forked, so that all of them are fast. Run it as ``python -m
tests.live.killed_publisher URL COUNT SEED``. It prints how many requests have committed
and checks that they, and no others, have stored their message.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from typing import Any

import sqlalchemy as sa
from tg import TGController, expose, request

import tgstream
from tests.application import database_options, make_wsgi_app
from tests.live.table_sender import TableSender, metadata
from tests.model import Model, User
from tests.wsgi import get


class Killer:
    """Counts the instructions of this thread, and kills the process at one of them.

    :param number: of the instruction. 0 kills nothing.
    """

    def __init__(self, number: int) -> None:
        self.number, self.count = number, 0

    def trace(self, frame: Any, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.count += 1
            if self.count == self.number:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.trace

    def start(self) -> None:
        frame: Any = sys._getframe(1)
        sys.settrace(self.trace)
        while frame is not None:  # frames that run already, too
            self.trace(frame, "call", None)
            frame.f_trace = self.trace
            frame = frame.f_back


killer = Killer(0)


class Root(TGController):
    """Adds a user. A listener of the model publishes the name of the user."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @expose(content_type="text/plain")
    def add(self) -> str:
        self.model.DBSession.add(User(name=request.GET["name"]))
        return "added"


def run_request(app: Any, number: int, at: int) -> int:
    """Call the application in a forked process, and kill it at an instruction.

    :returns: the number of instructions, if it was not killed.
    """
    reader, writer = os.pipe()
    if os.fork() == 0:
        killer.number = at
        get(app, f"/add?name=user {number}")
        sys.settrace(None)
        os.write(writer, str(killer.count).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        count = int(pipe.read() or 0)
    os.wait()
    return count


def main(url: str, count: int, seed: int) -> None:
    model = Model(url)
    metadata.drop_all(model.outside)
    metadata.create_all(model.outside)
    model.outside.dispose()
    sender = TableSender(model)

    def publish_name(mapper: Any, connection: Any, user: User) -> None:
        if not killer.count:
            killer.start()
        sender.send(user.name)

    sa.event.listen(User, "after_insert", publish_name)
    options = {"root_controller": Root(model), "tm.enabled": True}
    app = make_wsgi_app({**options, **database_options(model)}, tgstream.plugme)
    run_request(app, 0, 0)  # it fills caches
    instructions = run_request(app, 1, 0)
    numbers = random.Random(seed)
    for number in range(2, count):
        run_request(app, number, numbers.randint(1, instructions))
    names = model.names()
    assert sorted(names) == sorted(sender.stored()), (names, sender.stored())
    print(
        f"{len(names)} of {count} committed, {instructions} instructions, seed {seed}"
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
