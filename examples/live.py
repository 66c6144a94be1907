"""A live page: a feed, a form that posts to it, and a job with a progress bar.

python examples/live.py                      # then open its address in two browsers
curl -N http://127.0.0.1:8080/feed           # prints each message when it is sent
curl -d text=hello http://127.0.0.1:8080/say

Two processes that share their channels, with Valkey or Redis (pip install '.[redis]'):

python examples/live.py --channels redis://localhost --port 8080
python examples/live.py --channels redis://localhost --port 8081
"""

import argparse
import contextlib
import logging
import os
import re
import threading
import time
import uuid

import tg
import waitress
from tg import FullStackApplicationConfigurator, TGController, expose

import tgstream
from tgstream import SSE, Channel, last_event_id, stream

STEPS = 20
INDEX = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Live</title>
<meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark; font: 17px/1.5 system-ui, sans-serif; }
body { max-width: 34rem; margin: 2rem auto; padding: 0 1rem; }
form, p { display: flex; gap: .6rem; align-items: center; }
input, progress { flex: 1; min-width: 0; accent-color: #0a7d55; }
input, button { font: inherit; padding: .4rem .8rem; border-radius: .4rem;
  border: 1px solid #8888; }
button { background: #0a7d55; color: #fff; cursor: pointer; }
ul { list-style: none; padding: 0; }
li { padding: .4rem .8rem; border-left: .25rem solid #0a7d55; margin: .4rem 0;
  overflow-wrap: anywhere; background: #8881; }
</style>
<h1>Live</h1>
<form id="say"><input name="text" maxlength="500" required autofocus
  placeholder="Open this page twice, and say something" aria-label="What to say">
<button>Say it to all</button></form>
<p><button id="start">Start a long job</button>
<progress id="bar" value="0"></progress> <output id="step"></output></p>
<ul id="feed"></ul>
<script>
const $ = id => document.getElementById(id);
function show(text) {
  const line = document.createElement("li");
  line.textContent = text;  // not innerHTML: other users wrote the text
  $("feed").prepend(line);
}
const feed = new EventSource("feed");  // reconnects automatically, with its last id
feed.onmessage = event => show(event.data);
feed.addEventListener("reset", () => show("(some messages are missing)"));
$("say").onsubmit = async event => {
  event.preventDefault();
  await fetch("say", {method: "POST", body: new FormData($("say"))});
  $("say").reset();
};
let steps;
function follow() {  // from the job's first step, so that the bar survives a reload
  steps?.close();
  steps = new EventSource("steps" + location.search);
  steps.onmessage = event => {
    const {step, of} = JSON.parse(event.data);
    $("bar").value = step / of;
    $("step").textContent = step < of ? `${step} of ${of}` : "done";
    if (step == of) steps.close();
  };
  steps.addEventListener("reset", () => $("step").textContent = "forgotten");
}
$("start").onclick = async () => {
  const job = await (await fetch("start", {method: "POST"})).json();
  history.replaceState(null, "", "?" + new URLSearchParams(job));
  follow();
};
if (location.search) follow();
</script>"""


def work(channel, pause):  # on its own thread: the job outlives the page
    for step in range(1, STEPS + 1):
        time.sleep(pause)
        channel.publish({"step": step, "of": STEPS})


class RootController(TGController):
    @expose()
    def index(self):
        return INDEX

    @expose()
    @stream(SSE(retry=1000))
    def feed(self):
        return Channel("feed").listen(after=last_event_id())

    @expose()
    def say(self, text):
        Channel("feed").publish(text[:500])  # sent when the transaction commits

    @expose("json")
    def start(self):
        job = uuid.uuid4().hex
        channel, pause = Channel(f"job {job}"), tg.config["live.pause"]
        since = channel.position()  # before the first step
        threading.Thread(target=work, args=[channel, pause], daemon=True).start()
        return {"job": job, "lastEventId": since}  # last_event_id() reads it

    @expose()
    @stream(SSE(retry=1000))
    def steps(self, job):
        if not re.fullmatch("[0-9a-f]{32}", job):
            tg.abort(404)
        return Channel(f"job {job}").listen(after=last_event_id())


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default=8080, type=int, help="0 for a free one")
    parser.add_argument("--pause", default=0.5, type=float, help="seconds a step takes")
    channels = os.environ.get("TGSTREAM_CHANNELS", "memory://")
    parser.add_argument("--channels", default=channels, help="redis://host:port/db")
    args = parser.parse_args()
    base_config = FullStackApplicationConfigurator()
    base_config.update_blueprint(
        {
            "root_controller": RootController(),
            "renderers": ["json"],
            "default_renderer": "json",
            "live.pause": args.pause,
        }
    )
    tgstream.plugme(base_config, {"channels": args.channels})
    logging.getLogger("tg").setLevel("ERROR")  # TG misses lib.helpers here
    app = base_config.make_wsgi_app({}, {})
    # Each open page needs a thread for its feed, and a thread for its progress bar.
    server = waitress.create_server(app, host=args.host, port=args.port, threads=100)
    print(f"Open http://{args.host}:{server.effective_port}/", flush=True)
    threading.Thread(target=server.run, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    tgstream.drain()  # browsers reconnect to the next process


if __name__ == "__main__":
    main()
