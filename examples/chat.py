"""A chat page: the tokens of a model are sent to the browser while it makes them.

python examples/chat.py                      # then open its address in a browser
curl -N 'http://127.0.0.1:8080/answer?text=hello'

The model is a server of its own, here a small one that repeats the question. Use
another one that sends a line for each token:

python examples/chat.py --upstream http://localhost:9000/generate
"""

import argparse
import contextlib
import http.server
import logging
import threading
import time
import urllib.parse

import httpx
import tg
import waitress
from tg import FullStackApplicationConfigurator, TGController, expose

import tgstream
from tgstream import SSE, Event, stream

INDEX = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Chat</title>
<meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark; font: 17px/1.5 system-ui, sans-serif; }
body { max-width: 34rem; margin: 2rem auto; padding: 0 1rem; }
form { display: flex; gap: .6rem; }
input { flex: 1; min-width: 0; }
input, button { font: inherit; padding: .4rem .8rem; border-radius: .4rem;
  border: 1px solid #8888; }
button { background: #0a7d55; color: #fff; cursor: pointer; }
#answer { white-space: pre-wrap; overflow-wrap: anywhere; min-height: 3rem; }
</style>
<h1>Chat</h1>
<form id="ask"><input name="text" maxlength="500" required autofocus
  aria-label="Your question"><button>Ask</button>
<button type="button" id="stop">Stop</button></form>
<p id="answer"></p>
<script>
const $ = id => document.getElementById(id);
let answer;
$("ask").onsubmit = event => {
  event.preventDefault();
  answer?.close();
  $("answer").textContent = "";
  answer = new EventSource("answer?" + new URLSearchParams(new FormData($("ask"))));
  answer.onmessage = event => {
    $("answer").textContent += JSON.parse(event.data).token + " ";
  };
  answer.addEventListener("done", () => answer.close());
  answer.onerror = () => { answer.close(); $("answer").textContent += " (failed)"; };
};
$("stop").onclick = () => answer?.close();  // the server stops the model
</script>"""

# One client for the process. The event loop of tgstream uses it for all streams.
CLIENT = httpx.AsyncClient(
    limits=httpx.Limits(max_connections=None), timeout=httpx.Timeout(5, read=60)
)


class RootController(TGController):
    @expose()
    def index(self):
        return INDEX

    @expose()
    @stream(SSE(heartbeat=0.3), max_seconds=600)  # notices a disconnect twice as late
    async def answer(self, text):
        url = tg.config["chat.upstream"]
        async with CLIENT.stream("GET", url, params={"text": text}) as upstream:
            if upstream.status_code != 200:
                tg.abort(502, "The model has failed")
            async for token in upstream.aiter_lines():
                yield {"token": token}
        yield Event("", event="done")  # the page must not reconnect


class Model(http.server.BaseHTTPRequestHandler):
    """Sends a word of the question, and waits, and sends the next one."""

    pause = 0.2

    def do_GET(self):
        _, _, query = self.path.partition("?")
        [text] = urllib.parse.parse_qs(query)["text"]
        self.send_response(200)
        self.end_headers()
        for word in f"You said: {text}".split():
            self.wfile.write(f"{word}\n".encode())
            time.sleep(self.pause)

    def log_message(self, *args):
        """Nothing."""


def start_model(pause):
    Model.pause = pause
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Model)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default=8080, type=int, help="0 for a free one")
    parser.add_argument("--pause", default=0.2, type=float, help="seconds for a token")
    parser.add_argument("--upstream", help="the URL of a model. Default: a small one")
    args = parser.parse_args()
    base_config = FullStackApplicationConfigurator()
    base_config.update_blueprint(
        {
            "root_controller": RootController(),
            "renderers": ["json"],
            "default_renderer": "json",
            "chat.upstream": args.upstream or start_model(args.pause),
        }
    )
    tgstream.plugme(base_config)
    logging.getLogger("tg").setLevel("ERROR")  # TG misses lib.helpers here
    app = base_config.make_wsgi_app({}, {})
    # Each answer that is being sent needs a thread.
    server = waitress.create_server(app, host=args.host, port=args.port, threads=100)
    print(f"Open http://{args.host}:{server.effective_port}/", flush=True)
    threading.Thread(target=server.run, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    tgstream.drain()


if __name__ == "__main__":
    main()
