"""The statement of ``rows()`` or ``copy()``: its columns, its engine, its execution.

A statement is executed by its session, so that everything that an application adds to
the session applies, for example an event handler that filters by tenant. There are no
ORM objects: mapped classes are replaced by their columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import result_tuple
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.orm import Bundle, Load, Mapper, Query, Session
from sqlalchemy.orm.attributes import QueryableAttribute

from ..core.errors import StreamError
from ..database.writes import OWN_STATEMENT
from ..formats.fields import mapped_columns

STATEMENT_TYPES = (
    sa.Select,
    sa.CompoundSelect,
    sa.TextualSelect,
    sa.TextClause,
    Query,
)


class PreparedStatement(NamedTuple):
    """A statement whose mapped classes became columns, and the session of a Query."""

    statement: Any
    session: Session | None


def prepare(function: str, statement: Any) -> PreparedStatement:
    """Check a statement, and replace its mapped classes by their columns.

    :param function: the name for error messages, ``rows`` or ``copy``.
    :raises TypeError: if it is not a statement that selects, or has loader options.
    :raises StreamError: if it was already executed.
    """
    if isinstance(statement, sa.Result | sa.ScalarResult | sa.MappingResult):
        raise StreamError(
            f"{function}() got a Result, which belongs to the transaction in which its "
            "statement was executed. Pass the statement itself"
        )
    if not isinstance(statement, STATEMENT_TYPES):
        raise TypeError(
            f"{function}() needs a statement that selects, got {_describe(statement)}. "
            "Pass a select(), a union, text() or a Query"
        )
    session = None
    if isinstance(statement, Query):
        query, session, statement = statement, statement.session, statement.statement
        if not query.load_options._autoflush:  # which the statement does not have
            statement = statement.execution_options(autoflush=False)
    if isinstance(statement, sa.Select):
        _check_options(function, statement)
        statement = _select_columns(statement)
    return PreparedStatement(statement, session)


def _describe(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else repr(value)


def _check_options(function: str, statement: sa.Select[Any]) -> None:
    if any(isinstance(option, Load) for option in statement._with_options):
        raise TypeError(
            f"{function}() selects columns, so loader options such as joinedload() and "
            "load_only() have no effect. Remove them, and name the columns in select()"
        )


def _select_columns(statement: sa.Select[Any]) -> sa.Select[Any]:
    """Select the columns of mapped classes, under the names of their attributes."""
    selected = [column["expr"] for column in statement.column_descriptions]
    expanded = [part for expr in selected for part in _expand_entity(expr)]
    columns = list(_label_columns(expanded))
    if all(a is b for a, b in zip(columns, selected, strict=False)) and (
        len(columns) == len(selected)
    ):
        return statement
    return statement.with_only_columns(*columns)


def _expand_entity(expr: Any) -> Iterator[Any]:
    if isinstance(expr, Bundle):
        for part in expr.exprs:
            yield from _expand_entity(part)
        return
    inspected: Any = sa.inspect(expr, raiseerr=False)
    if isinstance(inspected, Mapper) or getattr(inspected, "is_aliased_class", False):
        for name in mapped_columns(inspected.mapper.class_) or ():
            yield getattr(inspected.entity, name)
    else:
        yield expr


def _label_columns(columns: list[Any]) -> Iterator[Any]:
    """Name attributes as ``session.execute()`` does. No two get the same name."""
    used: set[str | None] = set()
    for column in columns:
        inner = getattr(column, "expression", None)
        if not (
            isinstance(column, QueryableAttribute)
            and isinstance(inner, sa.ColumnElement)
        ):
            used.add(getattr(column, "name", None))
            yield column
            continue
        name = _unused_name(column.key, used)
        used.add(name)
        yield column if getattr(inner, "name", None) == name else column.label(name)


def _unused_name(name: str, used: Collection[str | None]) -> str:
    number, candidate = 0, name
    while candidate in used:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def make_rows(names: Sequence[str], values: Iterable[Sequence[Any]]) -> list[Any]:
    """Make rows with these names, of the values of each row."""
    return list(map(result_tuple(list(names)), values))


# Execution.


def execute(
    session: Session,
    statement: Any,
    choose_options: Callable[[sa.Connection, Any], Mapping[str, Any]],
) -> sa.Result[Any]:
    """Execute ``statement`` and return its rows as the driver returns them.

    Handlers of ``do_orm_execute`` run as usual. The handler that is added here runs
    last, and returns a Result of the connection, which has no part of the ORM.

    :param choose_options: is called with the connection and the statement before it is
        executed there, and returns its execution options. No earlier call knows for
        certain which engine executes the statement.
    """

    def execute_on_connection(state: Any) -> Any:
        if OWN_STATEMENT not in state.local_execution_options:
            return None  # a handler's own statement
        # The session itself flushes only after handlers that return no result.
        if session.autoflush and state.execution_options.get("autoflush", True):
            session.flush()
        # Not session.connection(), after which a stream keeps its transaction open.
        connection = type(session).connection(
            session, bind_arguments=state.bind_arguments
        )
        options = choose_options(connection, state.statement)
        return connection.execute(
            state.statement,
            state.parameters or {},
            execution_options={**state.local_execution_options, **options},
        )

    event.listen(session, "do_orm_execute", execute_on_connection)
    try:
        return session.execute(statement, execution_options={OWN_STATEMENT: True})
    finally:
        event.remove(session, "do_orm_execute", execute_on_connection)


class OtherEngineError(StreamError):
    """The session executes a statement on another engine than expected.

    :param function: the name for the message, ``rows`` or ``copy``.
    :param dialect: the dialect of the engine that executes the statement.
    :param expected: the name of the expected dialect and driver.
    """

    def __init__(self, function: str, dialect: sa.Dialect, expected: str) -> None:
        super().__init__(
            f"{function}() reads from {expected}, but the session executed one of its "
            f"statements on {dialect.name}+{dialect.driver}. Make get_bind() return "
            f"one engine for all statements of {function}(), or pass a session that "
            "has one engine"
        )
        self.dialect = dialect


def find_dialect(session: Session, statement: Any) -> sa.Dialect:
    """The dialect that probably executes a ``select()``. A connection makes it certain.

    ``get_bind()`` gets the arguments that the session would pass. An identity or a
    shard, if it needs that, is known only when a statement is executed.
    """
    arguments = {"clause": statement}
    for column in statement.column_descriptions[:1]:
        if (entity := column.get("entity")) is not None:
            arguments["mapper"] = sa.inspect(entity).mapper
    with suppress(Exception):
        return session.get_bind(**arguments).dialect

    def stop(connection: sa.Connection, statement: Any) -> Any:
        raise OtherEngineError("rows", connection.dialect, "an unknown engine")

    try:
        execute(session, statement, stop)
    except OtherEngineError as other:
        return other.dialect
    return DefaultDialect()  # a handler has returned a result


class DriverStatement(NamedTuple):
    """A statement as the driver of ``connection`` receives it."""

    connection: sa.Connection
    text: str
    parameters: Any
    fields: Sequence[str]
    """The names of its columns, as in ``Row``. The database may have others."""
    types: Sequence[Any]
    """The codes of their types, as the driver has them."""


def compile_for_driver(
    session: Session, statement: Any, dialect_name: str, driver: str
) -> DriverStatement | None:
    """Return a statement with everything that the application adds to it.

    To collect these additions the statement is executed, wrapped in a query that
    returns no rows. The result is None, and nothing is executed, if the session would
    use another dialect or driver, or if a handler returns a result.
    """
    connections: list[sa.Connection] = []
    executed: list[tuple[str, Any]] = []
    types: list[Any] = []

    def select_nothing(
        connection: Any, cursor: Any, text: str, parameters: Any, *rest: Any
    ) -> Any:
        text = text.rstrip().rstrip(";")
        executed.append((text, parameters))
        return f"SELECT * FROM (\n{text}\n) AS nothing WHERE false", parameters

    def read_types(connection: Any, cursor: Any, *rest: Any) -> None:
        types[:] = [column[1] for column in cursor.description or ()]

    def add_listeners(connection: sa.Connection, statement: Any) -> Mapping[str, Any]:
        dialect = connection.dialect
        if connections or (dialect.name, dialect.driver) != (dialect_name, driver):
            raise OtherEngineError("copy", dialect, f"{dialect_name}+{driver}")
        connections.append(connection)
        event.listen(connection, "before_cursor_execute", select_nothing, retval=True)
        event.listen(connection, "after_cursor_execute", read_types)
        return {"stream_results": False}

    try:
        with execute(session, statement, add_listeners) as result:
            fields = get_fields("copy", result)
    except OtherEngineError:
        if connections:
            raise
        return None
    finally:
        for connection in connections:
            event.remove(connection, "before_cursor_execute", select_nothing)
            event.remove(connection, "after_cursor_execute", read_types)
    if not executed:
        return None
    return DriverStatement(connections[0], *executed[-1], fields, types)


def get_fields(function: str, result: sa.Result[Any]) -> list[str]:
    """Return the names of the columns of ``result``.

    :raises StreamError: if there is no column, or two have the same name. The result
        is closed then.
    """
    if not getattr(result, "returns_rows", True):
        raise StreamError(
            f"{function}(): the statement returns no rows. Pass a select()"
        )
    # "".join() makes a plain str of a quoted_name, which JSON encoders reject.
    fields = ["".join(name) for name in tuple(result.keys())]
    if len(set(fields)) < len(fields):
        duplicate = next(name for name in fields if fields.count(name) > 1)
        result.close()
        raise StreamError(
            f"{function}(): the statement has two columns named {duplicate!r}. Give "
            "each column its own name with label() or AS"
        )
    return fields
