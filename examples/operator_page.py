"""A page for operators: the open streams of all processes, and a button to end each.

python examples/operator_page.py             # then open its address in a browser

Two processes, whose streams both pages show, with Valkey or Redis:

python examples/operator_page.py --channels redis://localhost --password x --port 8080
python examples/operator_page.py --channels redis://localhost --password x --port 8081
"""

import argparse
import contextlib
import logging
import os
import secrets
import socket
import threading
import time

import tg
import waitress
from tg import FullStackApplicationConfigurator, TGController, expose, require
from tg.configuration.auth import TGAuthMetadata
from tg.predicates import has_permission

import tgstream
from tgstream import SSE, Channel, stream

STYLE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Streams</title>
<meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
input, button { font: inherit; padding: .2rem .8rem; border-radius: .4rem;
  border: 1px solid #8888; }
button { background: #0a7d55; color: #fff; cursor: pointer; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #8884; text-align: left; }
</style>"""
INDEX = (
    STYLE
    + """<h1>Two streams</h1>
<p>The server's time: <output id="clock"></output></p>
<p><a href="report">A report that takes a while</a>, and <a href="operator">the page
for operators</a></p>
<script>
const clock = new EventSource("clock");  // it reconnects when an operator ends it
clock.onmessage = event => document.getElementById("clock").textContent = event.data;
</script>"""
)
LOGIN = (
    STYLE
    + """<h1>Log in</h1><form action="login_handler" method="post">
<input name="login" value="operator" aria-label="Name">
<input name="password" type="password" required autofocus aria-label="Password">
<button>Log in</button></form>"""
)
OPERATOR = (
    STYLE
    + """<h1>Open streams</h1>
<table><thead><tr><th>Process<th>Controller<th>Path<th>User<th>Address<th>Seconds
<th>Items<th>Bytes<th>State<th>Transaction<th></thead><tbody id="streams"></table>
<script>
const processes = new Map();  // the newest answer of each process
function ask(order = {}) {
  fetch("operator/ask", {method: "POST", body: new URLSearchParams(order)});
}
function addRow(process, {id, ...stream}) {
  const row = document.getElementById("streams").insertRow();
  row.id = id;
  for (const value of [process, stream.controller, stream.path, stream.user,
      stream.remote_addr, Math.round(stream.started), stream.items, stream.bytes,
      stream.state, stream.in_transaction ? "open" : ""])
    row.insertCell().textContent = value ?? "";  // not innerHTML: clients choose paths
  const button = document.createElement("button");
  button.textContent = "End";
  button.onclick = () => { ask({end: id}); setTimeout(ask, 1000); };
  row.insertCell().append(button);
}
function show() {
  document.getElementById("streams").replaceChildren();
  for (const process of [...processes.keys()].sort()) {
    const {time, streams} = processes.get(process);
    if (Date.now() - time > 10000) processes.delete(process);  // it has ended
    else streams.forEach(stream => addRow(process, stream));
  }
}
const answers = new EventSource("operator/answers");
answers.onopen = () => ask();
answers.onmessage = event => {
  const {process, streams} = JSON.parse(event.data);
  processes.set(process, {time: Date.now(), streams});
  show();
};
setInterval(ask, 2000);
</script>"""
)

ORDERS, ANSWERS = Channel("operator orders"), Channel("operator answers")
PROCESS = f"{socket.gethostname()} {os.getpid()}"


def answer_orders():  # on a thread of its own, in each process
    while True:  # listen() returns if this thread is too slow
        for event in ORDERS.listen():
            if event.data is None:
                continue  # a comment
            order, streams = event.json(), tgstream.running()
            for each in streams:
                if each.id == order["end"]:
                    each.end(f"stopped by {order['by']}")
            answer = {
                "process": PROCESS,
                "streams": [each._asdict() for each in streams],
            }
            ANSWERS.publish(answer, now=True)


class OperatorController(TGController):
    @expose()
    @require(has_permission("operate"))
    def index(self):
        return OPERATOR

    @expose()
    @require(has_permission("operate"))
    @stream(SSE(retry=1000))
    def answers(self):
        return ANSWERS.listen()

    @expose()
    @require(has_permission("operate"))
    def ask(self, end=None):
        if tg.request.method != "POST":
            tg.abort(405)
        user = tg.request.identity["repoze.who.userid"]
        ORDERS.publish({"end": end, "by": user}, now=True)


class RootController(TGController):
    operator = OperatorController()

    @expose()
    def index(self):
        return INDEX

    @expose()
    def login(self, **params):
        return LOGIN

    @expose()
    @stream(SSE(retry=1000, heartbeat=15))
    def clock(self):
        while True:
            yield time.strftime("%H:%M:%S")
            time.sleep(1)

    @expose(content_type="text/plain")
    @stream
    def report(self):
        for line in range(1, 3601):
            yield f"line {line}\n"
            time.sleep(1)


class Operators(TGAuthMetadata):
    """One user. An application has its own users and permissions."""

    def __init__(self, password):
        self.password = password

    def authenticate(self, environ, identity):
        given, right = identity["password"].encode(), self.password.encode()
        is_right = secrets.compare_digest(given, right)
        return "operator" if identity["login"] == "operator" and is_right else None

    def get_user(self, identity, userid):
        return userid

    def get_groups(self, identity, userid):
        return ["operators"]

    def get_permissions(self, identity, userid):
        return ["operate"]


def make_app(channels, password):
    base_config = FullStackApplicationConfigurator()
    base_config.update_blueprint(
        {
            "root_controller": RootController(),
            "renderers": ["json"],
            "default_renderer": "json",
            "sa_auth.enabled": True,
            "sa_auth.authmetadata": Operators(password),
            # An application has a secret of its own, the same in all processes.
            "sa_auth.cookie_secret": f"example {password}",
            "sa_auth.authtkt.samesite": "Lax",  # other sites cannot send orders
            "sa_auth.post_login_url": "/operator",
        }
    )
    tgstream.plugme(base_config, {"channels": channels})
    logging.getLogger("tg").setLevel("ERROR")  # TG misses lib.helpers here
    app = base_config.make_wsgi_app({}, {})
    threading.Thread(target=answer_orders, daemon=True).start()
    return app


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default=8080, type=int, help="0 for a free one")
    channels = os.environ.get("TGSTREAM_CHANNELS", "memory://")
    parser.add_argument("--channels", default=channels, help="redis://host:port/db")
    parser.add_argument("--password", default=secrets.token_urlsafe(6))
    args = parser.parse_args()
    app = make_app(args.channels, args.password)
    # Each open stream needs a thread.
    server = waitress.create_server(app, host=args.host, port=args.port, threads=100)
    print(f"Open http://{args.host}:{server.effective_port}/", flush=True)
    print(f"Log in as operator, with the password {args.password}", flush=True)
    threading.Thread(target=server.run, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    tgstream.drain()  # browsers reconnect to the next process


if __name__ == "__main__":
    main()
