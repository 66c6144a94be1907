"""``plugme``, and the options of an application."""

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
from tests.wsgi import get, get_chunks
from tgstream import plugme, stream
from tgstream.core.settings import OPTIONS, read_option


class Lines:
    """A format without a chunk size."""

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


def test_plugme_returns_its_appid_and_can_be_called_twice() -> None:
    """tgext.pluggable needs the appid, and an application may also call it itself."""
    configurator = FullStackApplicationConfigurator()
    assert plugme(configurator) == {"appid": "tgstream"}
    assert plugme(configurator, {"appid": None}) == {"appid": "tgstream"}
    assert configurator.get_blueprint_value("tgstream.chunk_size") == 32768


def test_unknown_option_of_an_ini_file_is_logged(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """The application starts, and the warning names the options there are."""
    make_app(root(), plug=plugme, tgstream__chunksize="1", tgstream__chunk_size="2")
    [record] = [line for line in caplog.records if line.name == "tgstream"]
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(
        "tgstream has no option tgstream.chunksize. Its options are tgstream.channel_"
    )


def test_application_with_an_invalid_option_does_not_start(make_app: MakeApp) -> None:
    """The error names the option, the value and the reason."""
    match = r"^the option tgstream.chunk_size has an invalid value, 'big': Bad integer"
    with pytest.raises(ValueError, match=match):
        make_app(root(), plug=plugme, tgstream__chunk_size="big")


def test_plugme_rejects_an_unknown_option() -> None:
    """The error names it, and the options there are."""
    with pytest.raises(ValueError, match=r"no option tgstream.chunksize. .*chunk_size"):
        plugme(FullStackApplicationConfigurator(), {"chunksize": 1})


def test_plugme_sets_the_defaults_of_the_application(make_app: MakeApp) -> None:
    """Streams of the application use the options that plugme was called with."""
    app = make_app(root(), plug=lambda config: plugme(config, {"chunk_size": 6}))
    assert get_chunks(app, "/lines") == [b"abcabc", b"abcabc"]


def test_plug_of_tgext_pluggable_calls_plugme(make_app: MakeApp) -> None:
    """``plug(base_config, 'tgstream', chunk_size=6)`` is one line in app_cfg.py."""
    app = make_app(root(), plug=lambda c: plug(c, "tgstream", chunk_size=6))
    assert get_chunks(app, "/lines") == [b"abcabc", b"abcabc"]


def test_ini_file_overrides_plugme(make_app: MakeApp) -> None:
    """The text of the file is converted to the type of the option."""
    base_config = MinimalApplicationConfigurator()
    base_config.update_blueprint({"root_controller": root(), "renderers": []})
    plugme(base_config, {"chunk_size": 6})
    app = base_config.make_wsgi_app({}, {"tgstream.chunk_size": "9"})
    assert tg.config["tgstream.chunk_size"] == 9
    assert get_chunks(app, "/lines") == [b"abcabcabc", b"abc"]


def test_application_without_plugme_has_the_defaults(make_app: MakeApp) -> None:
    """An import is enough, and options in the configuration are used all the same."""
    app = make_app(root(), plug=lambda config: None)
    assert get_chunks(app, "/lines") == [b"abcabcabcabc"]
    app = make_app(root(), plug=lambda config: None, tgstream__chunk_size="6")
    assert get_chunks(app, "/lines") == [b"abcabc", b"abcabc"]


def test_invalid_option_is_named(make_app: MakeApp) -> None:
    """The message names the option, its value, and the default."""
    match = r"tgstream.flush_seconds has an invalid value, 'soon': .*default, 0\.05"
    with pytest.raises(ValueError, match=match):
        read_option({"tgstream.flush_seconds": "soon"}, "tgstream.flush_seconds")
    with pytest.raises(ValueError, match="'many'"):
        make_app(root(), tgstream__chunk_size="many")


NUMBERS = [
    name for name, option in OPTIONS.items() if type(option.default) in (int, float)
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["-4", "nan"])
def test_option_out_of_range_is_rejected(name: str, value: str) -> None:
    """A negative number is not a size or a time, and ``nan`` is not a number."""
    with pytest.raises(ValueError, match=rf"option {name} has an .* '{value}': "):
        read_option({name: value}, name)


@pytest.mark.parametrize("name", NUMBERS)
def test_zero_is_a_size_or_a_duration_but_not_an_interval(name: str) -> None:
    """A check or a heartbeat every 0 seconds would never pause."""
    allows_zero = {
        "tgstream.chunk_size",
        "tgstream.flush_seconds",
        "tgstream.idle_transaction_seconds",
        "tgstream.spool_max_bytes",
    }
    if name in allows_zero:
        assert read_option({name: "0"}, name) == 0
    else:
        with pytest.raises(ValueError, match="a finite number > 0"):
            read_option({name: "0"}, name)


def test_plugme_accepts_an_app_config(make_app: MakeApp) -> None:
    """Applications from before TurboGears 2.4 have one. It wraps a configurator."""
    with pytest.warns(DeprecationWarning, match="AppConfig"):
        base_config = AppConfig(minimal=True, root_controller=root())
        plugme(base_config, {"chunk_size": 6})
        app = base_config.make_wsgi_app()
    assert get_chunks(app, "/lines") == [b"abcabc", b"abcabc"]


def test_option_defaults_have_the_type_of_the_option() -> None:
    """An application without the option gets the default of the table."""
    for name, option in OPTIONS.items():
        assert read_option({}, name) == option.convert(option.default)


@pytest.mark.parametrize("name", ["nosuchmodule.DBSession", "tg.nosuch", "x"])
def test_sessions_option_that_cannot_be_imported_is_named(
    make_app: MakeApp, name: str
) -> None:
    """A dotted name that does not exist is an error in the request."""
    app = make_app(root(), tgstream__sessions=name, trace_errors__enable=False)
    with pytest.raises(ValueError, match=f"tgstream.sessions names {name}"):
        get(app, "/lines")


@pytest.mark.parametrize("value", ["tg.config", 7])
def test_sessions_option_that_is_not_a_scoped_session_is_rejected(
    make_app: MakeApp, value: Any
) -> None:
    """An object of any other type is an error in the request."""
    app = make_app(root(), tgstream__sessions=value, trace_errors__enable=False)
    with pytest.raises(ValueError, match="is not a scoped_session"):
        get(app, "/lines")
