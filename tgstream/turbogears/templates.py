"""``render``: a page of the application's own templates, sent while it is made.

Rule: what a page is, TG decides: its template, its variables, its doctype. Here it is
only taken piece by piece where TG would join it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import tg
from tg.render import MissingRendererError, _get_tg_vars

from ..core import context as _context
from ..core.cleanup import close, first_error
from ..core.errors import StreamError
from ..core.settings import read_option


def render(template: str, /, **variables: Any) -> Iterator[str]:
    """The page that TG makes of a template, in the pieces in which it is made.

    Return it from a controller under ``@stream``, or in a :class:`Stream`; nothing is
    rendered before its first piece is asked for. What a template asks for late, because
    it loops over a generator or calls a function, does not hold up what stands above
    it. Do not use a generator that is among the variables again: it is closed with the
    page.

    Kajiki, Jinja2 and Genshi give pieces. Mako and other renderers, and a page with
    ``tg_cache``, come whole, as one.

    :param template: its name as ``@expose`` takes it, with or without ``engine:``.
    :param variables: what the template sees beside TG's own variables.
    :returns: an iterator of text.
    :raises StreamError: outside of a request.
    :raises TypeError: when ``template`` is no text.
    :raises tg.render.MissingRendererError: when the application has no such renderer.
    """
    if not isinstance(template, str):
        raise TypeError(
            f"render({template!r}): a template is named by a str, as in @expose; "
            "write render('myapp.templates.users', users=...)"
        )
    try:
        tg_locals = _context.current()
    except TypeError:
        raise StreamError(
            f"render({template!r}) was called outside of a request, where TG has no "
            "variables for a template; call it in a controller or in its generator"
        ) from None
    engine, name = _named(template, tg_locals.config)
    renderer = tg_locals.config["render_functions"].get(engine)
    if renderer is None:
        raise MissingRendererError(engine)
    pieces = _pieces(renderer, engine, name, variables)
    page = _with_flash(_with_content_type(pieces, tg_locals), tg_locals)
    return _closing(_gathered(page, tg_locals.config), variables.values())


def _named(template: str, config: Any) -> tuple[str, str]:
    """The engine and the name of a template, told apart as ``@expose`` does."""
    if template in config.get("renderers", ()):
        return template, ""
    engine, colon, name = template.partition(":")
    return (engine, name) if colon else (config["default_renderer"], template)


def _pieces(
    renderer: Any, engine: str, name: str, variables: dict[str, Any]
) -> Iterator[str]:
    """What ``tg.render_template`` does, in its order, without joining the text."""
    way = _WAYS.get(getattr(type(renderer).__call__, "__module__", ""))
    if way is None or variables.get("tg_cache"):
        yield tg.render_template(variables, engine, name)
        return
    options: dict[str, Any] = dict.fromkeys(_CACHING)
    told = (engine, name, variables, options)
    tg.hooks.notify("before_render_call", told)
    namespace = _get_tg_vars()
    namespace.update(variables)
    params = {key: options[key] for key in options if key not in _CACHING}
    yield from way(renderer, name, namespace, params)
    options["result"] = ""  # what has left cannot be changed
    tg.hooks.notify("after_render_call", told)


_CACHING = ("cache_key", "cache_expire", "cache_type")


# How TG's renderers make a text, up to where they would join it.


def _kajiki(renderer: Any, name: str, namespace: Any, params: Any) -> Iterable[str]:
    pieces: Iterable[str] = renderer.loader.load(name, **params)(namespace)
    return pieces


def _jinja(renderer: Any, name: str, namespace: Any, params: Any) -> Iterable[str]:
    pieces: Iterable[str] = renderer.jinja2_env.get_template(name).generate(**namespace)
    return pieces


def _genshi(renderer: Any, name: str, namespace: Any, params: Any) -> Iterable[str]:
    """The method and the doctype are found by TG's renderer, given a :class:`_Kept`."""
    kept: list[_Kept] = []

    def load(name: str) -> _Kept:
        kept.append(_Kept(renderer.load_template(name)))
        return kept[0]

    keeping = copy.copy(renderer)
    keeping.load_template = load
    keeping(name, namespace, **params)
    return kept[0].pieces


class _Kept:
    """A Genshi template that, asked for its text, keeps the pieces instead."""

    pieces: Iterable[str] = ()

    def __init__(self, template: Any) -> None:
        self._template = template

    def generate(self, **namespace: Any) -> _Kept:
        self._stream = self._template.generate(**namespace)
        return self

    def render(self, encoding: None, **options: Any) -> str:
        self.pieces = self._stream.serialize(**options)
        return ""


# By the module that says how a renderer is called: to those who say it otherwise, or
# in a class of their own, TG's way may be wrong.
_WAYS: dict[str, Callable[..., Iterable[str]]] = {
    "tg.renderers.kajiki": _kajiki,
    "tg.renderers.jinja": _jinja,
    "tg.renderers.genshi": _genshi,
}


# What an ordinary page has before it is rendered, and after.


def _with_content_type(pieces: Iterator[str], tg_locals: Any) -> Iterator[str]:
    """``pieces``, made as if the content type were there that TG sets afterwards.

    Templates and renderers look at it, and at the charset in it. It does not stay:
    what is rendered here may be a mail, and the stream a CSV.
    """
    response = tg_locals.response
    while response.content_type is None:
        assumed = _content_type(tg_locals)
        response.headers["Content-Type"] = assumed
        try:
            piece = next(pieces, None)
        finally:
            if response.headers.get("Content-Type") == assumed:
                del response.headers["Content-Type"]
        if piece is None:
            return
        yield piece
    yield from pieces


def _content_type(tg_locals: Any) -> str:
    """What TG will set, by what the controller is exposed with."""
    decoration = tg_locals.request.dispatch_state.action.decoration
    name: str = decoration.lookup_template_engine(tg_locals)[0]
    textual = name.startswith(("text/", "application/xhtml+xml", "application/xml"))
    return f"{name}; charset=utf-8" if textual and "charset" not in name else name


def _with_flash(pieces: Iterator[str], tg_locals: Any) -> Iterator[str]:
    """``pieces``, the first of them up to where a ``flash()`` message is shown.

    Only headers can delete its cookie, and they leave with the first piece. A template
    that shows none holds its page up by a chunk, and only while a message waits.
    """
    request, headers = tg_locals.request, tg_locals.response.headers
    if tg.flash.cookie_name in request.cookies or "webflash.payload" in request.environ:
        size = read_option(tg_locals.config, "tgstream.chunk_size")
        cookies = headers.getall("Set-Cookie")
        head: list[str] = []
        for piece in pieces:
            head.append(piece)
            size -= len(piece)
            if size <= 0 or headers.getall("Set-Cookie") != cookies:
                break
        yield "".join(head)
    yield from pieces


_ALONE = 256
"""Pieces in a row, none of them waited for, after which they are gathered."""


def _gathered(pieces: Iterable[str], config: Any) -> Iterator[str]:
    """``pieces``, alone until they have come fast for long, then gathered.

    A template yields two pieces a table cell, and none of them tells that a query is to
    come. So the head, and a page that is made slowly, leave piece by piece.
    """
    size = read_option(config, "tgstream.chunk_size")
    seconds = read_option(config, "tgstream.flush_seconds")
    clock = time.perf_counter
    gathered: list[str] = []
    length = fast = 0
    start = last = clock()
    for piece in pieces:
        if not piece:
            continue
        gathered.append(piece)
        length += len(piece)
        now = clock()
        fast = fast + 1 if now - last < seconds else 0
        last = now
        if fast < _ALONE or length >= size or now - start >= seconds:
            yield "".join(gathered)
            gathered.clear()
            length, start = 0, clock()
            last = start
    if gathered:
        yield "".join(gathered)


def _closing(pieces: Iterator[str], variables: Iterable[Any]) -> Iterator[str]:
    """``pieces``, and at the end, however it comes, the iterators among ``variables``.

    A Kajiki template is a reference cycle, so that they would wait for the collector.
    """
    lazy = [value for value in variables if isinstance(value, Iterator)]
    closes = [partial(close, value) for value in lazy]
    try:
        yield from pieces
    except GeneratorExit:
        pass  # no error: only what the closing raises is
    except BaseException:
        first_error(closes)
        raise
    error = first_error(closes)
    if error is not None:
        raise error
