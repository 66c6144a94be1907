"""Channels with ``database://`` through PgBouncer in transaction mode."""

from __future__ import annotations

import time

import pytest
import tg
from tg import TGController

from tests.conftest import MakeApp
from tests.live.listeners import id_of, receive
from tests.model import Model
from tests.pgbouncer.conftest import PgBouncer
from tests.pgbouncer.test_pgbouncer import AS_DOCUMENTED
from tgstream import Channel
from tgstream.channels import metadata
from tgstream.doctor.settings_checks import check_settings
from tgstream.live.backends.database_tables import create_tables


@pytest.mark.parametrize("is_direct", [False, True])
def test_events_arrive_through_a_pooler(
    make_app: MakeApp,
    model: Model,
    pgbouncer: PgBouncer,
    postgresql: str,
    is_direct: bool,
) -> None:
    """With a direct connection by notification, and otherwise by polling."""
    metadata.drop_all(model.outside)
    create_tables(model.outside)
    options = {"tgstream__channel_poll_seconds": 10.0 if is_direct else 0.05}
    if is_direct:
        options["tgstream__channel_listen_url"] = postgresql  # type: ignore[assignment]
    make_app(
        TGController(),
        model,
        sqlalchemy__url=pgbouncer.url,
        tgstream__channels="database://",
        **options,
        **AS_DOCUMENTED,
    )
    events = Channel("pooled").listen()
    start = id_of(next(events))
    before = time.perf_counter()
    for number in range(20):
        Channel("pooled").publish(str(number))
        assert receive(events, 1) == [str(number)]
    assert time.perf_counter() - before < 9
    resumed = Channel("pooled").listen(after=start)
    assert receive(resumed, 3) == ["open", "0", "1"]
    [finding] = [each for each in check_settings(tg.config) if each.check == "channels"]
    assert finding.mark == ("ok" if is_direct else "warn")
