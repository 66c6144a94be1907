"""Traces the layers of a request: middlewares, and TurboGears' application wrappers.

No attributes of applications are searched. A layer is a callable that was called with
the environ of the request.
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

ENVIRON_KEY = "tgstream.doctor"
"""The key of a request's probe in its environ."""


class Layer(NamedTuple):
    """A WSGI application, a middleware or an application wrapper of TurboGears."""

    name: str
    app: Any
    """The callable, for requests to this layer alone. None if it is unknown."""
    is_wrapper: bool


@contextlib.contextmanager
def trace_layers(probe: Any) -> Iterator[None]:
    """Add the layers that the request passes through to ``probe.layers``.

    It ends when the controller of the probe is called. Some layers have returned by
    then, such as middlewares that are generators, so the stack does not have them.
    """

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and not probe.started:
            add_layer(frame, probe.layers)

    previous = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(previous)


def add_callers(frame: FrameType | None, layers: list[Layer]) -> None:
    """Add the layers on the stack, which :func:`trace_layers` does not see on threads.

    :param frame: the innermost.
    """
    if frame is not None:
        add_callers(frame.f_back, layers)
        add_layer(frame, layers)


def add_layer(frame: FrameType, layers: list[Layer]) -> None:
    """Add the layer that is called in a frame, if there is one and it is new."""
    layer = _layer_of(frame)
    if layer is not None and all(
        layer.app is not known.app or layer.name != known.name for known in layers
    ):
        layers.append(layer)


def _layer_of(frame: FrameType) -> Layer | None:
    """The layer that is called in a frame.

    Its arguments are the environ and a callable. They are recognized by their values,
    because parameters may have any names.
    """
    code, module = frame.f_code, frame.f_globals.get("__name__", "")
    values = _argument_values(frame)
    if module == "webob.dec" and code.co_name == "__call__":
        return Layer(_name_of(getattr(values[0], "func", None)), values[0], False)
    index = next((i for i, value in enumerate(values) if _is_environ(value)), None)
    if index is None or len(values) < index + 2:
        return None
    is_wrapper = not callable(values[index + 1])
    if index and code.co_varnames[0] == "self":
        if is_wrapper and (index, code.co_name) != (2, "__call__"):
            return None  # a method with which TurboGears calls the controller
        return Layer(_name_of(type(values[0])), values[0], is_wrapper)
    if is_wrapper:
        return None
    function = _function_of(frame)
    name = (
        remove_locals(get_qualified_name(frame))
        if function is None
        else _name_of(function)
    )
    return Layer(name, function, False)


def _argument_values(frame: FrameType) -> list[Any]:
    """The values of the positional arguments, ``*args`` included."""
    code, variables = frame.f_code, frame.f_locals
    values = [variables.get(name) for name in code.co_varnames[: code.co_argcount]]
    if code.co_flags & inspect.CO_VARARGS:
        index = code.co_argcount + code.co_kwonlyargcount
        values += variables.get(code.co_varnames[index], ())
    return values


def _is_environ(value: Any) -> bool:
    # isinstance() would make a proxy of the application resolve its object, which may
    # run a query or raise.
    return issubclass(type(value), dict) and ENVIRON_KEY in value


def _function_of(frame: FrameType) -> Any:
    """The function that is called in a frame. None if several have its code."""
    functions = [
        referrer
        for referrer in gc.get_referrers(frame.f_code)
        if isinstance(referrer, FunctionType) and referrer.__code__ is frame.f_code
    ]
    return functions[0] if len(functions) == 1 else None


def _name_of(thing: Any) -> str:
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    return remove_locals(f"{getattr(thing, '__module__', '')}.{name}")


def remove_locals(name: str) -> str:
    """A qualified name without Python's ``<locals>``."""
    return name.replace("<locals>.", "")
