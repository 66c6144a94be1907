"""Loads the application of an ``.ini`` file as ``gearbox serve`` does.

An application has an error guard only if tgstream is imported before the application
is created. The doctor checks for the guard, so it must load the application in a
process that has not imported tgstream. The command line therefore runs this file by
its path, in a child process. Nothing here may import tgstream until ``load()`` has
returned, and then only by its full name.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import tg


class LoadError(Exception):
    """The application cannot be loaded. Its own error is the cause, if there is one."""


def main(config: str, path: str | None = None) -> int:
    """Load an application, examine it, and print the findings.

    :param config: the file, with ``#name`` for a section other than ``main``.
    :param path: the path that the doctor requests. None to create the tables of
        channels instead.
    :returns: the exit status.
    """
    try:
        app, tg_apps = load(config)
    except LoadError as error:
        from tgstream.doctor.examine import report_load_error

        findings = report_load_error(config, error)
    else:
        if path is None:
            from tgstream.doctor.channel_tables import create

            return create(config, tg_apps)
        imports_tgstream = "tgstream" in sys.modules
        from tgstream.doctor.examine import Application, examine

        application = Application(config, app, tg_apps, imports_tgstream)
        findings = examine(application, path)
    from tgstream.doctor.finding import print_findings

    return print_findings(findings)


def load(config: str) -> tuple[Any, list[Any]]:
    """Load an application, and import its root controllers.

    :param config: the file, with ``#name`` for a section other than ``main``.
    :returns: the outermost WSGI application, and the TurboGears applications in it.
    :raises LoadError: when that fails.
    """
    try:
        from paste.deploy import loadapp
    except ImportError:
        raise LoadError(
            "PasteDeploy is not installed. Install gearbox, or PasteDeploy alone: "
            "pip install PasteDeploy"
        ) from None
    tg_apps: list[Any] = []
    tg.hooks.register("configure_new_app", tg_apps.append)
    try:
        app = loadapp(f"config:{config}", relative_to=os.getcwd())
        for tg_app in tg_apps:
            tg_app._get_controller_instance("root")  # like the first request
    except (Exception, SystemExit) as error:
        raise LoadError from error
    finally:
        tg.hooks.disconnect("configure_new_app", tg_apps.append)
    return app, tg_apps


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
