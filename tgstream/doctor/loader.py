"""An application of an ``.ini`` file, loaded as ``gearbox serve`` loads it.

Rule: an application is loaded before tgstream is imported by anybody but itself; else
it would have a guard here that it has not in its server. So this module imports no
other of tgstream.
"""

from __future__ import annotations

import configparser
import os
import sys
from typing import Any, NamedTuple

import tg


class Loaded(NamedTuple):
    """An application, and what was seen while it was loaded."""

    app: Any
    """The WSGI application, outermost."""
    tg_apps: list[Any]
    """The TurboGears applications in it."""
    imported: bool
    """Whether it imported tgstream, its root controllers included."""


class LoadError(Exception):
    """The application cannot be loaded; the cause is its own error, if it has one."""


def forget() -> None:
    """Take tgstream away again, as if nobody had imported it in this process."""
    sys.modules["tgstream.turbogears.hooks"].HOOKS.clear()
    for name in [*sys.modules]:
        if name.partition(".")[0] == "tgstream":
            del sys.modules[name]


def load(config: str) -> Loaded:
    """Load the application of an ``.ini`` file, and import its root controllers.

    :param config: the file; behind a ``#`` the name of its section, ``main`` if none.
    :raises LoadError: when that fails.
    """
    try:
        from paste.deploy import loadapp
    except ImportError:
        raise LoadError(
            "PasteDeploy, which reads the file, is not installed: pip install gearbox, "
            "or PasteDeploy alone"
        ) from None
    tg_apps: list[Any] = []
    tg.hooks.register("configure_new_app", tg_apps.append)
    try:
        app = loadapp(f"config:{config}", relative_to=os.getcwd())
        for tg_app in tg_apps:
            tg_app._get_controller_instance("root")  # as the first request does
    except (Exception, SystemExit) as error:
        raise LoadError("it raises") from error
    finally:
        tg.hooks.disconnect("configure_new_app", tg_apps.append)
    return Loaded(app, tg_apps, "tgstream" in sys.modules)


def options(config: str) -> dict[str, str]:
    """The options of tgstream in an ``.ini`` file, whatever else is wrong with it."""
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    try:
        parser.read(config.partition("#")[0])
    except (configparser.Error, UnicodeDecodeError):
        return {}
    found: dict[str, str] = {}
    for section in parser.values():
        found |= {n: v for n, v in section.items() if n.startswith("tgstream.")}
    return found
