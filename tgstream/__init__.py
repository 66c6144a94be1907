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

from ._config import plugme
from ._controller import stream
from ._options import Format, StreamError
from ._report import Report
from ._stream import Stream, commit, current_stream, flush, rollback

__all__ = [
    "Format",
    "Report",
    "Stream",
    "StreamError",
    "commit",
    "current_stream",
    "flush",
    "plugme",
    "rollback",
    "stream",
]
__version__ = "0.1.0.dev0"
