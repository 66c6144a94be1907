"""``@stream``, and the start of a stream inside the request.

Rule: here is the only code that TG calls; it starts any ``Stream`` that a controller
returns, decorated or not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import tg
from tg.configuration import milestones
from tg.decorators import Decoration
from tg.support.converters import asbool
from webob.exc import HTTPException

from ..core import context as _context
from ..core.headers import charset_in, has_no_body, set_headers
from ..core.limits import take
from ..core.options import Options, Plan
from ..core.settings import option
from ..core.source import is_for_a_stream, not_streamed, resolve_proxy
from ..core.stream import Stream
from ..database.on_commit import is_tm_enabled
from ..database.registry import install_registry, scoped_sessions
from .decorator import name_of
from .guard import Guard
from .response import check_headers, end_previous, send_off, watch_exit

if TYPE_CHECKING:
    from ..core.body import Body
    from ..database.database import StreamDatabase

# What TG calls.


class _Hooks(dict[str, Any]):
    """The hooks by name."""

    def install(self) -> None:
        """Register the hooks with TG, once, however often its milestones are reset."""
        for name, hook in self.items():
            tg.hooks.disconnect(name, hook)
            tg.hooks.register(name, hook)


def _before_render(remainder: Any, params: Any, output: Any) -> None:
    output = resolve_proxy(output)
    if isinstance(output, Stream):
        try:
            _start(output, _context.current())
        except BaseException:
            output._leave_seat()
            raise
    elif is_for_a_stream(output):
        raise not_streamed(output, name_of(_dispatched(_context.current().request)))


def _start(stream: Stream, tg_locals: Any) -> None:
    """Start the stream inside the request, up to its first chunk."""
    _context.check_locals()
    stream._prepare(tg_locals.request)
    options = stream._options
    function = stream._controller or _dispatched(tg_locals.request)

    if stream._seat is None:
        end_previous(tg_locals.request.environ)
        try:
            stream._seat = take(function, options.limit)
        except HTTPException:
            stream._discard()
            raise
    check_headers(tg_locals.response, stream, name_of(function))

    def exposed() -> Any:
        return Decoration.get_decoration(function).lookup_template_engine(tg_locals)

    def charset() -> str:
        asked = options.charset or tg_locals.response.charset
        asked = getattr(options.format, "charset", None) or asked
        return asked or charset_in(exposed()[0]) or "utf-8"

    if tg_locals.request.method in _RUN_NOTHING:
        _answer_without_body(stream, tg_locals, exposed)
        return
    database = _database_of(tg_locals)
    length = partial(_declared_length, options, tg_locals.response)
    plan = _plan(options, name_of(function), charset, length, tg_locals.config)
    body = stream._open(plan, tg_locals, database)
    watch_exit(tg_locals.request.environ, body)
    if database is not None:
        _take_over(database, body, tg_locals)
    body.start(lambda answer: _vetoed(tg_locals, answer))
    set_headers(tg_locals.response, exposed, options)
    send_off(tg_locals.response, stream)


_RUN_NOTHING = {"HEAD", "OPTIONS", "TRACE", "CONNECT"}
"""Methods that do not ask for the resource's content, so no generator runs."""


def _answer_without_body(stream: Stream, tg_locals: Any, exposed: Any) -> None:
    """Answer with the headers alone: those of the stream for HEAD, else no content."""
    response = tg_locals.response
    stream._discard()
    if tg_locals.request.method == "HEAD":
        stream._length = _declared_length(stream._options, response)
        set_headers(response, exposed, stream._options)
    else:
        stream._length = None if has_no_body(response.status_int) else 0
    send_off(response, stream)


def _dispatched(request: Any) -> Any:
    """The controller that TG's dispatch chose, when no decorator named it."""
    action = request._dispatch_state.action
    return getattr(action, "__func__", action)


def _declared_length(options: Options, response: Any) -> int | None:
    """The bytes of the whole body, as an option or the response's headers have them."""
    if options.length is not None:
        return options.length
    return response.content_length or None  # TG's own is 0, which nobody meant


def _plan(
    options: Options,
    controller: str,
    charset: Callable[[], str],
    length: Callable[[], int | None],
    config: Any,
) -> Plan:
    """The options: what was asked, else the format's, else the application's."""
    format, commit, size = options.format, options.commit, options.chunk_size
    if format is None:
        size = size or 0
    else:
        commit = commit or getattr(format, "commit", None)
        size = getattr(format, "chunk_size", None) if size is None else size
        size = option(config, "tgstream.chunk_size") if size is None else size
    every = commit if isinstance(commit, int) else int(commit == "each")
    seconds = option(config, "tgstream.chunk_seconds") if size else 0.0
    return Plan(
        *(controller, format, every, commit == "manual", size, seconds, charset),
        *(length, options.max_seconds),
        option(config, "tgstream.idle_seconds"),
    )


# The request's transaction.


def _vetoed(tg_locals: Any, response: Any) -> bool:
    veto = tg_locals.config.get("tm.commit_veto")
    if veto is None:
        return False
    environ = tg_locals.request.environ
    return bool(veto(environ, response.status, response.headerlist))


def _take_over(database: StreamDatabase, body: Body, tg_locals: Any) -> None:
    try:
        database.adopt_request_sessions(
            is_tm_enabled(tg_locals), lambda: _vetoed(tg_locals, tg_locals.response)
        )
    except BaseException:
        body.cancel()
        raise


def _database_of(tg_locals: Any) -> StreamDatabase | None:
    """The stream's sessions and transaction, in an application that has any."""
    config = tg_locals.config
    scoped = scoped_sessions(config)
    if not scoped and not is_tm_enabled(tg_locals):
        return None
    database: StreamDatabase = _database_class()(
        tuple(map(install_registry, scoped)), asbool(config.get("use_sqlalchemy"))
    )
    return database


@lru_cache
def _database_class() -> Any:
    """Imported where an application has sessions or transactions, and only there."""
    return importlib.import_module("tgstream.database.database").StreamDatabase


HOOKS = _Hooks(before_render=_before_render, after_wsgi_middlewares=Guard)


def install() -> None:
    """Register the hooks, when TG's configuration is ready or at once if it is."""
    # A bound method: TG's own tests read __self__ of what a milestone keeps.
    milestones.config_ready.register(HOOKS.install, persist_on_reset=True)
