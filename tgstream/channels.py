"""Named channels of events, and the tables of ``tgstream.channels = database://``.

``metadata`` is the ``sqlalchemy.MetaData`` of these tables, for Alembic.
"""

from typing import TYPE_CHECKING, Any

from .live.channel import Channel, listen, position

if TYPE_CHECKING:
    from .live.backends.database_tables import metadata

__all__ = ["Channel", "listen", "metadata", "position"]


def __getattr__(name: str) -> Any:
    # Imported only when used: it needs SQLAlchemy.
    if name == "metadata":
        from .live.backends.database_tables import metadata

        return metadata
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
