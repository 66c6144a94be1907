"""A server whose responses another server streams on, like that of a model."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from threading import Thread

TOKENS = 5


class Upstream:
    """A server of tokens. It runs on an event loop and a thread of its own.

    ``/tokens/...`` sends some tokens, ``/silent/...`` sends one and waits, and every
    other path is not found.
    """

    def __init__(self) -> None:
        self.open: Counter[str] = Counter()
        """Connections that the client has not closed, by the path of the request."""
        self._loop = asyncio.new_event_loop()
        self._loop.set_debug(False)
        self._thread = Thread(target=self._loop.run_forever)
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        path = request.split()[1].decode()
        _, kind, *_ = path.split("/")
        status = "200 OK" if kind in ("tokens", "silent") else "404 Not Found"
        writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n".encode())
        self.open[kind] += 1
        closed = asyncio.ensure_future(reader.read(1))
        for number in range(TOKENS if kind == "tokens" else kind == "silent"):
            writer.write(f"{path} {number}\n".encode())
            await asyncio.wait([closed], timeout=0.05)
        if kind == "silent":
            await closed
        self.open[kind] -= 1
        closed.cancel()
        writer.close()

    def close(self) -> None:
        async def cancel_all() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(cancel_all(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> float:
    """Wait for a condition. Returns the seconds that it took."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < seconds
        time.sleep(0.005)
    return time.monotonic() - start
