"""Encode a value as JSON, as TurboGears' encoder does, and faster with orjson.

TurboGears' own encoder decides how a value looks in JSON. If orjson is installed and
the application has no custom encoders, orjson is tried first. Its result is used only
if it is an equal document: orjson writes ``null`` for NaN, for example, and ignores the
``__json__`` method of an ``Enum``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from math import isfinite
from types import GeneratorType
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

import tg.jsonify
from webob.multidict import MultiDict

from .fields import (
    attrs_fields,
    dump_method,
    field_names,
    is_named_row,
    load_expired,
    mapped_columns,
    single_entity,
)
from .values import BYTES_TYPES, find_substitute

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment, unused-ignore]


class Encoder:
    """Encodes values as compact JSON in UTF-8, with the rules of TurboGears' encoder.

    It also encodes an ``Enum``, bytes and ranges by the rules of ``values``, and
    dataclasses, attrs classes, pydantic models and mappings as objects. ``uses_orjson``
    is whether orjson is tried first, ``dates_as_str`` whether ``str()`` gives the text
    of a datetime.
    """

    def __init__(self) -> None:
        # TG configures this encoder by the application's json.* options.
        self._tg_encoder: Any = tg.jsonify._default_encoder
        self._custom_types: tuple[type, ...] = self._tg_encoder._registered_types_list
        self._to_json = self._make_json_encoder(ensure_ascii=False)
        self.uses_orjson = orjson is not None and not self._custom_types
        self.dates_as_str = not self._custom_types and self._tg_encoder.default(
            _SAMPLE_DATETIME
        ) == str(_SAMPLE_DATETIME)
        self._generator_items: Any = WeakKeyDictionary()

    def _make_json_encoder(self, ensure_ascii: bool) -> Callable[[Any], str]:
        return json.JSONEncoder(
            default=self.substitute,
            separators=(",", ":"),
            ensure_ascii=ensure_ascii,
            allow_nan=False,
        ).encode

    def encode(self, value: Any, item: int | str | Callable[[], str]) -> bytes:
        """Return the JSON document of a value.

        :param value: any value that JSON supports.
        :param item: for an error message: the number of the item, or a name, or a
            function that returns the name.
        :raises TypeError: when JSON does not support the value.
        :raises ValueError: when the value contains NaN, Infinity or itself.
        """
        try:  # without the cost of a call of _encode()
            data = self.encode_with_orjson(value) if self.uses_orjson else None
            return self._encode_with_json(value) if data is None else data
        except (TypeError, ValueError, RecursionError) as error:
            name = f"item {item}" if isinstance(item, int) else item
            subject = str(name() if callable(name) else name)
            if path := self._find_field(value):
                subject = f'{subject}, field "{path}": the value'
            if "JSON compliant" in str(error):
                raise ValueError(
                    f"{subject} contains NaN or Infinity, which JSON does not support. "
                    "Convert it to None or a string"
                ) from error
            error_type = TypeError if isinstance(error, TypeError) else ValueError
            raise error_type(
                f"{subject} cannot be encoded as JSON: {error}. Convert it to values "
                "that JSON supports"
            ) from error

    def _encode(self, value: Any) -> bytes:
        data = self.encode_with_orjson(value) if self.uses_orjson else None
        return self._encode_with_json(value) if data is None else data

    def _find_field(self, value: Any) -> str:
        """Return the path to the field that cannot be encoded, such as ``a.b``.

        :return: an empty text for a value without fields.
        """
        path: list[str] = []
        while len(path) < _PATH_LENGTH and (names := field_names(value)) is not None:
            for name in names:
                part = (
                    value[name] if isinstance(value, Mapping) else getattr(value, name)
                )
                if self._fails(part):
                    path.append(str(name))
                    value = part
                    break
            else:
                break
        return ".".join(path)

    def _fails(self, value: Any) -> bool:
        try:
            self._encode(value)
        except (TypeError, ValueError, RecursionError):
            return True
        return False

    def encode_with_orjson(self, value: Any) -> bytes | None:
        """Return orjson's document, None if TurboGears' encoder must decide."""
        try:
            data: bytes = orjson.dumps(value, self._orjson_default, _ORJSON_OPTIONS)
        except TypeError as error:  # the only class of error that orjson raises
            cause = error.__cause__
        else:
            cls = type(value)
            if cls is dict:
                parts = value.values()
            else:
                parts = value if cls is tuple or cls is list else (value,)
            unsure = b"null" in data or not _CHECKED_TYPES.issuperset(map(type, parts))
            return None if unsure and _orjson_differs(value) else data
        if cause is None or isinstance(cause, _OrjsonDiffersError):
            return None
        raise cause  # do not try again: a second attempt may succeed with half the data

    def _encode_with_json(self, value: Any) -> bytes:
        try:
            return self._to_json(value).encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can escape
            return self._make_json_encoder(ensure_ascii=True)(value).encode()

    def _orjson_default(self, value: Any) -> Any:
        if type(value) is datetime and self.dates_as_str:
            return str(value)
        substitute = self.substitute(value)
        if _orjson_differs(substitute):
            raise _OrjsonDiffersError
        return substitute

    def substitute(self, value: Any) -> Any:
        """Return what to encode in place of a value that JSON does not support."""
        cls: Any = type(value)
        if isinstance(value, tuple):  # only orjson passes subclasses of these two types
            return list(value)
        if isinstance(value, float):
            return float(value)
        if (
            cls in _TG_TYPES
            or hasattr(cls, "__json__")
            or isinstance(value, self._custom_types)
        ):
            return self._tg_encoder.default(value)
        if (substitute := find_substitute(cls)) is not None:
            return substitute(value)
        return self._object_default(value)

    def _object_default(self, value: Any) -> Any:
        cls: Any = type(value)
        if isinstance(value, GeneratorType):
            return self._list_generator(value)
        if isinstance(value, Mapping) and not isinstance(value, MultiDict):
            return dict(value)
        if isinstance(value, MutableSequence):  # also psycopg's Multirange
            return list(value)
        columns = mapped_columns(cls)
        if columns is not None:
            load_expired(value, columns)  # TG's encoder would omit expired attributes
        elif dataclasses.is_dataclass(cls):
            fields = dataclasses.fields(cls)
            return {field.name: getattr(value, field.name) for field in fields}
        elif (dump := dump_method(cls)) is not None:
            return dump(value)
        elif (names := attrs_fields(cls)) is not None:
            return {name: getattr(value, name) for name in names}
        return self._tg_encoder.default(value)

    def _list_generator(self, generator: Any) -> list[Any]:
        """Return the items of a generator, which a second attempt needs again."""
        if generator not in self._generator_items:
            try:
                self._generator_items[generator] = list(generator)
            except Exception as error:
                self._generator_items[generator] = error
        items: Any = self._generator_items[generator]
        if isinstance(items, Exception):
            raise items
        return list(items)


class _OrjsonDiffersError(Exception):
    """orjson would write another document than TurboGears' encoder."""


def _orjson_differs(value: Any) -> bool:
    """Return True if orjson writes null for NaN, or ignores an Enum's ``__json__``."""
    cls = type(value)
    if cls is float:
        return not isfinite(value)
    if cls in _EQUAL_TYPES:
        return False
    if isinstance(value, _CONTAINERS):
        parts = value.values() if isinstance(value, dict) else value
        for part in parts:  # any() takes 1.7 times as long
            if type(part) not in _EQUAL_TYPES and _orjson_differs(part):
                return True
        return False
    if isinstance(value, Enum):
        return hasattr(cls, "__json__") or _orjson_differs(value.value)
    return isinstance(value, float) and not isfinite(value)


_PATH_LENGTH = 8
"""Maximum number of names in the path to a field: a value may contain itself."""

_CONTAINERS = dict, list, tuple
_EQUAL_TYPES = frozenset(
    # _orjson_default() checks the value that replaces a Decimal or a date.
    {str, int, bool, type(None), datetime, date, time, Decimal, UUID}
)
_CHECKED_TYPES = _EQUAL_TYPES | {float}
"""Types of values that are equal in both encoders if orjson writes no ``null``."""

_TG_TYPES = {datetime, date, time, Decimal}
_SAMPLE_DATETIME = datetime(2000, 1, 2, 3, 4, 5, 6)
if orjson is not None:
    _ORJSON_OPTIONS = orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_DATACLASS


def to_document(item: Any) -> Any:
    """Return what to encode for an item: a dict for a row with names.

    A ``Row`` of one entity becomes that entity. An item of bytes becomes an object that
    cannot be encoded, because it is more likely a document or a line of CSV than a
    value.
    """
    cls: Any = type(item)
    kind = _find_kind(cls)
    if kind is None:
        return item
    if kind == "bytes":
        return _BytesItem()
    if hasattr(cls, "__json__"):
        return item.__json__()
    if len(item) == 1 and (entity := single_entity(item)) is not None:
        return entity
    return dict(zip(_plain_strings(item._fields), item, strict=True))


@lru_cache
def _find_kind(cls: Any) -> str | None:
    """Return the kind of items that are not encoded as they are."""
    if issubclass(cls, BYTES_TYPES):
        return "bytes"
    return "row" if is_named_row(cls) else None


class _BytesItem:
    def __json__(self) -> None:
        raise TypeError("it is bytes")


@lru_cache
def _plain_strings(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(str, names))  # orjson refuses SQLAlchemy's subclass of str


# Columns of plain values, which orjson encodes as one list.

COLUMN_SEPARATOR = b",\n  "
"""Separates two values of a column. Inside a value there is no line break, because JSON
escapes it, so that only separators match."""


def encode_column(values: Sequence[Any]) -> bytes | None:
    """Encode values with orjson, separated by ``COLUMN_SEPARATOR``.

    orjson writes null for NaN and Infinity.

    :return: None if orjson is not installed or rejects a value.
    """
    if orjson is None:
        return None
    try:
        data: bytes = orjson.dumps(values, option=orjson.OPT_INDENT_2)
    except TypeError:
        return None
    return data[4:-2]


def encode_datetimes(values: Sequence[Any]) -> bytes | None:
    """Encode datetimes, some of which may be None, as ``str()`` writes them.

    :return: None if one has an offset: orjson does not always write it as ``str()``.
    """
    data = encode_column(values)
    if data is None:
        return None
    count = len(values) - data.count(b"null")
    if b"+" in data or data.count(b"-") != 2 * count:
        return None
    return data.replace(b"T", b" ")
