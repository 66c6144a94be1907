"""A stream that is sent through an application's whole stack.

Rule: no controller of the application runs, and the rest of the stack does. The probe
answers in place of the root controller, and only requests that carry it.
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

from ..turbogears.decorator import stream
from ..turbogears.diagnostics import find_buffering_caller
from .middleware_trace import KEY, Layer, meet_callers

ITEMS = 64
"""So many that what is held back by the block is told from what is collected."""
SIZE = 2048
"""Bytes of an item: more than those that compress leave alone."""


class ProbeError(Exception):
    """What a probe fails with; an error tracker may see it."""


class Probe:
    """One stream: what its generator made, on which thread, and who was around it.

    :param content_type: of the response.
    :param fails: whether it fails after two chunks.
    """

    def __init__(self, content_type: str = "text/plain", fails: bool = False) -> None:
        self.content_type = content_type
        self.fails = fails
        self.begun = self.closed = False
        self.made = 0
        self.threads: list[int] = []
        self.reader: str | None = None
        self.layers: list[Layer] = []
        self.config: Any = None

    def begin(self, frame: FrameType) -> Iterator[bytes]:
        """What the controller does: look who has called, and begin to stream."""
        self.begun = True
        meet_callers(frame, self.layers)
        self.config = tg.config._current_obj()
        tg.response.content_type = self.content_type
        return self._items()

    def _items(self) -> Iterator[bytes]:
        try:
            for item in items():
                if self.fails and self.made == 2:
                    raise ProbeError(
                        "tgstream doctor asks what becomes of a stream that fails; "
                        "nothing is wrong"
                    )
                if self.made == 1:
                    self.reader = find_buffering_caller(sys._getframe(1))
                self.made += 1
                self.threads.append(threading.get_ident())
                yield item
        finally:
            self.closed = True


@cache
def items() -> tuple[bytes, ...]:
    """What a probe yields: text that no compression makes much of."""
    numbers = random.Random(1)
    return tuple(base64.b64encode(numbers.randbytes(1536)) for _ in range(ITEMS))


@contextlib.contextmanager
def installed(tg_apps: list[Any]) -> Iterator[None]:
    """Have TurboGears' applications answer probes, and leave them as they were."""
    kept = [(dict(app.controller_instances), dict(app.config)) for app in tg_apps]
    disabled = logging.root.manager.disable
    logging.disable()  # what a probe does is told by the doctor
    reporting = [each for each in gc.get_objects() if _reports(each)]
    reporters = [each.reporters for each in reporting]
    try:
        for each in reporting:
            each.reporters = []
        for app in tg_apps:
            original = app._get_controller_instance("root")
            app.controller_instances["root"] = _answering(original)
        yield
    finally:
        logging.disable(disabled)
        for each, own in zip(reporting, reporters, strict=True):
            each.reporters = own
        for app, (instances, config) in zip(tg_apps, kept, strict=True):
            app.controller_instances.clear()
            app.controller_instances.update(instances)
            for name in app.config.keys() - config.keys():
                del app.config[name]  # what advice was given already


def _reports(thing: Any) -> bool:
    """Whether this is a middleware of backlash, whose reporters send mail."""
    module = str(type(thing).__module__)
    return module.startswith("backlash.") and "reporters" in vars(thing)


def _answering(original: Any) -> TGController:
    """A root controller for probes, in front of the application's own."""

    class Doctor(TGController):  # type: ignore[misc]
        @expose()  # type: ignore[untyped-decorator]
        @stream
        def _default(self, *args: Any, **params: Any) -> Iterator[bytes]:
            return probe_of(tg.request.environ).begin(sys._getframe())

        def __call__(self, environ: dict[str, Any], context: Any) -> Any:
            if KEY in environ:
                return super().__call__(environ, context)
            return original(environ, context)

    return Doctor()


def probe_of(environ: dict[str, Any]) -> Probe:
    """The probe of a request."""
    probe: Probe = environ[KEY]
    return probe
