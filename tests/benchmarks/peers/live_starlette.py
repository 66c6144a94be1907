"""sse-starlette: an ``EventSourceResponse`` and a queue for each client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from ..collector import set_collector


def make_app(where: str) -> Starlette:
    queues: set[asyncio.Queue[str]] = set()

    async def listen(request: Request) -> EventSourceResponse:
        async def generate() -> AsyncIterator[ServerSentEvent]:
            queue: asyncio.Queue[str] = asyncio.Queue()
            queues.add(queue)
            try:
                yield ServerSentEvent(comment="open")
                while True:
                    yield ServerSentEvent(data=await queue.get())
            finally:
                queues.discard(queue)

        return EventSourceResponse(generate(), ping=15)

    async def publish(request: Request) -> PlainTextResponse:
        data = str(time.monotonic())
        for queue in list(queues):
            queue.put_nowait(data)
        return PlainTextResponse("published")

    async def collector(request: Request) -> PlainTextResponse:
        set_collector(request.query_params["how"])
        return PlainTextResponse("set")

    routes = [
        Route("/listen", listen),
        Route("/publish", publish),
        Route("/collector", collector),
    ]
    return Starlette(routes=routes)
