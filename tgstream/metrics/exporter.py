"""The metrics, and the observer of streams and channels that counts them.

A stream is counted by the two hooks. Its meter passes on the chunks that the server
pulls, and measures the time between two pulls.

The metrics of prometheus_client have locks, which are not re-entrant. Python's cyclic
garbage collector may run a finaliser while its thread holds one, and a finaliser may
end a stream or publish. With several processes, the metrics write to files, which may
fail. So each use of a metric goes through :func:`_apply`, which leaves the changes of
finalisers to the next change, and logs errors.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, get_args
from weakref import WeakSet

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
except ImportError as error:
    raise ImportError(
        "tgstream.metrics.register() needs the package prometheus_client, which is not "
        "installed. Run: pip install 'tgstream[prometheus]'"
    ) from error

from ..core import context
from ..core.hooks import keep_hooks
from ..core.monitor import is_collecting_garbage
from ..core.names import find_controller, get_controller_name
from ..core.options import clock
from ..core.refusals import on_refusal
from ..core.report import FINISHED, STARTED, Reason, Report, log
from ..live.observation import set_observer

if TYPE_CHECKING:
    from ..core.body import Body
    from ..core.stream import Stream
    from ..formats.sse import Event

MAX_CONTROLLERS = 100
"""Maximum values of the label ``controller``. Other controllers share one more."""
OTHERS = "other"
"""The label of the controllers that are too many."""
FLUSH_SECONDS = 5.0
"""Seconds of a long stream after which its bytes, or its events, are counted."""

LIFE_BUCKETS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14_400, 43_200, 86_400)
"""Seconds of a download up to those of an event stream of a day."""
WAIT_BUCKETS = (0.01, *LIFE_BUCKETS)
FIRST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Seconds that a request waits for its first chunk."""

_changes: deque[Callable[[], object]] = deque()


def _apply(change: Callable[[], object]) -> None:
    """Apply a change to the metrics, and those that finalisers have left."""
    _changes.append(change)
    while _changes and not is_collecting_garbage():
        try:
            next_change = _changes.popleft()
        except IndexError:  # another thread has taken it
            return
        try:
            next_change()
        except Exception:
            log.exception("tgstream.metrics could not count")


class _Series:
    """The metrics of one controller."""

    def __init__(self, controller: str, metrics: Exporter) -> None:
        self.open = metrics.open.labels(controller)
        self.started = metrics.started.labels(controller)
        self.ended = {
            reason: metrics.ended.labels(controller, reason)
            for reason in get_args(Reason)
        }
        self.bytes = metrics.bytes.labels(controller)
        self.seconds = metrics.seconds.labels(controller)
        self.first_chunk = metrics.first_chunk.labels(controller)
        self.client_wait = metrics.client_wait.labels(controller)
        self.refused = metrics.refused.labels(controller)


class _Meter:
    """Measures one stream. It keeps no reference to the stream.

    :param add_bytes: is called with bytes that were not counted before.
    """

    def __init__(self, add_bytes: Callable[[int], None]) -> None:
        self._add_bytes = add_bytes
        self._waited = 0.0
        self._waits_since: float | None = None
        self._bytes = 0
        self._lock = threading.Lock()  # the monitor may end a stream that is counted

    def measure(self, body: Body, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The chunks, as the server pulls them."""
        next_count = clock() + FLUSH_SECONDS
        for chunk in chunks:
            since = self._waits_since = clock()
            yield chunk
            now = clock()
            self._waited += now - since
            self._waits_since = None
            if now > next_count:
                self._count_bytes(body.bytes)
                next_count = now + FLUSH_SECONDS

    def finish(self, report: Report) -> float:
        """The stream has ended.

        :returns: the seconds that it has waited for its client.
        """
        waited, since = self._waited, self._waits_since  # the server may pull meanwhile
        if since is not None:
            waited += clock() - since
        self._count_bytes(report.bytes)
        return waited

    def _count_bytes(self, total: int) -> None:
        with self._lock:
            more = max(total - self._bytes, 0)
            self._bytes += more
        if more:
            _apply(partial(self._add_bytes, more))


class Exporter:
    """The metrics of this process."""

    def __init__(self) -> None:
        self._create_stream_metrics()
        self._create_channel_metrics()
        self._series: dict[str, _Series] = {}
        self._registries: WeakSet[CollectorRegistry] = WeakSet()
        # In this order: a stream that ends meanwhile must not be counted as open.
        keep_hooks((FINISHED, self._finish), (STARTED, self._begin))
        on_refusal(self._refuse)
        set_observer(self)

    def _create_stream_metrics(self) -> None:
        counter = partial(Counter, registry=None, labelnames=["controller"])
        histogram = partial(Histogram, registry=None, labelnames=["controller"])
        self.open = Gauge(
            "tgstream_streams_open",
            "Streams that have started and not ended",
            ["controller"],
            registry=None,
            multiprocess_mode="livesum",
        )
        self.started = counter("tgstream_streams_started_total", "Streams started")
        self.ended = Counter(
            "tgstream_streams_ended_total",
            "Streams ended, by the reason of their report",
            ["controller", "reason"],
            registry=None,
        )
        self.bytes = counter("tgstream_bytes_total", "Bytes before compression")
        self.seconds = histogram(
            "tgstream_stream_seconds",
            "Seconds from the start to the end of a stream",
            buckets=LIFE_BUCKETS,
        )
        self.first_chunk = histogram(
            "tgstream_first_chunk_seconds",
            "Seconds from the start of a stream to its first chunk",
            buckets=FIRST_BUCKETS,
        )
        self.client_wait = histogram(
            "tgstream_client_wait_seconds",
            "Seconds that a stream has waited for its client, all pulls together",
            buckets=WAIT_BUCKETS,
        )
        self.refused = counter(
            "tgstream_refused_total", "Requests refused by a limit or by drain()"
        )

    def _create_channel_metrics(self) -> None:
        counter = partial(Counter, registry=None)
        self.published = counter(
            "tgstream_events_published_total", "Events published by this process"
        )
        self.delivered = counter(
            "tgstream_events_delivered_total", "Events that listeners have received"
        )
        self.backlog = Gauge(
            "tgstream_event_backlog",
            "Events that are kept until Redis can be reached",
            registry=None,
            multiprocess_mode="livesum",
        )
        self.reconnects = counter(
            "tgstream_backend_reconnects_total",
            "Connections of channels that were lost and are back",
        )
        self._last_backlog = 0

    def add_to(self, registry: CollectorRegistry | None) -> None:
        """Add the metrics to a registry, unless it has them.

        :raises TypeError: when it is not a registry.
        :raises ValueError: when it has other metrics with one of the names.
        """
        if registry is None:
            registry = REGISTRY
        elif not isinstance(registry, CollectorRegistry):
            raise TypeError(
                "register: registry must be a prometheus_client.CollectorRegistry or "
                f"None, got {type(registry).__name__}: {registry!r:.80}"
            )
        if registry in self._registries:
            return
        with ExitStack() as stack:  # all of them, or none
            for metric in vars(self).values():
                if isinstance(metric, Counter | Gauge | Histogram):
                    registry.register(metric)
                    stack.callback(registry.unregister, metric)
            stack.pop_all()
        self._registries.add(registry)

    # Streams.

    def _begin(self, stream: Stream) -> None:
        controller = stream.controller
        meter = _Meter(partial(self._count_bytes, controller))
        context.thread.record.body.meter = meter
        _apply(partial(self._count_start, controller))

    def _finish(self, report: Report) -> None:
        meter: _Meter | None = context.thread.record.body.meter
        if meter is not None:  # else it has started before register()
            _apply(partial(self._count_end, report, meter.finish(report)))

    def _refuse(self) -> None:
        try:
            name = get_controller_name(find_controller(context.current().request))
        except (AttributeError, TypeError):  # refused before TG's dispatch
            name = OTHERS
        _apply(partial(self._count_refusal, name))

    # Changes, each by _apply().

    def _find_series(self, controller: str) -> _Series:
        if controller not in self._series and len(self._series) >= MAX_CONTROLLERS:
            controller = OTHERS
        series = self._series.get(controller)
        if series is None:
            series = self._series[controller] = _Series(controller, self)
        return series

    def _count_start(self, controller: str) -> None:
        series = self._find_series(controller)
        series.open.inc()
        series.started.inc()

    def _count_bytes(self, controller: str, count: int) -> None:
        self._find_series(controller).bytes.inc(count)

    def _count_end(self, report: Report, client_wait: float) -> None:
        series = self._find_series(report.controller)
        series.open.dec()
        series.ended[report.reason].inc()
        series.seconds.observe(report.seconds)
        if report.first_chunk_seconds is not None:
            series.first_chunk.observe(report.first_chunk_seconds)
        series.client_wait.observe(client_wait)

    def _count_refusal(self, controller: str) -> None:
        self._find_series(controller).refused.inc()

    # Channels.

    def count_published(self, count: int) -> None:
        """Events were published."""
        _apply(partial(self.published.inc, count))

    def count_reconnect(self) -> None:
        """A connection that was lost is back."""
        _apply(self.reconnects.inc)

    def set_backlog(self, count: int) -> None:
        """This process keeps ``count`` events until it can send them."""
        if count != self._last_backlog:
            self._last_backlog = count
            _apply(partial(self.backlog.set, count))

    def watch_events(self, events: Iterator[Event]) -> Iterator[Event]:
        """The events of a listener, as its stream receives them."""
        count, next_count = 0, clock() + FLUSH_SECONDS
        try:
            for event in events:
                count += event.data is not None
                yield event
                del event
                if clock() > next_count:
                    _apply(partial(self.delivered.inc, count))
                    count, next_count = 0, clock() + FLUSH_SECONDS
        finally:
            _apply(partial(self.delivered.inc, count))


exporter = Exporter()
"""The metrics of this process, which are created when the module is imported."""
