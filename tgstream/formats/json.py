"""NDJSON and JSONArray: the formats that encode each item as a JSON document.

``json_encoder`` encodes a document. This module joins the documents, and encodes a
batch of rows a column at a time, which gives the same bytes as row by row. A row is
encoded separately if one of its values is not plain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import Any

from webob.multidict import MultiDict

from .convert import Converter, Function, make_converter
from .fields import is_named_row, single_entity
from .json_encoder import (
    COLUMN_SEPARATOR,
    Encoder,
    encode_column,
    encode_datetimes,
    to_document,
)
from .protocols import Batched, batch_encoder
from .values import PLAIN_TYPES


class _JSONFormat:
    """The base of both formats: a document for each item, with bytes around it."""

    charset = "utf-8"
    _converter: Converter | None = None
    _prefix = b""  # before the first document
    _separator = b""  # between two documents
    _suffix = b""  # after each document

    def encode(self, items: Iterable[Any]) -> Iterator[bytes]:
        """Yield the document of each item, and the end."""
        encoder, number = Encoder(), 0
        convert = _make_document_converter(encoder, self._converter)
        before = self._prefix
        for number, item in enumerate(items, 1):
            document = to_document(item) if convert is None else convert(item, number)
            yield before + encoder.encode(document, number) + self._suffix
            before = self._separator
        yield self._ending(number)

    def encode_batches(self, source: Batched) -> Iterator[bytes]:
        """Yield the documents of each batch, and the end."""
        encoder, number = Encoder(), 0
        convert = _make_document_converter(encoder, self._converter)
        before, between = self._prefix, self._suffix + self._separator
        are_documents = False
        for batch in source.batches():
            if not number:
                are_documents = getattr(source, "documents", False)
            first, number = number + 1, number + len(batch)
            if are_documents:
                data = b"".join(batch)[:-1]
                if between != b"\n":
                    data = data.replace(b"\n", between)
            elif (
                encoder.uses_orjson
                and len(batch) > 1
                and _have_columns(batch, source.fields)
            ):
                columns: list[Sequence[Any]] = list(zip(*batch, strict=True))
                if convert is not None:
                    columns = convert.convert_columns(columns, source.fields, first)
                data = _encode_columns(encoder, columns, source.fields, first, between)
            else:
                data = between.join(
                    encoder.encode(
                        to_document(item)
                        if convert is None
                        else convert(item, item_number),
                        item_number,
                    )
                    for item_number, item in enumerate(batch, first)
                )
            yield before + data + self._suffix
            before = self._separator
        yield self._ending(number)

    def _ending(self, count: int) -> bytes:
        """Return the bytes after the last of ``count`` documents."""
        return b""


class NDJSON(_JSONFormat):
    """One JSON document per line (newline-delimited JSON), in UTF-8.

    :param end: whether to send a last record, ``{"end": true, "items": N}``. It proves
        to the client that the response is complete, for servers that cannot show that a
        response was aborted. If the stream fails, the last record before the abort is
        ``{"end": false, "incident": "..."}``. The log line and the :class:`Report` of
        the failure have the same incident id. A failure before the first chunk is an
        ordinary error page.
    :param convert: maps a type or the name of a field to a function of one value, such
        as ``{Decimal: str}``. The function gets the values of the field, or those of
        the type and its subclasses at any depth, and never None. A name outranks a
        type, and the nearest base class wins. Names are those of the item's own fields.
    :raises TypeError: when ``convert`` is invalid.
    """

    content_type = "application/x-ndjson"
    suffix = "ndjson"
    _suffix = b"\n"

    def __init__(
        self, end: bool = False, *, convert: Mapping[Any, Function] | None = None
    ) -> None:
        self._converter = make_converter("NDJSON", convert)
        self._end = end

    def _ending(self, count: int) -> bytes:
        return b'{"end":true,"items":%d}\n' % count if self._end else b""

    def encode_failure(self, incident: str) -> bytes:
        """Return the last record of a failed stream, empty without ``end``.

        :param incident: the id of the failure.
        """
        return (
            b'{"end":false,"incident":"%b"}\n' % incident.encode() if self._end else b""
        )


class JSONArray(_JSONFormat):
    """One JSON array of all items, in UTF-8.

    If the stream fails, the closing bracket is missing.

    :param convert: as for :class:`NDJSON`.
    """

    content_type = "application/json"
    suffix = "json"
    _prefix = b"["
    _separator = b","

    def __init__(self, *, convert: Mapping[Any, Function] | None = None) -> None:
        self._converter = make_converter("JSONArray", convert)

    def _ending(self, count: int) -> bytes:
        return b"]" if count else b"[]"


def joins_documents(format: Any) -> bool:
    """Return True if ``format`` accepts a source of encoded documents.

    ``NDJSON`` and ``JSONArray`` do, unless they convert values. A subclass with its own
    ``encode`` does not.
    """
    encode_batches = getattr(batch_encoder(format), "__func__", None)
    return encode_batches is _JSONFormat.encode_batches and format._converter is None


# A batch of rows, a column at a time.


def _have_columns(rows: Sequence[Any], names: Sequence[str]) -> bool:
    """Return True for rows of one class, whose fields have exactly these names."""
    types = set(map(type, rows))
    row_type: Any = types.pop()
    if len(names) == 1 and any(single_entity(row) is not None for row in rows):
        return False  # such a row becomes the document of its entity
    return (
        not types
        and is_named_row(row_type)
        and not hasattr(row_type, "__json__")
        and tuple(rows[0]._fields) == tuple(names)
        and len(set(names)) == len(names)
    )


def _encode_columns(
    encoder: Encoder,
    columns: Sequence[Sequence[Any]],
    names: Sequence[str],
    first: int,
    between: bytes,
) -> bytes:
    """Encode rows for which :func:`_have_columns` is True as objects.

    :param encoder: uses orjson.
    :param columns: the values of the rows, a column at a time.
    :param first: the item number of the first row, for errors.
    :param between: the bytes between two objects.
    """
    separate: set[int] = set()
    encoded = [_encode_values(encoder, column, separate) for column in columns]
    keys = [encoder.encode(name, first).replace(b"%", b"%%") for name in names]
    template = b"{" + b",".join([key + b":%b" for key in keys]) + b"}"
    documents = list(map(template.__mod__, zip(*encoded, strict=True)))
    for index in sorted(separate):
        values = [column[index] for column in columns]
        document = dict(zip(map(str, names), values, strict=True))
        documents[index] = encoder.encode(document, first + index)
    return between.join(documents)


def _encode_values(
    encoder: Encoder, values: Sequence[Any], separate: set[int]
) -> list[bytes]:
    """Encode the values of a column.

    :param separate: gets the indices of the rows that must be encoded separately.
    """
    types = set(map(type, values)) - {type(None)}
    data = None
    if types <= {str, int, bool}:
        data = encode_column(values)
    elif types <= {int, float}:  # SQLite gives the 1.0 of a Numeric column as 1
        data = _encode_floats(values)
    elif types == {Decimal}:
        data = _encode_decimals(values)
    elif types == {datetime} and encoder.dates_as_str:
        data = encode_datetimes(values)
    if data is None:
        return _encode_one_by_one(encoder, values, separate)
    return data.split(COLUMN_SEPARATOR)


def _encode_floats(values: Sequence[Any]) -> bytes | None:
    data = encode_column(values)
    if data is None or data.count(b"null") != values.count(None):
        return None  # orjson wrote null for a NaN
    return data


def _encode_decimals(values: Sequence[Any]) -> bytes | None:
    try:
        floats = [None if value is None else float(value) for value in values]
    except ValueError:  # a signaling NaN
        return None
    return _encode_floats(floats)


def _encode_one_by_one(
    encoder: Encoder, values: Sequence[Any], separate: set[int]
) -> list[bytes]:
    encoded: list[bytes] = []
    for index, value in enumerate(values):
        try:
            data = encoder.encode_with_orjson(value)
        except (TypeError, ValueError):  # the row, encoded separately, raises it again
            data = None
        if data is None:
            separate.add(index)
        encoded.append(data or b"")
    return encoded


# Convert.


def _make_document_converter(
    encoder: Encoder, converter: Converter | None
) -> _DocumentConverter | None:
    return None if converter is None else _DocumentConverter(encoder, converter)


_ITEMS_WITHOUT_FIELDS = (*PLAIN_TYPES, list, tuple)


class _DocumentConverter:
    """Converts items to the documents to encode.

    :param encoder: returns the fields of objects.
    :param converter: converts their values.
    """

    def __init__(self, encoder: Encoder, converter: Converter) -> None:
        self._encoder = encoder
        self._converter = converter.expand_with(self._expand)

    def __call__(self, item: Any, number: int) -> Any:
        """Return the document of an item, whose values are converted.

        :raises ValueError: when a function of the user fails.
        """
        document = to_document(item)
        convert, find_function = (
            self._converter.convert_one,
            self._converter.find_function,
        )
        if (fields := self._get_fields(document)) is None:
            return convert(document, None, partial("item {}".format, number))
        return {
            name: convert(
                value, find_function(name), partial(_name_field, name, number, 0)
            )
            for name, value in fields.items()
        }

    def convert_columns(
        self, columns: Sequence[Sequence[Any]], names: Sequence[str], first: int
    ) -> list[Sequence[Any]]:
        """Return columns of values, converted.

        :param first: the item number of the first value of each column.
        :raises ValueError: when a function of the user fails.
        """
        return [
            self._converter.convert_column(
                column,
                self._converter.find_function(name),
                partial(_name_field, name, first),
            )
            for name, column in zip(names, columns, strict=True)
        ]

    def _get_fields(self, document: Any) -> Mapping[Any, Any] | None:
        """Return the fields of an item, None if it has no fields."""
        if isinstance(document, Mapping) and not isinstance(document, MultiDict):
            return document
        if isinstance(document, _ITEMS_WITHOUT_FIELDS):
            return None
        substitute = self._expand(document)
        return substitute if isinstance(substitute, dict) else None

    def _expand(self, value: Any) -> Any:
        """Return what the encoder encodes in place of an object.

        An object that it does not support is returned unchanged: the encoder then
        raises the error.
        """
        try:
            return self._encoder.substitute(value)
        except (TypeError, ValueError):
            return value


def _name_field(name: Any, first: int, index: int) -> str:
    return f'item {first + index}, field "{name}"'
