"""One controller, several formats: the request chooses one of them.

The extension of the URL decides, as TurboGears has parsed it. Without an extension the
``Accept`` header decides (RFC 9110, section 12.5.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from webob.acceptparse import AcceptValidHeader, create_accept_header
from webob.exc import HTTPNotAcceptable

from ..core.headers import add_vary
from ..core.options import check
from ..formats.protocols import Format


def check_formats(where: str, formats: Sequence[Any]) -> tuple[Format, ...]:
    """Check the formats of a controller, and make objects of classes.

    :param where: the place that gives them, for error messages.
    :raises TypeError: when one of them is not a format.
    :raises ValueError: when there is none, or two have the same content type.
    """
    checked: list[Any] = [check(where, format).format for format in formats]
    if not checked or None in checked:
        raise ValueError(
            f"{where}: the list of formats must have at least one format, and only "
            f"formats, got {formats!r:.80}"
        )
    types = [format.content_type for format in checked]
    if len(set(types)) < len(types):
        raise ValueError(
            f"{where}: the formats must have different content types, because requests "
            f"choose by these, got {', '.join(types)}"
        )
    return tuple(checked)


def choose_format(formats: Sequence[Format], request: Any, response: Any) -> Format:
    """The format of the response to a request.

    :param response: TG's, which gets ``Vary: Accept``.
    :raises HTTPNotAcceptable: when the URL has the extension of another type of file,
        or when the client accepts none of the formats.
    """
    add_vary(response, "Accept")
    # TG sets it only if extensions are enabled.
    extension = (getattr(request, "response_ext", None) or "").lower().removeprefix(".")
    for format in formats:
        if extension and extension == getattr(format, "suffix", None):
            return format
    if not request.response_type:  # an unknown extension may be a part of a name
        offers = {format.content_type: format for format in formats}
        accept = request.accept
        if not any(";" in offer for offer in offers):
            accept = _ignore_parameters(accept)
        accepted = accept.acceptable_offers([*offers])
        if accepted:
            return offers[accepted[0][0]]
    raise HTTPNotAcceptable(
        _describe(formats, extension if request.response_type else ""),
        headers={"Vary": "Accept"},
        body_template="${detail}",
    )


def _ignore_parameters(accept: Any) -> Any:
    """An ``Accept`` header without the parameters of its media types.

    Clients send ``text/csv; charset=utf-8``. An empty header counts as a missing one.
    """
    if not isinstance(accept, AcceptValidHeader):
        return accept
    ranges = [
        f"{media_range.partition(';')[0]};q={quality}"
        for media_range, quality, *_ in accept.parsed
    ]
    return create_accept_header(", ".join(ranges) or None)


def _describe(formats: Sequence[Format], extension: str) -> str:
    """The text of the response.

    :param extension: that of the URL, if it is the reason.
    """
    types = []
    for format in formats:
        suffix = getattr(format, "suffix", None)
        types.append(format.content_type + (f" (.{suffix})" if suffix else ""))
    wanted = f"as .{extension}" if extension else "in a type that you accept"
    return (
        f"This resource is not available {wanted}. It is available as "
        f"{', '.join(types)}."
    )
