"""The hooks that TurboGears calls: the start of a stream inside the request.

TG calls ``before_render`` with the output of each controller. A :class:`Stream` is
started there, decorated or not: its first chunk is made, the request's transaction ends
by TG's rules, and the response gets the stream as its body.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from tg.support.converters import asbool

from ..core import context
from ..core.compression import is_compressible, is_text
from ..core.context import Context
from ..core.files import StoredFile
from ..core.headers import find_charset, has_no_body, set_headers
from ..core.hooks import keep_hooks
from ..core.limits import reserve
from ..core.names import find_controller, get_controller_name
from ..core.options import (
    FormatTraits,
    Options,
    Plan,
    SpoolSettings,
    check_limit_is_whole,
    check_spoolable,
)
from ..core.ranges import Representation
from ..core.recheck import Recheck
from ..core.settings import read_option
from ..core.source import make_missing_stream_error, needs_stream, resolve_proxy
from ..core.stream import Stream
from ..database.on_commit import is_tm_enabled
from ..database.registry import install_registry, scoped_sessions
from .decorator import find_exposed
from .files import (
    remember_answer,
    respond_with_file,
    set_file_headers,
    withdraw_answer,
)
from .guard import Guard
from .permissions import Permission
from .response import check_headers, end_previous, end_with_request, send_off

if TYPE_CHECKING:
    from ..core.body import Body
    from ..core.files import FileParts
    from ..core.spool import Spool
    from ..database.database import StreamDatabase


def _before_render(remainder: Any, params: Any, output: Any) -> None:
    if type(output) is not Stream:
        output = resolve_proxy(output)
    if isinstance(output, Stream):
        try:
            start = _Start(output, context.current())
        except BaseException:
            output._discard()
            raise
        try:
            start.run(output)
        except BaseException:
            output._release_slot()
            raise
    elif needs_stream(output):
        where = get_controller_name(find_controller(context.current().request))
        raise make_missing_stream_error(output, where)


class _Start:
    """The start of a stream inside the request, up to its first chunk.

    The body keeps it for its charset, so that it must not keep the stream.
    """

    _measured: int | None = None  # bytes of the whole body, by its format or its file
    _file: FileParts | None = None  # that it sends
    _recheck: Recheck | None = None

    def __init__(self, stream: Stream, tg_locals: Any) -> None:
        self._tg_locals = tg_locals
        self._options = stream._options
        self._function = stream._controller or find_controller(tg_locals.request)
        self._plan = _make_plan(
            get_controller_name(self._function), stream._options, tg_locals.config
        )
        if stream._options.spool:
            self._plan = _add_spool(self._plan, self._options, tg_locals.config)
        if stream._options.recheck_seconds is not None:
            self._recheck = self._make_recheck(stream._options.recheck_seconds)

    def _make_recheck(self, seconds: float) -> Recheck:
        tg_locals, controller = self._tg_locals, self._plan.controller
        manages = is_tm_enabled(tg_locals)
        make_database = partial(_make_database, tg_locals.config, manages)
        permission = Permission(tg_locals, self._function, controller, make_database)
        return Recheck(controller, seconds, permission.is_granted)

    def run(self, stream: Stream) -> None:
        """Start it.

        :raises Exception: the error of the generator, or of headers that cannot be
            sent. The stream has then ended.
        """
        tg_locals, options = self._tg_locals, self._options
        request, response = tg_locals.request, tg_locals.response
        context.check_locals()
        if "tganswer" in response.__dict__:  # of an earlier attempt
            withdraw_answer(response)
        stream._prepare(request)
        if self._plan.traits.measure is not None and options.length is None:
            self._measured = self._plan.traits.measure(stream._source)
        if stream._controller is None:  # no decorator has done it
            end_previous(response)
        if options.limit or options.limit_by or options.limit_action or options.busy:
            self._reserve_slot(stream)
        checked = check_headers(response, stream, self._plan.controller)
        method = request.environ["REQUEST_METHOD"]
        if type(stream._source) is StoredFile:
            self._answer_with_file(stream, stream._source, method)
        if method in _RUN_NOTHING:
            self._answer_without_body(stream)
            return
        body = self._open(stream)
        body.file = self._file
        try:
            body.start(self._is_vetoed)
        except BaseException:
            withdraw_answer(response)
            raise
        try:
            if self._plan.spool is None:
                options = self._options  # a file has changed them
                set_headers(response, self._find_exposed, options, self._plan.traits)
            send_off(response, stream, self._plan, checked)
        except BaseException as error:
            body.fail(error, in_request=True)
            raise
        body.announce()

    def _reserve_slot(self, stream: Stream) -> None:
        """Reserve the slot of a stream, unless the decorator has reserved it.

        :raises HTTPException: when the limit is reached.
        :raises ValueError: when the options do not go together.
        """
        name, options = self._plan.controller, self._options
        request = self._tg_locals.request
        try:
            check_limit_is_whole(name, options)
            if stream._slot is None:
                stream._slot = reserve(self._function, name, options, request)
        except BaseException:
            stream._discard()
            raise

    def _answer_with_file(
        self, stream: Stream, stored: StoredFile, method: str
    ) -> None:
        """Set the status and the headers of a file, and send the parts of it."""
        if method != "HEAD" and method in _RUN_NOTHING:
            return
        tg_locals, name = self._tg_locals, self._options.filename
        response = tg_locals.response
        try:
            with remember_answer(response):
                set_file_headers(response, stored, name, self._find_exposed)
                self._set_headers()
                check_headers(response, stream, self._plan.controller)  # for parts, too
                # The content type may be that of several ranges from now on.
                self._options = self._options._replace(charset=None)
                parts = respond_with_file(tg_locals.request, response, stored)
        except BaseException:
            stream._discard()
            withdraw_answer(response)
            raise
        stream._source = self._file = parts
        self._measured = parts.length
        self._plan = self._plan._replace(spool=None)  # it is a file already
        if self._options.compress is None:  # a compressed file cannot be resumed
            self._plan = self._plan._replace(compress=None)

    def _open(self, stream: Stream) -> Body:
        """Make the body, and end the request's transaction by TG's rules."""
        tg_locals = self._tg_locals
        manages = is_tm_enabled(tg_locals)
        database = _make_database(tg_locals.config, manages)
        body = stream._open(
            self._plan,
            self._charset,
            self._declared_length,
            Context(tg_locals)
            if database is None
            else database.make_context(tg_locals),
            database,
            None if self._plan.spool is None else self._respond_with_spool,
        )
        if self._recheck is not None:
            body.recheck = self._recheck
        end_with_request(tg_locals.request.environ, body)
        if database is not None:
            try:
                database.adopt_request_sessions(
                    manages, lambda: self._is_vetoed(tg_locals.response)
                )
            except BaseException:
                body.cancel()
                withdraw_answer(tg_locals.response)
                raise
        return body

    def _answer_without_body(self, stream: Stream) -> None:
        """Answer with the headers alone: those of the stream for HEAD."""
        response = self._tg_locals.response
        stream._discard()
        if self._tg_locals.request.method == "HEAD":
            stream._length = self._declared_length()
            self._set_headers()
        else:
            stream._length = None if has_no_body(response.status) else 0
        send_off(response, stream, self._plan)

    def _set_headers(self) -> None:
        response, traits = self._tg_locals.response, self._plan.traits
        set_headers(response, self._find_exposed, self._options, traits)

    # Called by the body, when it needs them.

    def _find_exposed(self) -> Any:
        return find_exposed(self._function, self._tg_locals)

    def _charset(self) -> str:
        return (
            self._plan.traits.charset
            or self._options.charset
            or self._tg_locals.response.charset
            or find_charset(self._find_exposed()[0])
            or "utf-8"
        )

    def _declared_length(self) -> int | None:
        """The bytes of the whole body, by the option or the response's headers."""
        if self._measured is not None:
            return self._measured
        if self._options.length is not None:
            return self._options.length
        response = self._tg_locals.response
        for name, value in response.headerlist:
            if value != "0" and name.lower() == "content-length":  # TG's own is 0
                length: int | None = response.content_length
                return length or None
        return None

    def _respond_with_spool(self, spool: Spool) -> FileParts:
        """Answer with the whole body, which is made, or with a range of it."""
        response = self._tg_locals.response
        with remember_answer(response):
            self._set_headers()
            content_type = (
                response.headers.get("Content-Type") or self._find_exposed()[0]
            )
            content = Representation(spool.size, f'"{spool.make_etag(content_type)}"')
            return respond_with_file(
                self._tg_locals.request, response, StoredFile(spool, content)
            )

    def _is_vetoed(self, response: Any) -> bool:
        """Whether ``tm.commit_veto`` aborts the transaction for this response."""
        veto = self._tg_locals.config.get("tm.commit_veto")
        if veto is None:
            return False
        environ = self._tg_locals.request.environ
        return bool(veto(environ, response.status, response.headerlist))


_RUN_NOTHING = {"HEAD", "OPTIONS", "TRACE", "CONNECT"}
"""Methods that do not ask for the resource's content, so no generator runs."""


def _make_plan(controller: str, options: Options, config: Any) -> Plan:
    """The given options, completed by the format and by the application.

    Plans without a format are kept, because few different ones are needed. To make one
    takes 2 us. The attributes of a format are read for each stream, because they may
    differ for each, and a plan that is kept would keep the objects of its format.
    """
    get, (size, flush, idle, check, compress) = config.get, _SETTINGS
    values = get(size), get(flush), get(idle), get(check), get(compress)
    try:
        if options.format is None:
            return _keep_plan(controller, options, values)
        settings = _keep_settings(values)
    except TypeError:  # an invalid value that has no hash
        settings = _read_settings(values)
    return _complete_plan(controller, options, settings)


_SETTINGS = (
    "tgstream.chunk_size",
    "tgstream.flush_seconds",
    "tgstream.idle_transaction_seconds",
    "tgstream.disconnect_check_seconds",
    "tgstream.compress",
)


def _read_settings(values: tuple[Any, ...]) -> tuple[Any, ...]:
    given = zip(_SETTINGS, values, strict=True)
    config = {name: value for name, value in given if value is not None}
    return tuple([read_option(config, name) for name in _SETTINGS])


_keep_settings = lru_cache(64)(_read_settings)


@lru_cache(256)
def _keep_plan(controller: str, options: Options, values: tuple[Any, ...]) -> Plan:
    return _complete_plan(controller, options, _keep_settings(values))


def _complete_plan(
    controller: str, options: Options, settings: tuple[Any, ...]
) -> Plan:
    default_size, flush, idle, check, compress = settings
    traits = FormatTraits.of(options.format)
    commit, size = options.commit or traits.commit, options.chunk_size
    if size is None:
        size = traits.chunk_size
    if size is None:
        size = 0 if options.format is None else default_size
    return Plan(
        controller=controller,
        format=options.format,
        traits=traits,
        commit_every=commit if isinstance(commit, int) else int(commit == "each"),
        commit_manually=commit == "manual",
        chunk_size=size,
        flush_seconds=flush if size else 0.0,
        max_seconds=options.max_seconds,
        idle_transaction_seconds=idle,
        disconnect_check_seconds=check,
        compress=_choose_types(options.compress, compress),
    )


def _add_spool(plan: Plan, options: Options, config: Any) -> Plan:
    """The plan of a stream that is spooled.

    A compressed file cannot be resumed, so that only its own option compresses it.

    :raises ValueError: when its format cannot be spooled, or an option is invalid.
    """
    check_spoolable(plan.controller, plan.format)
    directory, max_bytes = (
        read_option(config, f"tgstream.spool_{name}")
        for name in ("directory", "max_bytes")
    )
    return plan._replace(
        spool=SpoolSettings(directory, max_bytes),
        compress=plan.compress if options.compress else None,
    )


def _choose_types(option: bool | None, setting: bool) -> Callable[[str], bool] | None:
    """The content types that a stream compresses, None for no compression."""
    if option is None:
        return is_text if setting else None
    return is_compressible if option else None


def _make_database(config: Any, manages: bool) -> StreamDatabase | None:
    """The stream's sessions and transaction, in an application that has any.

    :param manages: whether a transaction manager runs the request.
    """
    scoped = scoped_sessions(config)
    if not scoped and not manages:
        return None
    database: StreamDatabase = _database_class()(
        tuple([install_registry(session) for session in scoped]),
        asbool(config.get("use_sqlalchemy")),
    )
    return database


@lru_cache
def _database_class() -> Any:
    """Imported where an application has sessions or transactions, and only there."""
    return importlib.import_module("tgstream.database.database").StreamDatabase


def install() -> None:
    """Register the hooks, when TG's configuration is ready or at once if it is."""
    keep_hooks(("before_render", _before_render), ("after_wsgi_middlewares", Guard))
