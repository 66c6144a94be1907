"""Where a client that comes back says it was: its last event id.

Rule: what a client says is a claim. It is bounded and made of one line, or there is
none; whether it is true is for whoever reads it to find out.
"""

from __future__ import annotations

from ..core import context as _context
from ..core.errors import StreamError

LONGEST = 256
"""Characters that an event id may have, to be taken for one."""


def last_event_id() -> str | None:
    """The id of the last event that the client has had, as it says itself.

    Browsers send it by the header ``Last-Event-ID`` when they come back; polyfills that
    cannot set headers, by the query parameter ``lastEventId``. Do not trust it: it may
    be forged, as anything that a client sends. ``Channel.listen(after=...)`` takes it
    as it is.

    :returns: at the most 256 characters, without CR, LF or NUL; None where the client
        has said nothing, or something else.
    :raises StreamError: outside of a request.
    """
    try:
        request = _context.current().request
    except TypeError:
        raise StreamError(
            "last_event_id() belongs in a controller, or in the generator of its "
            "stream; no request is running here"
        ) from None
    try:
        # A browser sends UTF-8, and WSGI hands it on as latin-1.
        said = request.headers.get("Last-Event-ID", "").encode("latin-1").decode()
        said = said or request.GET.get("lastEventId", "")
    except ValueError:  # which UnicodeError is
        return None
    return said if is_id(said) else None


def is_id(said: str) -> bool:
    """True for what can be the id of an event."""
    return 0 < len(said) <= LONGEST and not any(each in said for each in "\r\n\0")
