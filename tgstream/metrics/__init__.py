"""Metrics of streams and channels for Prometheus, with the extra ``prometheus``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["register"]


def register(registry: CollectorRegistry | None = None) -> None:
    """Measure the streams and channels of this process, and export the metrics.

    Call it once before the first request, for example in ``config/app_cfg.py``. Streams
    that have started before may not be counted. A call with another registry adds the
    same metrics to it. A second call with the same registry does nothing.
    :doc:`operating` lists the metrics.

    In a server with several processes, ``PROMETHEUS_MULTIPROC_DIR`` must be set before
    they start, as for any metric of prometheus_client.

    :param registry: a ``CollectorRegistry`` of prometheus_client. None for its
        ``REGISTRY``.
    :raises ImportError: when the package prometheus_client is not installed.
    :raises TypeError: when ``registry`` is not a ``CollectorRegistry``.
    :raises ValueError: when the registry has other metrics with one of the names. It
        then gets none of them.
    """
    # Imported only when used: the package prometheus_client is optional.
    from .exporter import exporter

    exporter.add_to(registry)
