"""Sphinx's configuration. ``tgstream`` is imported as it is installed."""

import tgstream

project = "tgstream"
author = "The tgstream maintainers"
project_copyright = f"2026, {author}"
version = release = tgstream.__version__

extensions = ["sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"tgstream {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]

autodoc_typehints = "none"  # the docstrings name what each parameter is
autodoc_member_order = "bysource"
nitpick_ignore_regex = [
    # Python's and TG's own: to link them, a build would need the network.
    ("py:exc", r"TypeError|ValueError|tg\.render\.MissingRendererError"),
]
