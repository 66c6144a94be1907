"""The thread of ``docs/operating.rst`` that answers the page for operators."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from tg import TGController

from tests.conftest import MakeApp
from tests.live_apps.metrics_app import run_block


def test_thread_answers_an_order(make_app: MakeApp) -> None:
    """It publishes the streams of its process, of which there are none."""
    make_app(TGController())
    shown = run_block("def answer_orders()")
    orders, answers = shown["ORDERS"].listen(), shown["ANSWERS"].listen()
    assert next(orders).data is next(answers).data is None  # both listen
    shown["ORDERS"].publish({"end": None, "by": "ada"}, now=True)

    class Once:
        """Returns the one order, and then ends the thread."""

        def listen(self) -> list[object]:
            if answered.is_set():
                raise SystemExit
            answered.set()
            return [next(orders)]

    answered = threading.Event()
    shown["ORDERS"] = Once()
    with ThreadPoolExecutor(1) as threads:
        assert isinstance(
            threads.submit(shown["answer_orders"]).exception(), SystemExit
        )
    answer = next(answers).json()
    assert answer == {"process": shown["PROCESS"], "streams": []}
