"""The probe: a stream that the doctor sends through the whole stack of an application.

For requests that carry a probe, a controller of the doctor stands in for the root
controller. So no controller of the application runs, but the rest of the stack does.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import logging
import random
import sys
import threading
from collections.abc import Iterator
from functools import cache
from types import FrameType
from typing import Any

import tg
from tg import TGController, expose

from ..core import context
from ..turbogears.decorator import stream
from ..turbogears.diagnostics import find_buffering_caller
from .middleware_trace import ENVIRON_KEY, Layer, add_callers

ITEM_COUNT = 64
"""So many that a middleware that buffers a block of them does not buffer all."""
ITEM_SIZE = 2048
"""Bytes of an item. Compressing middlewares skip responses that are smaller."""


class ProbeError(Exception):
    """The error of a probe that fails. Error trackers may report it."""


class Probe:
    """One stream, and a record of how it was produced.

    :param content_type: of the response.
    :param fails: whether it fails after two chunks.
    """

    def __init__(self, content_type: str = "text/plain", fails: bool = False) -> None:
        self.content_type = content_type
        self.fails = fails
        self.started = self.closed = False
        self.produced = 0
        """How many items the generator has yielded."""
        self.threads: list[int] = []
        """The ident of the thread that produced each item."""
        self.reader: str | None = None
        """The function that iterates the stream before the server does, if any."""
        self.layers: list[Layer] = []
        """The layers that the request has passed through, outermost first."""
        self.config: Any = None
        """The configuration of the TurboGears application that was reached."""

    def respond(self, frame: FrameType) -> Iterator[bytes]:
        """Record the callers of the controller, and return its stream."""
        self.started = True
        add_callers(frame, self.layers)
        self.config = context.current().config
        tg.response.content_type = self.content_type
        return self._generate()

    def _generate(self) -> Iterator[bytes]:
        try:
            for item in probe_items():
                if self.fails and self.produced == 2:
                    raise ProbeError(
                        "tgstream doctor tests a stream that fails. Ignore this error"
                    )
                if self.produced == 1:
                    self.reader = find_buffering_caller(sys._getframe(1))
                self.produced += 1
                self.threads.append(threading.get_ident())
                yield item
        finally:
            self.closed = True


@cache
def probe_items() -> tuple[bytes, ...]:
    """The items of a probe, as text that does not compress well."""
    numbers = random.Random(1)
    return tuple(base64.b64encode(numbers.randbytes(1536)) for _ in range(ITEM_COUNT))


@contextlib.contextmanager
def answer_probes(tg_apps: list[Any]) -> Iterator[None]:
    """Make TurboGears applications answer probes, and restore them afterwards.

    Meanwhile nothing is logged, and backlash sends no reports.

    :param tg_apps: TurboGears applications with instantiated root controllers.
    """
    saved = [(dict(app.controller_instances), dict(app.config)) for app in tg_apps]
    disabled = logging.root.manager.disable
    logging.disable()  # the doctor prints what it finds
    middlewares = [item for item in gc.get_objects() if _has_reporters(item)]
    reporters = [middleware.reporters for middleware in middlewares]
    try:
        for middleware in middlewares:
            middleware.reporters = []
        for app in tg_apps:
            original = app.controller_instances["root"]
            app.controller_instances["root"] = _make_root(original)
        yield
    finally:
        logging.disable(disabled)
        for middleware, original in zip(middlewares, reporters, strict=True):
            middleware.reporters = original
        for app, (instances, config) in zip(tg_apps, saved, strict=True):
            app.controller_instances.clear()
            app.controller_instances.update(instances)
            for name in app.config.keys() - config.keys():
                del app.config[name]  # records of warnings that were logged


def _has_reporters(thing: Any) -> bool:
    """Whether this is a middleware of backlash, whose reporters send mail."""
    module = str(type(thing).__module__)
    return module.startswith("backlash.") and "reporters" in vars(thing)


def _make_root(original: Any) -> TGController:
    """A root controller that answers probes, and passes on other requests."""

    class Doctor(TGController):  # type: ignore[misc]
        @expose()  # type: ignore[untyped-decorator]
        @stream
        def _default(self, *args: Any, **params: Any) -> Iterator[bytes]:
            probe: Probe = tg.request.environ[ENVIRON_KEY]
            return probe.respond(sys._getframe())

        def __call__(self, environ: dict[str, Any], context: Any) -> Any:
            if ENVIRON_KEY in environ:
                return super().__call__(environ, context)
            return original(environ, context)

    return Doctor()
