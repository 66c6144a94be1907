"""What a request comes through: middlewares, and application wrappers of TurboGears.

Rule: nothing is looked up in objects; a layer is what has been called with the request.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import sys
from collections.abc import Iterator
from types import FrameType, FunctionType
from typing import Any, NamedTuple

from ..turbogears.diagnostics import get_qualified_name

KEY = "tgstream.doctor"
"""Where a request carries its probe, in the environ."""


class Layer(NamedTuple):
    """A WSGI application, a middleware or an application wrapper of TurboGears."""

    name: str
    app: Any
    """What may be called with a request of its own; None where that is not known."""
    is_wrapper: bool


@contextlib.contextmanager
def followed(probe: Any) -> Iterator[None]:
    """Write down what the request comes through, outermost first.

    Some of it has returned when the controller is called, and is on no stack any more.
    """
    before = sys.getprofile()
    sys.setprofile(
        lambda frame, event, _: (
            event == "call" and not probe.begun and meet(frame, probe.layers)
        )
    )
    try:
        yield
    finally:
        sys.setprofile(before)


def meet_callers(frame: FrameType | None, layers: list[Layer]) -> None:
    """Add what is on the stack, which may be that of a thread of its own."""
    if frame is not None:
        meet_callers(frame.f_back, layers)
        meet(frame, layers)


def meet(frame: FrameType, layers: list[Layer]) -> bool:
    """Add the layer whose call this is; false if it is none, or is there already."""
    layer = _layer(frame)
    new = layer is not None and all(
        layer.app is not each.app or layer.name != each.name for each in layers
    )
    if new and layer is not None:
        layers.append(layer)
    return new


def _layer(frame: FrameType) -> Layer | None:
    """The layer whose call this is: it has the environ, and then something callable.

    By the values, for the names of parameters are anybody's to choose.
    """
    code, module = frame.f_code, frame.f_globals.get("__name__", "")
    values = _arguments(frame)
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
    function = _function(frame)
    name = short(get_qualified_name(frame)) if function is None else _name(function)
    return Layer(name, function, False)


def _arguments(frame: FrameType) -> list[Any]:
    """What the call was given, by place; ``*args`` included."""
    code, known = frame.f_code, frame.f_locals
    values = [known.get(name) for name in code.co_varnames[: code.co_argcount]]
    if code.co_flags & inspect.CO_VARARGS:
        place = code.co_argcount + code.co_kwonlyargcount
        values += known.get(code.co_varnames[place], ())
    return values


def _carries(value: Any) -> bool:
    # Not isinstance(): that asks a proxy for what it stands for, which may do anything.
    return issubclass(type(value), dict) and KEY in value


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
    return short(f"{getattr(found, '__module__', '')}.{name}")


def short(name: str) -> str:
    """A name without what Python says of functions in functions."""
    return name.replace("<locals>.", "")
