"""An application whose streams write to the database and fail on demand."""

from __future__ import annotations

import builtins
import resource
from collections.abc import Iterator
from typing import Any

import tg
from tg import TGController, expose

from tests.application import database_options
from tests.live_apps.stream_app import Mounted, variant
from tests.model import Model, User
from tgstream import Stream, commit, flush

BLOCK = 65536


def raise_error(name: str) -> None:
    """Raise the builtin exception with this name. An empty name raises nothing."""
    if name:
        raise getattr(builtins, name)


def fail_in_hook(report: Any) -> None:
    """Raise the exception that the request's parameter ``hook`` names."""
    raise_error(tg.request.params.get("hook", ""))


class RootController(TGController):
    """Streams that commit one user, and flush another."""

    made = 0
    """The number of blocks that the last stream made."""

    @expose(content_type="text/plain")
    def write(self, **params: str) -> Stream:
        return Stream(self.items(**params))

    def items(
        self,
        name: str,
        early: str = "",
        pipe: str = "",
        blocks: str = "0",
        error: str = "",
        close: str = "",
        hook: str = "",
    ) -> Iterator[bytes]:
        """Wait for a line in the named pipe, if there is a pipe, and send blocks.

        :param early: anything, to send a first chunk before that.
        :param error: the name of an exception to raise after the blocks.
        :param close: the name of an exception to raise in ``finally``.
        """
        session = tg.config["DBSession"]
        session.add(User(name=f"{name} stored"))
        commit()
        session.add(User(name=f"{name} flushed"))
        flush()
        try:
            if early:
                yield b"early"
            if pipe:
                with open(pipe) as file:
                    yield file.readline().encode()
            for number in range(int(blocks)):
                self.made = number + 1
                yield b"x" * BLOCK
            raise_error(error)
            yield b"end"
        finally:
            raise_error(close)

    @expose("json")
    def progress(self) -> dict[str, int]:
        """Return the bytes made, and the peak memory of this process in KiB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"made": self.made * BLOCK, "peak": peak}


def make_app(url: str) -> Any:
    """Return the application, on existing tables."""
    model = Model(url, create=False)
    options = {"root_controller": RootController(), **database_options(model)}
    app = variant("yes", **options)
    tg.hooks.register("tgstream.finished", fail_in_hook)
    return Mounted({"faulty": app}, {"faulty": model})
