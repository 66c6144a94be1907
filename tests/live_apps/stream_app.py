"""The application that all servers serve, in every combination of TG's middleware.

One process has an application for each combination and each database, each at its own
path: ``/traced/fail``, ``/postgresql/names``. With ``plugged=no`` the applications are
made before tgstream is imported. The controllers then import tgstream at the first
request, like in a quickstarted application without the plug.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tg
from tg.request_local import context

import tests
from tests.application import Plug, database_options, make_wsgi_app
from tests.model import Model

WIRINGS: dict[str, dict[str, Any]] = {
    "traced": {},
    "traced-buffered": {"registry_streaming": False},
    "untraced": {"trace_errors.enable": False},
    "debugged": {"debug": True},
    "debugged-buffered": {"debug": True, "registry_streaming": False},
}


def make_app(
    plugged: str = "yes",
    drains: str = "no",
    looks: str = "10",
    threads: str = "",
    max_requests: str = "",
    **urls: str,
) -> Any:
    """Return all applications as one WSGI application.

    :param plugged: ``no`` for applications without the plug.
    :param drains: ``yes`` for a server that drains at SIGTERM. ``run.py`` reads it.
    :param looks: the seconds between two checks whether a client has disconnected.
    :param threads: of the server. ``run.py`` reads it, and ``max_requests``.
    :param urls: databases by name. Each gets an application.
    """
    # TG warns when a process makes a second application.
    logging.getLogger("tg.configurator.application").setLevel("ERROR")
    tg.hooks.register("tgstream.finished", write_reason)
    models = {name: Model(url) for name, url in urls.items()}
    checks = {"tgstream.disconnect_check_seconds": looks}
    apps = {
        name: variant(plugged, **checks, **options) for name, options in WIRINGS.items()
    }
    for name, model in models.items():
        model.seed("ada", "bob", "eve")
        apps[name] = variant(plugged, **checks, **database_options(model))
    if plugged == "no":
        assert "tgstream" not in sys.modules
    return Mounted(apps, models)


def variant(plugged: str, **options: Any) -> Any:
    """Return an application whose controllers are those of ``root.py``."""
    plug: Plug | None = None
    if plugged == "yes":
        import tgstream

        plug = tgstream.plugme
    controllers = {"controllers": str(Path(__file__).parent)}
    return make_wsgi_app({"package": tests, "paths": controllers, **options}, plug)


def write_reason(report: Any) -> None:
    """Write the reason of a stream's end into the client's named pipe, if any."""
    pipe = tg.request.params.get("tell")
    if pipe is not None:
        with open(pipe, "w") as file:
            file.write(report.reason)


def count_contexts(stack: list[Any]) -> int:
    """The contexts on a thread, without the failed requests that TG's debugger keeps.

    Other requests of the thread find these on it.
    """
    names = [locals_.request.environ["SCRIPT_NAME"] for locals_, _ in stack]
    return sum(not name.startswith("/debugged") for name in names)


class Mounted:
    """Applications by the first part of the path, and the state they leave behind."""

    def __init__(self, apps: dict[str, Any], models: dict[str, Model]) -> None:
        self.apps = apps
        self.models = models
        self.stacks: dict[int, list[Any]] = {}

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        # TG makes the stack of this thread once, and never replaces it.
        context._push_object(None)
        context._pop_object()
        stack = context.____local__.objects
        _, name, path = environ["PATH_INFO"].split("/", 2)
        self.stacks[id(stack)] = stack
        if path == "state":
            return self.state(name, start_response)
        environ["SCRIPT_NAME"], environ["PATH_INFO"] = f"/{name}", f"/{path}"
        return self.apps[name](environ, start_response)

    def state(self, name: str, start_response: Callable[..., Any]) -> list[bytes]:
        """Return what streams and requests left behind, on any thread."""
        model = self.models[name]
        state = {
            "contexts": sum(map(count_contexts, self.stacks.values())),
            "connections": getattr(model.engine.pool, "checkedout", int)(),
            "idle in transaction": model.idle_in_transaction(),
            "process": os.getpid(),
        }
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(state).encode()]
