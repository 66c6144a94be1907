"""How a generator, of whichever framework, tells the client, and waits for it."""

from __future__ import annotations

import asyncio
import os
import time

PACE = 0.1
"""Seconds between two chunks of a generator that has something to wait for."""

PACES = 25


def tell(pipe: str, text: str) -> None:
    """Say something to the client, out of band."""
    with open(pipe, "w") as file:
        file.write(text)


def hear(pipe: str) -> None:
    """Wait until the client writes into a named pipe."""
    with open(pipe) as file:
        file.readline()


def wait_for(gate: str) -> None:
    """Wait, on this thread, until there is a file."""
    while not os.path.exists(gate):
        time.sleep(0.02)


async def until(gate: str) -> None:
    """Wait, on no thread, until there is a file."""
    while not os.path.exists(gate):
        await asyncio.sleep(0.02)
