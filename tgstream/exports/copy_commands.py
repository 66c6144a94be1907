"""The commands with which ``copy()`` makes PostgreSQL write CSV or JSON.

JSON documents are written in COPY's format ``text``, which escapes a backslash and a
line break with a backslash, and nothing else of a document. The format ``csv`` takes
the server a tenth longer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TypeAlias

Buffer: TypeAlias = bytes | memoryview


def write_csv_command(text: str, header: bool) -> str:
    """Return the command that writes the rows of a statement as CSV.

    :param text: the statement, for a driver that doubles percent signs.
    :param header: whether the first line has the names of the columns.
    """
    options = f"FORMAT csv, HEADER {header}, ENCODING 'UTF8'"
    return f"COPY (\n{text}\n) TO STDOUT ({options})"


# JSON documents.

_LONGEST_NAME = 63
"""The bytes after which PostgreSQL truncates the name of a column."""

_HAS_JSON_SCALAR = 170000
"""The first version of PostgreSQL that has ``json_scalar``. For each value, the
functions ``row_to_json`` and ``to_json`` look up the functions of its type.
``json_scalar`` does it once for a statement, which saves a sixth of the server's
time."""

_INTEGERS = frozenset({20, 21, 23})
_SCALARS = frozenset({16, 25, 700, 701, 1042, 1043, 1082, 1114, 1184, 1700, 2950})
"""The object identifiers of types, by PostgreSQL's catalog ``pg_type``: bool, text,
float4, float8, bpchar, varchar, date, timestamp, timestamptz, numeric and uuid."""


def write_documents_command(
    text: str, fields: Sequence[str], types: Sequence[int], version: int
) -> str:
    """Return the command that writes each row of a statement as a JSON document.

    :param text: the statement, for a driver that doubles percent signs.
    :param fields: the names of its columns.
    :param types: the object identifiers of their types.
    :param version: the server's, such as 170002.
    """
    has_json_scalar = version >= _HAS_JSON_SCALAR
    if has_json_scalar or any(len(name.encode()) > _LONGEST_NAME for name in fields):
        columns = [f"c{number}" for number, _ in enumerate(fields)]
        scalars = _SCALARS if has_json_scalar else frozenset()
        parts = ["'{'"]
        for name, column, type in zip(fields, columns, types, strict=True):
            separator = "," if len(parts) > 1 else ""
            key = f"{separator}{json.dumps(name, ensure_ascii=False)}:"
            parts += [_quote_text(key), _convert_to_text(f"t.{column}", type, scalars)]
        document = _concatenate([*parts, "'}'"])
    else:
        columns = [_quote_name(name) for name in fields]
        document = "row_to_json(t.*)"
    source = f"(\n{text}\n) AS t ({', '.join(columns)})"
    return f"COPY (SELECT {document} FROM {source}) TO STDOUT (ENCODING 'UTF8')"


def _convert_to_text(column: str, type: int, scalars: frozenset[int]) -> str:
    """Return an expression for the JSON text of a column.

    :param scalars: the types for which to call ``json_scalar``.
    """
    if type in _INTEGERS:
        value = column
    elif type in scalars:
        value = f"json_scalar({column})"
    else:
        value = f"to_json({column})"
    return f"coalesce({value}::text, 'null')"


def _concatenate(parts: Sequence[str]) -> str:
    """Return an expression that concatenates parts, and copies no part many times."""
    if len(parts) == 1:
        return parts[0]
    middle = len(parts) // 2
    return f"({_concatenate(parts[:middle])} || {_concatenate(parts[middle:])})"


def _quote_name(name: str) -> str:
    quoted = name.replace('"', '""').replace("%", "%%")
    return f'"{quoted}"'


def _quote_text(text: str) -> str:
    quoted = text.replace("\\", r"\\").replace("'", "''").replace("%", "%%")
    return f"E'{quoted}'"


def read_documents(lines: Sequence[Buffer]) -> Sequence[Buffer]:
    """Return the documents in lines that the command has written, as lines.

    PostgreSQL stores the text of a ``json`` value as it was given. A line break or tab
    in it is outside of strings, so that a space replaces it.

    :param lines: the lines that arrived together.
    """
    data = b"".join(lines)
    if b"\\" not in data:
        return lines
    data = data.replace(rb"\\", b"\0")  # no JSON text contains NUL
    for escaped in (rb"\n", rb"\r", rb"\t"):
        data = data.replace(escaped, b" ")
    return data.replace(b"\0", b"\\").splitlines(keepends=True)
