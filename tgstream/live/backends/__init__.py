"""Back ends of channels: the choice of a back end by its URL.

The modules of the back ends do not import this one, because it imports them.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..protocols import Backend, ChannelSettings
from .memory import MemoryBackend

REDIS_SCHEMES = (
    "redis://",
    "rediss://",
    "unix://",
    "redis+sentinel://",
    "redis+cluster://",
)
"""The beginnings of a URL of Redis or Valkey."""
DATABASE = "database://"
"""The URL of the application's own database. It has no host and no options."""
RESERVED_URL_OPTIONS = {
    "protocol",
    "decode_responses",
    "encoding",
    "encoding_errors",
    "socket_timeout",
    "socket_connect_timeout",
    "max_connections",
    "timeout",
    "retry_on_timeout",
    "retry_on_error",
    "single_connection_client",
}
"""Options that a URL must not set after its ``?``, because tgstream sets them."""


def create_backend(url: str, settings: ChannelSettings) -> Backend:
    """Create the back end of a URL.

    :param url: the value of ``tgstream.channels``.
    :param settings: the other options of the application.
    :raises ValueError: if the URL is not valid. The message never contains a password.
    :raises ImportError: if the URL needs the package ``redis``, which is not installed.
    """
    if url == "memory://":
        return MemoryBackend(settings)
    if url.startswith(REDIS_SCHEMES):
        _check_redis_url(url)
        # Imported only when used: the package redis is optional.
        from .redis import RedisBackend

        return RedisBackend(url, settings)
    scheme = redact_url(url).partition(":")[0]  # the rest may contain a password
    for known in ("memory://", DATABASE):
        if url.startswith(known):
            raise ValueError(
                f"{known} in tgstream.channels takes no host and no path. Write "
                f"tgstream.channels = {known}"
            )
    raise ValueError(
        f"unsupported scheme {scheme!r} in tgstream.channels. Use memory://, "
        "database://, redis://, rediss://, unix://, redis+sentinel:// or "
        "redis+cluster://"
    )


def _check_redis_url(url: str) -> None:
    shown = redact_url(url)
    if shown.endswith("..."):
        # The package redis would take a part of the password for the host or the port,
        # and show it in its messages.
        raise ValueError(
            f"cannot parse {shown} in tgstream.channels. Use redis://host:port/db, and "
            "percent-encode the password"
        )
    if reserved := reserved_url_options(url):
        raise ValueError(
            f"tgstream.channels must not set {', '.join(reserved)} after '?', because "
            "tgstream sets these options. Remove them from the URL"
        )


def reserved_url_options(url: str) -> list[str]:
    """The options after the ``?`` of a URL that tgstream sets itself."""
    options = parse_qs(urlsplit(url).query, keep_blank_values=True)
    return sorted(RESERVED_URL_OPTIONS & options.keys())


def redact_url(value: Any) -> str:
    """The scheme, host, port and path of a URL, without user, password and options.

    If the value is not a valid URL, any part may be the password, so only the scheme is
    returned. The result then ends with ``...``.
    """
    scheme, separator, rest = str(value).partition("://")
    if not separator or not _is_scheme(scheme):
        beginning, colon, _ = scheme.partition(":")
        return f"{beginning}:..." if colon and _is_scheme(beginning) else "..."
    netloc = re.split("[/?#]", rest)[0]
    path = rest.removeprefix(netloc)
    host = netloc.rpartition("@")[2]
    # An "@" in the path, or an odd host, is of a password that was not percent-encoded.
    # redis+sentinel:// and redis+cluster:// have several hosts.
    if "@" in path or not all(map(_is_host, host.split(","))):
        return f"{scheme}://..."
    return f"{scheme}://{host}{re.split('[?#]', path)[0]}"


_is_scheme = re.compile("[A-Za-z][A-Za-z0-9+.-]*").fullmatch
_is_host = re.compile(r"(\[[0-9A-Fa-f:.]*\]|[^:\[\]]*)(:\d*)?").fullmatch
