"""An application whose streams write, and end badly in ways that a client chooses."""

from __future__ import annotations

import builtins
import resource
from collections.abc import Iterator
from typing import Any

import tg
from tg import TGController, expose

from tests.live_apps.stream_app import Mounted, variant
from tests.model import Model, User
from tgstream import Stream, commit, flush

BLOCK = 65536


def raise_(kind: str) -> None:
    """Raise what is built in under that name; nothing without one."""
    if kind:
        raise getattr(builtins, kind)


class Hook:
    """Raises in the report of a stream whose client asks for it."""

    def __call__(self, report: Any) -> None:
        raise_(tg.request.params.get("hook", ""))


class RootController(TGController):
    """Streams that commit a name, and flush another."""

    made = 0
    """Blocks of the last stream of them."""

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
        """Waits for a line of the named pipe, if any, and then sends so many blocks.

        :param early: whether a first chunk leaves before.
        :param error: what to raise behind them.
        :param close: what to raise where it is closed, or ends.
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
            raise_(error)
            yield b"end"
        finally:
            raise_(close)

    @expose("json")
    def progress(self) -> dict[str, int]:
        """How much was made, and the most memory that this process has had, in KiB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"made": self.made * BLOCK, "peak": peak}


def make_app(url: str) -> Any:
    """The application, on tables that are there."""
    model = Model(url, create=False)
    app = variant(
        "yes",
        root_controller=RootController(),
        use_sqlalchemy=True,
        model=model,
        **{"sqlalchemy.url": url},
    )
    tg.hooks.register("tgstream.finished", Hook())
    return Mounted({"faulty": app}, {"faulty": model})
