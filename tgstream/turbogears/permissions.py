"""The permission of a request, evaluated again after the request.

TurboGears evaluates the ``allow_only`` of all controllers on the path of a request,
and then the ``@require`` of the method. The same methods of TurboGears are called again
here, with a copy of the request:

- repoze.who identifies the user again, by the cookie or the headers of the request.
- ``sa_auth.authmetadata`` reads the user, the groups and the permissions again.
- ``DBSession`` is a new session with a transaction of its own, which is rolled back.

The stream, its request and its session are not changed.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Any

from tg.appwrappers.identity import IdentityApplicationWrapper
from tg.controllers.decoratedcontroller import DecoratedController
from tg.decorators import Decoration, require
from tg.predicates import NotAuthorizedError
from tg.request_local import Response
from webob.exc import HTTPException

from ..core.context import Context
from ..core.errors import StreamError
from .guard import LOCALS_KEY

if TYPE_CHECKING:
    from ..core.context import StreamTransaction


class Permission:
    """The ``@require`` and the ``allow_only`` of a request.

    :param tg_locals: TG's ``RequestLocals`` of the request.
    :param function: the method of the controller.
    :param where: the name of the method, for the error.
    :param make_transaction: makes sessions and a transaction for one evaluation. It
        returns None in an application without a database.
    :raises StreamError: when there is no ``@require`` and no ``allow_only``.
    """

    def __init__(
        self,
        tg_locals: Any,
        function: Any,
        where: str,
        make_transaction: Callable[[], StreamTransaction | None],
    ) -> None:
        path = tg_locals.request.dispatch_state.controller_path
        self._controllers = [each for _, each in path if _is_protected(each)]
        self._requirements = _find_requirements(function)
        if not (self._controllers or self._requirements):
            raise StreamError(
                f"{where}: recheck_seconds has nothing to check again. Put @require on "
                "the controller, set allow_only on its class, or omit recheck_seconds"
            )
        self._tg_locals = tg_locals
        self._make_transaction = make_transaction
        self._run: Callable[..., bool] = contextvars.copy_context().run

    def is_granted(self) -> bool:
        """Evaluate it on this thread.

        :raises Exception: the error of a predicate, or of the database.
        """
        tg_locals = _copy_locals(self._tg_locals)
        transaction = self._make_transaction()
        if transaction is None:
            context = Context(tg_locals)
        else:
            context = transaction.make_context(tg_locals)
        record = context.bind(None)
        outer, record.sessions = record.sessions, transaction
        try:
            return self._run(self._evaluate, tg_locals)
        finally:
            try:
                if transaction is not None:
                    transaction.release(False)
            finally:
                record.sessions = outer
                context.unbind(record)

    def _evaluate(self, tg_locals: Any) -> bool:
        try:
            _identify(tg_locals)
            for controller in self._controllers:
                controller._check_security()
            for requirement in self._requirements:
                requirement._check_authorization()
        except (HTTPException, NotAuthorizedError):
            return False
        return True


def _is_protected(controller: Any) -> bool:
    """Whether a controller has ``allow_only``, or a check of its own."""
    check = getattr(type(controller), "_check_security", None)
    return check is not None and (
        check is not DecoratedController._check_security
        or getattr(controller, "allow_only", None) is not None
    )


def _find_requirements(function: Any) -> list[require]:
    """The ``@require`` of a method, also those of the methods that it overrides."""
    hooks = Decoration.get_decoration(function).hooks["before_call"]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, require)]


def _copy_locals(tg_locals: Any) -> Any:
    """TG's context for one evaluation, which may change it."""
    copied = copy(tg_locals)
    copied.request = request = _copy_request(tg_locals.request)
    copied.response = Response()
    copied.tmpl_context = type(tg_locals.tmpl_context)()
    copied.tmpl_context.__dict__.update(tg_locals.tmpl_context.__dict__)
    copied.session = _copy_session(tg_locals.session, request.environ)
    request.environ["beaker.session"] = copied.session
    request.environ[LOCALS_KEY] = copied
    return copied


def _copy_session(session: Any, environ: dict[str, Any]) -> Any:
    """Beaker's session of the request, which it loads again on its first use."""
    options = getattr(session, "__dict__", {}).get("_params")
    return session if options is None else type(session)(environ, **options)


def _copy_request(request: Any) -> Any:
    environ = request.environ.copy()
    environ["webob.adhoc_attrs"] = {**environ.get("webob.adhoc_attrs", {})}
    copied = type(request)(environ)
    copied.__dict__.update(request.__dict__, environ=environ)
    copied.__dict__.pop("state", None)  # it has the environ
    return copied


def _identify(tg_locals: Any) -> None:
    """Identify the user again, and read the groups and the permissions again."""
    environ = tg_locals.request.environ
    api, identity = environ.get("repoze.who.api"), environ.get("repoze.who.identity")
    if not identity:
        return  # anonymous, or the application has an identity of its own
    if api is None or "authenticator" not in identity:  # of another middleware
        environ["repoze.who.identity"] = copy(identity)
    else:
        del environ["repoze.who.identity"]
        environ["repoze.who.api"] = api = copy(api)
        api.environ = environ
        environ.pop(api.remote_user_key, None)
        if api.authenticate() is None:
            environ.pop("repoze.what.credentials", None)
    wrapper = IdentityApplicationWrapper(lambda *_: None, tg_locals.config)
    if wrapper.injected:
        wrapper(None, environ, tg_locals)
