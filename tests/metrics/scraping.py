"""Reads the metrics of a server, like Prometheus."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

Metrics = dict[tuple[str, frozenset[tuple[str, str]]], float]

SECONDS = 20.0


class Scraper:
    """The clients of a server, and its metrics."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str) -> http.client.HTTPResponse:
        """The response to a request, with its body unread."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        connection.request("GET", path, headers={"Connection": "close"})
        return connection.getresponse()

    def read(self, path: str) -> bytes:
        """The body of a response, as far as it arrives."""
        with self.get(path) as response:
            try:
                return response.read()
            except http.client.IncompleteRead as error:
                return error.partial

    def scrape(self) -> Metrics:
        """All samples, by their names and labels."""
        with self.get("/metrics") as response:
            assert response.status == 200
            text = response.read().decode()
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """The value of one sample. It is 0 if there is none."""
        return self.scrape().get((name, frozenset(labels.items())), 0.0)

    def wait_for(self, expected: float, name: str, **labels: str) -> None:
        """Wait until a sample has a value."""
        wait_until(lambda: self.value(name, **labels), expected, name)


def wait_until(read: Callable[[], float], expected: float, what: str) -> None:
    """Wait until a function returns the expected number."""
    deadline = time.monotonic() + SECONDS
    while (value := read()) != expected:
        assert time.monotonic() < deadline, f"{what}: {value} instead of {expected}"
        time.sleep(0.02)
