"""An application with OpenAI's API for chats, which answers with the question."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import tg
from tg import TGController, expose

import tgstream
from tests.application import make_wsgi_app
from tgstream import SSE, stream


class ChatEvents(SSE):
    """Events whose failure the clients of OpenAI's API raise as an error."""

    def encode_failure(self, incident: str) -> bytes:
        error = json.dumps({"error": {"message": f"incident {incident}"}})
        return f"data: {error}\n\n".encode()


class Chat(TGController):
    @expose()
    @stream(ChatEvents(done="[DONE]"))
    def completions(self) -> Iterator[Any]:
        for word in tg.request.json_body["messages"][-1]["content"].split():
            if word == "fail":
                raise LookupError("a secret")
            yield {"choices": [{"index": 0, "delta": {"content": word}}]}


def make_app() -> Any:
    """Return the application."""
    root = TGController()
    root.chat = Chat()
    return make_wsgi_app({"root_controller": root}, tgstream.plugme)
