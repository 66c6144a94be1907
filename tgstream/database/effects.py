"""Effects of a statement beside reading: writes, locks, settings of its transaction.

Text and unknown functions can have any effect. The functions here assume the worst.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import visitors
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import ForUpdateArg

_SAFE_FUNCTION_NAMES = (
    "abs avg char_length coalesce concat count current_date current_time"
    " current_timestamp dense_rank length localtime localtimestamp lower max min now"
    " rank round row_number sum trim upper"
)
_SAFE_FUNCTIONS = frozenset(_SAFE_FUNCTION_NAMES.split())
_SAFE_TEXT = re.compile(r"\*|\w+")  # of count(*), and of SELECT 1 in an EXISTS
_QUOTED = re.compile(
    r"""--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|"(?:[^"]|"")*"|\$(\w*)\$.*?\$\1\$""", re.S
)
_READS = re.compile(r"[\s(]*(?:SELECT|VALUES|TABLE|WITH)\b", re.I)
_WRITES = re.compile(r"[()]\s*(?:UPDATE|DELETE)\b|\bINTO\b", re.I)
_LOCKS = re.compile(
    r"\bFOR\s+(?:NO\s+KEY\s+)?UPDATE\b|\bFOR\s+(?:KEY\s+)?SHARE\b"
    r"|\bLOCK\s+IN\s+SHARE\s+MODE\b|\b(?:UPD|X|HOLD)LOCK\b|\w*advisory_xact_lock\w*",
    re.I,
)


def is_query(statement: Any) -> bool:
    """True for a statement that can be a cursor's or a subquery: it only selects.

    INSERT ... RETURNING, SHOW and EXPLAIN return rows, too, but cannot be either.
    """
    if isinstance(statement, sa.TextualSelect):
        statement = statement.element
    if isinstance(statement, sa.TextClause):
        text = _QUOTED.sub(" ", statement.text)
        return _READS.match(text) is not None and _WRITES.search(text) is None
    return not writes(statement)


def writes(statement: Any) -> bool:
    """True if a select() contains an INSERT, UPDATE or DELETE, for example as a CTE."""
    return any(
        isinstance(part, UpdateBase)
        or (isinstance(part, sa.TextualSelect) and not is_query(part))
        for part in visitors.iterate(statement)
    )


def find_lock(statement: Any) -> str | None:
    """The clause or function of a select() that locks rows until its transaction ends.

    None if there is no lock.
    """
    for part in visitors.iterate(statement):
        if isinstance(part, ForUpdateArg):
            return "with_for_update()"
        if isinstance(part, FunctionElement):
            texts = iter([getattr(part, "name", "")])  # a class may have no name
        else:
            texts = _texts(part)
        for text in texts:
            if lock := _LOCKS.search(_QUOTED.sub(" ", text)):
                return lock[0]
    return None


def only_reads(statement: Any) -> bool:
    """True if a statement certainly leaves nothing in its transaction."""
    if not isinstance(statement, sa.Select | sa.CompoundSelect):
        return False
    options = statement.get_execution_options()
    if options.get("stream_results") or options.get("yield_per"):
        return False  # it may still be read from
    return all(_only_reads(part) for part in visitors.iterate(statement))


def _only_reads(part: Any) -> bool:
    if isinstance(part, ForUpdateArg | UpdateBase):
        return False
    if isinstance(part, FunctionElement):
        packages = getattr(part, "packagenames", ())
        return getattr(part, "name", None) in _SAFE_FUNCTIONS and not packages
    return all(_SAFE_TEXT.fullmatch(text) for text in _texts(part))


def _texts(part: Any) -> Iterator[str]:
    """The texts of a part that SQLAlchemy sends unchanged."""
    if isinstance(part, sa.TextClause):
        yield part.text
    elif isinstance(part, sa.ColumnClause) and part.is_literal:
        yield str(part.name)
    elif isinstance(part, sa.Select):
        # These are private. A rename raises an AttributeError, and hides no lock.
        for text, _ in (*part._prefixes, *part._suffixes):
            yield str(text)
        yield from part._hints.values()
        yield from (text for _, text in part._statement_hints)
