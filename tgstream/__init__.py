"""Streaming responses for TurboGears2 that just work.

    from tgstream import stream

    class RootController(BaseController):

        @expose(content_type='text/plain')
        @stream
        def names(self):
            for user in DBSession.query(User).order_by(User.user_id):
                yield user.user_name + '\\n'

While the generator runs, TG's request and context are bound, and ``DBSession`` is the
stream's own, with a transaction that is committed when the generator ends.
"""

from .channels import Channel
from .core.draining import drain, health
from .core.errors import StreamError
from .core.report import Report
from .core.running import RunningStream, running
from .core.source import register_adapter as _register_adapter
from .core.stream import Stream, commit, current_stream, flush, rollback
from .exports.copy import copy
from .exports.rows import is_statement as _is_statement
from .exports.rows import rows
from .formats.arrow import Arrow, Parquet
from .formats.csv import CSV
from .formats.json import NDJSON, JSONArray
from .formats.protocols import Batched, Format
from .formats.sse import SSE, Event
from .formats.xlsx import XLSX
from .formats.zip import ZIP
from .live.channel import last_event_id, listen, position
from .turbogears.decorator import stream
from .turbogears.files import send_file
from .turbogears.hooks import install as _install_hooks
from .turbogears.plug import plugme
from .turbogears.templates import render

__all__ = [
    "CSV",
    "NDJSON",
    "SSE",
    "XLSX",
    "ZIP",
    "Arrow",
    "Batched",
    "Channel",
    "Event",
    "Format",
    "JSONArray",
    "Parquet",
    "Report",
    "RunningStream",
    "Stream",
    "StreamError",
    "commit",
    "copy",
    "current_stream",
    "drain",
    "flush",
    "health",
    "last_event_id",
    "listen",
    "plugme",
    "position",
    "render",
    "rollback",
    "rows",
    "running",
    "send_file",
    "stream",
]
__version__ = "0.1.0"

_install_hooks()  # TG calls them from now on
_register_adapter(_is_statement, rows)
