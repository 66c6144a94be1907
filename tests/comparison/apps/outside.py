"""How a generator reports to the client, and waits for it, in every framework."""

from __future__ import annotations

import asyncio
import os
import time

PACE = 0.1
"""Seconds between two chunks of a slow generator."""

PACES = 25


def write(pipe: str, text: str) -> None:
    """Write a text into the client's named pipe."""
    with open(pipe, "w") as file:
        file.write(text)


def read_line(pipe: str) -> None:
    """Wait until the client writes a line into a named pipe."""
    with open(pipe) as file:
        file.readline()


def wait_for(gate: str) -> None:
    """Block this thread until a file exists."""
    while not os.path.exists(gate):
        time.sleep(0.02)


async def wait_for_async(gate: str) -> None:
    """Wait on the event loop until a file exists."""
    while not os.path.exists(gate):
        await asyncio.sleep(0.02)
