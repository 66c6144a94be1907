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
from types import FrameType, FunctionType
from typing import Any, NamedTuple

import tg
from tg import TGController, expose

from ._advice import _reader
from ._controller import stream

KEY = "tgstream.doctor"
"""Where a request carries its probe, in the environ."""
ITEMS = 64
"""So many that what is held back by the block is told from what is collected."""
SIZE = 2048
"""Bytes of an item: more than those that compress leave alone."""


class ProbeError(Exception):
    """What a probe fails with; an error tracker may see it."""


class Layer(NamedTuple):
    """A WSGI application, a middleware or an application wrapper of TurboGears."""

    name: str
    app: Any
    """What may be called with a request of its own; None where that is not known."""
    is_wrapper: bool


class Probe:
    """One stream: what its generator made, on which thread, and who was around it.

    :param content_type: of the response.
    :param fails: whether it fails after two chunks.
    """

    def __init__(self, content_type: str = "text/plain", fails: bool = False) -> None:
        self.content_type = content_type
        self.fails = fails
        self.begun = self.closed = self.strange = False
        self.made = 0
        self.threads: list[int] = []
        self.reader: str | None = None
        self.layers: list[Layer] = []
        self.config: Any = None

    def begin(self, frame: FrameType) -> Iterator[bytes]:
        """What the controller does: look who has called, and begin to stream."""
        self.begun = True
        self.layers += [e for e in _layers(frame) if not _is_known(e, self.layers)]
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
                    self.reader = _reader(sys._getframe(1))
                self.made += 1
                self.threads.append(threading.get_ident())
                self.strange |= tg.request.environ.get(KEY) is not self
                yield item
        finally:
            self.closed = True


@cache
def items() -> tuple[bytes, ...]:
    """What a probe yields: text that no compression makes much of."""
    numbers = random.Random(1)
    return tuple(base64.b64encode(numbers.randbytes(1536)) for _ in range(ITEMS))


@contextlib.contextmanager
def followed(probe: Probe) -> Iterator[None]:
    """Write down what the request comes through, outermost first.

    Some of it has returned when the controller is called, and is on no stack any more.
    """

    def look(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or probe.begun:
            return
        layer = _layer(frame)
        if layer is not None and not _is_known(layer, probe.layers):
            probe.layers.append(layer)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)


def _layers(frame: FrameType | None) -> list[Layer]:
    """What is on the stack of a thread that something else may have begun."""
    found: list[Layer] = []
    while frame is not None:
        layer = _layer(frame)
        if layer is not None and not _is_known(layer, found):
            found.append(layer)
        frame = frame.f_back
    return found[::-1]


def _is_known(layer: Layer, found: list[Layer]) -> bool:
    if layer.app is None:
        return any(layer.name == each.name for each in found)
    return any(layer.app is each.app for each in found)


def _layer(frame: FrameType) -> Layer | None:
    """The layer whose call this is: it has the environ, and then something callable.

    By the values, for the names of parameters are anybody's to choose.
    """
    code, module = frame.f_code, frame.f_globals.get("__name__", "")
    values = [frame.f_locals.get(n) for n in code.co_varnames[: code.co_argcount]]
    if module == "webob.dec" and code.co_name == "__call__":
        return Layer(_name(getattr(values[0], "func", None)), values[0], False)
    place = next((n for n, each in enumerate(values) if _carries(each)), None)
    if place is None or len(values) < place + 2:
        return None
    is_wrapper = not callable(values[place + 1])
    if place and code.co_varnames[0] == "self":
        if is_wrapper and (place, code.co_name) != (2, "__call__"):
            return None  # TurboGears' own way to its controller
        return Layer(_name(type(values[0])), values[0], is_wrapper)
    if is_wrapper:
        return None
    name = f"{module}.{getattr(code, 'co_qualname', code.co_name)}"
    return Layer(name.replace("<locals>.", ""), _function(frame), False)


def _carries(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get(KEY), Probe)


def _function(frame: FrameType) -> Any:
    """The function whose call this is, where there is one of its code alone."""
    made = [
        each
        for each in gc.get_referrers(frame.f_code)
        if isinstance(each, FunctionType) and each.__code__ is frame.f_code
    ]
    return made[0] if len(made) == 1 else None


def _name(found: Any) -> str:
    name = getattr(found, "__qualname__", type(found).__qualname__)
    return f"{getattr(found, '__module__', '')}.{name.replace('<locals>.', '')}"


@contextlib.contextmanager
def installed(tg_apps: list[Any]) -> Iterator[None]:
    """Have TurboGears' applications answer probes, and leave them as they were."""
    kept = [(dict(app.controller_instances), dict(app.config)) for app in tg_apps]
    disabled = logging.root.manager.disable
    logging.disable()  # what a probe does is told by the doctor
    try:
        for app in tg_apps:
            original = app._get_controller_instance("root")
            app.controller_instances["root"] = _answering(original)
        yield
    finally:
        logging.disable(disabled)
        for app, (instances, config) in zip(tg_apps, kept, strict=True):
            app.controller_instances.clear()
            app.controller_instances.update(instances)
            for name in app.config.keys() - config.keys():
                del app.config[name]  # what advice was given already


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


@contextlib.contextmanager
def unreported(layers: list[Layer]) -> Iterator[None]:
    """Keep backlash's reporters, which send mail, from hearing of a probe."""
    reporting = [
        layer.app
        for layer in layers
        if type(layer.app).__module__.partition(".")[0] == "backlash"
        and hasattr(layer.app, "reporters")
    ]
    kept = [each.reporters for each in reporting]
    for each in reporting:
        each.reporters = []
    try:
        yield
    finally:
        for each, reporters in zip(reporting, kept, strict=True):
            each.reporters = reporters
