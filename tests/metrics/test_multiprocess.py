"""The metrics of gunicorn with two workers, set up as ``docs/operating.rst`` shows."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.conftest import LiveServer
from tests.live_apps.metrics_app import find_block
from tests.metrics.scraping import Scraper
from tests.pages import DOCS, commands

ROOT = Path(__file__).parents[2]
OPEN = "tgstream_streams_open"
EVENTS = "Root.events"


class Gunicorn(LiveServer):
    """gunicorn with two workers, whose configuration is that of the page.

    :param folder: gets the configuration, and the directory of the metrics.
    :param options: more options of the command.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.name = "gunicorn"
        config, metrics = folder / "gunicorn.conf.py", folder / "metrics"
        config.write_text(find_block("def child_exit"))
        prepare = [line for line in commands(PAGE) if "rm -rf" in line]
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(metrics)}
        subprocess.run(" ".join(prepare), shell=True, check=True, env=environment)
        words = "--workers 2 --bind 127.0.0.1:0 --graceful-timeout 1"
        app = "tests.live_apps.metrics_app:make_app(tgstream__heartbeat_seconds='0.2')"
        self.start(
            [
                *(sys.executable, "-m", "gunicorn", "-c", str(config)),
                *(*words.split(), *options, app),
            ],
            r".*Listening at: http://127\.0\.0\.1:(\d+)",
            env=environment,
            cwd=ROOT,
        )


PAGE = (DOCS / "operating.rst").read_text()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Scraper]]:
    """A function that starts gunicorn. It is stopped after the test."""
    with ExitStack() as stack:

        def start(*options: str) -> Scraper:
            live = Gunicorn(tmp_path, *options)
            stack.callback(live.kill)
            return Scraper(live.port)

        yield start


def open_events(scraper: Scraper) -> tuple[http.client.HTTPResponse, int]:
    """Open a stream, and return the id of its process, too."""
    response = scraper.get("/events")
    match = re.fullmatch(rb"data: (\d+)\n", response.readline())
    assert match is not None
    return response, int(match[1])


@contextmanager
def stopped(process: int) -> Iterator[None]:
    """Let a process not run meanwhile."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@pytest.mark.parametrize(
    "options",
    [
        "--worker-class gthread --threads 8 --preload",
        "--worker-class gevent",
    ],
)
def test_metrics_are_those_of_all_workers(
    start: Callable[..., Scraper], options: str
) -> None:
    """The streams of a worker that is killed are no longer open."""
    scraper = start(*options.split())
    first, killed = open_events(scraper)
    responses = [first]
    with stopped(killed):  # so that the other worker accepts these
        for _ in range(2):
            response, other = open_events(scraper)
            assert other != killed
            responses.append(response)
    scraper.wait_for(3, OPEN, controller=EVENTS)
    os.kill(killed, signal.SIGKILL)
    scraper.wait_for(2, OPEN, controller=EVENTS)
    for _ in range(10):
        assert scraper.read("/words") == b"onetwo"
    for response in responses:
        response.close()
    scraper.wait_for(0, OPEN, controller=EVENTS)
    started, ended = "tgstream_streams_started_total", "tgstream_streams_ended_total"
    assert scraper.value(started, controller=EVENTS) == 3
    scraper.wait_for(2, ended, controller=EVENTS, reason="disconnected")
    scraper.wait_for(10, ended, controller="Root.words", reason="completed")
    assert scraper.value("tgstream_bytes_total", controller="Root.words") == 60
    labels = {label for _, labels in scraper.scrape() for label, _ in labels}
    assert labels == {"controller", "reason", "le"}
