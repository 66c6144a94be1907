"""The application that all servers serve, in every wiring that TG knows.

One process holds an application for each wiring and each database, at a path of its
own: ``/traced/fail``, ``/postgresql/names``. Unplugged, they are made before tgstream
is imported, which then happens as in a quickstarted application: by the controllers,
that TG imports at the first request.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tg
from tg import FullStackApplicationConfigurator
from tg.request_local import context

import tests
from tests.model import Model

WIRINGS: dict[str, dict[str, Any]] = {
    "traced": {},
    "traced-buffered": {"registry_streaming": False},
    "untraced": {"trace_errors.enable": False},
    "debugged": {"debug": True},
    "debugged-buffered": {"debug": True, "registry_streaming": False},
}


def make_app(
    plugged: str = "yes", drains: str = "no", looks: str = "10", **urls: str
) -> Any:
    """All of it, as one WSGI application.

    :param plugged: ``no`` for applications that know nothing of tgstream.
    :param drains: ``yes`` for a server that drains when it is told to end; ``run.py``
        looks for it.
    :param looks: seconds between two checks whether a client has disconnected.
    :param urls: databases by name, each of which gets an application.
    """
    # TG warns of what it registers anew for the second application of a process.
    logging.getLogger("tg.configurator.application").setLevel("ERROR")
    tg.hooks.register("tgstream.finished", tell)
    models = {name: Model(url) for name, url in urls.items()}
    checks = {"tgstream.disconnect_check_seconds": looks}
    apps = {name: variant(plugged, **checks, **kind) for name, kind in WIRINGS.items()}
    for name, model in models.items():
        url = model.url.render_as_string(hide_password=False)
        database = {"use_sqlalchemy": True, "sqlalchemy.url": url, "model": model}
        model.seed("ada", "bob", "eve")
        apps[name] = variant(plugged, **checks, **database)
    if plugged == "no":
        assert "tgstream" not in sys.modules
    return Mounted(apps, models)


def variant(plugged: str, **options: Any) -> Any:
    """An application whose controllers are those of ``root.py`` beside this file."""
    base_config = FullStackApplicationConfigurator()
    base_config.update_blueprint(
        {
            "package": tests,
            "paths": {"controllers": str(Path(__file__).parent)},
            "renderers": ["json"],
            "default_renderer": "json",
            "errorpage.enabled": False,
            "app_globals": SimpleNamespace,
            "helpers": SimpleNamespace,
            "i18n.enabled": False,
            **options,
        }
    )
    if plugged == "yes":
        import tgstream

        tgstream.plugme(base_config)
    return base_config.make_wsgi_app({}, {})


def tell(report: Any) -> None:
    """Write how a stream ended into the named pipe that the client asked for."""
    pipe = tg.request.params.get("tell")
    if pipe is not None:
        with open(pipe, "w") as file:
            file.write(report.reason)


class Mounted:
    """Applications by the first part of the path, and what they leave behind."""

    def __init__(self, apps: dict[str, Any], models: dict[str, Model]) -> None:
        self.apps = apps
        self.models = models
        self.stacks: dict[int, list[Any]] = {}

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        # TG's stack of this thread is made once, and never replaced.
        context._push_object(None)
        context._pop_object()
        stack = context.____local__.objects
        _, name, path = environ["PATH_INFO"].split("/", 2)
        if not name.startswith(
            "debugged"
        ):  # TG keeps a failed request for its debugger
            self.stacks[id(stack)] = stack
        if path == "state":
            return self.state(name, start_response)
        environ["SCRIPT_NAME"], environ["PATH_INFO"] = f"/{name}", f"/{path}"
        return self.apps[name](environ, start_response)

    def state(self, name: str, start_response: Callable[..., Any]) -> list[bytes]:
        """What streams and requests have left, on any thread."""
        model = self.models[name]
        state = {
            "contexts": sum(map(len, self.stacks.values())),
            "connections": getattr(model.engine.pool, "checkedout", int)(),
            "idle in transaction": model.idle_in_transaction(),
            "process": os.getpid(),
        }
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(state).encode()]
