"""The response of a file: its status, its headers, and the bytes that are sent."""

from __future__ import annotations

from typing import Any

from ..core.files import FileParts, StoredFile
from ..core.ranges import evaluate, make_multipart, parse_date


def respond_with_file(request: Any, response: Any, stored: StoredFile) -> FileParts:
    """Answer a request with a file: the whole file, a range of it, or a 304.

    It sets the status and the headers ``Accept-Ranges``, ``ETag``, ``Last-Modified``,
    ``Content-Range`` and ``Content-Length``. The caller sets the content type before,
    and sends the bytes of the returned object. To send a temporary file with a
    hash of its content::

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
    if response.status_int != 200:
        return _send(response, FileParts(stored, [range(stored.content.size)]))
    headers, content = response.headers, stored.content
    if "ETag" in headers:
        content = content._replace(etag=headers["ETag"])
    if "Last-Modified" in headers:
        content = content._replace(last_modified=parse_date(headers["Last-Modified"]))
    answer = evaluate(request.environ, content)
    if answer.status != 200:
        response.status = answer.status
    headers.update(answer.headers)
    parts: list[bytes | range] = [*answer.ranges]
    if len(parts) > 1:
        content_type = headers.get("Content-Type")
        headers["Content-Type"], parts = make_multipart(
            answer.ranges, content.size, content_type
        )
    return _send(response, FileParts(stored, parts))


def _send(response: Any, source: FileParts) -> FileParts:
    response.headers["Content-Length"] = str(source.length)
    return source
