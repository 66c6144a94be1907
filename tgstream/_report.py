"""How a stream ended, told once: a line in the log, and the hook ``tgstream.finished``.

Rule: to tell it never changes how it ended.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import tg

log = logging.getLogger("tgstream")


class Report(NamedTuple):
    """How a stream ended: the argument of the hook ``tgstream.finished``.

    ``reason`` is ``'completed'``, ``'failed'`` or ``'disconnected'`` (closed before its
    end, or dropped); ``error`` is the first that was raised, also while it closed.
    ``seconds`` and ``first_chunk_seconds`` count from the start of the stream; the
    latter is None where no chunk was made. ``commits`` counts committed transactions.
    """

    reason: str
    error: BaseException | None
    controller: str
    path: str
    items: int
    chunks: int
    bytes: int
    seconds: float
    first_chunk_seconds: float | None
    commits: int


def tell(report: Report) -> None:
    """Log ``report``, and hand it to those who registered for the hook."""
    log.log(
        logging.DEBUG if report.error is None else logging.ERROR,
        "%s at %s %s: %d items, %d chunks, %d bytes, %d commits in %.3f s",
        report.controller,
        report.path,
        report.reason,
        report.items,
        report.chunks,
        report.bytes,
        report.commits,
        report.seconds,
        exc_info=report.error,
    )
    tg.hooks.notify("tgstream.finished", args=(report,), trap_exceptions=True)
