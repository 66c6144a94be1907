"""The private parts of other packages that tgstream uses: each is there, and works.

A new release may change a private part without notice. The table names each one: the
module that touches it, its use, and what fails without it. Two tests read the code of
tgstream: one finds private names that the table does not have, the other checks that
each name is touched in one module only.

Documented names are not in the table, even if they begin with an underscore.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import socket
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import copy
from functools import cache
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from zipfile import ZIP_DEFLATED, ZipFile
from zlib import crc32

import attrs
import pydantic
import pytest
import redis
import sqlalchemy as sa
import tg
import transaction
import webob.dec
from backlash.tracing.errors.middleware import TraceErrorsMiddleware
from gunicorn.http.wsgi import default_environ  # type: ignore[import-untyped]
from psycopg import connect
from psycopg.pq import TransactionStatus
from psycopg2.extensions import TRANSACTION_STATUS_INERROR
from repoze.who.middleware import PluggableAuthenticationMiddleware
from repoze.who.plugins.auth_tkt import AuthTktCookiePlugin
from sqlalchemy.engine import result_tuple
from sqlalchemy.orm import (
    Session,
    load_only,
    registry,
    scoped_session,
    sessionmaker,
)
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.sql import visitors
from sqlalchemy.sql.selectable import ForUpdateArg
from stream_unzip import stream_unzip
from tg import TGController, expose, require
from tg.configuration import AppConfig, milestones
from tg.decorators import Decoration
from tg.predicates import not_anonymous
from tg.renderers.genshi import GenshiRenderer
from tg.renderers.jinja import JinjaRenderer
from tg.renderers.kajiki import KajikiRenderer
from tg.support.objectproxy import TurboGearsObjectProxy
from tg.support.registry import Registry, RegistryManager, StackedObjectProxy
from tg.wsgiapp import TGApp
from transaction.interfaces import TransientError
from transaction.weakset import WeakSet
from waitress.channel import HTTPChannel
from waitress.task import WSGITask
from webob import Response
from webob.exc import HTTPUnauthorized
from webob.request import LimitedLengthFile
from zipstream import ZipStream
from zipstream.ng import ZipStreamInfo
from zope.sqlalchemy import datamanager, mark_changed, register
from zope.sqlalchemy.datamanager import SessionDataManager

import tgstream
from tests.conftest import MakeApp
from tests.wsgi import get

FOLDER = Path(tgstream.__file__).parent


class Part(NamedTuple):
    """A private part of another package.

    :param name: the name as it stands in the code of tgstream.
    :param package: the package that it belongs to.
    :param module: the module of tgstream that touches it.
    :param use: the purpose for which tgstream needs it.
    :param breaks: the consequence for users if it changes.
    :param check: returns True if it still does what tgstream needs. Its parameters are
        fixtures.
    """

    name: str
    package: str
    module: str
    use: str
    breaks: str
    check: Callable[..., bool]


# TurboGears.


def hooks_are_lists_by_name(make_app: MakeApp) -> bool:
    make_app(TGController())  # hooks are registered when TG is configured
    hook: Callable[[], None] = lambda: None  # noqa: E731
    tg.hooks.register("tgstream.test", hook)
    registered = tg.hooks._hooks.get("tgstream.test") == [hook]
    tg.hooks.disconnect("tgstream.test", hook)
    return registered and not tg.hooks._hooks.get("tgstream.test")


def stack_is_a_list_of_the_thread() -> bool:
    proxy = StackedObjectProxy(name="test")
    proxy._push_object("first")
    stack = proxy.____local__.objects
    stack.append(("second", False))
    seen = [proxy._current_obj()]
    stack.pop()
    seen.append(proxy._current_obj())
    proxy._pop_object("first")
    is_local = isinstance(proxy.____local__, threading.local)
    return is_local and stack == [] and seen == ["second", "first"]


class Registered:
    """Records what a registry calls."""

    _is_preserved = False

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def _push_object(self, value: Any) -> None:
        self.calls.append(("push", value))

    def _pop_object(self, value: Any) -> None:
        self.calls.append(("pop", value))


def registry_calls_what_it_cleans_up() -> bool:
    registered, environs = Registered(), []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environs.append(environ)
        environ["paste.registry"].register(registered, 1)
        return []

    list(RegistryManager(app)({}, None))
    return registered.calls == [("push", 1), ("pop", 1)]


def registry_lists_its_requests() -> bool:
    of_request = Registry()
    of_request.prepare()
    return len(of_request.reglist) == 1


def root_controller_is_an_entry() -> bool:
    app, root = object.__new__(TGApp), object()
    app.controller_instances = {"root": root}
    return app._get_controller_instance("root") is root


def wrapper_is_called_with_the_caller() -> bool:
    def page(self: Any) -> None:
        pass

    decoration = Decoration.get_decoration(page)
    caller = decoration.controller_caller
    decoration._register_controller_wrapper(lambda inner: ("wrapped", inner))
    return bool(decoration.controller_caller == ("wrapped", caller))


def milestone_calls_again_after_a_reset() -> bool:
    calls: list[int] = []
    milestone = type(milestones.config_ready)("test")
    milestone.register(lambda: calls.append(1), persist_on_reset=True)
    for _ in range(2):
        milestone.reach()
        milestone._reset()
    return calls == [1, 1]


def requirement_is_a_hook_of_its_method() -> bool:
    requirement = require(not_anonymous())
    page = requirement(lambda self: None)
    hook: Any
    [hook] = Decoration.get_decoration(page).hooks["before_call"]
    return bool(hook == requirement._check_authorization)


def controller_checks_its_allow_only(make_app: MakeApp) -> bool:
    class Protected(TGController):
        allow_only = not_anonymous()

    def look() -> Any:
        with pytest.raises(HTTPUnauthorized):
            Protected()._check_security()
        return TGController()._check_security()

    return in_request(make_app, look)["result"] is True


def api_identifies_a_copy_of_the_request() -> bool:
    plugin: Any = AuthTktCookiePlugin("secret")
    environ = webob.Request.blank("/").environ
    [(_, cookie), *_] = plugin.remember(environ, {"repoze.who.userid": "ada"})
    environs = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environs.append(environ)
        start_response("200 OK", [])
        return []

    named = [("cookie", plugin)]
    who = PluggableAuthenticationMiddleware(
        app, named, named, [], [], lambda _: "", lambda *_: False
    )
    webob.Request.blank("/", headers={"Cookie": cookie}).get_response(who)
    [environ] = environs
    api, copied = copy(environ["repoze.who.api"]), environ.copy()
    del copied[api.remote_user_key]
    is_named = "authenticator" in copied.pop("repoze.who.identity")
    api.environ = copied
    is_identified = api.authenticate()["repoze.who.userid"] == "ada"
    return bool(is_identified and is_named and copied["REMOTE_USER"] == "ada")


def session_keeps_its_options(make_app: MakeApp) -> bool:
    def look() -> Any:
        session = tg.session._current_obj()
        return type(session)({}, **session.__dict__["_params"]).accessed()

    options = {"session__enabled": True, "session__type": "memory"}
    return in_request(make_app, look, **options)["result"] is False


def context_leaves_the_environ(make_app: MakeApp) -> bool:
    seen = in_request(make_app, lambda: "tg.locals" in tg.request.environ)
    return seen["result"] is True and "tg.locals" not in seen["environ"]


def template_has_variables(make_app: MakeApp) -> bool:
    from tg.render import _get_tg_vars

    variables = in_request(make_app, _get_tg_vars)["result"]
    return {"tg", "h", "tmpl_context"} <= {*variables}


def engine_of_a_controller_is_found(make_app: MakeApp) -> bool:
    def look() -> Any:
        action = Decoration.get_decoration(tg.request.dispatch_state.action.__func__)
        return action.lookup_template_engine(tg.request_local.context._current_obj())

    return bool(in_request(make_app, look)["result"][0] == "text/plain")


def flash_has_its_payload(make_app: MakeApp) -> bool:
    def look() -> Any:
        tg.flash("hello")
        return tg.request.environ["webflash.payload"]

    is_payload = "hello" in in_request(make_app, look)["result"]
    return is_payload and tg.flash.cookie_name == "webflash"


def renderers_are_in_the_configuration(make_app: MakeApp) -> bool:
    seen = in_request(make_app, lambda: [*tg.config["render_functions"]])
    return "json" in seen["result"]


def slow_requests_are_configured(make_app: MakeApp) -> bool:
    seen = in_request(
        make_app,
        lambda: dict(tg.config["tg.slowreqs"]),
        trace_slowreqs__enable=True,
        trace_slowreqs__exclude=["/feed"],
    )["result"]
    return (seen["enable"], [*seen["exclude"]]) == (True, ["/feed"])


def debugbar_has_an_engine() -> bool:
    # Read and not imported, because an import starts to record queries.
    distribution = metadata.distribution("tgext.debugbar")
    code = Path(str(distribution.locate_file("tgext/debugbar/initialize.py")))
    return "conf['debugbar.engine'] =" in code.read_text()


def in_request(
    make_app: MakeApp, look: Callable[[], Any], **options: Any
) -> dict[str, Any]:
    """Call a function in a request: its result, and the environ of the request."""
    seen: dict[str, Any] = {}

    class Root(TGController):
        @expose(content_type="text/plain")
        def index(self) -> str:
            seen["result"] = look()
            return ""

    seen["environ"] = get(make_app(Root(), **options)).environ
    return seen


def json_encoder_has_its_types() -> bool:
    types = tg.jsonify._default_encoder._registered_types_list
    return isinstance(types, tuple) and not isinstance({}, types)


def old_configurator_has_a_new_one() -> bool:
    inner = AppConfig()._configurator
    return callable(inner.update_blueprint) and callable(inner.register)


class Template:
    """A template of any engine, which records what its renderer calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, *args: Any, **options: Any) -> Template:
        self.calls.append(str(args[0]) if args else "")
        return self

    load = get_template = load_template = generate = __call__

    def render(self, *args: Any, **options: Any) -> str:
        return "text"


def kajiki_is_loaded_by_its_loader() -> bool:
    renderer, loader = object.__new__(KajikiRenderer), Template()
    renderer.loader = loader
    is_known = KajikiRenderer.__call__.__module__ == "tg.renderers.kajiki"
    return is_known and renderer("page", {}) == "text" and loader.calls[0] == "page"


def jinja_is_loaded_by_its_environment() -> bool:
    renderer, environment = object.__new__(JinjaRenderer), Template()
    renderer.jinja2_env = environment
    is_known = JinjaRenderer.__call__.__module__ == "tg.renderers.jinja"
    return is_known and renderer("page", {}) == "text" and "page" in environment.calls


def genshi_is_loaded_by_its_method() -> bool:
    source = inspect.getsource(GenshiRenderer)
    is_known = GenshiRenderer.__call__.__module__ == "tg.renderers.genshi"
    calls = "self.load_template(template_name)", "template.generate(**", "encoding=None"
    return is_known and all(call in source for call in calls)


TURBOGEARS = [
    Part(
        "____local__",
        "TurboGears2",
        "core/context",
        "bind the request's context around each pull, at the cost of a list.append()",
        "tg.request is missing in generators, or belongs to another user",
        stack_is_a_list_of_the_thread,
    ),
    Part(
        "_push_object",
        "TurboGears2",
        "core/context",
        "make the stack of a thread that has none yet",
        "the first stream of a thread fails",
        stack_is_a_list_of_the_thread,
    ),
    Part(
        "_pop_object",
        "TurboGears2",
        "core/context",
        "make the stack of a thread that has none yet",
        "the first stream of a thread fails",
        stack_is_a_list_of_the_thread,
    ),
    Part(
        "_current_obj",
        "TurboGears2",
        "core/context",
        "get the request's context and the object behind a proxy",
        "no stream starts",
        stack_is_a_list_of_the_thread,
    ),
    Part(
        "_hooks",
        "TurboGears2",
        "core/report",
        "call the hooks of a stream, and make no report if no hook receives it",
        "the hooks tgstream.started and tgstream.finished are not called",
        hooks_are_lists_by_name,
    ),
    Part(
        "TurboGearsObjectProxy",
        "TurboGears2",
        "core/source",
        "recognise tg.response and other proxies that a controller returns",
        "a controller that returns tg.response is streamed as an iterable",
        lambda: issubclass(type(tg.response), TurboGearsObjectProxy),
    ),
    Part(
        "paste.registry",
        "TurboGears2",
        "turbogears/response",
        "be called when the request is cleaned up, and clean it up before streaming",
        "streams of failed requests stay open, and threads keep a request's context",
        registry_calls_what_it_cleans_up,
    ),
    Part(
        "reglist",
        "TurboGears2",
        "doctor/client",
        "clean up only the registry of the doctor itself",
        "the doctor fails, or hides a missing clean-up",
        registry_lists_its_requests,
    ),
    Part(
        "_get_controller_instance",
        "TurboGears2",
        "doctor/loader",
        "import the root controllers, as the first request does",
        "the doctor misses errors of controllers",
        root_controller_is_an_entry,
    ),
    Part(
        "controller_instances",
        "TurboGears2",
        "doctor/probe",
        "answer the doctor's requests in place of the root controller",
        "the doctor runs the application's controllers",
        root_controller_is_an_entry,
    ),
    Part(
        "_check_authorization",
        "TurboGears2",
        "turbogears/permissions",
        "evaluate the @require of a controller again",
        "recheck_seconds fails, or a user without permission keeps a stream",
        requirement_is_a_hook_of_its_method,
    ),
    Part(
        "_check_security",
        "TurboGears2",
        "turbogears/permissions",
        "evaluate the allow_only of a controller again",
        "recheck_seconds fails, or a user without permission keeps a stream",
        controller_checks_its_allow_only,
    ),
    Part(
        "repoze.who.api",
        "repoze.who",
        "turbogears/permissions",
        "identify the user again, by the cookie or the headers of the request",
        "a login that has timed out keeps a stream with recheck_seconds",
        api_identifies_a_copy_of_the_request,
    ),
    Part(
        "_params",
        "Beaker",
        "turbogears/permissions",
        "load tg.session again when a predicate reads it again",
        "a session that was deleted keeps a stream with recheck_seconds",
        session_keeps_its_options,
    ),
    Part(
        "tg.locals",
        "TurboGears2",
        "turbogears/guard",
        "give tg.caching the context that TG has removed from the environ",
        "cached functions fail in a generator after the first chunk",
        context_leaves_the_environ,
    ),
    Part(
        "_get_tg_vars",
        "TurboGears2",
        "turbogears/templates",
        "give streamed templates the variables that TG gives to others",
        "render() fails",
        template_has_variables,
    ),
    Part(
        "render_functions",
        "TurboGears2",
        "turbogears/templates",
        "find the renderer of a template",
        "render() fails",
        renderers_are_in_the_configuration,
    ),
    Part(
        "renderer.loader",
        "TurboGears2",
        "turbogears/templates",
        "load a Kajiki template as TG does, and iterate it",
        "render() fails with Kajiki",
        kajiki_is_loaded_by_its_loader,
    ),
    Part(
        "renderer.jinja2_env",
        "TurboGears2",
        "turbogears/templates",
        "load a Jinja2 template as TG does, and iterate it",
        "render() fails with Jinja2",
        jinja_is_loaded_by_its_environment,
    ),
    Part(
        "renderer.load_template",
        "TurboGears2",
        "turbogears/templates",
        "let TG choose the doctype and method of a Genshi template that is iterated",
        "render() fails with Genshi, or sends another doctype",
        genshi_is_loaded_by_its_method,
    ),
    Part(
        "webflash.payload",
        "TurboGears2",
        "turbogears/templates",
        "buffer a page up to its flash message, whose cookie is deleted by a header",
        "a flash message is shown again on the next page",
        flash_has_its_payload,
    ),
    Part(
        "lookup_template_engine",
        "TurboGears2",
        "turbogears/decorator",
        "get the content type of @expose before TG sets it",
        "streams have the wrong Content-Type or charset",
        engine_of_a_controller_is_found,
    ),
    Part(
        "_register_controller_wrapper",
        "TurboGears2",
        "turbogears/decorator",
        "call @stream around the controller, above and below @expose",
        "@stream fails at import",
        wrapper_is_called_with_the_caller,
    ),
    Part(
        "milestones",
        "TurboGears2",
        "core/hooks",
        "register the hooks again after tests have reset TG",
        "no stream starts in the second application of a test suite",
        milestone_calls_again_after_a_reset,
    ),
    Part(
        "tg.slowreqs",
        "TurboGears2",
        "turbogears/diagnostics",
        "know whether slow requests are reported, and which paths are excluded",
        "no warning explains that each long stream is reported as a slow request",
        slow_requests_are_configured,
    ),
    Part(
        "debugbar.engine",
        "tgext.debugbar",
        "turbogears/diagnostics",
        "know whether the debugbar records queries",
        "no warning explains why the memory of a long stream grows",
        debugbar_has_an_engine,
    ),
    Part(
        "_default_encoder",
        "TurboGears2",
        "formats/json_encoder",
        "encode values as the application's json.* options and encoders do",
        "NDJSON, JSONArray and SSE fail, or ignore custom encoders",
        json_encoder_has_its_types,
    ),
    Part(
        "_registered_types_list",
        "TurboGears2",
        "formats/json_encoder",
        "use orjson only without custom encoders",
        "NDJSON, JSONArray and SSE fail, or ignore custom encoders",
        json_encoder_has_its_types,
    ),
    Part(
        "_configurator",
        "TurboGears2",
        "turbogears/plug",
        "plug tgstream into an AppConfig, which older applications have",
        "plugme() fails in older applications",
        old_configurator_has_a_new_one,
    ),
]


# WebOb, and what is around an application.


def wrapper_of_the_input_is_known() -> bool:
    file = io.BytesIO(b"body")
    raw = io.BufferedReader(LimitedLengthFile(file, 4)).raw
    if not isinstance(raw, LimitedLengthFile):
        return False
    is_unread = raw.remaining == raw.maxlen == 4 and raw.file is file
    raw.read(1)
    return is_unread and raw.remaining == 3


def response_calls_its_new_class() -> bool:
    class Streamed(Response):
        def __call__(self, environ: Any, start_response: Any) -> Any:
            return ["streamed"]

    response: Any = Response()
    response.__class__ = Streamed
    return bool(response({}, None) == ["streamed"])


def response_keeps_its_body_in_a_list() -> bool:
    response: Any = Response()
    response.app_iter = iter([b"streamed"])
    response._app_iter = []
    return bool(response.app_iter == [] and response.body == b"")


def wsgify_is_called_in_its_module() -> bool:
    wsgify: Any = webob.dec.wsgify
    called = wsgify.__call__
    is_known = (called.__module__, called.__name__) == ("webob.dec", "__call__")
    return is_known and wsgify(print).func is print


def running_generator_raises() -> bool:
    def running() -> Iterator[None]:
        generator.close()
        yield

    generator: Any = running()
    with pytest.raises(ValueError, match="generator already executing"):
        next(generator)
    return True


def nan_is_named() -> bool:
    with pytest.raises(ValueError, match="JSON compliant"):
        json.dumps(float("nan"), allow_nan=False)
    return True


AROUND = [
    Part(
        "LimitedLengthFile",
        "WebOb",
        "core/source",
        "read a request body as it arrives, past a wrapper that waits for whole blocks",
        "an upload is read in blocks, so that progress arrives late",
        wrapper_of_the_input_is_known,
    ),
    Part(
        "remaining",
        "WebOb",
        "core/source",
        "know that nothing of the request body has been read",
        "an upload that was read in part is read from the wrong place",
        wrapper_of_the_input_is_known,
    ),
    Part(
        "maxlen",
        "WebOb",
        "core/source",
        "know that nothing of the request body has been read",
        "an upload that was read in part is read from the wrong place",
        wrapper_of_the_input_is_known,
    ),
    Part(
        "response.__class__",
        "WebOb",
        "turbogears/response",
        "release the request when TG calls the response",
        "the request's session stays on the thread while the response streams",
        response_calls_its_new_class,
    ),
    Part(
        "response._app_iter",
        "WebOb",
        "turbogears/response",
        "let go of a stream that has left, without the cost of WebOb's property",
        "a dropped stream waits for the garbage collector",
        response_keeps_its_body_in_a_list,
    ),
    Part(
        "webob.dec",
        "WebOb",
        "turbogears/diagnostics",
        "recognise a middleware that is made with wsgify",
        "a warning about a buffering middleware names the wrong one",
        wsgify_is_called_in_its_module,
    ),
    Part(
        "headers were already sent",
        "backlash",
        "turbogears/guard",
        "notice that backlash has swallowed a stream's error, without an error guard",
        "a failed stream looks complete in an application without the error guard",
        lambda: (
            "headers were already '\n                'sent"
            in inspect.getsource(TraceErrorsMiddleware)
        ),
    ),
    Part(
        "reporters",
        "backlash",
        "doctor/probe",
        "send no error report for a stream that fails on purpose",
        "the doctor sends mail to the administrators",
        lambda: TraceErrorsMiddleware(None, ["mail"], []).reporters == ["mail"],
    ),
    Part(
        "gunicorn.socket",
        "gunicorn",
        "core/monitor",
        "notice that a client has disconnected, disconnect one that does not read, and "
        "close the connection of a client after drain()",
        "the stream of a client that has disconnected runs until its next write, end() "
        "does not free the thread of a client that does not read, and gunicorn keeps "
        "the connections of clients while it stops",
        lambda: (
            default_environ(
                SimpleNamespace(body=None, method="", query="", uri="", version=(1, 1)),
                "socket",
                SimpleNamespace(
                    errorlog="-", is_ssl=False, workers=1, worker_class_str="gthread"
                ),
            )["gunicorn.socket"]
            == "socket"
        ),
    ),
    Part(
        "waitress.client_disconnected",
        "waitress",
        "core/monitor",
        "find the socket, which shows that a client has disconnected",
        "a client that reloads a page is refused until its old stream ends",
        lambda: (
            "self.channel.check_client_disconnected"
            in inspect.getsource(WSGITask.get_environment)
            and "self.socket = sock" in inspect.getsource(HTTPChannel.set_socket)
        ),
    ),
    Part(
        "generator already executing",
        "Python",
        "turbogears/guard",
        "close a response whose generator another thread runs",
        "the server logs an error when a client disconnects",
        running_generator_raises,
    ),
    Part(
        "JSON compliant",
        "Python",
        "formats/json_encoder",
        "name the item that contains NaN",
        "the error does not say what to do",
        nan_is_named,
    ),
    Part(
        "__attrs_attrs__",
        "attrs",
        "formats/fields",
        "get the fields of an attrs class without importing attrs",
        "attrs classes cannot be items",
        lambda: vars(attrs.make_class("Item", ["x"]))["__attrs_attrs__"][0].name == "x",
    ),
    Part(
        "__pydantic_validator__",
        "pydantic",
        "formats/fields",
        "recognise a pydantic model without importing pydantic",
        "pydantic models cannot be items",
        lambda: hasattr(pydantic.create_model("Item"), "__pydantic_validator__"),
    ),
]


# transaction and zope.sqlalchemy.


class DataManager:
    """Takes part in a transaction, and records its status while that commits."""

    transaction_manager = None

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.status = fails, ""

    def tpc_begin(self, txn: Any) -> None:
        self.status = txn.status
        if self.fails:
            raise ValueError

    def nothing(self, txn: Any) -> None:
        """Take part."""

    abort = commit = tpc_vote = tpc_finish = tpc_abort = nothing

    def sortKey(self) -> str:
        return ""


def transaction_keeps_its_data_managers() -> bool:
    txn, joined = transaction.TransactionManager().get(), DataManager()
    txn.join(joined)
    return bool(txn._resources == [joined])


def manager_has_three_attributes() -> bool:
    manager = transaction.TransactionManager()
    return {*vars(manager)} == {"explicit", "_txn", "_synchs"}


def manager_keeps_its_transaction() -> bool:
    manager = transaction.TransactionManager()
    return manager._txn is None and bool(manager.get() is manager._txn)


def synchronizers_are_a_weak_set() -> bool:
    synchs = transaction.TransactionManager()._synchs
    return isinstance(synchs, WeakSet) and not synchs


def manager_decides_on_a_retry() -> bool:
    class Manager(transaction.TransactionManager):
        def _retryable(self, error_type: Any, error: Any) -> bool:
            return isinstance(error, KeyError)

    txn = Manager().get()
    answers = [txn.isRetryableError(error) for error in (KeyError(), ValueError())]
    return answers == [True, False]


def transaction_takes_an_answer() -> bool:
    txn = transaction.TransactionManager().get()
    before = txn.isRetryableError(TransientError())
    txn.isRetryableError = lambda error: False
    return before and not txn.isRetryableError(TransientError())


def thread_has_a_manager_to_replace() -> bool:
    threads, other = (
        transaction.ThreadTransactionManager(),
        transaction.TransactionManager(),
    )
    was = threads.__dict__["manager"]
    threads.__dict__["manager"] = other
    is_used = threads.get() is other.get() and threads.manager is other
    return is_used and was is not other


def transaction_has_the_status(status: str) -> Callable[[], bool]:
    def check() -> bool:
        manager = transaction.TransactionManager()
        joined = DataManager(fails=status == "Commit failed")
        txn = manager.get()
        txn.join(joined)
        try:
            txn.commit()
        except ValueError:
            assert joined.fails
        return status == (joined.status if status == "Committing" else txn.status)

    return check


def parked_session_joins_nothing_else() -> bool:
    engine = sa.create_engine("sqlite://")
    DBSession = scoped_session(sessionmaker(bind=engine))
    register(DBSession)
    parked, session = transaction.TransactionManager(), DBSession()
    mark_changed(session, parked, keep_session=True)
    session.rollback()
    session.execute(sa.text("SELECT 1"))
    is_joined = len(parked.get()._resources) == 1
    is_joined_elsewhere = bool(transaction.get()._resources)
    parked.abort()
    DBSession.remove()
    engine.dispose()
    return is_joined and not is_joined_elsewhere


def joined_session_has_a_state() -> bool:
    engine = sa.create_engine("sqlite://")
    DBSession = scoped_session(sessionmaker(bind=engine))
    register(DBSession)
    session = DBSession()
    states = [session in datamanager._SESSION_STATE]
    session.execute(sa.text("SELECT 1"))
    states.append(session in datamanager._SESSION_STATE)
    transaction.abort()
    states.append(session in datamanager._SESSION_STATE)
    DBSession.remove()
    engine.dispose()
    return states == [False, True, False]


TRANSACTIONS = [
    Part(
        "_resources",
        "transaction",
        "database/transaction",
        "know which data managers take part in a transaction",
        "failed commits are retried wrongly, and a request's transaction is not ended",
        transaction_keeps_its_data_managers,
    ),
    Part(
        "_txn",
        "transaction",
        "database/transaction",
        "know whether a transaction has begun, without beginning one",
        "a stream that does not use the database begins transactions",
        manager_keeps_its_transaction,
    ),
    Part(
        "explicit",
        "transaction",
        "database/transaction",
        "make a manager for each stream without calling its base's __init__()",
        "an attribute is missing in the transaction manager of a stream",
        manager_has_three_attributes,
    ),
    Part(
        "_synchs",
        "transaction",
        "database/transaction",
        "make a set of synchronizers only if one registers",
        "transaction.manager.registerSynch() fails in a generator",
        synchronizers_are_a_weak_set,
    ),
    Part(
        "_retryable",
        "transaction",
        "database/transaction",
        "retry a stream's own commit as zope.sqlalchemy would",
        "transaction.attempts() in a generator does not retry",
        manager_decides_on_a_retry,
    ),
    Part(
        "isRetryableError",
        "transaction",
        "database/transaction",
        "let tm.attempts not run a controller again whose changes are committed",
        "a controller runs twice, and its changes are stored twice",
        transaction_takes_an_answer,
    ),
    Part(
        "manager.manager",
        "transaction",
        "database/database",
        "get and replace the transaction manager of the thread",
        "the generator's changes take part in another transaction",
        thread_has_a_manager_to_replace,
    ),
    Part(
        "manager.__dict__",
        "transaction",
        "database/context",
        "replace the transaction manager of the thread without a look-up per pull",
        "the generator's changes take part in another transaction",
        thread_has_a_manager_to_replace,
    ),
    *(
        Part(
            status,
            "transaction",
            "database/transaction_messages",
            "know whether an event can still join the transaction",
            "an event that is published in a hook is lost, or sent too early",
            transaction_has_the_status(status),
        )
        for status in ("Committing", "Committed", "Commit failed")
    ),
    Part(
        "mark_changed",
        "zope.sqlalchemy",
        "database/transaction",
        "keep zope.sqlalchemy from joining a stream's session to a transaction",
        "zope.sqlalchemy closes the session at each commit",
        parked_session_joins_nothing_else,
    ),
    Part(
        "_SESSION_STATE",
        "zope.sqlalchemy",
        "database/transaction",
        "commit a joined session that has written nothing but an event",
        "an event of database:// is not stored in a transaction that only reads",
        joined_session_has_a_state,
    ),
    Part(
        "SessionDataManager",
        "zope.sqlalchemy",
        "database/transaction",
        "retry the errors that zope.sqlalchemy retries, for any session",
        "transaction.attempts() in a generator does not retry",
        lambda: (
            SessionDataManager.should_retry(object(), StaleDataError()) is True
            and not SessionDataManager.should_retry(object(), ValueError())
        ),
    ),
]


# SQLAlchemy.

TABLE = sa.table("t", sa.column("a"))
SELECT = sa.select(TABLE)
mapped = registry()


@mapped.mapped
class Item:
    __table__ = sa.Table(
        "item", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True)
    )


def session_keeps_its_binds() -> bool:
    binds: Any = {Item: sa.create_engine("sqlite://")}
    session = Session(binds=binds)
    # SQLAlchemy 2.1 has a public name, and 2.0 has not.
    by_class: Any = getattr(session, "binds", None) or vars(session)["_Session__binds"]
    return binds[Item] in by_class.values()


def session_says_that_it_flushes() -> bool:
    class Routing(Session):
        def get_bind(self, *args: Any, **options: Any) -> Any:
            return self._flushing

    session = Routing()
    found = [session.get_bind()]
    session._flushing = True
    return [*found, session.get_bind()] == [False, True]


def is_set(value: Any) -> bool:
    return value is not None and value is not False and value != ()


def clause_is_set_only(slot: str, statement: Any) -> Callable[[], bool]:
    """Whether a slot is empty in a SELECT, and is set by a clause."""

    def check() -> bool:
        empty, full = getattr(SELECT, slot), getattr(statement, slot)
        return is_set(full) and not is_set(empty)

    return check


def text_is_kept(name: str, statement: Any) -> Callable[[], bool]:
    def check() -> bool:
        texts = getattr(statement, name)
        values = texts.values() if isinstance(texts, dict) else texts
        return "XX" in str([str(part) for value in values for part in _flat(value)])

    return check


def _flat(value: Any) -> Any:
    return value if isinstance(value, tuple) else (value,)


def commit_expires_attributes() -> bool:
    item: Any = Item()
    state = sa.inspect(item)
    is_state = item._sa_instance_state is state
    engine = sa.create_engine("sqlite://")
    Item.__table__.metadata.create_all(engine)
    with Session(engine) as session:
        item.id = 1
        session.add(item)
        session.commit()
        expired = set(item._sa_instance_state.expired_attributes)
        states = list(session.identity_map.all_states())
    engine.dispose()
    return is_state and expired == {"id"} and states == [state]


def execution_does_not_call_the_attribute() -> bool:
    engine = sa.create_engine("sqlite://")
    calls: list[int] = []
    with Session(engine) as session:
        vars(session)["connection"] = lambda *args: calls.append(1)
        session.execute(sa.text("SELECT 1"))
        has_run = session.in_transaction() and not calls
    engine.dispose()
    return has_run


def registry_makes_sessions() -> bool:
    maker = sessionmaker()
    scoped: scoped_session[Session] = scoped_session(maker)
    replaced: Any = SimpleNamespace(has=lambda: True)
    is_maker = scoped.registry.createfunc is maker
    scoped.registry = replaced
    return is_maker and scoped.registry.has()


CLAUSES = {
    "_order_by_clauses": SELECT.order_by("a"),
    "_limit_clause": SELECT.limit(1),
    "_offset_clause": SELECT.offset(1),
    "_fetch_clause": SELECT.fetch(1),
    "_distinct": SELECT.distinct(),
    "_group_by_clauses": SELECT.group_by("a"),
    "_having_criteria": SELECT.having(sa.true()),
}
TEXTS = {
    "_prefixes": SELECT.prefix_with("XX"),
    "_suffixes": SELECT.suffix_with("XX"),
    "_hints": SELECT.with_hint(TABLE, "XX"),
    "_statement_hints": SELECT.with_statement_hint("XX"),
}
SQLALCHEMY = [
    Part(
        "_Session__binds",
        "SQLAlchemy",
        "database/engines",
        "get the engines of a session that has one for each class",
        "a stream on an in-memory SQLite database is not warned about",
        session_keeps_its_binds,
    ),
    Part(
        "_flushing",
        "SQLAlchemy",
        "database/engines",
        "get the engine that a session writes to, which TG's BalancedSession chooses",
        "database:// may use a replica",
        session_says_that_it_flushes,
    ),
    *(
        Part(
            slot,
            "SQLAlchemy",
            "exports/keyset",
            "reject a statement that has its own order or limit",
            "rows(key=...) skips or repeats rows without an error",
            clause_is_set_only(slot, statement),
        )
        for slot, statement in CLAUSES.items()
    ),
    *(
        Part(
            name,
            "SQLAlchemy",
            "database/effects",
            "find locks and other effects in the text of a statement",
            "rows(key=...) ends a transaction that holds a lock",
            text_is_kept(name, statement),
        )
        for name, statement in TEXTS.items()
    ),
    Part(
        "ForUpdateArg",
        "SQLAlchemy",
        "database/effects",
        "find with_for_update() in a statement",
        "rows(key=...) ends a transaction that holds a lock",
        lambda: any(
            isinstance(part, ForUpdateArg)
            for part in visitors.iterate(SELECT.with_for_update())
        ),
    ),
    Part(
        "packagenames",
        "SQLAlchemy",
        "database/effects",
        "distinguish a known function from one of another schema",
        "rows(key=...) ends a transaction that a function has changed",
        lambda: [*sa.func.schema.lower("A").packagenames] == ["schema"],
    ),
    Part(
        "is_literal",
        "SQLAlchemy",
        "database/effects",
        "find SQL text in literal_column()",
        "rows(key=...) ends a transaction that SQL text has changed",
        lambda: sa.literal_column("1").is_literal and not sa.column("a").is_literal,
    ),
    Part(
        "_with_options",
        "SQLAlchemy",
        "exports/statement",
        "reject options that apply to objects, which rows() does not make",
        "rows() ignores joinedload() and load_only()",
        lambda: len(SELECT.options(load_only(Item.id))._with_options) == 1,  # type: ignore[attr-defined]
    ),
    Part(
        "_autoflush",
        "SQLAlchemy",
        "exports/statement",
        "find out whether Query.autoflush(False) was called",
        "rows() flushes the session in spite of it",
        lambda: not Session().query(Item).autoflush(False).load_options._autoflush,
    ),
    Part(
        "result_tuple",
        "SQLAlchemy",
        "exports/statement",
        "make rows without the columns of a key, or with converted values",
        "rows(key=...) fails if the key is not selected, and rows(convert=...) fails",
        lambda: result_tuple(["a"])((1,)).a == 1,
    ),
    Part(
        "hash",
        "SQLAlchemy",
        "exports/keyset_columns",
        "find the column of a key among the selected columns",
        "rows(key=...) selects the key twice, which is slower",
        lambda: hash(Item.id.expression) == hash(Item.__table__.c.id),  # type: ignore[attr-defined]
    ),
    Part(
        "_sa_instance_state",
        "SQLAlchemy",
        "formats/fields",
        "load the expired attributes of an object before it becomes JSON",
        "an object has no fields in JSON after a commit",
        commit_expires_attributes,
    ),
    Part(
        "all_states",
        "SQLAlchemy",
        "database/transaction",
        "expire at a commit only the objects that were used since the last one",
        "each commit of commit='each' takes longer than the one before",
        commit_expires_attributes,
    ),
    Part(
        "session.connection",
        "SQLAlchemy",
        "database/transaction",
        "notice that the application uses the connection of its session directly",
        "rows(key=...) ends a transaction that holds more than reads",
        execution_does_not_call_the_attribute,
    ),
    Part(
        "createfunc",
        "SQLAlchemy",
        "database/registry",
        "make a stream's own session, and replace the registry of a scoped session",
        "DBSession in a generator is the session of the thread",
        registry_makes_sessions,
    ),
    Part(
        "sqlalchemy.dialects.postgresql.base",
        "SQLAlchemy",
        "exports/server_side_cursor",
        "recognise dialects that derive from PostgreSQL's, without importing it",
        "rows() fails on such a database with AUTOCOMMIT",
        lambda: issubclass(
            sa.make_url("postgresql+psycopg://").get_dialect(),
            sys.modules["sqlalchemy.dialects.postgresql.base"].PGDialect,
        ),
    ),
]


# psycopg.


def copied_lines_are_read_without_waiting(postgresql: str) -> bool:
    options = sa.make_url(postgresql)
    with (
        connect(host=str(options.query["host"]), user="postgres") as connection,
        connection.cursor() as cursor,
        cursor.copy("COPY (SELECT generate_series(1, 3)) TO STDOUT") as lines,
    ):
        seen, count = [bytes(lines.read())], 0
        while not count:
            connection.pgconn.consume_input()
            count, line = connection.pgconn.get_copy_data(1)
        seen.append(bytes(line))
        seen += map(bytes, lines)
    return seen == [b"1\n", b"2\n", b"3\n"]


PSYCOPG = [
    Part(
        "get_copy_data",
        "psycopg",
        "exports/copy",
        "take the lines of a COPY that have arrived, without a Python call for each",
        "copy() fails, or is as slow as rows()",
        copied_lines_are_read_without_waiting,
    ),
    Part(
        "transaction_status",
        "psycopg",
        "database/transaction",
        "know that PostgreSQL will roll back at COMMIT",
        "a commit that stored nothing is reported as done",
        lambda: TransactionStatus.INERROR == TRANSACTION_STATUS_INERROR == 3,
    ),
]


# zipstream-ng.


def make_member(zip64: bool) -> tuple[Any, bytes]:
    """A member whose sizes stand behind its data, and its bytes."""
    info, data = ZipStreamInfo("a.txt", (1980, 1, 1, 0, 0, 0)), b"KI,I\4\0"
    info.compress_type, info.flag_bits, info.header_offset = ZIP_DEFLATED, 8, 0
    info.CRC, info.file_size, info.compress_size = crc32(b"data"), 4, len(data)
    return info, info.FileHeader(False) + data + info.DataDescriptor(zip64)


def footer_has_given_members_and_position() -> bool:
    (info, member), archive = make_member(False), ZipStream()
    archive._filelist.append(info)
    archive._pos = len(member)
    with ZipFile(io.BytesIO(member + b"".join(archive.footer()))) as opened:
        return opened.testzip() is None and opened.read("a.txt") == b"data"


def sizes_stand_behind_the_data() -> bool:
    read: list[Any] = [
        (name, size, b"".join(chunks))
        for zip64 in (False, True)
        for name, size, chunks in stream_unzip(
            [make_member(zip64)[1], b"PK\1\2", bytes(20)]
        )
    ]
    return read == [(b"a.txt", None, b"data")] * 2


ZIPSTREAM = [
    *(
        Part(
            name,
            "zipstream-ng",
            "formats/archive",
            "make the central directory of members that tgstream has compressed",
            "ZIP and XLSX make files that no reader opens",
            footer_has_given_members_and_position,
        )
        for name in ("_filelist", "_pos")
    ),
    *(
        Part(
            name,
            "zipstream-ng",
            "formats/archive",
            "write the parts of a member around its data",
            "ZIP and XLSX make files that no reader opens",
            sizes_stand_behind_the_data,
        )
        for name in ("FileHeader", "DataDescriptor")
    ),
]


# redis.


def connection_has_the_timeout_of_its_socket() -> bool:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        create: Any = redis.Connection
        connection = create(host, port, redis_connect_func=lambda _: None)
        try:
            connection.connect()
            connection._sock.settimeout(0.01)  # the default is longer, or endless
            connection.send_packed_command([bytes(20_000_000)], check_health=False)
        except redis.TimeoutError:
            return True
        finally:
            connection.disconnect()
    return False


REDIS = [
    Part(
        "_sock",
        "redis",
        "live/backends/redis_sender",
        "limit the time of all answers together, and not of each read",
        "a request waits longer than tgstream.publish_timeout for a slow server",
        connection_has_the_timeout_of_its_socket,
    )
]

PARTS = [
    *TURBOGEARS,
    *AROUND,
    *TRANSACTIONS,
    *SQLALCHEMY,
    *PSYCOPG,
    *ZIPSTREAM,
    *REDIS,
]
ALSO_IN = {
    "_current_obj": {"core/source"},
    "paste.registry": {"doctor/client", "turbogears/guard"},
    "lookup_template_engine": {"turbogears/templates"},
    "tg.slowreqs": {"doctor/settings_checks"},
    "debugbar.engine": {"doctor/settings_checks"},
    "webob.dec": {"doctor/middleware_trace"},
    "manager.manager": {"database/session_transactions", "testing/leaks"},
    "createfunc": {"database/sessions"},
}
"""Other modules that touch a part. Nothing may be added."""

DOCUMENTED = {"_exit", "_fields", "_getframe", "_replace", "_xoptions"}
DOCUMENTED |= {"_get_running_loop", "_set_running_loop"}
"""Public names with an underscore: of os, sys, named tuples and event loops."""


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.package}-{part.name}")
def test_private_part_does_what_tgstream_needs(
    part: Part, request: pytest.FixtureRequest
) -> None:
    """Its check is run against the version that is installed."""
    fixtures = inspect.signature(part.check).parameters
    assert part.check(*map(request.getfixturevalue, fixtures)), (
        f"{part.package} has changed {part.name}, which {part.module} uses to "
        f"{part.use}. Consequence: {part.breaks}"
    )


@cache
def names_by_module() -> dict[str, set[str]]:
    """All names and texts that each module uses, dotted names also in part.

    A name that a class defines is used too, if its base may have it.
    """
    names: dict[str, set[str]] = defaultdict(set)
    for path in FOLDER.rglob("*.py"):
        used = names[str(path.relative_to(FOLDER).with_suffix(""))]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                dotted = ast.unparse(node).split(".")
                used |= {".".join(dotted[index:]) for index in range(len(dotted))}
            elif isinstance(node, ast.Name):
                used.add(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.add(node.value)
            elif isinstance(node, ast.ImportFrom):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ClassDef):
                foreign = any(isinstance(base, ast.Attribute) for base in node.bases)
                used |= {getattr(part, "name", "") for part in node.body if foreign}
    return names


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.package}-{part.name}")
def test_private_part_is_touched_in_one_module(part: Part) -> None:
    """The module of its row, and no other but those of the list."""
    modules = {
        module for module, names in names_by_module().items() if part.name in names
    }
    assert modules == {part.module} | ALSO_IN.get(part.name, set())


def private_names(tree: ast.AST) -> Iterator[str]:
    """The private names of other objects that a module reads, sets or imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if ast.unparse(node.value) not in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.isidentifier():  # as getattr() takes it
                yield node.value
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (alias.name for alias in node.names)


def own_names(tree: ast.AST) -> Iterator[str]:
    """The names that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) == "self":
                yield node.attr
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Constant) and "tgstream" in str(node.value):
            yield str(node.value)
        elif isinstance(node, ast.Dict):  # as type() takes members
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            yield from (key for key in keys if isinstance(key, str))


def is_private(name: str) -> bool:
    return name.startswith("_") and re.fullmatch(r"_+|__[^\W_]\w*__", name) is None


def test_every_private_part_has_a_row() -> None:
    """A name that tgstream does not define itself, and that nobody has documented."""
    trees = {path: ast.parse(path.read_text()) for path in FOLDER.rglob("*.py")}
    known = {part.name for part in PARTS} | DOCUMENTED
    known |= {name for tree in trees.values() for name in own_names(tree)}
    unknown = {
        f"{path.relative_to(FOLDER)}: {name}"
        for path, tree in trees.items()
        for name in private_names(tree)
        if is_private(name) and name not in known
    }
    assert unknown == set()
    assert len(trees) > 50


def test_unknown_private_names_are_found() -> None:
    """In attributes, in strings for getattr(), and in imports."""
    source = "from a import _b\nx._c\ngetattr(x, '_d')\nself._e\nx.__f__\nx.____g__"
    found = {name for name in private_names(ast.parse(source)) if is_private(name)}
    assert found == {"_b", "_c", "_d", "____g__"}
