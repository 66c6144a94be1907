"""A listener whose permission is withdrawn receives no other event."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tg import TGController, expose, predicates, require

from tests.authentication import REVOKE, add_users, auth_options, cookie_of
from tests.conftest import MakeApp, assert_clean
from tests.model import MakeModel, Model
from tests.valkey import Valkey
from tests.wsgi import Call, get
from tgstream import SSE, Channel, Event, Report, last_event_id, stream
from tgstream.channels import metadata
from tgstream.live.backends.database_tables import create_tables


@pytest.fixture(params=["memory", "redis", "database-sqlite", "database-postgresql"])
def backend(
    request: pytest.FixtureRequest, make_model: MakeModel, tmp_path: Path
) -> Iterator[tuple[str, Model]]:
    """The URL of a store of channels, and a model with the user ``ada``."""
    kind, _, engine = request.param.partition("-")
    url = f"sqlite:///{tmp_path}/test.db"
    if engine == "postgresql":
        url = request.getfixturevalue("postgresql")
    model = make_model(url)
    add_users(model)
    model.execute("INSERT INTO notes (text, user_id) VALUES ('staff', 2)")
    if kind == "database":
        metadata.drop_all(model.outside)
        create_tables(model.outside)
        yield "database://", model
    elif kind == "redis":
        with Valkey(tmp_path / "valkey") as server:
            yield server.url, model
    else:
        yield "memory://", model


class Feed(TGController):
    """A feed for members of ``staff``, and a page that publishes."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        for method in Feed.feed, Feed.post:  # TG forgets it between tests
            expose()(method)

    @require(predicates.in_group("staff"))
    @stream(SSE, recheck_seconds=1e-9)
    def feed(self) -> Iterator[Event]:
        return self.channel.listen(after=last_event_id())

    def post(self, text: str) -> str:
        self.channel.publish(text)
        return ""


def next_data(call: Call) -> bytes:
    """The data of the next event that is not a heartbeat."""
    while (chunk := next(call)) == b":\n\n":
        pass
    [line] = [line for line in chunk.splitlines() if line.startswith(b"data:")]
    return line[6:]


def test_listener_without_permission_receives_no_event(
    make_app: MakeApp,
    channel: Channel,
    backend: tuple[str, Model],
    reports: list[Report],
) -> None:
    """Others do. The client that reconnects is refused."""
    url, model = backend
    app = make_app(
        Feed(channel),
        model,
        **auth_options(model),
        tgstream__channels=url,
        tgstream__heartbeat_seconds=0.05,
    )
    calls = [Call(app, "/feed", HTTP_COOKIE=cookie_of(user)) for user in ("ada", "bob")]
    for call in calls:
        assert next(call).startswith(b": open\n")
    get(app, "/post?text=first")
    assert [next_data(call) for call in calls] == [b"first", b"first"]
    model.execute(f"{REVOKE} WHERE user_id = 1")
    get(app, "/post?text=second")
    ada, bob = calls
    assert ada.read() == b""
    assert next_data(bob) == b"second"
    model.execute(REVOKE)
    assert bob.read() == b""  # at a heartbeat
    assert [report.reason for report in reports] == ["refused", "refused"]
    assert get(app, "/feed", HTTP_COOKIE=cookie_of("ada")).status_int == 403
    assert_clean(model)
