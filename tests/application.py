"""Makes the applications of tests, of live servers and of benchmarks.

This module does not import tgstream: some applications are made before tgstream is
imported, and some never import it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tg import FullStackApplicationConfigurator

Plug = Callable[[Any], Any]


class AppGlobals:
    """The class of ``tg.app_globals``."""


class Helpers:
    """The ``h`` of templates, to which plugged extensions add attributes."""


def make_wsgi_app(
    options: dict[str, Any],
    plug: Plug | None = None,
    configurator: Callable[[], Any] = FullStackApplicationConfigurator,
) -> Any:
    """Return an application, made as in ``config/app_cfg.py``.

    :param options: its configuration. It is added to what all these applications share:
        JSON as the renderer, no error pages and no translations.
    :param plug: called with the configurator, to plug tgstream. Without it the
        application does not use tgstream.
    :param configurator: makes the configurator.
    """
    base_config = configurator()
    base_config.update_blueprint(
        {
            "renderers": ["json"],
            "default_renderer": "json",
            "errorpage.enabled": False,
            "app_globals": AppGlobals,
            "helpers": Helpers,
            "i18n.enabled": False,
            **options,
        }
    )
    if plug is not None:
        plug(base_config)
    return base_config.make_wsgi_app({}, {})


def database_options(model: Any) -> dict[str, Any]:
    """Return the options of an application whose database is that of ``model``."""
    return {
        "use_sqlalchemy": True,
        "sqlalchemy.url": model.url.render_as_string(hide_password=False),
        "model": model,
    }
