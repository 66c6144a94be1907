"""The headers of a stream: its content type, its charset, the name of a download.

Rule: what the user set wins; and whatever text comes in, a harmless header comes out.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any
from urllib.parse import quote

from ._options import Format, Options


def charset_in(content_type: str | None) -> str | None:
    """The charset that a content type names, if it does."""
    match = re.search(r"charset=[\"']?([^\s;\"']+)", content_type or "")
    return match and match[1]


def set_headers(response: Any, exposed: Any, options: Options) -> None:
    """The stream's headers, where the user has set none."""
    if options.filename is not None and "Content-Disposition" not in response.headers:
        response.headers["Content-Disposition"] = disposition(options.filename)
    if options.format is None and options.charset is None:
        return  # TG itself sets what @expose says
    if response.content_type is None:
        _set_content_type(response, exposed(), options.format)
    if options.charset is not None:
        response.charset = options.charset


def _set_content_type(response: Any, exposed: Any, format: Format | None) -> None:
    content_type, engine, template = exposed[:3]
    if format is not None and (content_type == "text/html" or engine or template):
        content_type = format.content_type
    response.headers["Content-Type"] = content_type
    if content_type.startswith("text/") and charset_in(content_type) is None:
        response.charset = "utf-8"


_LONGEST = 200
"""Characters of a name: what file systems take, with room for a browser's ``(1)``."""


def disposition(filename: str) -> str:
    """The value that makes a browser save a response as ``filename``.

    Path parts, control and formatting characters cannot get through, whatever the name
    says. Names that are not plain ASCII go out twice, as RFC 6266 advises: as
    ``filename*``, and as an ASCII fallback.

    :param filename: the wished name, which may come from a user.
    :returns: ``attachment; filename=...``, ASCII.
    """
    name = _safe(filename)
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    fallback = re.sub(r'["\\%]', "_", ascii_name).strip() or "download"
    value = f'attachment; filename="{fallback}"'
    if fallback != name:
        value += f"; filename*=UTF-8''{quote(name, safe='')}"
    return value


def _safe(filename: str) -> str:
    """The last path part, without what a screen or a file system could misread."""
    name = re.split(r"[/\\]", filename)[-1]
    name = "".join(c for c in name if unicodedata.category(c)[0] != "C")
    name = name.strip(" .")
    if len(name) > _LONGEST:
        stem, dot, suffix = name.rpartition(".")
        if not dot or len(suffix) > 10:
            return name[:_LONGEST]
        name = stem[: _LONGEST - len(suffix) - 1] + dot + suffix
    return name or "download"
