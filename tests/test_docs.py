"""README and docs: what they name is there, what is there is named, and it runs."""

from __future__ import annotations

import re
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tg
from tg import expose
from tg.configuration.auth import TGAuthMetadata

import tgstream
from examples import cookbook
from tests.conftest import MakeApp
from tests.live_apps.run import SERVERS
from tests.servers.expected import unexpected
from tests.wsgi import get
from tgstream import stream
from tgstream._config import OPTIONS
from tgstream.testing import open_stream

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs/reference.rst").read_text()
EXPORTS = (ROOT / "docs/exports.rst").read_text()
LIVE = (ROOT / "docs/live.rst").read_text()
CONTRIBUTING = (ROOT / "docs/contributing.rst").read_text()


def snippets(language: str) -> list[str]:
    """What stands in the README's fences of this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The lines of the shell blocks of a page of the docs."""
    blocks = re.findall(r"code-block:: sh\n\n((?: {4}.*\n)+)", text)
    return [line.strip() for block in blocks for line in block.splitlines()]


USAGE, *ENABLING, STREAM, EXPORT, TESTING = snippets("python")


@pytest.mark.parametrize("name", tgstream.__all__)
def test_reference_has_every_public_name(name: str) -> None:
    """What can be imported from tgstream has an entry, and a docstring for it."""
    assert re.search(rf"^\.\. auto\w+:: {name}$", REFERENCE, re.MULTILINE)
    assert getattr(tgstream, name).__doc__


@pytest.mark.parametrize("name", tgstream.__all__)
def test_changelog_has_every_public_name(name: str) -> None:
    """A new name is told to those who read what is new."""
    assert f"``tgstream.{name}``" in (ROOT / "docs/changelog.rst").read_text()


@pytest.mark.parametrize("name", OPTIONS)
def test_option_is_documented_with_its_default(name: str) -> None:
    """The table of options in the code is the one in the reference and the README."""
    default = OPTIONS[name].default
    shown = "none" if default == () else str(default)
    row = re.search(rf"\* - ``{name}``\n +- (\S+)\n", REFERENCE)
    assert row is not None
    assert row[1].strip("`") == shown
    assert re.search(rf"^\| `{name}` \| `?{re.escape(shown)}`? \|", README, re.M)


@pytest.mark.parametrize("text", [README, REFERENCE], ids=["README", "reference"])
def test_option_that_is_documented_exists(text: str) -> None:
    """No table has a row for an option that is gone."""
    assert set(re.findall(r"[|-] `+(tgstream\.\w+)`+\s", text)) == OPTIONS.keys()


@pytest.mark.parametrize("enable", ENABLING, ids=["plugme", "plug"])
def test_readme_usage_runs(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enable: str
) -> None:
    """What the README shows does what it says, in an application enabled as it says."""
    provide(monkeypatch, "myapp.lib.base", BaseController=tg.TGController)
    provide(monkeypatch, "myapp.model", **vars(cookbook))
    shown: dict[str, Any] = {}
    exec(USAGE, shown)
    exec(STREAM, shown)
    exec(EXPORT, shown)
    shown["RootController"].report = shown["ReportController"]()
    shown["RootController"].export = shown["ExportController"]()

    def plug(base_config: Any) -> None:
        base_config.update_blueprint(
            {
                "use_sqlalchemy": True,
                "sqlalchemy.url": f"sqlite:///{tmp_path}/readme.db",
                "model": cookbook,
            }
        )
        exec(enable, {"base_config": base_config})

    app = make_app(shown["RootController"](), plug=plug)
    try:
        assert get(app, "/names").text == "manager\neditor\n"
        exec(TESTING, shown)
        shown["test_first_name_comes_alone"](app)
        download = get(app, "/report/download?year=2026")
        assert download.text == "1,2026\n2,2026\n"
        exported = get(app, "/export/csv").text
        assert exported.startswith("user_id,user_name,display_name\r\n1,manager,")
        assert len(get(app, "/export/lines").text.splitlines()) == 2
        disposition = download.headers["Content-Disposition"]
        assert disposition == 'attachment; filename="report-2026.csv"'
    finally:
        tg.config["tg.app_globals"].sa_engine.dispose()


def blocks(text: str) -> list[str]:
    """The Python blocks of a page of the docs, where the page stands in the margin."""
    found = re.findall(r"code-block:: python\n\n((?: {4}.*\n|\n)+)", text)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in found]


EXPORTED = {
    "users": "user_id,user_name\r\n1,manager\r\n2,editor\r\n",
    "all": "user_id,user_name,display_name\r\n",
    "some": "id,name\r\n1,Manager\r\n",
    "excel": "\ufeffuser_id,display_name\r\n",
    "lines": '{"user_id":1,"user_name":"manager","display_name":"Example manager"}\n',
    "array": '[{"user_id":1,',
    "since?user_id=1": '{"user_id":2,',
    "fast": "user_id,user_name,display_name\r\n1,manager,Example manager\r\n",
    "events": ': open\n\nevent: count\nid: 0\ndata: {"number":0}\n\n',
    "backup": "the backup",
}


def test_exports_page_runs(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controllers of the page on exports give what it says."""
    provide(monkeypatch, "myapp.lib.base", BaseController=tg.TGController)
    provide(monkeypatch, "myapp.model", **vars(cookbook))
    imports, *methods, own = blocks(EXPORTS)
    shown: dict[str, Any] = {}
    exec(imports, shown)
    exec("".join(methods), shown)
    exec(own, shown)
    shown["Exports"].mine = expose()(
        stream(shown["Lines"])(lambda self: ["one", "two"])
    )

    def plug(base_config: Any) -> None:
        url = f"sqlite:///{tmp_path}/exports.db"
        base_config.update_blueprint(
            {"use_sqlalchemy": True, "sqlalchemy.url": url, "model": cookbook}
        )
        tgstream.plugme(base_config)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "backup.tar").write_text("the backup")
    app = make_app(shown["Exports"](), plug=plug)
    try:
        for path, beginning in EXPORTED.items():
            assert get(app, f"/{path}").text.startswith(beginning), path
        assert get(app, "/backup").headers["Content-Length"] == "10"
        assert get(app, "/mine").text == "1: one\n2: two\n"
    finally:
        tg.config["tg.app_globals"].sa_engine.dispose()


def test_live_page_runs(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controllers of the page on live streams do what it says."""
    provide(monkeypatch, "myapp.lib.base", BaseController=tg.TGController)
    provide(monkeypatch, "myapp.model", **vars(cookbook))
    imports, *methods = blocks(LIVE)
    shown: dict[str, Any] = {}
    exec(imports, shown)
    exec("".join(methods), shown)

    def plug(base_config: Any) -> None:
        url = f"sqlite:///{tmp_path}/live.db"
        base_config.update_blueprint(
            {"use_sqlalchemy": True, "sqlalchemy.url": url, "model": cookbook}
        )
        base_config.update_blueprint({"sa_auth.authmetadata": Users()})
        tgstream.plugme(base_config)

    app = make_app(shown["Live"](), plug=plug)
    try:
        check_feeds(app)
        check_who_may_listen(app)
        waits = iter([None, 1, 2])
        shown["wait_for_change"] = lambda seconds: next(waits)
        check_bounds(app)
    finally:
        tg.config["tg.app_globals"].sa_engine.dispose()


def check_feeds(app: Any) -> None:
    """What is committed is heard, also by who comes back."""
    with open_stream(app, "/feed") as feed, open_stream(app, "/refused") as refused:
        heard, others = feed.events(), refused.events()
        opened = next(heard)
        assert next(others).comment == "open"
        assert get(app, "/register?name=ada").status_int == 302
        ada = next(heard)
        assert (ada.event, ada.data) == ("registered", '{"name":"ada"}')
        assert get(app, "/refuse?name=bob").status_int == 409
        assert next(heard).event == next(others).event == "refused"
        assert get(app, "/load?names=eve+joe").text == "eve\njoe\n"
        loaded = [event.data for event in islice(heard, 2)]
        assert loaded == ['{"name":"eve"}', '{"name":"joe"}']
    headers = {"Last-Event-ID": str(opened.id)}
    with open_stream(app, "/watch", headers=headers) as response:
        events = list(islice(response.events(), 6))
        assert (events[0].event, events[0].data) == ("count", "5")
        assert events[1].comment == "open"
        assert events[2] == ada


def check_bounds(app: Any) -> None:
    """A generator with a heartbeat, and a stream with a limit."""
    with open_stream(app, "/changes") as response:
        events = response.events()
        assert next(events).retry == 3000
        assert [event.data for event in islice(events, 3)] == [None, "1", "2"]
    with open_stream(app, "/bounded") as response:
        assert next(response.events()).comment == "open"


def check_who_may_listen(app: Any) -> None:
    """Who is logged in hears what is for them, and nobody else does."""
    for path in "/everything", "/mine", "/tell?name=ada&text=hello":
        assert get(app, path).status_int == 401
    ada, boss = user("ada"), user("boss")
    assert get(app, "/everything", **ada).status_int == 403
    with open_stream(app, "/everything", **boss) as response:
        assert next(response.events()).comment == "open"
    with open_stream(app, "/mine", **ada) as response:
        events = response.events()
        assert next(events).comment == "open"
        get(app, "/tell?name=bob&text=for+bob", **boss)
        get(app, "/tell?name=ada&text=for+ada", **boss)
        assert next(events).data == "for ada"


class Users(TGAuthMetadata):
    """What TG asks about who is logged in."""

    authenticate = None

    def get_user(self, identity: Any, userid: str) -> object:
        return object()

    def get_groups(self, identity: Any, userid: str) -> list[str]:
        return []

    def get_permissions(self, identity: Any, userid: str) -> list[str]:
        return ["manage"] if userid == "boss" else []


def user(name: str) -> dict[str, Any]:
    """The environ of a request by one who is logged in, as repoze.who leaves it."""
    return {"repoze.who.identity": {"repoze.who.userid": name}}


def provide(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Make the module ``name`` importable, with these members."""
    parent, _, _ = name.rpartition(".")
    if parent and parent not in sys.modules:
        provide(monkeypatch, parent)
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_readme_and_index_show_the_same_usage() -> None:
    """The first page of the docs has the README's example."""
    index = (ROOT / "docs/index.rst").read_text()
    assert re.sub(r"^(?=.)", "    ", USAGE, flags=re.M) in index


def test_readme_has_its_two_commands() -> None:
    """Each is one line, and does its own set-up in a virtual environment."""
    example, tests = (line.strip() for line in snippets("sh")[:2])
    begin = "python3 -m venv .venv && .venv/bin/pip install -q '.[{}]' && .venv/bin/{}"
    assert example == begin.format("examples", "python examples/cookbook.py")
    assert tests == begin.format("test", "python -m pytest")


@pytest.mark.parametrize(
    "path",
    [*re.findall(r"\]\(([^)#]+)\)", README), *re.findall(r"[\w/]+\.py\b", README)],
)
def test_readme_names_files_that_exist(path: str) -> None:
    """Its links and commands lead somewhere."""
    ours = not path.startswith("config/")  # of the reader's application
    assert (ROOT / path).exists() == ours


def test_table_of_servers_is_what_is_pinned() -> None:
    """The page says what the tests see."""
    table = (ROOT / "docs/matrix.txt").read_text()
    heads, *rows = [
        re.findall(r"- ((?:[^\n]|\n {9,})+)", row)
        for row in re.split(r"^ {4}\* ", table, flags=re.M)[1:]
    ]
    assert [name for name, *_ in rows] == [*SERVERS]
    for name, *cells in rows:
        ours = [re.sub(r" \(TG: .*\)$", "", cell) for cell in cells]
        assert unexpected(name, dict(zip(heads[1:], ours, strict=True))) == {}


@pytest.mark.parametrize(
    "path", [".ci/run", ".ci/matrix", ".ci/mariadb", ".ci/browser", ".ci/network"]
)
def test_command_of_contributors_exists(path: str) -> None:
    """What they are told to run can be run."""
    assert path in commands(CONTRIBUTING)
    assert (ROOT / path).stat().st_mode & 0o111


def test_ci_runs_the_checks_of_contributors() -> None:
    """There is one set of commands."""
    told = commands(CONTRIBUTING)
    first, last = told.index("ruff format --check ."), told.index(".ci/run")
    run = (ROOT / ".ci/run").read_text().splitlines()
    assert set(told[first:last]) <= set(run)
    assert "python -m build" in set(told) & set(run)
    assert run[-1] in told[first:last]  # pytest, whose summary is the last word
