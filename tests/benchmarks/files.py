"""How much does a server need to send a file, and do slow clients hold its threads?

``send_file()`` is compared with an open file that plain TurboGears2 returns, with
WebOb's ``FileApp`` in it, and with Flask's ``send_file()``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

from .measure import Result, in_turn, ratio
from .servers import MIB, Server

SMALL, LARGE = 10_000, 64 * MIB
THREADS = 4
"""Of waitress, by default."""
HELD_SECONDS = 1.0
"""Seconds for which each slow client reads nothing."""

WAYS = {
    "send_file()": ("files_tgstream", "/sent/{}"),
    "send_file(), in chunks": ("files_tgstream", "/sent/{}?chunks"),
    "plain TG2, an open file": ("files_turbogears", "/opened/{}"),
    "plain TG2, FileApp": ("files_turbogears", "/file_app/{}"),
    "Flask, send_file()": ("files_flask", "/sent/{}"),
}
OURS, CHUNKS, *PEERS = WAYS


def run(folder: Path, quick: bool) -> list[Result]:
    """Measure a small and a large file on two servers, and slow clients of waitress."""
    for name, size in ("small", SMALL), ("large", LARGE):
        (folder / name).write_bytes(random.Random(1).randbytes(size))
    results: list[Result] = []
    for server in "waitress", "gthread":
        with ExitStack() as stack:
            started = {way: Server(server, way, folder) for way, _ in WAYS.values()}
            for each in started.values():
                stack.callback(each.stop)
            rounds, count = (3, 200) if quick else (11, 1000)
            results += compare_requests(server, started, "small", rounds, count)
            results += compare_requests(server, started, "large", rounds, 2)
            if server == "waitress":
                results.append(compare_slow_clients(started["files_tgstream"]))
    return results


def compare_requests(
    name: str, servers: dict[str, Server], file: str, rounds: int, count: int
) -> list[Result]:
    """Compare the requests for each second of the server's CPU time."""
    measures = {
        label: partial(requests_per_second, servers[way], path.format(file), count)
        for label, (way, path) in WAYS.items()
    }
    for measure in measures.values():
        measure()
    rates = in_turn(rounds, measures)
    size = f"{SMALL // 1000} kB" if file == "small" else f"{LARGE // MIB} MiB"
    return [
        Result(
            f"{size} over {name}, beside {peer}",
            f"{median(rates[peer]):.0f} requests/s of CPU",
            f"{median(rates[OURS]):.0f} requests/s of CPU",
            ratio(rates[OURS], rates[peer]),
            None,
            at_least=True,
        )
        for peer in (CHUNKS, *PEERS)
    ]


def requests_per_second(server: Server, path: str, count: int) -> float:
    """Return the requests that a second of the server's CPU time suffices for."""
    connection, start = connect(server), server.cpu()
    for _ in range(count):
        connection.request("GET", path)
        read(connection.getresponse())
    used = server.cpu() - start
    connection.close()
    return count / max(used, 0.01)  # the clock of the CPU time has ticks of 10 ms


def connect(server: Server) -> HTTPConnection:
    return HTTPConnection("127.0.0.1", server.port, 30)


def read(response: HTTPResponse) -> None:
    buffer = bytearray(MIB)
    while response.readinto(buffer):
        pass


def compare_slow_clients(server: Server) -> Result:
    """Compare the wait of a request, while more clients than threads read nothing."""

    def measure(path: str) -> float:
        clients: list[tuple[HTTPConnection, HTTPResponse]] = []
        for _ in range(THREADS):
            client = connect(server)
            client.request("GET", path)
            clients.append((client, client.getresponse()))
        start = perf_counter()
        other = connect(server)
        other.request("GET", "/sent/small")
        other.sock.settimeout(HELD_SECONDS)
        with suppress(TimeoutError):
            other.getresponse().read()
        waited = perf_counter() - start
        other.close()
        for client, response in clients:
            response.close()
            client.close()
        sleep(0.2)  # the server closes the connections
        return waited

    ways: dict[str, Callable[[], float]] = {
        OURS: lambda: measure("/sent/large"),
        CHUNKS: lambda: measure("/sent/large?chunks"),
    }
    seconds = in_turn(3, ways)
    return Result(
        f"wait for waitress while {THREADS} slow clients load a large file",
        f"{median(seconds[CHUNKS]) * 1000:.0f} ms or more",
        f"{median(seconds[OURS]) * 1000:.0f} ms",
        ratio(seconds[OURS], seconds[CHUNKS]),
        0.5,
    )
