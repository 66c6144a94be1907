"""The command ``create-tables``, and the check of ``tgstream.channels = database://``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ..live.backends import redact_url
from .finding import FAIL, OK, WARN, Finding, describe_error

_ADVICE = "Run python -m tgstream create-tables config.ini, or migrate with Alembic."


def create(config: str, tg_apps: list[Any]) -> int:
    """Create the tables in the database of an application, and print the result.

    :param config: the file that it was loaded from.
    :param tg_apps: the TurboGears applications. The first one is used.
    :returns: the exit status.
    """
    # Imported only when used: an application may not use SQLAlchemy.
    from ..live.backends.database import find_engine
    from ..live.backends.database_tables import create_tables, metadata

    if not tg_apps:
        print(f"{config} creates no TurboGears application", file=sys.stderr)
        return 1
    try:
        engine = find_engine(tg_apps[0].config)[1]
        created = create_tables(engine)
        engine.dispose()
    except Exception as error:
        print(f"the tables cannot be created: {error}", file=sys.stderr)
        return 1
    for name in metadata.tables:
        state = "created" if name in created else "exists"
        print(f"{name} {state} in {_show(engine)}")
    return 0


def check_channel_tables(config: Mapping[str, Any]) -> Finding:
    """Check the database of ``database://``: whether it has the tables."""
    from ..live.backends.database import find_engine
    from ..live.backends.database_tables import find_missing_tables

    try:
        engine = find_engine(config)[1]
    except ValueError as error:
        return Finding(FAIL, "channels", str(error))
    shown = f"database:// on {_show(engine)}"
    try:
        missing = find_missing_tables(engine)
    except Exception as error:
        result = f"cannot connect to {shown}: {describe_error(error)}"
        return Finding(FAIL, "channels", result, "Start the database.")
    if missing:
        result = f"{shown} has no table {' and '.join(missing)}"
        return Finding(FAIL, "channels", result, _ADVICE)
    if not _has_direct_connection(config, engine):
        return Finding(
            WARN,
            "channels",
            f"{shown} is behind a connection pooler such as PgBouncer, so events of "
            "other processes are found only by polling",
            "Set tgstream.channel_listen_url to the URL of a direct connection.",
        )
    return Finding(OK, "channels", f"{shown} has the tables")


def _has_direct_connection(config: Mapping[str, Any], engine: Any) -> bool:
    from ..live.backends.database_changes import is_direct

    if engine.dialect.driver not in ("psycopg", "psycopg2"):
        return True
    if config.get("tgstream.channel_listen_url"):
        return True
    with engine.connect() as connection:
        return is_direct(connection)


def _show(engine: Any) -> str:
    return redact_url(engine.url)
