"""``SSE(done="[DONE]")`` on real servers, read by OpenAI's own client."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import LiveServer


@pytest.mark.parametrize("server", ["waitress", "gunicorn-gevent"])
def test_openai_client_reads_a_stream(
    live_server: Callable[..., LiveServer], server: str
) -> None:
    """It stops at the last event, and raises the failure of a stream as its error."""
    openai: Any = importlib.import_module("openai")  # takes a second
    live = live_server(server, "openai_app")
    url = f"http://127.0.0.1:{live.port}"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:

        def ask(question: str) -> Any:
            message = {"role": "user", "content": question}
            return client.chat.completions.create(
                model="echo", messages=[message], stream=True
            )

        def texts(answer: Any) -> list[str]:
            return [chunk.choices[0].delta.content for chunk in answer]

        assert texts(ask("one two three")) == ["one", "two", "three"]
        with ask("one two fail") as answer:
            received = [next(answer).choices[0].delta.content for _ in range(2)]
            with pytest.raises(openai.APIError, match=r"^incident [0-9a-f]{16}$"):
                next(answer)
        assert received == ["one", "two"]
