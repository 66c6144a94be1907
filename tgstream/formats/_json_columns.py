"""The JSON of a batch of rows, a column at a time.

Rule: it is what the encoder makes of the same rows, one at a time; a row of which a
cell is not that simple is made so.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from . import _orjson as _orjson
from .fields import entity_in
from .json_encoder import Encoder, document, has_names


def are_alike(rows: Sequence[Any], fields: Sequence[str]) -> bool:
    """True for rows that :func:`objects` takes: with names, which are ``fields``."""
    kinds = set(map(type, rows))
    kind: Any = kinds.pop()
    if len(fields) == 1 and any(entity_in(row) is not None for row in rows):
        return False  # it is the document of its entity
    return (
        not kinds
        and has_names(kind)
        and not hasattr(kind, "__json__")
        and tuple(rows[0]._fields) == tuple(fields)
        and len(set(fields)) == len(fields)
    )


def objects(
    encoder: Encoder,
    rows: Sequence[Any],
    fields: Sequence[str],
    first: int,
    between: bytes,
) -> bytes:
    """The objects of rows that are alike.

    :param encoder: one that is quick.
    :param first: the number of the first row, for errors.
    :param between: what stands between two.
    """
    slow: set[int] = set()
    columns = [_column(encoder, c, slow) for c in zip(*rows, strict=True)]
    names = [encoder.encode(name, first).replace(b"%", b"%%") for name in fields]
    one = b"{" + b",".join([name + b":%b" for name in names]) + b"}"
    documents = list(map(one.__mod__, zip(*columns, strict=True)))
    for n in sorted(slow):
        documents[n] = encoder.encode(document(rows[n]), first + n)
    return between.join(documents)


def _column(encoder: Encoder, values: Sequence[Any], slow: set[int]) -> list[bytes]:
    """The documents of ``values``; ``slow`` gets the places of what is not simple."""
    kinds = set(map(type, values)) - {type(None)}
    data = None
    if kinds <= {str, int, bool}:
        data = _orjson.column(values)
    elif kinds <= {int, float}:  # SQLite gives 1.0 of a Numeric as 1
        data = _floats(values)
    elif kinds == {Decimal}:
        data = _decimals(values)
    elif kinds == {datetime} and encoder.plain_dates:
        data = _orjson.dates(values)
    if data is None:
        return _one_by_one(encoder, values, slow)
    return data.split(_orjson.SEPARATOR)


def _floats(values: Sequence[Any]) -> bytes | None:
    data = _orjson.column(values)
    if data is None or data.count(b"null") != values.count(None):
        return None  # one is NaN
    return data


def _decimals(values: Sequence[Any]) -> bytes | None:
    try:
        floats = [None if value is None else float(value) for value in values]
    except ValueError:  # a signaling NaN
        return None
    return _floats(floats)


def _one_by_one(encoder: Encoder, values: Sequence[Any], slow: set[int]) -> list[bytes]:
    cells: list[bytes] = []
    for n, value in enumerate(values):
        try:
            cell = encoder.quickly(value)
        except (TypeError, ValueError):  # told with the row
            cell = None
        if cell is None:
            slow.add(n)
        cells.append(cell or b"")
    return cells
