"""The fields of an item: what a row, a mapping or an object has under which name.

Rule: nothing is imported to find out; an item is asked by what it carries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any


def names_of(item: Any) -> Sequence[str] | None:
    """The names of an item's fields, in order; None for an item without names."""
    item = unwrapped(item)
    if isinstance(item, Mapping):
        return tuple(dict.fromkeys(item))  # of a MultiDict, once
    kind: Any = type(item)
    if (names := mapped_columns(kind)) is not None:
        return names  # before its fields as a dataclass, which hold relationships too
    if hasattr(kind, "_fields"):  # Row, named tuple
        return tuple(item._fields)
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    return attrs_fields(kind)


def unwrapped(item: Any) -> Any:
    """The item that is meant: the entity in a ``Row`` of one, a pydantic model's dict.

    ``session.execute(select(User))`` gives such rows.
    """
    kind: Any = type(item)
    if hasattr(kind, "_fields"):
        return item if (entity := entity_in(item)) is None else entity
    return item if (dump := dump_of(kind)) is None else dump(item)


def entity_in(row: Any) -> Any:
    """The mapped object that is the only value of a row with names, or None."""
    if isinstance(row, Sequence) and len(row) == 1 and hasattr(row, "_fields"):
        kind: Any = type(row[0])
        if mapped_columns(kind) is not None:
            return row[0]
    return None


@lru_cache
def dump_of(kind: Any) -> Any:
    """The method by which a pydantic model becomes a dict; None for another class."""
    if mapped_columns(kind) is not None:  # SQLModel's tables are both
        return None
    if hasattr(kind, "__pydantic_validator__"):
        return getattr(kind, "model_dump", None)
    return getattr(kind, "dict", None) if hasattr(kind, "__fields_set__") else None


@lru_cache
def attrs_fields(kind: Any) -> tuple[str, ...] | None:
    """The names of the fields of an attrs class; None for another class."""
    fields = getattr(kind, "__attrs_attrs__", None)
    return None if fields is None else tuple(field.name for field in fields)


@lru_cache
def mapped_columns(kind: Any) -> tuple[str, ...] | None:
    """The attributes of a mapped class that are columns, but for deferred ones.

    The table's come first, as one finds them there; a mapper has expressions first.
    """
    mapper = getattr(kind, "__mapper__", None)
    if mapper is None:
        return None
    props = [prop for prop in mapper.column_attrs if not prop.deferred]
    props.sort(key=lambda prop: not hasattr(prop.columns[0], "nullable"))
    return tuple(prop.key for prop in props)


def load_expired(item: Any, names: Sequence[str]) -> None:
    """Read again what of these attributes of a mapped object a commit has expired."""
    expired = item._sa_instance_state.expired_attributes
    for name in expired.intersection(names):
        getattr(item, name)  # the first reads them all
