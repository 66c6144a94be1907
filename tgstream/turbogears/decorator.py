"""``@stream``: a controller whose output is sent while it is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar, overload

from tg.decorators import Decoration
from webob import Response

from ..core import context as _context
from ..core.limits import reserve
from ..core.options import Commit, Options, check
from ..core.source import check_streamable, resolve_proxy
from ..core.stream import Stream
from ..formats.protocols import Format
from .response import end_previous

F = TypeVar("F", bound=Callable[..., Any])


@overload
def stream(
    format: Format | type[Format] | None = None,
    *,
    commit: Commit | None = None,
    chunk_size: int | None = None,
    filename: str | None = None,
    charset: str | None = None,
    length: int | None = None,
    max_seconds: float | None = None,
    limit: int | None = None,
) -> Callable[[F], F]: ...
@overload
def stream(function: F, /) -> F: ...
def stream(
    format: Any = None,
    *,
    commit: Commit | None = None,
    chunk_size: int | None = None,
    filename: str | None = None,
    charset: str | None = None,
    length: int | None = None,
    max_seconds: float | None = None,
    limit: int | None = None,
) -> Any:
    """Send what the controller yields to the client while it is made.

    The controller may be a generator function, or return any iterable or an open binary
    file; a text, a dict, a response and None go to TG untouched. Do not decorate an
    ``async def``. Bare or called, above or below ``@expose``; the function itself is
    returned unchanged. Parameters, and what commits when, are those of :class:`Stream`.

    :raises TypeError: for an ``async def``, and when an option is of a wrong type.
    :raises ValueError: when an option makes no sense.
    """

    function = None
    if _is_meant_as_function(format):
        function, format = format, None
    elif format is not None:
        format = check("@stream", format).format

    def decorate(function: F) -> F:
        _check_function(function)
        where = f"@stream on {name_of(function)}"
        if _is_async(function):
            raise TypeError(
                f"{where}: TurboGears calls controllers without an event loop; "
                "write it as def, not async def"
            )
        options = check(
            *(where, format, commit, chunk_size, filename, charset, length),
            *(max_seconds, limit),
        )
        method = getattr(function, "__func__", function)  # of a bound method
        Decoration.get_decoration(method)._register_controller_wrapper(
            lambda caller: _streaming(caller, method, options)
        )
        return function

    return decorate if function is None else decorate(function)


def _is_meant_as_function(value: Any) -> bool:
    """True for the argument of a bare ``@stream``, also if it cannot be a controller.

    A format may be a class, or have a ``__call__``, but has an ``encode``.
    """
    if hasattr(value, "encode"):
        return False
    return callable(value) or _is_descriptor(value)


def _is_descriptor(value: Any) -> bool:
    return isinstance(value, staticmethod | classmethod)


def _check_function(value: Any) -> None:
    """Refuse all that TurboGears does not call as a controller, for no reason told.

    :raises TypeError: when ``value`` is not a function; compiled by Cython is fine.
    """
    if hasattr(value, "__code__"):
        return
    kind = type(value).__name__
    if _is_descriptor(value):
        raise TypeError(
            f"@stream must stand below @{kind}, on the function itself, got {kind}: "
            f"{value!r:.80}. Swap the two lines"
        )
    raise TypeError(
        f"@stream must decorate a function, because TurboGears calls nothing else as a "
        f"controller, got {kind}: {value!r:.80}. Write a method that calls it, and put "
        "@stream on that method"
    )


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _streaming(caller: Any, function: Any, options: Options) -> Callable[..., Any]:
    """TG's controller caller, with a stream made of what the controller returns."""

    def call(*args: Any) -> Any:
        end_previous(_context.current().request.environ)
        with reserve(function, options.limit) as seat:
            output = resolve_proxy(caller(*args))
            if isinstance(output, Stream):
                output._adopt(options, function, seat, _context.current().request)
                return output
            given = isinstance(output, Response)
            if given or not check_streamable(output, name_of(function)):
                return output
            stream = Stream._of(output, options, function)
        stream._seat = seat
        return stream

    return call


@lru_cache
def name_of(function: Any) -> str:
    """What a controller is called in messages: ``RootController.users``."""
    name: str = getattr(function, "__qualname__", repr(function))
    return name.rpartition("<locals>.")[2]
