"""The headers of a stream: its content type, its charset, the name of a download.

Rule: what the user set wins; and whatever text comes in, a harmless header comes out.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from ..formats.protocols import Format
from .errors import StreamError
from .options import FormatTraits, Options


def charset_in(content_type: str | None) -> str | None:
    """The charset that a content type names, if it does."""
    match = re.search(r"charset=[\"']?([^\s;\"']+)", content_type or "")
    return match and match[1]


def set_headers(
    response: Any, exposed: Any, options: Options, traits: FormatTraits
) -> None:
    """The stream's headers, where the user has set none."""
    format = options.format
    for name, value in traits.headers.items():
        response.headers.setdefault(name, value)
    if options.filename is not None and "Content-Disposition" not in response.headers:
        response.headers["Content-Disposition"] = disposition(options.filename)
    if format is None and options.charset is None:
        return  # TG itself sets what @expose says
    if response.content_type is None:
        _set_content_type(response, exposed(), format)
    fixed = traits.charset
    if options.charset is not None or (fixed and response.charset):
        response.charset = fixed or options.charset


def _set_content_type(response: Any, exposed: Any, format: Format | None) -> None:
    content_type, engine, template = exposed[:3]
    if format is not None and (content_type == "text/html" or engine or template):
        content_type = format.content_type
    response.headers["Content-Type"] = content_type
    if content_type.startswith("text/") and charset_in(content_type) is None:
        response.charset = "utf-8"


_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
"""The name of a header, by RFC 9110."""

_TEXT = r"[\t\x20-\x7e\x80-\xff]"
_FORBIDDEN = re.compile(_TEXT.replace("[", "[^", 1))
"""Characters that neither a header's value nor a status line can hold."""

_HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization"),
        *("te", "trailers", "transfer-encoding", "upgrade"),
    }
)
"""Headers of a connection, by RFC 2616, section 13.5.1, which PEP 3333 names."""


@lru_cache(256)
def _is_clean_name(name: str) -> bool:
    return bool(_TOKEN.fullmatch(name)) and name.lower() not in _HOP_BY_HOP


def is_clean(response: Any) -> bool:
    """Whether any server can send the status and the headers of a response as they are.

    It looks at usual headers only. For others the answer is False, and
    :func:`check_sendable` finds out. Three looks a stream cost 2 us.
    """
    try:
        status = response.status
        clean: bool = status.isascii() and status.isprintable()
        for name, value in response.headerlist:
            clean = (
                clean
                and value.isascii()
                and value.isprintable()
                and _is_clean_name(name)
            )
        return clean
    except (AttributeError, TypeError):  # one of them is not a str
        return False


def drop_hop_by_hop(response: Any) -> list[str]:
    """Remove the headers that PEP 3333 leaves to the server, such as ``Connection``.

    :returns: their names.
    """
    headers = response.headerlist
    names = [name for name, _ in headers if str(name).lower() in _HOP_BY_HOP]
    headers[:] = [(name, value) for name, value in headers if name not in names]
    return names


def check_sendable(where: str, response: Any) -> None:
    """Check that any server can send the status line and the headers.

    :param where: the controller.
    :raises StreamError: when one cannot be sent. The response has lost that header, so
        that an error page can be sent with the others.
    """
    headers = response.headerlist
    if problem := _problem("the status", response.status):
        raise StreamError(f"{where}: {problem}")
    for index, (name, value) in enumerate(headers):
        problem = f"the header name {name!r} is not valid. Use letters, digits and '-'"
        if isinstance(name, str) and _TOKEN.fullmatch(name):
            problem = _problem(f"the value of the header {name}", value)
        if problem:
            del headers[index]
            raise StreamError(f"{where}: {problem}")


def _problem(what: str, value: Any) -> str:
    """Why a text cannot be sent; empty if it can."""
    if not isinstance(value, str):
        return f"{what} is {type(value).__name__}: {value!r}. Convert it to a str"
    found = _FORBIDDEN.search(value)
    if found is None:
        return ""
    return (
        f"{what} contains {found[0]!a} at position {found.start()}. It must be "
        "Latin-1 without line breaks and control characters. Remove the character, or "
        "quote the text with urllib.parse.quote()"
    )


def has_no_body(status: str) -> bool:
    """Whether HTTP allows no body in a response with this status line."""
    return status.startswith(("1", "204", "205", "304"))


_LONGEST = 200
"""Bytes of a name: file systems take 255, and a browser adds ``(1).crdownload``."""

_SPACES = [0x20, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000]
_EDGES = "." + "".join(map(chr, _SPACES))
"""What no name begins or ends with."""

_DEVICE = re.compile(
    r"(con|prn|aux|nul|(com|lpt)[1-9¹²³]|con(in|out)\$)\s*(\.|$)", re.IGNORECASE
)
"""Names that Windows keeps for its devices, with any suffix."""


def disposition(filename: str) -> str:
    """The value that makes a browser save a response as ``filename``.

    Path parts, control and formatting characters cannot get through, whatever the name
    says. Names that are not plain ASCII go out twice, as RFC 6266 advises: as
    ``filename*``, and as an ASCII fallback.

    :param filename: the wished name, which may come from a user.
    :returns: ``attachment; filename=...``, ASCII.
    """
    name = _safe(filename)
    # Canonical: a compatible form would make a slash of what only looks like one.
    letters = unicodedata.normalize("NFD", name).encode("ascii", "ignore").decode()
    fallback = _safe(re.sub(r'["\\%]', "_", letters))
    value = f'attachment; filename="{fallback}"'
    if fallback != name:
        value += f"; filename*=UTF-8''{quote(name, safe='')}"
    return value


def _safe(filename: str) -> str:
    """The last path part, without what a screen or a file system could misread."""
    name = re.split(r"[/\\]", filename)[-1]
    name = "".join(c for c in name if not _is_hidden(c))
    stem, dot, suffix = name.rpartition(".")
    if dot and not stem.strip(_EDGES):
        name = f"download.{suffix.strip(_EDGES)}"
    name = _cut(name.strip(_EDGES)).strip(_EDGES) or "download"
    name = re.sub(r"^([A-Za-z]):", r"\1_", name)  # a drive
    return f"_{name}" if _DEVICE.match(name) else name


def _is_hidden(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "C" or category in ("Zl", "Zp")


def _cut(name: str) -> str:
    """As much of ``name`` as a file system takes, with a suffix of ordinary length."""
    stem, dot, suffix = name.rpartition(".")
    ending = (dot + suffix).encode()
    if not dot or len(ending) > 11:
        stem, ending = name, b""
    kept = stem.encode()[: _LONGEST - len(ending)].decode(errors="ignore")
    return kept + ending.decode()
