"""The headers of a stream: content type, charset, and the file name of a download.

A header that the controller has set stays. Every header that tgstream makes, whatever
the text it is made from, is one that any server can send.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from ..formats.filenames import clean_filename
from .errors import StreamError
from .options import FormatTraits, Options


def find_charset(content_type: str | None) -> str | None:
    """The charset parameter of a content type, if it has one."""
    match = re.search(r"charset=[\"']?([^\s;\"']+)", content_type or "")
    return match and match[1]


def add_vary(response: Any, name: str) -> None:
    """Add the name of a request header to ``Vary``, unless it is there.

    :param response: a WebOb response.
    """
    values = response.headers.getall("Vary")
    names = {part.strip().lower() for value in values for part in value.split(",")}
    if not names & {"*", name.lower()}:
        response.headers["Vary"] = ", ".join([*filter(None, values), name])


def set_headers(
    response: Any,
    exposed: Callable[[], tuple[Any, ...]],
    options: Options,
    traits: FormatTraits,
) -> None:
    """Set the stream's headers that the controller has not set.

    :param exposed: returns what ``@expose`` declares: content type, engine, template.
    :param options: the stream's.
    :param traits: of the stream's format.
    """
    format = options.format
    for name, value in traits.headers.items():
        response.headers.setdefault(name, value)
    if options.formats is not None:
        add_vary(response, "Accept")  # the controller may have replaced it
    if options.filename is not None and "Content-Disposition" not in response.headers:
        filename = options.filename
        for suffix in [getattr(f, "suffix", None) for f in options.formats or ()]:
            filename = filename.removesuffix(f".{suffix}")
        filename = _add_suffix(filename, traits.suffix)
        disposition = make_content_disposition(filename)
        response.headers["Content-Disposition"] = disposition
    if format is None and options.charset is None:
        return  # TG sets the content type of @expose
    if response.content_type is None:
        _set_content_type(response, exposed, options)
    fixed = traits.charset
    if options.charset is not None or (fixed and response.charset):
        response.charset = fixed or options.charset


_SUFFIX = re.compile(r"\.(?=[A-Za-z0-9]*[A-Za-z])[A-Za-z0-9]{1,10}\Z")


def _add_suffix(filename: str, suffix: str | None) -> str:
    """The name, with the suffix of the format if it has no suffix.

    A number, as in ``2026.11``, is not a suffix.
    """
    if suffix is None or _SUFFIX.search(filename):
        return filename
    return f"{filename}.{suffix}"


def _set_content_type(
    response: Any, exposed: Callable[[], tuple[Any, ...]], options: Options
) -> None:
    format = options.format
    if format is not None and options.formats is not None:
        content_type = format.content_type  # the request has chosen it
    else:
        content_type, engine, template = exposed()[:3]
        if format is not None and (content_type == "text/html" or engine or template):
            content_type = format.content_type
    response.headers["Content-Type"] = content_type
    if content_type.startswith("text/") and find_charset(content_type) is None:
        response.charset = "utf-8"


_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
"""The syntax of a header's name, by RFC 9110."""

_FORBIDDEN = re.compile(r"[^\t\x20-\x7e\x80-\xff]")
"""Characters that neither a header's value nor a status line can contain."""

_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailers",
    "transfer-encoding",
    "upgrade",
}
"""Headers of one connection, by RFC 2616, section 13.5.1, to which PEP 3333 refers."""


@lru_cache(256)
def _is_usual_name(name: str) -> bool:
    return bool(_TOKEN.fullmatch(name)) and name.lower() not in _HOP_BY_HOP


def is_usual(response: Any) -> bool:
    """Whether all headers are printable ASCII, and none is the server's to set.

    Most responses are, so that :func:`check_sendable`, which takes five times as long,
    is needed for few.
    """
    try:
        status = response.status
        usual: bool = status.isascii() and status.isprintable()
        for name, value in response.headerlist:
            usual = (
                usual
                and value.isascii()
                and value.isprintable()
                and _is_usual_name(name)
            )
        return usual
    except (AttributeError, TypeError):  # one of them is not a str
        return False


def drop_hop_by_hop(response: Any) -> list[str]:
    """Remove the headers that only a server may set (PEP 3333), such as ``Connection``.

    :returns: the names of the removed headers.
    """
    headers = response.headerlist
    names = [name for name, _ in headers if str(name).lower() in _HOP_BY_HOP]
    if names:
        headers[:] = [(name, value) for name, value in headers if name not in names]
    return names


def check_sendable(where: str, response: Any) -> None:
    """Check that any server can send the status line and the headers.

    :param where: the controller.
    :raises StreamError: when a server could not. The response has lost the header in
        question, so that an error page can be sent with the others.
    """
    if problem := _find_problem("the status", response.status):
        raise StreamError(f"{where}: {problem}")
    headers = response.headerlist
    for index, (name, value) in enumerate(headers):
        if isinstance(name, str) and _TOKEN.fullmatch(name):
            problem = _find_problem(f"the value of the header {name}", value)
        else:
            problem = f"the header name {name!r} is invalid. Use letters, digits and -"
        if problem:
            del headers[index]
            raise StreamError(f"{where}: {problem}")


def _find_problem(subject: str, value: Any) -> str:
    """Why a server cannot send a value, or an empty string if it can."""
    if not isinstance(value, str):
        return f"{subject} must be a str, got {type(value).__name__}: {value!r:.80}"
    match = _FORBIDDEN.search(value)
    if match is None:
        return ""
    return (
        f"{subject} must be Latin-1 without line breaks and control characters, got "
        f"{match[0]!a} at position {match.start()}. Remove the character, or quote the "
        "text with urllib.parse.quote()"
    )


def has_length(response: Any) -> bool:
    """Whether a response has a ``Content-Length``. WebOb's property takes longer."""
    return "content-length" in [name.lower() for name, _ in response.headerlist]


def has_no_body(status: str) -> bool:
    """Whether HTTP allows no body in a response with this status line."""
    return status.startswith(("1", "204", "205", "304"))


def make_content_disposition(filename: str) -> str:
    """The ``Content-Disposition`` that makes a browser save a response as a file.

    Path parts, control characters and formatting characters are removed. A name that is
    not plain ASCII is sent twice (RFC 6266): as ``filename*``, and as an ASCII
    fallback.

    :param filename: the name, which may come from a user.
    :returns: ``attachment; filename=...``, ASCII.
    """
    name = clean_filename(filename)
    # NFD, not NFKD: that would convert characters that look like a slash to a slash.
    letters = unicodedata.normalize("NFD", name).encode("ascii", "ignore").decode()
    fallback = clean_filename(re.sub(r'["\\%]', "_", letters))
    value = f'attachment; filename="{fallback}"'
    if fallback != name:
        value += f"; filename*=UTF-8''{quote(name, safe='')}"
    return value
