"""The JSON of an item.

Rule: TurboGears' own encoder decides what a value is in JSON. orjson, where it is
installed, is asked first, and is held to give an equal document.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
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

from ._orjson import orjson
from .fields import attrs_fields, dump_of, entity_in, load_expired, mapped_columns


class Encoder:
    """Values to compact JSON in UTF-8, as TurboGears' encoder has it.

    To what that one knows it adds UUIDs as text, an ``Enum`` as its value, and
    dataclasses, attrs classes, pydantic models and mappings as objects.
    """

    def __init__(self) -> None:
        # TG's own, with the application's json.* options and custom encoders.
        self._tg: Any = tg.jsonify._default_encoder
        self._custom: tuple[type, ...] = self._tg._registered_types_list
        self._text = self._make(ensure_ascii=False)
        self.quick = orjson is not None and not self._custom
        self._drawn: Any = WeakKeyDictionary()  # of generators
        self.plain_dates = not self._custom and self._tg.default(_SAMPLE) == str(
            _SAMPLE
        )

    def _make(self, ensure_ascii: bool) -> Callable[[Any], str]:
        return json.JSONEncoder(
            default=self._default,
            separators=(",", ":"),
            ensure_ascii=ensure_ascii,
            allow_nan=False,
        ).encode

    def encode(self, value: Any, number: int) -> bytes:
        """The document of ``value``.

        :param value: anything that can be JSON.
        :param number: the number of its item, for the error.
        :raises TypeError: when it has no JSON.
        :raises ValueError: when it holds NaN or Infinity, or itself.
        """
        try:
            data = self.quickly(value) if self.quick else None
            return self._slowly(value) if data is None else data
        except (TypeError, ValueError, RecursionError) as error:
            if "JSON compliant" in str(error):
                raise ValueError(
                    f"item {number} holds NaN or Infinity, which JSON has not: make it "
                    "None, or text"
                ) from error
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"item {number} cannot be JSON: {error}") from error

    def quickly(self, value: Any) -> bytes | None:
        """What orjson makes of it; None where TG's encoder is to decide."""
        try:
            data: bytes = orjson.dumps(value, self._quick_default, _PASSTHROUGH)
        except TypeError as error:  # orjson's every error
            failed = error.__cause__
        else:
            kind = type(value)
            if kind is dict:
                inner = value.values()
            else:
                inner = value if kind is tuple or kind is list else (value,)
            judged = b"null" in data or not _PLAIN.issuperset(map(type, inner))
            return None if judged and _differs(value) else data
        if failed is None or isinstance(failed, _Differs):
            return None
        raise failed  # not once more: what has failed may work by half then

    def _slowly(self, value: Any) -> bytes:
        try:
            return self._text(value).encode()
        except UnicodeEncodeError:  # half a surrogate pair: JSON can escape it
            return self._make(ensure_ascii=True)(value).encode()

    def _quick_default(self, value: Any) -> Any:
        if type(value) is datetime.datetime and self.plain_dates:
            return str(value)
        made = self._default(value)
        if _differs(made):
            raise _Differs
        return made

    def _default(self, value: Any) -> Any:
        """What stands for a value that JSON has no word for."""
        kind = type(value)
        if isinstance(value, tuple):  # these two only orjson asks for: json knows them
            return list(value)
        if isinstance(value, float):
            return float(value)
        if (
            kind in _OF_TG
            or hasattr(kind, "__json__")
            or isinstance(value, self._custom)
        ):
            return self._tg.default(value)
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, UUID):
            return str(value)
        return self._of_object(value)

    def _of_object(self, value: Any) -> Any:
        kind: Any = type(value)
        if isinstance(value, GeneratorType):
            return self._drained(value)
        if isinstance(value, Mapping) and not isinstance(value, MultiDict):
            return dict(value)
        columns = mapped_columns(kind)
        if columns is not None:
            load_expired(value, columns)  # which TG's encoder overlooks
        elif dataclasses.is_dataclass(kind):
            fields = dataclasses.fields(kind)
            return {field.name: getattr(value, field.name) for field in fields}
        elif (dump := dump_of(kind)) is not None:
            return dump(value)
        elif (names := attrs_fields(kind)) is not None:
            return {name: getattr(value, name) for name in names}
        return self._tg.default(value)

    def _drained(self, generator: Any) -> list[Any]:
        """What a generator yields, which can be asked once; a value, twice."""
        if generator not in self._drawn:
            try:
                self._drawn[generator] = list(generator)
            except Exception as error:
                self._drawn[generator] = error
        drawn: Any = self._drawn[generator]
        if isinstance(drawn, Exception):
            raise drawn
        return list(drawn)


class _Differs(Exception):
    """orjson would write what TG's encoder would not."""


def _differs(value: Any) -> bool:
    """True where orjson writes null for a NaN, or overlooks an Enum's ``__json__``."""
    kind = type(value)
    if kind is float:
        return not isfinite(value)
    if kind in _NEVER:
        return False
    if isinstance(value, _CONTAINERS):
        inner = value.values() if isinstance(value, dict) else value
        for part in inner:  # noqa: SIM110  # any() costs twice as much
            if type(part) not in _NEVER and _differs(part):
                return True
        return False
    if isinstance(value, Enum):
        return hasattr(kind, "__json__") or _differs(value.value)
    return isinstance(value, float) and not isfinite(value)


_CONTAINERS = dict, list, tuple
_NEVER = frozenset(
    {str, int, bool, type(None), datetime.datetime, datetime.date, datetime.time}
    | {Decimal, UUID}  # what stands for one is looked at when it is asked for
)
_PLAIN = _NEVER | {float}
_OF_TG = {datetime.datetime, datetime.date, datetime.time, Decimal}
_SAMPLE = datetime.datetime(2000, 1, 2, 3, 4, 5, 6)
if orjson is not None:
    _PASSTHROUGH = orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_DATACLASS


def document(item: Any) -> Any:
    """An item as what is encoded: a row with names as an object.

    A ``Row`` of one entity is that entity.
    """
    kind: Any = type(item)
    if not has_names(kind):
        return item
    if hasattr(kind, "__json__"):
        return item.__json__()
    if len(item) == 1 and (entity := entity_in(item)) is not None:
        return entity
    return dict(zip(_plain(item._fields), item, strict=True))


@lru_cache
def has_names(kind: Any) -> bool:
    """True for named tuples, and for a ``Row``."""
    return issubclass(kind, Sequence) and hasattr(kind, "_fields")


@lru_cache
def _plain(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(str, names))  # SQLAlchemy's are of a class that orjson refuses
