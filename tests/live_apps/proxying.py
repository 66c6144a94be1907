"""An application whose async streams send the tokens of an upstream."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import httpx
import requests
import tg
from tg import TGController, expose

import tgstream
from tests.application import database_options, make_wsgi_app
from tests.model import Model, Note
from tgstream import SSE, current_stream, stream
from tgstream.core.body import Body

HEARTBEAT = 0.1


class RootController(TGController):
    """Streams that read from the upstream of ``tg.config``."""

    client: httpx.AsyncClient | None = None
    model: Model | None = None

    @expose()
    @stream(SSE(heartbeat=HEARTBEAT))
    async def chat(self, path: str, store: str = "") -> AsyncIterator[str]:
        if RootController.client is None:  # one for the process, which the loop uses
            # PYTHONDEVMODE switches it on, and it takes several times the CPU.
            asyncio.get_running_loop().set_debug(False)
            limits = httpx.Limits(max_connections=None)
            RootController.client = httpx.AsyncClient(limits=limits, timeout=60)
        url = f"{tg.config['upstream']}/{path}"
        async with RootController.client.stream("GET", url) as answer:
            if answer.status_code != 200:
                tg.abort(502, "The upstream has failed")
            async for token in answer.aiter_lines():
                assert tg.request.params["path"] == path
                if store and self.model is not None:
                    self.model.DBSession.add(Note(text=f"{store} {token}"))
                yield token

    @expose()
    @stream
    async def quiet(self, path: str) -> AsyncIterator[str]:
        """Send no heartbeats."""
        async with httpx.AsyncClient(timeout=60) as client:
            url = f"{tg.config['upstream']}/{path}"
            async with client.stream("GET", url) as answer:
                async for token in answer.aiter_lines():
                    yield token

    @expose()
    @stream(SSE(heartbeat=HEARTBEAT))
    def blocking(self, path: str) -> Iterator[str]:
        """Read from the upstream without an event loop."""
        url = f"{tg.config['upstream']}/{path}"
        answer = requests.get(url, stream=True, timeout=60)
        current_stream().on_end(answer.close)
        for token in answer.iter_lines(chunk_size=1):
            yield token.decode()

    @expose()
    @stream(SSE(heartbeat=HEARTBEAT))
    async def count(self, path: str) -> AsyncIterator[str]:
        """Query the database in threads, and in the generator."""
        assert self.model is not None
        for number in range(3):
            await asyncio.sleep(0.001)
            stored = await asyncio.to_thread(self.model.DBSession.query(Note).count)
            assert stored == self.model.DBSession.query(Note).count()
            assert tg.request.params["path"] == path
            yield str(number)


def make_app(upstream: str, url: str = "", threads: str = "", looks: str = "10") -> Any:
    """The application, with ``/vitals`` outside of it.

    :param upstream: the URL of the upstream.
    :param url: of a database.
    :param threads: of the server. ``run.py`` reads it.
    :param looks: the seconds between two checks whether a client has disconnected.
    """
    options: dict[str, Any] = {"root_controller": RootController()}
    if url:
        RootController.model = Model(url)
        options |= database_options(RootController.model)
    options |= {"upstream": upstream, "tgstream.disconnect_check_seconds": looks}
    app = make_wsgi_app(options, tgstream.plugme)

    def monitored(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/vitals":
            answer: Iterable[bytes] = app(environ, start_response)
            return answer
        gc.collect()
        model = RootController.model
        vitals = {
            # By type(): isinstance() would resolve the proxies of TG.
            "streams": sum(type(item) is Body for item in gc.get_objects()),
            "connections": getattr(model and model.engine.pool, "checkedout", int)(),
        }
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(vitals).encode()]

    return monitored
