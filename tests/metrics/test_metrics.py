"""The metrics of one process: every count is that of what the clients did."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import LiveServer
from tests.live_apps.metrics_app import FILE_SIZE, GENERATED
from tests.metrics.scraping import Scraper
from tests.pages import DOCS
from tests.valkey import Valkey
from tgstream.metrics.exporter import MAX_CONTROLLERS, OTHERS, _Meter

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scraper() -> Iterator[Scraper]:
    """A server with threads, whose options and metrics all tests of the file share."""
    live = LiveServer("waitress", "metrics_app", "tgstream__heartbeat_seconds=0.2")
    yield Scraper(live.port)
    live.kill()


@pytest.mark.parametrize(
    ("path", "reason", "size"),
    [
        ("words", "completed", 6),
        ("whole", "completed", 4),
        ("file", "completed", FILE_SIZE),
        ("spooled", "completed", 6),
        ("fails", "failed", 3),
    ],
)
def test_stream_is_counted_once(
    scraper: Scraper, path: str, reason: str, size: int
) -> None:
    """Each metric has the label of the controller."""
    name = f"Root.{path}"
    assert len(scraper.read(f"/{path}")) == size
    scraper.wait_for(1, "tgstream_streams_ended_total", controller=name, reason=reason)
    found = {
        (metric, *(labels - {("controller", name)})): value
        for (metric, labels), value in scraper.scrape().items()
        if ("controller", name) in labels
        and value
        and not metric.endswith(("_bucket", "_created", "_seconds_sum"))
    }
    assert found == {
        ("tgstream_streams_started_total",): 1,
        ("tgstream_streams_ended_total", ("reason", reason)): 1,
        ("tgstream_bytes_total",): size,
        ("tgstream_stream_seconds_count",): 1,
        ("tgstream_first_chunk_seconds_count",): 1,
        ("tgstream_client_wait_seconds_count",): 1,
    }


def test_stream_without_a_chunk_has_no_time_of_its_first_chunk(
    scraper: Scraper,
) -> None:
    """It has failed before."""
    controller = "Root.fails"
    before = scraper.value("tgstream_first_chunk_seconds_count", controller=controller)
    failed = scraper.value(
        "tgstream_streams_ended_total", controller=controller, reason="failed"
    )
    with scraper.get("/fails?first=no") as response:
        assert response.status == 500
    scraper.wait_for(
        failed + 1,
        "tgstream_streams_ended_total",
        controller=controller,
        reason="failed",
    )
    after = scraper.value("tgstream_first_chunk_seconds_count", controller=controller)
    assert after == before


def test_ordinary_response_is_not_counted(scraper: Scraper) -> None:
    """``abort()`` before the first chunk has no metric."""
    with scraper.get("/aborts") as response:
        assert response.status == 404
    labels = {label for _, labels in scraper.scrape() for label in labels}
    assert ("controller", "Root.aborts") not in labels


def test_open_and_refused_streams_are_counted(scraper: Scraper) -> None:
    """The gauge follows the client, and a 503 is counted."""
    controller = "Root.limited"
    with scraper.get("/limited") as response:
        assert response.readline() == b"data: one\n"
        scraper.wait_for(1, "tgstream_streams_open", controller=controller)
        assert scraper.get("/limited").status == 503
        scraper.wait_for(1, "tgstream_refused_total", controller=controller)
    scraper.read("/publish?channel=limited&data=wake")  # the server sees the disconnect
    scraper.read("/publish?channel=limited&data=wake")
    scraper.wait_for(0, "tgstream_streams_open", controller=controller)
    assert scraper.value("tgstream_streams_started_total", controller=controller) == 1


def test_events_are_counted(scraper: Scraper) -> None:
    """Two listeners receive each event."""
    published, delivered = (
        f"tgstream_events_{action}_total" for action in ("published", "delivered")
    )
    before = scraper.value(published), scraper.value(delivered)
    with scraper.get("/events") as first, scraper.get("/events") as second:
        for response in first, second:
            while not response.readline().startswith(b": open"):
                pass
        for number in range(3):
            scraper.read(f"/publish?data={number}")
        for response in first, second:
            while response.readline() != b"data: 2\n":
                pass
        assert scraper.value(published) == before[0] + 3
    scraper.read("/publish?data=wake")  # the server sees the disconnect
    scraper.read("/publish?data=wake")
    scraper.wait_for(0, "tgstream_streams_open", controller="Root.events")
    assert scraper.value(delivered) >= before[1] + 6


def test_names_of_controllers_are_bounded(scraper: Scraper) -> None:
    """The controllers that are too many share one name."""
    for number in range(GENERATED):
        scraper.read(f"/generated/number{number}")
    metrics = scraper.scrape()
    names = {
        value
        for _, labels in metrics
        for label, value in labels
        if label == "controller"
    }
    assert len(names) == MAX_CONTROLLERS + 1
    assert OTHERS in names
    counted = sum(
        value
        for (name, labels), value in metrics.items()
        if name == "tgstream_streams_started_total"
        and any(str(v).startswith((OTHERS, "Generated.")) for _, v in labels)
    )
    assert counted == GENERATED


REGISTERED = """
import prometheus_client
from tgstream import metrics

registry = prometheus_client.CollectorRegistry()
metrics.register(registry)
metrics.register(registry)
metrics.register()
for each in registry, prometheus_client.REGISTRY:
    print(len([1 for family in each.collect() if family.name.startswith("tgstream_")]))
try:
    metrics.register("registry")
except TypeError as error:
    print(error)
taken = prometheus_client.CollectorRegistry()
own = prometheus_client.Counter("tgstream_bytes_total", "own", registry=taken)
try:
    metrics.register(taken)
except ValueError as error:
    print(error)
print(len([*taken.collect()]))
taken.unregister(own)
metrics.register(taken)
print(len([*taken.collect()]))
"""


def test_metrics_can_be_registered_again() -> None:
    """A registry has each metric once, or none after an error."""
    first, second, invalid, taken, left, repaired = run(REGISTERED)
    assert (first, second) == ("12", "12")
    assert (left, repaired) == ("1", "12")
    assert invalid == (
        "register: registry must be a prometheus_client.CollectorRegistry or None, got "
        "str: 'registry'"
    )
    assert "tgstream_bytes_total" in taken


MISSING = """
import sys
sys.modules["prometheus_client"] = None
import tgstream
assert "tgstream.metrics" not in sys.modules
from tgstream import metrics
try:
    metrics.register()
except ImportError as error:
    print(error)
"""


def test_missing_package_is_named() -> None:
    """Only the call needs the package."""
    [line] = run(MISSING)
    assert "pip install 'tgstream[prometheus]'" in line


def test_page_lists_every_metric(scraper: Scraper) -> None:
    """The table has the metrics that a server exports, and no other."""
    page = (DOCS / "operating.rst").read_text()
    listed = re.findall(r"^    \* - ``(tgstream_\w+)``", page, re.MULTILINE)
    with scraper.get("/metrics") as response:
        text = response.read().decode()
    exported = re.findall(r"^# TYPE (tgstream_\w+)", text, re.MULTILINE)
    assert {*listed} == {name for name in exported if not name.endswith("_created")}


def run(script: str, *arguments: str, **environment: str) -> list[str]:
    """Run a script in a process of its own, because metrics stay registered."""
    ran = subprocess.run(
        [sys.executable, "-X", "dev", "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        env=os.environ | environment,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


APPLICATION = """
import gc, itertools, os, shutil, sys, time
import tg
from prometheus_client import REGISTRY
from tests.conftest import make_application
from tests.wsgi import Call, get
from tgstream import SSE, Channel, listen, metrics, stream

class Root(tg.TGController):
    @tg.expose(content_type="text/plain")
    @stream
    def words(self):
        yield "one"
        yield "two"
        yield "three"

    @tg.expose()
    @stream(SSE(heartbeat=0.05))
    def events(self):
        yield "one"
        yield from listen("events", comments=False)

def read(name, controller, **labels):
    return REGISTRY.get_sample_value(name, {"controller": controller, **labels}) or 0.0
"""

WAITS = f"""{APPLICATION}
from tgstream.metrics import exporter

exporter.FLUSH_SECONDS = 0.0
metrics.register()
app = make_application(Root())
for path, end in itertools.product(["words", "events"], ["close", "drop"]):
    name, total = f"Root.{{path}}", "tgstream_client_wait_seconds_sum"
    before = read(total, name)
    call = Call(app, f"/{{path}}", checked=False)
    next(call)
    begun = time.perf_counter()
    time.sleep(0.05)
    next(call)
    assert read(total, name) == before
    print(read("tgstream_bytes_total", name) > 0)
    time.sleep(0.05)
    getattr(call, end)()
    while read("tgstream_streams_open", name):
        Channel("events").publish("wake")
    print(0.1 <= read(total, name) - before <= time.perf_counter() - begun)
"""


def test_wait_for_the_client_is_measured() -> None:
    """The last wait counts, too, although the server does not pull again.

    The bytes of a long stream are counted before it ends.
    """
    assert run(WAITS) == ["True"] * 8


def test_wait_is_counted_once_if_the_server_pulls_at_the_end() -> None:
    """The monitor may end and count a stream while its server pulls."""

    def pull(count: int) -> None:
        next(pulls)

    body: Any = SimpleNamespace(bytes=1)
    meter = _Meter(pull)
    began = time.perf_counter()
    pulls = meter.measure(body, iter([b"a", b"b"]))
    next(pulls)
    while time.perf_counter() < began + 0.02:
        pass
    assert 0.01 < meter.finish(body) <= time.perf_counter() - began


LATE = f"""{APPLICATION}
app = make_application(Root())
calls = [Call(app, "/words", checked=False) for _ in range(3)]
register = tg.hooks.register

def register_and_end(*arguments):
    register(*arguments)
    calls.pop().read()

tg.hooks.register = register_and_end
metrics.register()
tg.hooks.register = register
calls.pop().read()
started = read("tgstream_streams_started_total", "Root.words")
ended = read("tgstream_streams_ended_total", "Root.words", reason="completed")
print(started == ended, read("tgstream_streams_open", "Root.words"))
"""


def test_stream_that_ends_while_metrics_are_registered_is_not_open() -> None:
    """Each stream that is counted as started is counted as ended."""
    assert run(LATE) == ["True 0.0"]


COLLECTED = f"""{APPLICATION}
channel = Channel("ends")
metrics.register()
app = make_application(Root())
for number in range(30):
    call = Call(app, "/words", checked=False)
    next(call)
    cycle = [call.body, call._chunks]
    cycle.append(cycle)
    call.drop()
del cycle
gc.collect()
while read("tgstream_streams_open", "Root.words"):
    get(app, "/words")
name = "tgstream_streams_ended_total"
print(read(name, "Root.words", reason="disconnected"))
"""


def test_streams_in_garbage_are_counted() -> None:
    """A finaliser, or the monitor, ends and counts them."""
    assert run(COLLECTED) == ["30.0"]


INTERRUPTED = f"""{APPLICATION}
from tgstream.metrics.exporter import exporter

class Publishing:
    def __del__(self):
        Channel("ends").publish("collected")

class Collecting(float):
    def __radd__(self, other):
        garbage = Publishing()
        garbage.cycle = garbage
        del garbage
        gc.collect()
        return other + float(self)

metrics.register()
app = make_application(Root())
exporter.published.inc(Collecting(1))
get(app, "/words")
print(REGISTRY.get_sample_value("tgstream_events_published_total"))
"""


def test_finaliser_in_the_middle_of_a_count_is_counted_later() -> None:
    """It must not wait for the lock of the metric, which its own thread holds."""
    assert run(INTERRUPTED) == ["2.0"]


PUBLISHED = f"""{APPLICATION}
import transaction
from tests.model import Model
from tgstream.channels import metadata

events = Channel("events")

class Publishing(tg.TGController):
    @tg.expose(content_type="text/plain")
    def index(self, fail=""):
        events.publish("at the commit")
        events.publish("at once", now=True)
        if fail:
            transaction.doom()
        return "published"

model = Model(f"sqlite:///{{sys.argv[1]}}")
metadata.create_all(model.engine)
options = {{"tgstream__channels": "database://", "tm__enabled": True}}
app = make_application(Publishing(), model, **options)
get(app)
metrics.register()
for path in "/", "/?fail=1":
    get(app, path)
    print(REGISTRY.get_sample_value("tgstream_events_published_total"))
model.dispose()
"""


def test_events_of_the_database_are_counted_once_they_are_committed(
    tmp_path: Path,
) -> None:
    """The back end was in use before. The events from then on are counted."""
    assert run(PUBLISHED, str(tmp_path / "events.db")) == ["2.0", "3.0"]


UNCOUNTED = f"""{APPLICATION}
import logging
folder = os.environ["PROMETHEUS_MULTIPROC_DIR"]
os.mkdir(folder)
metrics.register()
app = make_application(Root())
shutil.rmtree(folder)
if os.fork() == 0:
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    Channel("events").publish("event")
    print(get(app, "/words").text, flush=True)
    os._exit(0)
os.wait()
"""


def test_metric_that_fails_does_not_change_the_stream(tmp_path: Path) -> None:
    """The directory of the processes may be gone, or its disk may be full."""
    folder = str(tmp_path / "metrics")
    lines = run(UNCOUNTED, PROMETHEUS_MULTIPROC_DIR=folder)
    assert "tgstream.metrics could not count" in lines
    assert lines[-1] == "onetwothree"


def test_backlog_and_reconnects_are_counted(tmp_path: Path) -> None:
    """Redis is restarted while events are published in transactions."""
    backlog = "tgstream_event_backlog"
    with Valkey(tmp_path / "valkey") as valkey:
        options = f"tgstream__channels={valkey.url}", "tm__enabled=yes"
        live = LiveServer("waitress", "metrics_app", *options)
        try:
            scraper = Scraper(live.port)
            with scraper.get("/events") as response:
                while not response.readline().startswith(b": open"):
                    pass
                scraper.read("/publish?data=1")
                valkey.terminate()
                scraper.read("/publish?data=2")
                scraper.read("/publish?data=3")
                assert scraper.value(backlog) == 2
                valkey.start()
                scraper.wait_for(0, backlog)
                scraper.wait_for(2, "tgstream_backend_reconnects_total")
                assert scraper.value("tgstream_events_published_total") == 3
        finally:
            live.kill()
