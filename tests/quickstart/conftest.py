"""Applications from ``gearbox quickstart``, with the changes of the tutorial."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

import tgstream
from tests.conftest import LiveServer
from tests.quickstart.tutorial import TUTORIAL, Block, apply, blocks
from tgstream.doctor.package_checks import is_below

QUICKSTARTS = {"full": ["quickstart"], "minimal": ["quickstart", "--minimal"]}
PROBE = Block(
    "diff",
    "myapp/controllers/root.py",
    " from myapp.controllers.live import LiveController\n"
    "+from myapp.controllers.probe import ProbeController\n"
    "@@\n"
    "     live = LiveController()\n"
    "+    probe = ProbeController()\n",
)
PLUG = Block(  # the other way to install it
    "diff",
    "myapp/config/app_cfg.py",
    "-import tgstream\n"
    "-tgstream.plugme(base_config)\n"
    "+from tgext.pluggable import plug\n"
    "+plug(base_config, 'tgstream')\n",
)
LOGGED = """
[logger_tgstream]
level = DEBUG
handlers =
qualname = tgstream

"""

Quickstart = Callable[[str], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests if tg.devtools is older and makes another application."""
    if is_below(version("tg.devtools"), "2.5.1"):
        older = pytest.mark.skip(reason="the tutorial is about tg.devtools 2.5.1")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(older)


def run(folder: Path, *arguments: str) -> str:
    """Run Python in a folder, and return its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def environment() -> dict[str, str]:
    """The environment of processes: the path of tgstream, and no settings of pytest."""
    removed = "PYTEST", "PYTHONDEVMODE"
    kept = {key: os.environ[key] for key in os.environ if not key.startswith(removed)}
    return {**kept, "PYTHONPATH": str(Path(tgstream.__file__).parents[1])}


def gearbox(folder: Path, *arguments: str) -> str:
    """Run gearbox in a folder, and return its output."""
    return run(folder, "-c", "from gearbox.main import main; main()", *arguments)


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """Makes each kind of application once, with the changes of the tutorial.

    The workers of pytest-xdist share the applications. Nothing may change them.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def make(kind: str) -> Path:
        base = shared / f"quickstart-{kind}"
        with (shared / f"quickstart-{kind}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not base.exists():
                base.mkdir()
                make_application(kind, base)
        return base / "myapp"

    return make


def make_application(kind: str, base: Path) -> None:
    """Make an application in a folder, and follow the tutorial."""
    gearbox(base, *QUICKSTARTS[kind], "myapp")
    app = base / "myapp"
    # As pip install -e does: PasteDeploy finds the application by its metadata.
    run(app, "-c", "import setuptools; setuptools.setup()", "egg_info")
    for block in blocks(TUTORIAL.read_text()):
        if block.is_for_a_file:
            apply(block, app)
    gearbox(app, "setup-app")


class GearboxServe(LiveServer):
    """The application of an ``.ini`` file, served by ``gearbox serve``."""

    def __init__(self, config: Path) -> None:
        self.start(
            [
                *(sys.executable, "-c", "from gearbox.main import main; main()"),
                *("serve", "-c", config.name),
            ],
            r".*Starting Threaded HTTP server on http://127.0.0.1:(\d+)",
            cwd=config.parent,
            env=environment(),
        )


def serve_with_gearbox(config: Path) -> LiveServer:
    """Start the server of a quickstarted application, on a free port."""
    ini = config.read_text()
    for attempt in range(5):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config.write_text(ini.replace("port = 8080", f"port = {port}"))
        try:
            return GearboxServe(config)
        except RuntimeError as error:  # another process took the port
            if attempt == 4 or "already in use" not in str(error):
                raise
    raise AssertionError


def serve_with_waitress(config: Path) -> LiveServer:
    """Start waitress, as in production."""
    return LiveServer("waitress", "quickstarted", f"config={config}")


SERVERS = {"gearbox": serve_with_gearbox, "waitress": serve_with_waitress}
STACKS = [  # each pair of server, kind and debug is in one of them
    "gearbox-full-debug-true",
    "gearbox-minimal-debug-false",
    "waitress-full-debug-false",
    "waitress-minimal-debug-true",
]


class Stack:
    """A running application: its folder, its server, and its client."""

    def __init__(self, app: Path, name: str, folder: Path) -> None:
        self.name = name
        server, self.kind, _, debug = name.split("-")
        self.debug = debug == "true"
        self.folder = folder / "myapp"
        shutil.copytree(app, self.folder)
        shutil.copy(
            Path(__file__).with_name("probe.py"), self.folder / "myapp/controllers"
        )
        apply(PROBE, self.folder)
        if self.kind == "minimal":
            apply(PLUG, self.folder)
        self.server = SERVERS[server](self._config(debug))
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.server.port}")

    def _config(self, debug: str) -> Path:
        ini = (self.folder / "development.ini").read_text()
        for old, new in {
            "\ndebug = true": f"\ndebug = {debug}",
            "use = egg:waitress#main\n": "use = egg:gearbox#wsgiref\n",
            "threads = 32\n": "wsgiref.threaded = true\n",
            "[app:main]\n": "[app:main]\ntgstream.chunk_size = 1000\n",
            "[loggers]\nkeys = root,": "[loggers]\nkeys = root, tgstream,",
            "[logger_root]\n": LOGGED + "[logger_root]\n",
        }.items():
            assert ini.count(old) == 1
            ini = ini.replace(old, new)
        config = self.folder / "served.ini"
        config.write_text(ini)
        return config

    def log_in(self, name: str, password: str) -> None:
        """Log in with the form of the login page. The client keeps the cookies."""
        form = {"login": name, "password": password}
        page = self.client.post("/login_handler", data=form, follow_redirects=True)
        assert f"Welcome back, {name}!" in page.text or self.kind == "minimal"
        assert "authtkt" in {cookie.name for cookie in self.client.cookies.jar}

    def stop(self) -> None:
        self.client.close()
        self.server.stop()


@pytest.fixture(scope="session", params=STACKS)
def stack(
    request: pytest.FixtureRequest,
    quickstart: Quickstart,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    """Each application on each server, with debug on and off."""
    kind = request.param.split("-")[1]
    stack = Stack(quickstart(kind), request.param, tmp_path_factory.mktemp("stack"))
    yield stack
    stack.stop()
