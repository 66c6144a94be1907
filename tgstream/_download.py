"""The ``Content-Disposition`` of a download, after RFC 6266 and RFC 8187.

Rule: whatever text comes in, one harmless header value comes out.
"""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import quote

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
