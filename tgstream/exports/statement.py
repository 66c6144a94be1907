"""What a statement selects, and how it is run: with the session's own rules, as rows.

Rule: whatever an application hangs on its session applies (a handler that filters by
tenant); only the objects of the ORM are left out, which cost more than the database.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.orm import Bundle, Load, Mapper, Query, Session
from sqlalchemy.orm.attributes import QueryableAttribute

from ..core.errors import StreamError
from ..database.cursors import OWN_STATEMENT
from ..formats.fields import mapped_columns

KINDS = sa.Select, sa.CompoundSelect, sa.TextualSelect, sa.TextClause, Query


class Prepared(NamedTuple):
    """A statement whose entities became columns, and the session it came with."""

    statement: Any
    session: Session | None


def prepared(hook: str, statement: Any) -> Prepared:
    """What :func:`execute` runs for ``statement``.

    :raises TypeError: when it is none that selects, or has options for entities.
    :raises StreamError: when it has run already.
    """
    if isinstance(statement, sa.Result | sa.ScalarResult | sa.MappingResult):
        raise StreamError(
            f"{hook}() was given a Result, which belongs to the transaction that its "
            "statement ran in; give it the statement itself"
        )
    if not isinstance(statement, KINDS):
        raise TypeError(
            f"{hook}() was given {_named(statement)}; give it what selects: select(), "
            "a union, text(), or a Query"
        )
    session = None
    if isinstance(statement, Query):
        session, statement = statement.session, statement.statement
    if isinstance(statement, sa.Select):
        _check_options(hook, statement)
        statement = _as_columns(statement)
    return Prepared(statement, session)


def _named(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else repr(value)


def _check_options(hook: str, statement: Any) -> None:
    if any(isinstance(option, Load) for option in statement._with_options):
        raise TypeError(
            f"{hook}() gives columns, to which options as joinedload() and load_only() "
            "do not apply: leave them out, and name the columns in select()"
        )


def _as_columns(statement: sa.Select[Any]) -> sa.Select[Any]:
    """The statement with the columns of its entities, under the attributes' names."""
    exprs = [each["expr"] for each in statement.column_descriptions]
    parts = [part for expr in exprs for part in _parts(expr)]
    columns = list(_labelled(parts))
    if all(a is b for a, b in zip(columns, exprs, strict=False)) and (
        len(columns) == len(exprs)
    ):
        return statement
    return statement.with_only_columns(*columns)


def _parts(expr: Any) -> Iterator[Any]:
    if isinstance(expr, Bundle):
        for part in expr.exprs:
            yield from _parts(part)
        return
    looked: Any = sa.inspect(expr, raiseerr=False)
    if isinstance(looked, Mapper) or getattr(looked, "is_aliased_class", False):
        for name in mapped_columns(looked.mapper.class_) or ():
            yield getattr(looked.entity, name)
    else:
        yield expr


def _labelled(parts: list[Any]) -> Iterator[Any]:
    """The attributes named as ``session.execute()`` does, and each its own name."""
    used: set[str | None] = set()
    for part in parts:
        inner = getattr(part, "expression", None)
        if not (
            isinstance(part, QueryableAttribute) and isinstance(inner, sa.ColumnElement)
        ):
            used.add(getattr(part, "name", None))
            yield part
            continue
        name = _unused(part.key, used)
        used.add(name)
        yield part if getattr(inner, "name", None) == name else part.label(name)


def _unused(name: str, used: Collection[str | None]) -> str:
    number, found = 0, name
    while found in used:
        number += 1
        found = f"{name}_{number}"
    return found


# To run it.


def execute(
    session: Session,
    statement: Any,
    options: Mapping[str, Any],
    prepare: Callable[[sa.Connection, Any], Mapping[str, Any]] = lambda *args: {},
) -> sa.Result[Any]:
    """The rows of ``statement``, as its driver gives them.

    Handlers of ``do_orm_execute`` run as ever. The one that is added, and so the last,
    answers with a Result of the connection, which has no part of the ORM in it.

    :param prepare: called with the connection and the statement before it runs there,
        and returns more options. No other call knows for certain which engine it is.
    """

    def on_connection(state: Any) -> Any:
        if OWN_STATEMENT not in state.local_execution_options:
            return None  # a handler's own statement
        # Not the session's attribute: that is for those who use it themselves.
        connection = type(session).connection(
            session, bind_arguments=state.bind_arguments
        )
        more = prepare(connection, state.statement)
        return connection.execute(
            state.statement,
            state.parameters or {},
            execution_options={**state.local_execution_options, **more},
        )

    event.listen(session, "do_orm_execute", on_connection)
    try:
        return session.execute(
            statement, execution_options={**options, OWN_STATEMENT: True}
        )
    finally:
        event.remove(session, "do_orm_execute", on_connection)


class OtherEngine(StreamError):
    """The session runs a statement on another engine than it seemed: on ``dialect``."""

    def __init__(self, hook: str, dialect: sa.Dialect, expected: str) -> None:
        super().__init__(
            f"{hook}() reads on {expected}, but the session ran a statement of it on "
            f"{dialect.name}+{dialect.driver}. Make get_bind() return one engine for "
            f"all statements of {hook}(), or give it a session of one engine"
        )
        self.dialect = dialect


def dialect_of(session: Session, statement: Any) -> sa.Dialect:
    """The dialect that a select() will probably run on; only its connection knows.

    The arguments are those that the session would give ``get_bind()``. What else it
    may need, an identity or a shard, the execution of a statement alone has.
    """
    arguments = {"clause": statement}
    for each in statement.column_descriptions[:1]:
        if (entity := each.get("entity")) is not None:
            arguments["mapper"] = sa.inspect(entity).mapper
    with suppress(Exception):
        return session.get_bind(**arguments).dialect

    def found(connection: sa.Connection, statement: Any) -> Any:
        raise OtherEngine("rows", connection.dialect, "an unknown engine")

    try:
        execute(session, statement, {}, found)
    except OtherEngine as other:
        return other.dialect
    return DefaultDialect()  # a handler has answered


def compiled(
    session: Session, statement: Any, name: str, driver: str
) -> tuple[sa.Connection, str, Any] | None:
    """A statement as its driver gets it: the connection, the text, the parameters.

    It is run, for all that an application adds to be added, but told to give no row.

    :param name: the only database on which it is; elsewhere nothing runs, nor where a
        handler answers, and there is no such text.
    :param driver: its driver.
    """
    connections: list[sa.Connection] = []
    found: list[tuple[str, Any]] = []

    def nothing(conn: Any, cursor: Any, text: str, parameters: Any, *rest: Any) -> Any:
        text = text.rstrip().rstrip(";")
        found.append((text, parameters))
        return f"SELECT * FROM (\n{text}\n) AS nothing WHERE false", parameters

    def listen(connection: sa.Connection, statement: Any) -> Mapping[str, Any]:
        dialect = connection.dialect
        if connections or (dialect.name, dialect.driver) != (name, driver):
            raise OtherEngine("copy", dialect, f"{name}+{driver}")
        connections.append(connection)
        event.listen(connection, "before_cursor_execute", nothing, retval=True)
        return {"stream_results": False}

    try:
        with execute(session, statement, {}, listen) as result:
            fields_of("copy", result)
    except OtherEngine:
        if connections:
            raise
        return None
    finally:
        for connection in connections:
            event.remove(connection, "before_cursor_execute", nothing)
    return (connections[0], *found[-1]) if found else None


def fields_of(hook: str, result: sa.Result[Any]) -> list[str]:
    """The names of the columns of ``result``, which is closed when they are no good.

    :raises StreamError: when there are none, or one comes twice.
    """
    if not getattr(result, "returns_rows", True):
        raise StreamError(f"the statement of {hook}() returns no rows; give a select()")
    # Of a quoted name, which is a str of its own kind, JSON encoders want no part.
    fields = ["".join(name) for name in tuple(result.keys())]
    if len(set(fields)) < len(fields):
        twice = next(name for name in fields if fields.count(name) > 1)
        result.close()
        raise StreamError(
            f"the statement of {hook}() has two columns named {twice!r}; give them "
            "names of their own, with label() or AS"
        )
    return fields
