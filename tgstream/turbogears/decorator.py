"""``@stream``: a controller whose output is sent while it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from types import GeneratorType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from tg.decorators import Decoration
from webob import Response

from ..core import context
from ..core.draining import make_drain_refusal
from ..core.limits import reserve
from ..core.monitor import monitor
from ..core.names import get_controller_name
from ..core.options import (
    Options,
    StreamOptions,
    check,
    check_limit_is_whole,
    check_spoolable,
)
from ..core.refusals import is_of_events
from ..core.source import check_streamable, resolve_proxy
from ..core.stream import Stream
from ..formats.protocols import Format
from .negotiation import check_formats, choose_format
from .response import end_previous, release_with_request

if TYPE_CHECKING:
    from typing_extensions import Unpack

F = TypeVar("F", bound=Callable[..., Any])


@overload
def stream(
    format: Format | type[Format] | Sequence[Format | type[Format]] | None = None,
    **options: Unpack[StreamOptions],
) -> Callable[[F], F]: ...
@overload
def stream(function: F, /) -> F: ...
def stream(format: Any = None, **options: Unpack[StreamOptions]) -> Any:
    """Send the items of the controller to the client while they are made.

    The controller may be a generator function, or return any iterable or an open binary
    file. It may be an async generator function (``async def`` with ``yield``), or
    return an async iterable. A text, a dict, a response and None go to TG unchanged.
    Use it bare or called, above or below ``@expose``. The function itself is returned
    unchanged. Parameters, and when a stream commits, are those of
    :class:`Stream`.

    :param format: a format, or a list of formats from which each request chooses: by
        the extension of its URL (``/users.xlsx``), else by ``Accept``, else the first.
        A request that accepts none of them gets 406 before the controller runs.
    :raises TypeError: for an ``async def`` without ``yield``, and when an option has a
        wrong type.
    :raises ValueError: when an option has an invalid value.
    """

    function, formats = None, None
    if _is_meant_as_function(format):
        function, format = format, None
    elif isinstance(format, list | tuple):
        formats, format = check_formats("@stream", format), None
    elif format is not None:
        format = check("@stream", format).format

    def decorate(function: F) -> F:
        _check_function(function)
        where = f"@stream on {get_controller_name(function)}"
        if iscoroutinefunction(function):
            raise TypeError(
                f"{where}: TurboGears calls controllers without an event loop, so an "
                "async def must be a generator. Yield its items, or write def"
            )
        checked = check(where, format, **options)._replace(formats=formats)
        for each in formats or () if checked.spool else ():
            check_spoolable(where, each)
        for each in formats or (format,):
            check_limit_is_whole(where, checked._replace(format=each))
        method = getattr(function, "__func__", function)  # of a bound method
        Decoration.get_decoration(method)._register_controller_wrapper(
            lambda caller: _streaming_caller(caller, method, checked)
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
    """Refuse values that TurboGears does not call as a controller.

    :raises TypeError: when ``value`` is not a function. Cython's functions are fine.
    """
    if hasattr(value, "__code__"):
        return
    type_name = type(value).__name__
    if _is_descriptor(value):
        raise TypeError(
            f"@stream must stand below @{type_name}, on the function itself, got "
            f"{type_name}: {value!r:.80}. Swap the two lines"
        )
    raise TypeError(
        "@stream must decorate a function, because TurboGears calls nothing else as a "
        f"controller, got {type_name}: {value!r:.80}. Write a method that calls it, "
        "and put @stream on that method"
    )


def _streaming_caller(
    caller: Any, function: Any, options: Options
) -> Callable[..., Any]:
    """TG's controller caller, with a stream made of the controller's output."""

    name, given = get_controller_name(function), options

    def call(*args: Any) -> Any:
        tg_locals = context.current()
        end_previous(tg_locals.response)
        options, slot = given, None
        if options.formats is not None:
            options = _choose_format(options, options.formats, tg_locals)
        if monitor.draining:
            _refuse_stream(function, options.format, tg_locals.request.environ)
        if options.limit is not None:
            slot = reserve(function, name, options, tg_locals.request)
            release_with_request(tg_locals.request.environ, slot)
        try:
            output = caller(*args)
            if type(output) is GeneratorType:  # the usual output
                return Stream._of(output, options, function, slot)
            output = resolve_proxy(output)
            if isinstance(output, Stream):
                output._adopt(options, function, slot, tg_locals.request)
                return output
            if not isinstance(output, Response) and check_streamable(
                output, name, options.format
            ):
                return Stream._of(output, options, function, slot)
            if isinstance(output, Mapping) and options.format is not None:
                _check_page(function, options, tg_locals)
        except BaseException:  # its traceback would keep the slot for a while
            if slot is not None:
                slot.release()
            raise
        if slot is not None:
            slot.release()
        return output

    return call


def _choose_format(
    options: Options, formats: tuple[Format, ...], tg_locals: Any
) -> Options:
    """The options with the format that the request has chosen."""
    format = choose_format(formats, tg_locals.request, tg_locals.response)
    return options._replace(format=format)


def _refuse_stream(function: Any, format: Any, environ: dict[str, Any]) -> None:
    """In a process that drains: refuse a request that can only be for a stream.

    Another controller may return a page. If it returns a stream, the stream is refused
    when it starts.

    :raises HTTPException: the refusal.
    """
    is_generator = isgeneratorfunction(function) or isasyncgenfunction(function)
    if is_generator or is_of_events(format):
        raise make_drain_refusal(environ, format)


def find_exposed(function: Any, tg_locals: Any) -> Any:
    """The content type, engine and template that ``@expose`` declares."""
    decoration = Decoration.get_decoration(function)
    return decoration.lookup_template_engine(tg_locals)


def _check_page(function: Any, options: Options, tg_locals: Any) -> None:
    """Check that TG has a template or an engine for the dict of a controller.

    :raises TypeError: when it has none. TG's own error does not name the cause.
    """
    _, engine, template = find_exposed(function, tg_locals)[:3]
    if not (engine or template):
        raise TypeError(
            f"{get_controller_name(function)} returned a dict, which "
            f"@stream({type(options.format).__name__}) does not send. Return rows, or "
            "name a template in @expose for a page"
        )
