"""The commands with which ``copy()`` makes PostgreSQL write CSV or JSON."""

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
#
# The format ``binary`` writes a document as it is. The formats ``text`` and ``csv``
# look at each of its characters, so that the command takes a tenth longer.

_LONGEST_NAME = 63
"""The bytes after which PostgreSQL truncates the name of a column."""


def write_documents_command(text: str, fields: Sequence[str], is_utf8: bool) -> str:
    """Return the command that writes each row of a statement as a JSON document.

    :param text: the statement, for a driver that doubles percent signs.
    :param fields: the names of its columns.
    :param is_utf8: whether the connection has the encoding UTF-8.
    """
    if all(len(name.encode()) <= _LONGEST_NAME for name in fields):
        document, columns = "row_to_json(t.*)", [_quote_name(name) for name in fields]
    else:
        columns = [f"column_{number}" for number, _ in enumerate(fields)]
        document = _concatenate(fields, columns)
    if not is_utf8:
        document = f"convert_to(({document})::text, 'UTF8')"
    source = f"(\n{text}\n) AS t ({', '.join(columns)})"
    return f"COPY (SELECT {document} FROM {source}) TO STDOUT (FORMAT binary)"


def _concatenate(fields: Sequence[str], columns: Sequence[str]) -> str:
    """Return an expression for a document whose fields may have long names.

    It takes 1.4 times as long as ``row_to_json``.
    """
    pairs = [
        f"{_quote_text(json.dumps(name, ensure_ascii=False) + ':')}"
        f" || coalesce(to_json(t.{column})::text, 'null')"
        for name, column in zip(fields, columns, strict=True)
    ]
    return "'{' || " + " || ',' || ".join(pairs) + " || '}'"


def _quote_name(name: str) -> str:
    quoted = name.replace('"', '""').replace("%", "%%")
    return f'"{quoted}"'


def _quote_text(text: str) -> str:
    quoted = text.replace("\\", r"\\").replace("'", "''").replace("%", "%%")
    return f"E'{quoted}'"


_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
"""The bytes before the first row in COPY's binary format."""

_BEFORE_DOCUMENT = 6
"""The bytes of the number of columns and of the size. The end has only two bytes."""

_LINE_BREAKS_TO_SPACES = bytes.maketrans(b"\r\n", b"  ")


def read_documents(rows: Sequence[Buffer]) -> Sequence[Buffer]:
    """Return the documents of the rows that the command has written.

    PostgreSQL stores the text of a ``json`` value as it was given. A line break in it
    is outside of strings, so that a space replaces it.

    :param rows: the rows that arrived together.
    """
    rows = [bytes(rows[0]).removeprefix(_HEADER), *rows[1:]]
    documents = [row[_BEFORE_DOCUMENT:] for row in rows if len(row) > _BEFORE_DOCUMENT]
    text = b"".join(documents)
    if b"\n" in text or b"\r" in text:  # to look at each document would take longer
        return [bytes(each).translate(_LINE_BREAKS_TO_SPACES) for each in documents]
    return documents
