"""``limit_by=``: a limit for each user, each address, or each result of a function."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tg import TGController, expose
from tg.configuration.auth import TGAuthMetadata

from tests.conftest import MakeApp
from tests.wsgi import Call, get
from tgstream import CSV, NDJSON, SSE, Report, Stream, stream
from tgstream.core import limits


def words() -> Iterator[str]:
    yield "one"
    yield "two"


def make_root(ran: list[str] | None = None, **options: Any) -> TGController:
    """A root with a decorated controller, and one that returns a ``Stream``."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(**options)
        def decorated(self, **_: str) -> Any:
            if ran is not None:
                ran.append("decorated")
            return words()

        @expose(content_type="text/plain")
        def returned(self, **_: str) -> Stream:
            return Stream(words(), **options)

    return Root()


def name_of(request: Any) -> str | None:
    name: str | None = request.params.get("name")
    return name


PATHS = pytest.mark.parametrize("path", ["/decorated", "/returned"])


@PATHS
def test_function_gives_each_of_its_results_a_limit(
    make_app: MakeApp, path: str
) -> None:
    """A user who has reached the limit does not take the slots of others."""
    app = make_app(make_root(limit=2, limit_by=name_of))
    calls = [Call(app, f"{path}?name=ada") for _ in range(2)]
    assert get(app, f"{path}?name=ada").status_int == 503
    others = [Call(app, f"{path}?name=bob"), Call(app, path)]  # None is a key, too
    assert [call.read() for call in calls + others] == [b"onetwo"] * 4
    assert get(app, f"{path}?name=ada").text == "onetwo"


@PATHS
def test_address_has_its_own_limit(make_app: MakeApp, path: str) -> None:
    """It is the REMOTE_ADDR of the server."""
    app = make_app(make_root(limit=1, limit_by="remote_addr"))
    call = Call(app, path, REMOTE_ADDR="10.0.0.1")
    assert get(app, path, REMOTE_ADDR="10.0.0.1").status_int == 503
    assert get(app, path, REMOTE_ADDR="10.0.0.2").text == "onetwo"
    call.close()


class Metadata(TGAuthMetadata):
    """Users without groups."""

    authenticate = None

    def get_user(self, identity: Any, userid: str) -> Any:
        return userid

    def get_groups(self, identity: Any, userid: str) -> list[str]:
        return []

    def get_permissions(self, identity: Any, userid: str) -> list[str]:
        return []


@PATHS
@pytest.mark.parametrize("who", [True, False])
def test_user_has_a_limit_at_all_addresses(
    make_app: MakeApp, path: str, who: bool
) -> None:
    """Users are those of repoze.who, or of a server that logs them in itself.

    Requests without a user are counted by their address, also if a user has its name.
    """
    options: dict[str, Any] = {}
    if who:
        options = {
            "sa_auth__enabled": True,
            "sa_auth__authmetadata": Metadata(),
            "skip_authentication": True,
        }
    app = make_app(make_root(limit=1, limit_by="user"), **options)

    def status(user: str, address: str) -> int:
        environ = {"REMOTE_USER": user} if user else {}
        return get(app, path, REMOTE_ADDR=address, **environ).status_int

    call = Call(app, path, REMOTE_USER="ada", REMOTE_ADDR="10.0.0.1")
    assert status("ada", "10.0.0.2") == 503
    assert status("10.0.0.1", "10.0.0.1") == status("", "10.0.0.1") == 200
    anonymous = Call(app, path, REMOTE_ADDR="10.0.0.1")
    assert status("", "10.0.0.1") == 503
    assert status("", "10.0.0.2") == status("10.0.0.1", "10.0.0.3") == 200
    call.close()
    anonymous.close()
    assert status("ada", "10.0.0.2") == 200


@PATHS
def test_invalid_key_is_an_error_before_anything_runs(
    make_app: MakeApp, path: str
) -> None:
    """The message names the controller, the value and its type."""
    ran: list[str] = []
    root = make_root(ran, limit=1, limit_by=lambda request: ["ada"])
    app = make_app(root, trace_errors__enable=False)
    with pytest.raises(TypeError, match=r"Root\.\w+: limit_by must return a hashable"):
        Call(app, path, checked=False)
    assert ran == []


@PATHS
def test_error_of_the_function_takes_no_slot(make_app: MakeApp, path: str) -> None:
    """Its error is an ordinary error of the request."""
    root = make_root(limit=1, limit_by=lambda request: request.params["name"])
    app = make_app(root)
    assert get(app, path).status_int == 500
    assert get(app, f"{path}?name=ada").text == "onetwo"
    assert count_groups(root, path) == 0


def count_groups(root: TGController, path: str) -> int:
    """The number of keys that are kept for a controller."""
    return len(limits._groups.get(getattr(type(root), path[1:]), ()))


@PATHS
@pytest.mark.parametrize("action", ["refuse", "replace"])
def test_key_is_forgotten_with_its_last_stream(
    make_app: MakeApp, path: str, action: str
) -> None:
    """The memory does not grow with the number of users that disconnect."""
    root = make_root(limit=2, limit_by=name_of, limit_action=action)
    app = make_app(root)
    for number in range(50):
        assert get(app, f"{path}?name={number}").text == "onetwo"
    calls = [Call(app, f"{path}?name={number % 3}") for number in range(6)]
    assert count_groups(root, path) == 3
    for call in calls:
        call.close()
    assert count_groups(root, path) == 0


def test_decorator_and_stream_may_share_the_options(make_app: MakeApp) -> None:
    """The decorator has the limit, and the stream has its key."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream(limit=1)
        def shared(self, name: str) -> Stream:
            return Stream(words(), limit_by=lambda request: name)

    app = make_app(Root())
    call = Call(app, "/shared?name=ada")
    assert get(app, "/shared?name=ada").status_int == 503
    assert get(app, "/shared?name=bob").text == "onetwo"
    assert call.read() == b"onetwo"
    assert get(app, "/shared?name=ada").text == "onetwo"


# Options that cannot be used.


@pytest.mark.parametrize(
    "option",
    [{"limit_by": "user"}, {"limit_action": "replace"}, {"busy": "retry"}],
)
def test_option_of_a_limit_without_limit_is_rejected(
    make_app: MakeApp, option: dict[str, Any]
) -> None:
    """At decoration, and when a ``Stream`` starts: its decorator may have the limit."""
    [name] = option
    message = rf"{name}='\w+' needs limit, the number of open streams"
    with pytest.raises(ValueError, match=rf"^@stream on [\w.<>]+: {message}"):
        stream(SSE, **option)(lambda: None)

    class Root(TGController):
        @expose()
        def returned(self) -> Stream:
            return Stream(words(), SSE, **option)

    app = make_app(Root(), trace_errors__enable=False)
    with pytest.raises(ValueError, match=rf"^Root.returned: {message}"):
        Call(app, "/returned", checked=False)


@pytest.mark.parametrize("format", [None, CSV, [SSE, NDJSON]])
def test_busy_without_events_is_rejected(make_app: MakeApp, format: Any) -> None:
    """Only clients of events try again after a response without an event."""
    got = "no format" if format is None else "CSV|NDJSON"
    message = rf"busy='retry' is for clients of events, .* such as SSE, got ({got})\."
    with pytest.raises(ValueError, match=message):
        stream(format, limit=1, busy="retry")(lambda: None)
    if isinstance(format, list):
        return

    class Root(TGController):
        @expose()
        def returned(self) -> Stream:
            return Stream(words(), format, limit=1, busy="retry")

    app = make_app(Root(), trace_errors__enable=False)
    with pytest.raises(ValueError, match=message):
        Call(app, "/returned", checked=False)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("limit_by", "ip"),
        ("limit_by", 5),
        ("limit_action", "kill"),
        ("busy", True),
        ("busy", "wait"),
    ],
)
def test_invalid_option_of_a_limit_is_rejected(option: str, value: Any) -> None:
    """The error is raised at decoration, and names the values that can be used."""
    options: Any = {"limit": 1, option: value}
    with pytest.raises(ValueError, match=rf"{option} must be .*, got {value!r}"):
        stream(SSE, **options)(lambda: None)


@pytest.mark.parametrize("action", ["refuse", "replace"])
def test_limit_holds_for_requests_at_once(
    make_app: MakeApp, reports: list[Report], action: str
) -> None:
    """Of many threads, as many have a stream at the end as there are slots."""
    app = make_app(
        make_root(format=SSE, limit=3, limit_by=name_of, limit_action=action)
    )
    together = threading.Barrier(20, timeout=20)

    def request(number: int) -> int:
        together.wait()
        call = Call(app, f"/decorated?name={number % 2}")
        together.wait()
        call.read()
        return call.status_int

    with ThreadPoolExecutor(20) as threads:
        for _ in range(5):
            statuses = [*threads.map(request, range(20))]
            ended = Counter(report.reason for report in reports)
            reports.clear()
            if action == "refuse":
                assert Counter(statuses) == {200: 6, 503: 14}
                assert ended == {"completed": 6}
            else:
                assert statuses == [200] * 20
                assert ended == {"completed": 6, "replaced": 14}
