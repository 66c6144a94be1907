"""orjson, where it is installed, and what it makes of a column of plain values.

Rule: whatever it is asked, the same answer is had without it, later; where it would
give another, it gives none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment, unused-ignore]

__all__ = ["SEPARATOR", "column", "dates", "orjson"]

SEPARATOR = b",\n  "
"""What is between two values: with indentation a new line is in none of them."""


def column(values: Sequence[Any]) -> bytes | None:
    """Values as JSON, with ``SEPARATOR`` between; None if orjson refuses one.

    It writes null for a NaN.
    """
    try:
        data: bytes = orjson.dumps(values, option=orjson.OPT_INDENT_2)
    except TypeError:
        return None
    return data[4:-2]


def dates(values: Sequence[Any]) -> bytes | None:
    """The same for datetimes, and None for a missing one, as ``str`` writes them.

    None where one has an offset, which orjson does not always write as Python does.
    """
    data = column(values)
    if data is None:
        return None
    given = len(values) - data.count(b"null")
    if b"+" in data or data.count(b"-") != 2 * given:
        return None
    return data.replace(b"T", b" ")
