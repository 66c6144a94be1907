"""README and docs: they agree with the code, and their examples run."""

from __future__ import annotations

import ast
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from zipfile import ZipFile

import openpyxl
import polars as pl
import pytest
import tg
from tg import expose
from tg.configuration.auth import TGAuthMetadata

import tgstream
from examples import cookbook
from tests.comparison.expected import EXPECTED
from tests.comparison.frameworks import FRAMEWORKS
from tests.comparison.questions import QUESTIONS
from tests.comparison.table import VERSIONS, table
from tests.conftest import MakeApp
from tests.live_apps.run import SERVERS
from tests.pages import blocks, commands
from tests.servers.expected import unexpected
from tests.wsgi import Call, get
from tgstream import Event, stream
from tgstream.core.settings import OPTIONS
from tgstream.testing import open_stream

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs/reference.rst").read_text()
STREAMS = (ROOT / "docs/streams.rst").read_text()
EXPORTS = (ROOT / "docs/exports.rst").read_text()
DOWNLOADS = (ROOT / "docs/downloads.rst").read_text()
LIVE = (ROOT / "docs/live.rst").read_text()
CONTRIBUTING = (ROOT / "docs/contributing.rst").read_text()


def snippets(language: str) -> list[str]:
    """The README's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


USAGE, *ENABLING = snippets("python")


@pytest.mark.parametrize("name", tgstream.__all__)
def test_reference_has_every_public_name(name: str) -> None:
    """Each public name has an entry in the reference, and a docstring."""
    assert re.search(rf"^\.\. auto\w+:: {name}$", REFERENCE, re.MULTILINE)
    assert getattr(tgstream, name).__doc__


@pytest.mark.parametrize("name", tgstream.__all__)
def test_changelog_has_every_public_name(name: str) -> None:
    """The changelog lists each public name."""
    assert f"``tgstream.{name}``" in (ROOT / "docs/changelog.rst").read_text()


@pytest.mark.parametrize("name", OPTIONS)
def test_option_is_documented_with_its_default(name: str) -> None:
    """The reference has the same defaults as the code."""
    default = OPTIONS[name].default
    shown = "none" if default == () else str(default)
    row = re.search(rf"\* - ``{name}``\n +- (\S+)\n", REFERENCE)
    assert row is not None
    assert row[1].strip("`") == shown


LEVELS = {"exception": "ERROR", "log": "DEBUG"}
CODE = [
    ast.parse(path.read_text()) for path in Path(tgstream.__file__).parent.rglob("*.py")
]


class Logger(NamedTuple):
    """A function that writes a line to the log.

    :param level: of the line.
    :param position: of the parameter that is the format of the line.
    """

    level: str
    position: int


def loggers() -> dict[str, Logger]:
    """The functions that log a given text, such as ``warn_once(body, text)``."""
    known: dict[str, Logger] = {}
    functions = [
        node
        for tree in CODE
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    count = -1
    while count < len(known):  # one may call another
        count = len(known)
        for function in functions:
            names = [argument.arg for argument in function.args.args]
            is_method = names[:1] == ["self"]
            for level, text in log_calls(function, known):
                if isinstance(text, ast.Name) and text.id in names:
                    position = names.index(text.id) - is_method
                    known[function.name] = Logger(level, position)
    return known


def log_calls(
    tree: ast.AST, known: dict[str, Logger]
) -> Iterator[tuple[str, ast.expr]]:
    """The level and the format of each call that writes to the log."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        owner, _, name = ast.unparse(call.func).rpartition(".")
        if owner == "log" and name in ("debug", "info", "warning", "error", *LEVELS):
            position = 1 if name == "log" else 0  # log.log(level, text)
            yield LEVELS.get(name, name.upper()), call.args[position]
        elif name in known and len(call.args) > known[name].position:
            yield known[name].level, call.args[known[name].position]


def log_lines() -> list[tuple[str, str]]:
    """The level and the format of every line that the library logs.

    :raises ValueError: if a format is not a constant, so that no test can compare it.
    """
    known, lines = loggers(), set()
    for tree in CODE:
        constants = {
            ast.unparse(node.targets[0]): node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
        }
        for level, text in log_calls(tree, known):
            text = constants.get(ast.unparse(text), text)
            if isinstance(text, ast.JoinedStr | ast.BinOp):
                raise ValueError(f"not a constant: {ast.unparse(text)}")
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                lines.add((level, text.value))
    return sorted(lines)


def test_log_lines_were_found() -> None:
    """The tests below compare them, those of functions that log a given text too."""
    assert len(log_lines()) > 20
    assert {"WARNING", "ERROR", "DEBUG"} <= {level for level, _ in log_lines()}


@pytest.mark.parametrize(("level", "line"), log_lines())
def test_reference_has_every_log_line(level: str, line: str) -> None:
    """The reference quotes it word for word, so that a search finds it."""
    fixed = re.split(r"%(?!%)\.?\d*[a-z]", line)
    shown = "<[a-z]+>".join(re.escape(part.replace("%%", "%")) for part in fixed)
    text = " ".join(REFERENCE.split())
    assert re.search(rf"\* - ``{level}`` - ``{shown}`` - \w", text)


def test_reference_has_no_other_log_line() -> None:
    """The table of log lines has one row for each line, and no other row."""
    rows = re.findall(r"^    \* - ``[A-Z]+``\n      - ``", REFERENCE, re.MULTILINE)
    assert len(rows) == len({line for _, line in log_lines()})


def test_documented_option_exists() -> None:
    """The table of options has no row for an option that was removed."""
    assert set(re.findall(r"[|-] `+(tgstream\.\w+)`+\s", REFERENCE)) == OPTIONS.keys()


@pytest.mark.parametrize("enable", ENABLING, ids=["plugme", "plug"])
def test_readme_usage_runs(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enable: str
) -> None:
    """The README's example runs in an application that is set up as it shows."""
    provide(monkeypatch, "myapp.lib.base", BaseController=tg.TGController)
    provide(monkeypatch, "myapp.model", **vars(cookbook))
    shown: dict[str, Any] = {}
    exec(USAGE, shown)

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
        exported = get(app, "/export")
        assert sorted(exported.text.split()) == ["1,manager", "2,editor", HEAD]
        disposition = exported.headers["Content-Disposition"]
        assert disposition == 'attachment; filename="users.csv"'
        with open_stream(app, "/feed") as response:
            events = response.events()
            assert next(events).comment == "open"
            tgstream.Channel("users").publish("hello")
            assert next(events).data == "hello"
    finally:
        tg.config["tg.app_globals"].sa_engine.dispose()


def test_streams_page_runs(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controllers of the page on streams give the output that it describes."""
    provide(monkeypatch, "myapp.lib.base", BaseController=tg.TGController)
    provide(monkeypatch, "myapp.model", **vars(cookbook))
    imports, *enabling, first, second, third = blocks(STREAMS)
    assert [*map(str.strip, enabling)] == [*map(str.strip, ENABLING)]
    shown: dict[str, Any] = {}
    exec(imports, shown)
    exec(first + second + third, shown)

    app = make_app(shown["Reports"](), plug=storing(tmp_path))
    try:
        assert get(app, "/names").text == "manager\neditor\n"
        download = get(app, "/download?year=2026")
        assert download.text == "1,2026\n2,2026\n"
        disposition = download.headers["Content-Disposition"]
        assert disposition == 'attachment; filename="report-2026.csv"'
        counted = get(app, "/count").text
        assert counted.startswith("0 after 0 bytes\n1 after 16 bytes\n")
        assert counted.count("\n") == 1000
    finally:
        tg.config["tg.app_globals"].sa_engine.dispose()


def test_hook_of_the_reference_is_called(
    make_app: MakeApp, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints the controller, the reason of the end, and the number of bytes."""

    class Root(tg.TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> list[str]:
            return ["one", "two"]

    app = make_app(Root())
    [block] = blocks(REFERENCE)
    shown: dict[str, Any] = {}
    exec(block, shown)
    try:
        assert get(app, "/words").text == "onetwo"
    finally:
        tg.hooks.disconnect("tgstream.finished", shown["count"])
    assert capsys.readouterr().out == "Root.words completed 6\n"


def storing(folder: Path, **options: Any) -> Callable[[Any], None]:
    """Plug tgstream into an application with the cookbook's model, on a file."""
    url = f"sqlite:///{folder}/pages.db"
    database = {"use_sqlalchemy": True, "sqlalchemy.url": url, "model": cookbook}

    def plug(base_config: Any) -> None:
        base_config.update_blueprint(database | options)
        tgstream.plugme(base_config)

    return plug


HEAD = "user_id,user_name"
EXPORTED = {
    "users": "user_id,user_name\r\n1,manager\r\n2,editor\r\n",
    "all": "user_id,user_name,display_name\r\n",
    "some": "id,name\r\n1,Manager\r\n",
    "excel": "\ufeffuser_id;display_name\r\n",
    "semicolons": "\ufeffuser_id;display_name\r\n",
    "converted": "user_id,user_name\r\n1,Manager\r\n",
    "exact": '{"user_id":1,"price":"1.50"}\n',
    "lines": '{"user_id":',
    "array": '[{"user_id":',
    "since?user_id=1": '{"user_id":2,',
    "fast": "user_id,user_name\r\n",
    "fast_lines": '{"user_id":',
    "events": ': open\n\nevent: count\nid: 0\ndata: {"number":0}\n\n',
    "backup": "the backup",
}
DOWNLOADED = {
    "users": "user_id,user_name\r\n1,manager\r\n",
    "users.ndjson": '{"user_id":1,"user_name":"manager"}\n',
    "resumable": "user_id,user_name\r\n1,manager\r\n",
    "report/2026": "the report",
    "compressed": '{"user_id":',
}


def test_exports_page_runs(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controllers of the page on exports give the output that it describes."""
    provide(monkeypatch, "myapp.lib.base", BaseController=tg.TGController)
    provide(monkeypatch, "myapp.model", **vars(cookbook))
    imports, *methods, own, chat = blocks(EXPORTS)
    shown: dict[str, Any] = {}
    exec(imports, shown)
    exec("".join(methods), shown)
    exec(own + chat, shown)
    shown["Exports"].mine = expose()(
        stream(shown["Lines"])(lambda self: ["one", "two"])
    )

    monkeypatch.chdir(tmp_path)
    (tmp_path / "backup.tar").write_text("the backup")
    app = make_app(shown["Exports"](), plug=storing(tmp_path))
    try:
        for path, beginning in EXPORTED.items():
            assert get(app, f"/{path}").text.startswith(beginning), path
        assert get(app, "/backup").headers["Content-Length"] == "10"
        assert get(app, "/mine").text == "1: one\n2: two\n"
        data = shown["ChatEvents"]().encode_failure("1f").removeprefix("data: ")
        assert json.loads(data)["error"]["message"].endswith("1f")
    finally:
        tg.config["tg.app_globals"].sa_engine.dispose()


def test_downloads_page_runs(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controllers of the page on downloads give the files that it describes."""
    provide(monkeypatch, "myapp.lib.base", BaseController=tg.TGController)
    provide(monkeypatch, "myapp.model", **vars(cookbook))
    imports, *methods = blocks(DOWNLOADS)
    shown: dict[str, Any] = {}
    exec(imports, shown)
    exec("".join(methods), shown)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "2026.pdf").write_text("the report")
    app = make_app(shown["Downloads"](), plug=storing(tmp_path))
    try:
        for path, beginning in DOWNLOADED.items():
            assert get(app, f"/{path}").text.startswith(beginning), path
        assert get(app, "/users.pdf").status_int == 406
        for reader, path in (
            (pl.read_parquet, "/parquet"),
            (pl.read_ipc_stream, "/arrow"),
        ):
            users = reader(Call(app, path).read()).to_dicts()
            assert {"user_id": 1, "user_name": "manager"} in users
        part = get(app, "/report/2026", HTTP_RANGE="bytes=4-")
        assert (part.status_int, part.text) == (206, "report")
        assert get(app, "/report/2025").status_int == 404
        assert get(app, "/compressed").headers["Vary"] == "Accept-Encoding"
        check_workbooks(app)
        with ZipFile(io.BytesIO(Call(app, "/archive").read())) as archive:
            assert archive.read("users.csv").startswith(b"user_id,user_name\r\n")
            assert len(archive.namelist()) == 3
        assert get(app, "/photos").headers["Content-Length"] == "22"
    finally:
        tg.config["tg.app_globals"].sa_engine.dispose()


def check_workbooks(app: Any) -> None:
    """The workbooks have the sheets, the widths and the rows of the page."""
    book = openpyxl.load_workbook(io.BytesIO(Call(app, "/workbook").read()))
    assert book.active.column_dimensions["C"].width == 40
    assert [cell.value for cell in book.active[2]][:2] == [1, "manager"]
    report = openpyxl.load_workbook(io.BytesIO(Call(app, "/sheets").read()))
    assert report.sheetnames == ["Users", "Names"]
    assert [row[0].value for row in report["Names"]] == ["ada", "bob"]


def test_live_page_runs(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controllers of the page on live streams send the events it describes."""
    provide(monkeypatch, "myapp.lib.base", BaseController=tg.TGController)
    provide(monkeypatch, "myapp.model", **vars(cookbook))
    # test_redis.py runs the script. The other block is of Alembic.
    apart = "loadapp", "target_metadata"
    page = [b for b in blocks(LIVE) if not any(name in b for name in apart)]
    imports, *methods = page
    shown: dict[str, Any] = {}
    exec(imports, shown)
    exec("".join(methods), shown)

    plug = storing(tmp_path, **{"sa_auth.authmetadata": Users()})
    app = make_app(shown["Live"](), plug=plug)
    try:
        check_feeds(app)
        check_who_may_listen(app)
        waits = iter([None, 1, 2])
        shown["wait_for_change"] = lambda seconds: next(waits)
        check_bounds(app)
        check_ends(app)
    finally:
        tg.config["tg.app_globals"].sa_engine.dispose()


def check_feeds(app: Any) -> None:
    """Listeners receive events after the commit, also after a reconnect."""
    with open_stream(app, "/feed") as feed, open_stream(app, "/refused") as refused:
        events, others = feed.events(), refused.events()
        opened = next(events)
        assert next(others).comment == "open"
        assert get(app, "/register?name=ada").status_int == 302
        ada = next(events)
        assert (ada.event, ada.data) == ("registered", '{"name":"ada"}')
        assert get(app, "/refuse?name=bob").status_int == 409
        assert next(events).event == next(others).event == "refused"
        assert get(app, "/load?names=eve+joe").text == "eve\njoe\n"
        loaded = [event.data for event in islice(events, 2)]
        assert loaded == ['{"name":"eve"}', '{"name":"joe"}']
    headers = {"Last-Event-ID": str(opened.id)}
    with open_stream(app, "/watch", headers=headers) as response:
        watched = list(islice(response.events(), 6))
        assert (watched[0].event, watched[0].data) == ("count", "5")
        assert watched[1].comment == "open"
        assert watched[2] == ada
    place = json.loads(get(app, "/overview").text)["place"]
    for path in "/recent", "/feed":
        with open_stream(app, f"{path}?lastEventId={place}") as response:
            assert next(response.events()) == Event(comment="open", id=place)
    with open_stream(app, "/long_names") as response:
        events = response.events()
        assert next(events).comment == "open"
        for name in "max", "maximilian1":
            tgstream.Channel("users").publish({"name": name})
        assert next(events).data == '{"name":"maximilian1"}'
    with open_stream(app, f"/lines?lastEventId={opened.id}") as response:
        lines = list(islice(response.json(), 2))
        assert [line["comment"] for line in lines] == ["open", None]
        assert Event(**lines[1]) == replace(ada, channel="users")


def check_bounds(app: Any) -> None:
    """A generator with a heartbeat, and a stream with a limit."""
    with open_stream(app, "/changes") as response:
        events = response.events()
        assert next(events).retry == 3000
        assert [event.data for event in islice(events, 3)] == [None, "1", "2"]
    with open_stream(app, "/bounded") as response:
        assert next(response.events()).comment == "open"


def check_ends(app: Any) -> None:
    """The last event shows how the stream has ended."""
    assert get(app, "/names").text.endswith("event: done\ndata: 5\n\n")
    with open_stream(app, "/names?fail=yes") as response:
        assert list(islice(response.events(), 6))[-1].event == "failed"
    question = b'{"messages": [{"role": "user", "content": "one two"}]}'
    headers = {"Content-Type": "application/json"}
    with open_stream(
        app, "/completions", method="POST", body=question, headers=headers
    ) as response:
        *words, last = response.events()
    texts = [json.loads(w.data)["choices"][0]["delta"]["content"] for w in words]
    assert (texts, last.data) == (["one", "two"], "[DONE]")


def check_who_may_listen(app: Any) -> None:
    """A user who is logged in receives only the events that are for this user."""
    for path in "/everything", "/mine", "/tell?name=ada&text=hello":
        assert get(app, path).status_int == 401
    ada, boss = user("ada"), user("boss")
    assert get(app, "/everything", **ada).status_int == 403
    with open_stream(app, "/everything", **boss) as response:
        assert next(response.events()).comment == "open"
    with open_stream(app, "/everywhere", **ada) as response:
        events = response.events()
        assert next(events).comment == "open"
        tgstream.Channel("chat").publish("hello", event="said")
        get(app, "/tell?name=ada&text=for+ada", **boss)
        assert [event.data for event in islice(events, 2)] == ["hello", "for ada"]
    with open_stream(app, "/mine", **ada) as response:
        events = response.events()
        assert next(events).comment == "open"
        get(app, "/tell?name=bob&text=for+bob", **boss)
        get(app, "/tell?name=ada&text=for+ada", **boss)
        assert next(events).data == "for ada"


class Users(TGAuthMetadata):
    """The groups and permissions of a user, for TG."""

    authenticate = None

    def get_user(self, identity: Any, userid: str) -> object:
        return object()

    def get_groups(self, identity: Any, userid: str) -> list[str]:
        return []

    def get_permissions(self, identity: Any, userid: str) -> list[str]:
        return ["manage"] if userid == "boss" else []


def user(name: str) -> dict[str, Any]:
    """The environ of a request by a user who is logged in, as repoze.who makes it."""
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
    """Each command is one line that makes its own virtual environment."""
    example, tests = (line.strip() for line in snippets("sh")[:2])
    begin = "python3 -m venv .venv && .venv/bin/pip install -q '.[{}]' && .venv/bin/{}"
    assert example == begin.format("examples", "python examples/cookbook.py")
    assert tests == begin.format("test", "python -m pytest -n 2")


@pytest.mark.parametrize(
    "path",
    [*re.findall(r"\]\(([^)#]+)\)", README), *re.findall(r"[\w/]+\.py\b", README)],
)
def test_readme_names_files_that_exist(path: str) -> None:
    """Its links and commands lead to existing files."""
    is_ours = not path.startswith("config/")  # a file of the reader's application
    assert (ROOT / path).exists() == is_ours


def test_table_of_servers_has_the_expected_results() -> None:
    """The page shows the results that the tests expect."""
    table = (ROOT / "docs/matrix.txt").read_text()
    heads, *rows = [
        re.findall(r"- ((?:[^\n]|\n {9,})+)", row)
        for row in re.split(r"^ {4}\* ", table, flags=re.M)[1:]
    ]
    assert [name for name, *_ in rows] == [*SERVERS]
    for name, *cells in rows:
        results = [re.sub(r" \(TG: .*\)$", "", cell) for cell in cells]
        assert unexpected(name, dict(zip(heads[1:], results, strict=True))) == {}


def test_chart_and_page_have_the_same_figures() -> None:
    """The picture and the figures below it come from one measurement."""
    page = (ROOT / "docs/benchmarks.rst").read_text()
    drawn = re.findall(r">([\d.]+) s</text>", (ROOT / "docs/memory.svg").read_text())
    rows = re.findall(r"^    1,000,000 rows: .* ([\d.]+) s ", page, re.MULTILINE)
    shown = [pytest.approx(float(last), abs=0.051) for last in rows]
    assert [float(last) for last in drawn if "." in last] == shown
    assert len(shown) == 4


def test_table_of_frameworks_has_the_expected_results() -> None:
    """Each framework has a result for each question, and the page shows it."""
    assert [*EXPECTED] == [*FRAMEWORKS]
    assert all([*answers] == [*QUESTIONS] for answers in EXPECTED.values())
    head, versions = f"    * - {VERSIONS} ", dict.fromkeys(EXPECTED, "")
    shown, _, last = (ROOT / "docs/comparison.txt").read_text().partition(head)
    assert shown == table(EXPECTED, versions).partition(head)[0]
    assert len(last.splitlines()) == 1 + len(EXPECTED)


@pytest.mark.parametrize("question", QUESTIONS)
def test_comparison_has_a_section_for_each_question(question: str) -> None:
    """The section that the README links to has the result of each framework."""
    page = (ROOT / "docs/comparison.rst").read_text()
    section = re.split(r"\n(?=.+\n-{3,}\n)", page.partition(f"\n{question}\n-")[2])[0]
    answers = re.findall(r"^:([\w ]+): ((?:.|\n {4})+)", section, re.M)
    seen = {name: re.sub(r"\s+", " ", answer) for name, answer in answers}
    assert seen == {name: cells[question] for name, cells in EXPECTED.items()}


def anchors(path: str) -> set[str]:
    """The anchors that GitHub derives from the titles of a page."""
    titles = re.findall(r"^(\S.*)\n[-=~]{3,}$", (ROOT / path).read_text(), re.M)
    return {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles}


def test_readme_links_to_sections_that_exist() -> None:
    """If a title changes, its links must change too."""
    assert "a-failure-half-way" in anchors("docs/comparison.rst")
    for path, anchor in re.findall(r"\](?:\(|: )([\w/]+\.rst)#([\w-]+)", README):
        assert anchor in anchors(path)


@pytest.mark.parametrize(
    "path",
    [
        *(".ci/run", ".ci/matrix", ".ci/mariadb", ".ci/browser"),
        *(".ci/pgbouncer", ".ci/proxies", ".ci/network", ".ci/newcomer"),
    ],
)
def test_command_of_contributors_exists(path: str) -> None:
    """The page for contributors names a file that is executable."""
    assert path in commands(CONTRIBUTING)
    assert (ROOT / path).stat().st_mode & 0o111


def test_ci_runs_the_checks_of_contributors() -> None:
    """The page for contributors and ``.ci/run`` have the same commands."""
    shown = commands(CONTRIBUTING)
    first, last = shown.index("ruff format --check ."), shown.index(".ci/run")
    run = (ROOT / ".ci/run").read_text().splitlines()
    assert set(shown[first:last]) <= set(run)
    building = shown.index("python -m build")
    assert shown[building - 1] == "rm -rf dist"
    checks = shown[building : shown.index("check-manifest") + 1]
    assert len(checks) == 4
    assert {*checks} <= {line.strip() for line in run}
    assert run[-1] in shown[first:last]  # pytest, whose summary comes last
