"""The totals of all streams of a server: by its ledger, and by its metrics."""

from __future__ import annotations

import http.client
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families


class Totals(NamedTuple):
    """The numbers of streams, and their bytes."""

    started: int = 0
    ended: tuple[tuple[str, int], ...] = ()
    """The number of streams for each reason, in order."""
    bytes: int = 0
    open: int = 0


def add_up(path: Path) -> Totals:
    """Add up the lines that the hooks of the server have written."""
    ended = Counter[str]()
    started = size = 0
    for line in path.read_text().splitlines():
        _, reason, _, chunk_bytes = line.split()
        if reason == "started":
            started += 1
        else:
            ended[reason] += 1
            size += int(chunk_bytes)
    return Totals(started, tuple(sorted(ended.items())), size, started - ended.total())


def scrape(port: int) -> Totals:
    """Read the metrics of the server, like Prometheus."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/soak/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    totals, ended = Counter[str](), Counter[str]()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] += int(sample.value)
            if sample.name == "tgstream_streams_ended_total" and sample.value:
                ended[sample.labels["reason"]] += int(sample.value)
    return Totals(
        totals["tgstream_streams_started_total"],
        tuple(sorted(ended.items())),
        totals["tgstream_bytes_total"],
        totals["tgstream_streams_open"],
    )
