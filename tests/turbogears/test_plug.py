"""The options of an application, and how tgstream is plugged into it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tg
from tg import (
    AppConfig,
    FullStackApplicationConfigurator,
    MinimalApplicationConfigurator,
    TGController,
    expose,
)
from tgext.pluggable import plug

from tests.conftest import MakeApp
from tests.wsgi import Call, get
from tgstream import plugme, stream
from tgstream.core.settings import OPTIONS, option


class Lines:
    """A row format, which has no chunk size of its own."""

    content_type = "text/plain"

    def encode(self, items: Any) -> Iterator[str]:
        yield from items


def root() -> TGController:
    class Root(TGController):
        @expose()
        @stream(Lines)
        def lines(self) -> Any:
            return ["abc"] * 4

    return Root()


def chunks(app: Any) -> list[bytes]:
    call = Call(app, "/lines")
    body = list(call)
    call.close()
    return body


def test_plugme_returns_its_appid_and_may_come_twice() -> None:
    """tgext.pluggable wants the appid; an application may plug it by hand as well."""
    configurator = FullStackApplicationConfigurator()
    assert plugme(configurator) == {"appid": "tgstream"}
    assert plugme(configurator, {"appid": None}) == {"appid": "tgstream"}
    assert configurator.get_blueprint_value("tgstream.chunk_size") == 32768


def test_option_that_is_none_is_told_of(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """In an .ini file it is misspelt where nobody can refuse it, but in the log."""
    make_app(root(), plug=plugme, tgstream__chunksize="1", tgstream__chunk_size="2")
    [record] = [each for each in caplog.records if each.name == "tgstream"]
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(
        "tgstream has no option tgstream.chunksize; its options are tgstream.channel_"
    )


def test_application_with_an_option_that_cannot_be_read_is_not_made(
    make_app: MakeApp,
) -> None:
    """And the error names the option."""
    match = r"^the option tgstream.chunk_size is 'big', which cannot be read: "
    with pytest.raises(ValueError, match=match):
        make_app(root(), plug=plugme, tgstream__chunk_size="big")


def test_plugme_refuses_an_option_that_is_none() -> None:
    """A misspelt option is named, with those that are."""
    with pytest.raises(ValueError, match=r"no option tgstream.chunksize; .*chunk_size"):
        plugme(FullStackApplicationConfigurator(), {"chunksize": 1})


def test_plugme_sets_the_defaults_of_the_application(make_app: MakeApp) -> None:
    """An option given to plugme is what streams of the application do."""
    app = make_app(root(), plug=lambda config: plugme(config, {"chunk_size": 6}))
    assert chunks(app) == [b"abcabc", b"abcabc"]


def test_plug_of_tgext_pluggable_does_the_same(make_app: MakeApp) -> None:
    """``plug(base_config, 'tgstream', chunk_size=6)`` is one line in app_cfg.py."""
    app = make_app(root(), plug=lambda c: plug(c, "tgstream", chunk_size=6))
    assert chunks(app) == [b"abcabc", b"abcabc"]


def test_ini_file_wins_over_plugme(make_app: MakeApp) -> None:
    """The deployment's text is read as what the option is."""
    base_config = MinimalApplicationConfigurator()
    base_config.update_blueprint({"root_controller": root(), "renderers": []})
    plugme(base_config, {"chunk_size": 6})
    app = base_config.make_wsgi_app({}, {"tgstream.chunk_size": "9"})
    assert tg.config["tgstream.chunk_size"] == 9
    assert chunks(app) == [b"abcabcabc", b"abc"]


def test_application_without_plugme_has_the_defaults(make_app: MakeApp) -> None:
    """An import is enough; options in the configuration count all the same."""
    app = make_app(root(), plug=lambda config: None)
    assert chunks(app) == [b"abcabcabcabc"]
    app = make_app(root(), plug=lambda config: None, tgstream__chunk_size="6")
    assert chunks(app) == [b"abcabc", b"abcabc"]


def test_option_that_cannot_be_read_is_named(make_app: MakeApp) -> None:
    """The message names the option, its value, and the default."""
    with pytest.raises(ValueError, match=r"tgstream.chunk_seconds is 'soon'.*0\.05"):
        option({"tgstream.chunk_seconds": "soon"}, "tgstream.chunk_seconds")
    with pytest.raises(ValueError, match="'many'"):
        make_app(root(), tgstream__chunk_size="many")


NUMBERS = [name for name, row in OPTIONS.items() if type(row.default) in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["-4", "nan"])
def test_number_out_of_range_is_named(name: str, value: str) -> None:
    """No size and no time is negative, and ``nan`` would be taken for one."""
    with pytest.raises(ValueError, match=rf"option {name} is '{value}'"):
        option({name: value}, name)


def test_old_app_config_may_be_plugged(make_app: MakeApp) -> None:
    """What applications had before TurboGears 2.4 is a shell around a configurator."""
    with pytest.warns(DeprecationWarning, match="AppConfig"):
        base_config = AppConfig(minimal=True, root_controller=root())
        plugme(base_config, {"chunk_size": 6})
        app = base_config.make_wsgi_app()
    assert chunks(app) == [b"abcabc", b"abcabc"]


def test_option_defaults_are_of_their_kind() -> None:
    """What the table says is what an application without the option gets."""
    for name, row in OPTIONS.items():
        assert option({}, name) == row.coerce(row.default)


@pytest.mark.parametrize("name", ["nosuchmodule.DBSession", "tg.nosuch", "x"])
def test_sessions_option_names_what_cannot_be_found(
    make_app: MakeApp, name: str
) -> None:
    """A dotted name that leads nowhere is an error in the request, not silence."""
    app = make_app(root(), tgstream__sessions=name, trace_errors__enable=False)
    with pytest.raises(ValueError, match=f"tgstream.sessions names {name}"):
        get(app, "/lines")


@pytest.mark.parametrize("value", ["tg.config", 7])
def test_sessions_option_refuses_what_is_no_scoped_session(
    make_app: MakeApp, value: Any
) -> None:
    """What is found and is something else is told so."""
    app = make_app(root(), tgstream__sessions=value, trace_errors__enable=False)
    with pytest.raises(ValueError, match="is not a scoped_session"):
        get(app, "/lines")
