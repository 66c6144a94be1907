"""The text of a value, which is the same in every format.

Formats write None, bool, int, float, Decimal, str, dates and times in their own way.
Here are the rules for the other values: an ``Enum`` is its value, bytes are base64
(RFC 4648, section 4), and a range has the text that PostgreSQL gives it.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from operator import attrgetter
from typing import Any
from uuid import UUID

PLAIN_TYPES = frozenset(
    {type(None), bool, int, float, Decimal, str, date, datetime, time, timedelta}
)
"""Types of cells that are never replaced."""

BYTES_TYPES = (bytes, bytearray, memoryview)

_STR_TYPES = (
    *(UUID, timedelta, IPv4Address, IPv4Interface, IPv4Network),
    *(IPv6Address, IPv6Interface, IPv6Network),
)
"""Types whose text is that of ``str``."""


@lru_cache
def find_substitute(cls: Any) -> Callable[[Any], Any] | None:
    """Return the function that replaces the values of a class by a simpler value.

    The values of an ``Enum`` may be of any class.

    :return: None for a class that has no such function.
    """
    if issubclass(cls, Enum):
        return attrgetter("value")
    if issubclass(cls, BYTES_TYPES):
        return encode_base64
    if issubclass(cls, _STR_TYPES):
        return str
    return format_range if is_range(cls) else None


def encode_base64(value: bytes | bytearray | memoryview) -> str:
    """Return bytes as base64."""
    return b64encode(bytes(value)).decode()


# Ranges.


def is_range(cls: Any) -> bool:
    """Return True for the classes of ranges of SQLAlchemy, psycopg and psycopg2."""
    return all(hasattr(cls, name) for name in ("isempty", "lower_inc", "upper_inc"))


def format_range(value: Any) -> str:
    """Return the text of a range as PostgreSQL writes it, such as ``[1,10)``.

    The source is PostgreSQL's documentation, section 8.17.5.
    """
    if value.isempty:
        return "empty"
    lower, upper = _format_bound(value.lower), _format_bound(value.upper)
    first, last = "[" if value.lower_inc else "(", "]" if value.upper_inc else ")"
    return f"{first}{lower},{upper}{last}"


_needs_quotes = re.compile(r'[\s,()\[\]"\\]').search


def _format_bound(bound: Any) -> str:
    if bound is None:  # the range is not bounded on this side
        return ""
    text = str(bound)
    if text and not _needs_quotes(text):
        return text
    text = text.replace("\\", "\\\\").replace('"', '""')
    return f'"{text}"'


# Objects without a text.

ADDRESS = " at 0x"
"""Part of the text of an object whose class does not define its text."""

_find_address = re.compile(f"{ADDRESS}[0-9A-Fa-f]+>").search


def has_address(value: Any) -> bool:
    """Return True if the text of a value has the address of an object.

    A ``str`` may contain an address, also in a set.
    """
    if isinstance(value, str) or _find_address(str(value)) is None:
        return False
    if type(value).__repr__ in _SET_REPRS:
        return any(map(has_address, value))
    return True


_SET_REPRS: set[Any] = {set.__repr__, frozenset.__repr__}
"""The methods whose text is made of the texts of the parts alone."""
