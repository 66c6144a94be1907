"""The field names of items: of rows, mappings, dataclasses, models and mapped objects.

Objects of SQLAlchemy, pydantic and attrs are recognized by the attributes of their
classes. So none of these packages has to be installed or imported. The results for a
class are cached, because the functions run for each item.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any


def field_names(item: Any) -> Sequence[str] | None:
    """Return the names of an item's fields in order, None if it has no names."""
    item = _unwrap(item)
    if isinstance(item, Mapping):
        return tuple(dict.fromkeys(item))  # a MultiDict repeats its keys
    cls: Any = type(item)
    if (names := mapped_columns(cls)) is not None:
        return names  # not the fields of a mapped dataclass: they have relationships
    if hasattr(cls, "_fields"):  # a Row or a named tuple
        return tuple(item._fields)
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    return attrs_fields(cls)


def _unwrap(item: Any) -> Any:
    """Return the entity of a ``Row`` of one, a pydantic model's dict, or the item."""
    cls: Any = type(item)
    if hasattr(cls, "_fields"):
        return item if (entity := single_entity(item)) is None else entity
    return item if (dump := dump_method(cls)) is None else dump(item)


@lru_cache
def is_named_row(cls: Any) -> bool:
    """Return True for the class of a named tuple, and for SQLAlchemy's ``Row``."""
    return issubclass(cls, Sequence) and hasattr(cls, "_fields")


def single_entity(row: Any) -> Any:
    """Return the mapped object that is the only value of a row with names, or None.

    ``session.execute(select(User))`` gives rows of one entity.
    """
    if isinstance(row, Sequence) and len(row) == 1 and hasattr(row, "_fields"):
        cls: Any = type(row[0])
        if mapped_columns(cls) is not None:
            return row[0]
    return None


@lru_cache
def dump_method(cls: Any) -> Any:
    """Return the method that converts a pydantic model to a dict.

    :return: None for any other class.
    """
    if mapped_columns(cls) is not None:  # a table of SQLModel is a pydantic model too
        return None
    if hasattr(cls, "__pydantic_validator__"):
        return getattr(cls, "model_dump", None)
    return getattr(cls, "dict", None) if hasattr(cls, "__fields_set__") else None


@lru_cache
def attrs_fields(cls: Any) -> tuple[str, ...] | None:
    """Return the names of the fields of an attrs class, None for any other class."""
    fields = getattr(cls, "__attrs_attrs__", None)
    return None if fields is None else tuple(field.name for field in fields)


@lru_cache
def mapped_columns(cls: Any) -> tuple[str, ...] | None:
    """Return the attributes of a mapped class that are columns and not deferred.

    The table's columns come first, in the order of the table, then SQL expressions. (A
    mapper has the expressions first.)

    :return: None for a class that is not mapped.
    """
    mapper = getattr(cls, "__mapper__", None)
    if mapper is None:
        return None
    props = [prop for prop in mapper.column_attrs if not prop.deferred]
    props.sort(key=lambda prop: not hasattr(prop.columns[0], "nullable"))
    return tuple(prop.key for prop in props)


def load_expired(item: Any, names: Sequence[str]) -> None:
    """Load those of the named attributes of a mapped object that a commit expired."""
    expired = item._sa_instance_state.expired_attributes
    for name in expired.intersection(names):
        getattr(item, name)  # the first access loads them all
