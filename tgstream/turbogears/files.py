"""``send_file()``, and the response of a file: its status, headers and bytes."""

from __future__ import annotations

import io
import mimetypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..core.files import (
    FileParts,
    StoredFile,
    describe,
    find_name,
    find_stored,
    open_file,
    wrap_seekable,
)
from ..core.headers import find_charset
from ..core.options import Options, check
from ..core.ranges import evaluate, make_multipart, parse_date
from ..core.source import resolve_proxy
from ..core.stream import Stream


def send_file(
    file: Any,
    *,
    filename: str | None = None,
    content_type: str | None = None,
    max_age: int | None = None,
) -> Stream:
    """Send a file that clients can resume, check for changes, and read in parts.

    Return it from any exposed method. The response has ``Content-Length``, ``ETag``,
    ``Last-Modified`` and ``Accept-Ranges``. Conditions and ranges of the request are
    answered by RFC 9110, sections 13 and 14. The whole file is sent, from its first
    byte, and is closed at the end. If it becomes shorter while it is sent, the transfer
    is aborted.

    Check a path that comes from a user: ``../`` leads out of your folder.

    :param file: a path (``str`` or ``os.PathLike``), or an open, seekable binary
        file.
    :param filename: the name under which a browser saves the file. None for a file that
        the browser shows.
    :param content_type: None to guess it from ``filename``, or else from the name of
        the file. A type of text without a charset gets ``charset=utf-8``.
    :param max_age: seconds for which a browser may use the file without a request. None
        if it must check each time whether the file has changed.
    :raises OSError: when the path is missing, is not a regular file, or may not be
        read, and when an open file cannot be sought.
    :raises TypeError: when a parameter has a wrong type.
    :raises ValueError: when a parameter has an invalid value.
    """
    check("send_file", filename=filename)
    _check_parameters(content_type, max_age)
    stored = _find_file(resolve_proxy(file))
    stored.content_type, stored.max_age = content_type, max_age
    stored.default_type = "application/octet-stream"
    return Stream._of(stored, Options(filename=filename), None)


def _check_parameters(content_type: Any, max_age: Any) -> None:
    if content_type is not None and not isinstance(content_type, str):
        raise TypeError(
            "send_file: content_type must be a str or None, got "
            f"{type(content_type).__name__}: {content_type!r:.80}"
        )
    if content_type is not None and "/" not in content_type:
        raise ValueError(
            "send_file: content_type must be a type such as 'application/pdf', got "
            f"{content_type!r:.80}"
        )
    if max_age is not None and (
        not isinstance(max_age, int) or isinstance(max_age, bool) or max_age < 0
    ):
        raise ValueError(
            "send_file: max_age must be a number of seconds, an integer >= 0, or None, "
            f"got {max_age!r:.80}"
        )


def _find_file(file: Any) -> StoredFile:
    if isinstance(file, str | os.PathLike):
        opened = open_file(file)
        stored = find_stored(opened, 0)
        if stored is None:
            opened.close()
            raise ValueError(
                f"send_file: the size of {os.fspath(file)!r} is not known before it is "
                "read. Return the open file from a controller with @stream"
            )
        return stored
    if not hasattr(file, "read") or not hasattr(file, "seek"):
        raise TypeError(
            "send_file: file must be a path or an open, seekable binary file, got "
            f"{type(file).__name__}: {file!r:.80}"
        )
    if getattr(file, "closed", False) is True:
        raise ValueError(
            f"send_file: the file {describe(file)} is closed. Open it without 'with': "
            "tgstream closes it after the response"
        )
    if isinstance(file, io.TextIOBase) or isinstance(
        getattr(file, "encoding", None), str
    ):
        raise TypeError(
            f"send_file: file must be binary, got text: {type(file).__name__}. Open it "
            "with the mode 'rb'"
        )
    return find_stored(file, 0) or wrap_seekable(file)


# The response.


def set_file_headers(
    response: Any,
    stored: StoredFile,
    filename: str | None,
    exposed: Callable[[], tuple[Any, ...]],
) -> None:
    """Set the content type of a file.

    :param filename: the name under which a browser saves it.
    :param exposed: returns what ``@expose`` declares: content type, engine, template.
    """
    content_type = stored.content_type
    if content_type is None and response.content_type is None:
        content_type, engine, template = exposed()[:3]
        if content_type == "text/html" or engine or template:
            content_type = (
                _guess_type(filename)
                or _guess_type(find_name(stored.file))
                or stored.default_type
                or content_type
            )
    if content_type is not None:
        if content_type.startswith("text/") and find_charset(content_type) is None:
            content_type += "; charset=utf-8"
        response.headers["Content-Type"] = content_type


_COMPRESSED = {
    "br": "application/x-brotli",
    "bzip2": "application/x-bzip",
    "compress": "application/x-compress",
    "gzip": "application/gzip",
    "xz": "application/x-xz",
}
"""The types of compressed files by their encoding, which mimetypes gives apart."""


def _guess_type(name: str | None) -> str | None:
    if name is None:
        return None
    path = f"./{os.path.basename(name)}"  # mimetypes takes 'data:...' as a URL
    content_type, encoding = mimetypes.guess_type(path)
    return content_type if encoding is None else _COMPRESSED.get(encoding)


@contextmanager
def remember_answer(response: Any) -> Iterator[None]:
    """Remember the status and headers that are set, for :func:`withdraw_answer`."""
    before = response.status, response.headerlist[:]
    try:
        yield
    finally:
        response.tganswer = *before, response.status, response.headerlist[:]


def withdraw_answer(response: Any) -> None:
    """Take back the status and the headers of a file, except those changed since.

    The file could not be read, or ``tm.attempts`` runs the controller again with the
    same response. They would count as the controller's own.
    """
    answer = response.__dict__.pop("tganswer", None)
    if answer is None:
        return
    status, headers, answered_status, answered = answer
    if response.status == answered_status:
        response.status = status
    added = [header for header in answered if header not in headers]
    replaced = [header for header in headers if header not in answered]
    kept = [header for header in response.headerlist if header not in added]
    names = {name for name, _ in kept}
    response.headerlist = kept + [each for each in replaced if each[0] not in names]


def respond_with_file(request: Any, response: Any, stored: StoredFile) -> FileParts:
    """Answer a request with a file: the whole file, ranges of it, or a 304.

    It sets the status and the headers ``Accept-Ranges``, ``ETag``, ``Last-Modified``,
    ``Content-Range``, ``Content-Length`` and ``Cache-Control``. The caller sets the
    content type before, and sends the bytes of the returned object. To send a temporary
    file with a hash of its content::

        content = Representation(size, etag=f'"{digest}"')
        source = respond_with_file(request, response, StoredFile(file, content))
        source.length  # the bytes that ``source`` yields: for the Content-Length
        for block in source:  # not for HEAD
            ...
        source.close()  # always: it closes the file

    A status other than 200 that the controller has set is kept, and the whole file is
    sent. An ``ETag`` and a ``Last-Modified`` of the controller replace those of the
    file.

    :param stored: the file. Its ``etag`` must be strong: equal for equal bytes alone.
    :returns: the source of the body's bytes. It is empty for 304, 412 and 416.
    """
    response.conditional_response = False  # WebOb's own handling
    headers, content = response.headers, stored.content
    if response.status_int != 200:
        _set_max_age(headers, stored.max_age)
        return _send(response, FileParts(stored, [range(content.size)]))
    if "ETag" in headers:
        content = content._replace(etag=headers["ETag"])
    if "Last-Modified" in headers:
        content = content._replace(last_modified=parse_date(headers["Last-Modified"]))
    answer = evaluate(request.environ, content)
    if answer.status != 200:
        response.status = answer.status
    if answer.status < 400:  # a cache must not answer other requests with a 412 or 416
        _set_max_age(headers, stored.max_age)
    headers.update(answer.headers)
    parts: list[bytes | range] = [*answer.ranges]
    if len(parts) > 1:
        content_type = headers.get("Content-Type")
        headers["Content-Type"], parts = make_multipart(
            answer.ranges, content.size, content_type
        )
    return _send(response, FileParts(stored, parts))


def _set_max_age(headers: Any, seconds: int | None) -> None:
    if seconds is not None:
        # A shared cache must not answer for a controller that checks permissions.
        headers["Cache-Control"] = f"private, max-age={seconds}"
        headers.pop("Pragma", None)  # TG's default is no-cache


def _send(response: Any, source: FileParts) -> FileParts:
    response.headers["Content-Length"] = str(source.length)
    return source
