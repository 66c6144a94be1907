"""``render``: sends a page of the application's own templates while it is rendered.

TG decides everything about a page: its template, its variables, its doctype. This
module calls the template engines as TG's renderers do, but takes the text of a page
part by part, where a renderer would join the parts.
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
from ..core.cleanup import close, run_all
from ..core.errors import StreamError
from ..core.settings import read_option


def render(template: str, /, **variables: Any) -> Iterator[str]:
    """Render a template as TG does, and yield the page in parts.

    Return it from a controller with ``@stream``, or in a :class:`Stream`. Rendering
    starts when the first part is requested. If the template loops over a generator or
    calls a slow function, the part of the page above it is sent first. Do not use a
    generator that is among the variables again: it is closed with the page.

    Kajiki, Jinja2 and Genshi yield parts. Mako and other renderers, and pages with
    ``tg_cache``, yield the whole page as one part.

    :param template: its name as in ``@expose``, with or without ``engine:``.
    :param variables: the variables of the template, in addition to TG's own.
    :returns: an iterator of text.
    :raises StreamError: when it is called outside of a request.
    :raises TypeError: when ``template`` is not a ``str``.
    :raises tg.render.MissingRendererError: when the application has no such renderer.
    """
    if not isinstance(template, str):
        raise TypeError(
            "render() needs the name of a template as a str, such as "
            "render('myapp.templates.users', users=...), got "
            f"{type(template).__name__}: {template!r:.80}"
        )
    try:
        tg_locals = _context.current()
    except TypeError:
        raise StreamError(
            f"render({template!r}) was called outside of a request, where TG has no "
            "variables for a template. Call it in a controller or in its generator"
        ) from None
    engine, name = _split_name(template, tg_locals.config)
    renderer = tg_locals.config["render_functions"].get(engine)
    if renderer is None:
        raise MissingRendererError(engine)
    parts = _render_parts(renderer, engine, name, variables)
    parts = _assume_content_type(parts, tg_locals)
    parts = _join_until_flash(parts, tg_locals)
    parts = _buffer(parts, tg_locals.config)
    return _close_iterators(parts, variables.values())


def _split_name(template: str, config: Any) -> tuple[str, str]:
    """The engine and the name of a template, as ``@expose`` splits them."""
    if template in config.get("renderers", ()):
        return template, ""
    engine, colon, name = template.partition(":")
    return (engine, name) if colon else (config["default_renderer"], template)


def _render_parts(
    renderer: Any, engine: str, name: str, variables: dict[str, Any]
) -> Iterator[str]:
    """Do what ``tg.render_template`` does, in its order, but do not join the text."""
    generate = _GENERATE.get(getattr(type(renderer).__call__, "__module__", ""))
    if generate is None or variables.get("tg_cache"):
        yield tg.render_template(variables, engine, name)
        return
    options: dict[str, Any] = dict.fromkeys(_CACHE_OPTIONS)
    hook_arguments = (engine, name, variables, options)
    tg.hooks.notify("before_render_call", hook_arguments)
    namespace = _get_tg_vars()
    namespace.update(variables)
    params = {key: options[key] for key in options if key not in _CACHE_OPTIONS}
    yield from generate(renderer, name, namespace, params)
    options["result"] = ""  # the page has been sent, so that a hook cannot change it
    tg.hooks.notify("after_render_call", hook_arguments)


_CACHE_OPTIONS = ("cache_key", "cache_expire", "cache_type")


# TG's renderers, up to where they would join the text.


def _generate_kajiki(
    renderer: Any, name: str, namespace: Any, params: Any
) -> Iterable[str]:
    parts: Iterable[str] = renderer.loader.load(name, **params)(namespace)
    return parts


def _generate_jinja(
    renderer: Any, name: str, namespace: Any, params: Any
) -> Iterable[str]:
    parts: Iterable[str] = renderer.jinja2_env.get_template(name).generate(**namespace)
    return parts


def _generate_genshi(
    renderer: Any, name: str, namespace: Any, params: Any
) -> Iterable[str]:
    """TG's renderer chooses the method and the doctype of a :class:`_Recorder`."""
    recorders: list[_Recorder] = []

    def load(name: str) -> _Recorder:
        recorders.append(_Recorder(renderer.load_template(name)))
        return recorders[0]

    recording_renderer = copy.copy(renderer)
    recording_renderer.load_template = load
    recording_renderer(name, namespace, **params)
    return recorders[0].parts


class _Recorder:
    """A Genshi template whose ``render()`` keeps the parts and returns no text."""

    parts: Iterable[str] = ()

    def __init__(self, template: Any) -> None:
        self._template = template

    def generate(self, **namespace: Any) -> _Recorder:
        self._stream = self._template.generate(**namespace)
        return self

    def render(self, encoding: None, **options: Any) -> str:
        self.parts = self._stream.serialize(**options)
        return ""


# By the module that defines the renderer's __call__. A class of another module that
# overrides it renders in a way that is not known here.
_GENERATE: dict[str, Callable[..., Iterable[str]]] = {
    "tg.renderers.kajiki": _generate_kajiki,
    "tg.renderers.jinja": _generate_jinja,
    "tg.renderers.genshi": _generate_genshi,
}


# The things that TG does before and after it renders an ordinary page.


def _assume_content_type(parts: Iterator[str], tg_locals: Any) -> Iterator[str]:
    """Render ``parts`` as if the content type were set that TG sets afterwards.

    Templates and renderers read it, and its charset. It is removed again after each
    part, because the page may be the text of an email in a stream of another type.
    """
    response = tg_locals.response
    while response.content_type is None:
        assumed = _get_exposed_content_type(tg_locals)
        response.headers["Content-Type"] = assumed
        try:
            part = next(parts, None)
        finally:
            if response.headers.get("Content-Type") == assumed:
                del response.headers["Content-Type"]
        if part is None:
            return
        yield part
    yield from parts


def _get_exposed_content_type(tg_locals: Any) -> str:
    """The content type that TG sets after rendering, as ``@expose`` declares it."""
    decoration = tg_locals.request.dispatch_state.action.decoration
    name: str = decoration.lookup_template_engine(tg_locals)[0]
    textual = name.startswith(("text/", "application/xhtml+xml", "application/xml"))
    return f"{name}; charset=utf-8" if textual and "charset" not in name else name


def _join_until_flash(parts: Iterator[str], tg_locals: Any) -> Iterator[str]:
    """Join the parts up to the one that shows a ``flash()`` message.

    Only the headers can delete the cookie of the message, and they are sent with the
    first part. If a message waits and the template does not show it, a chunk of the
    page is joined.
    """
    request, headers = tg_locals.request, tg_locals.response.headers
    if tg.flash.cookie_name in request.cookies or "webflash.payload" in request.environ:
        size = read_option(tg_locals.config, "tgstream.chunk_size")
        cookies = headers.getall("Set-Cookie")
        head: list[str] = []
        for part in parts:
            head.append(part)
            size -= len(part)
            if size <= 0 or headers.getall("Set-Cookie") != cookies:
                break
        yield "".join(head)
    yield from parts


_UNBUFFERED_PARTS = 256
"""Fast parts in a row after which the parts are buffered."""


def _buffer(parts: Iterable[str], config: Any) -> Iterator[str]:
    """Yield parts one by one, and buffer them after many fast ones in a row.

    A template yields two parts for each table cell, and a part does not show whether
    the next one waits for a query. So the head of a page, and a page that is rendered
    slowly, are sent part by part.
    """
    size = read_option(config, "tgstream.chunk_size")
    seconds = read_option(config, "tgstream.flush_seconds")
    clock = time.perf_counter
    buffered: list[str] = []
    length = 0
    fast = 0  # parts in a row
    start = clock()
    last = start
    for part in parts:
        if not part:
            continue
        buffered.append(part)
        length += len(part)
        now = clock()
        fast = fast + 1 if now - last < seconds else 0
        last = now
        if fast < _UNBUFFERED_PARTS or length >= size or now - start >= seconds:
            yield "".join(buffered)
            buffered.clear()
            length = 0
            start = clock()
            last = start
    if buffered:
        yield "".join(buffered)


def _close_iterators(parts: Iterator[str], variables: Iterable[Any]) -> Iterator[str]:
    """Yield the parts, and close the iterators among ``variables`` afterwards.

    A Kajiki template is a reference cycle. Without this, its iterators would stay open
    until Python's cyclic garbage collector runs.
    """
    iterators = [value for value in variables if isinstance(value, Iterator)]
    steps = [partial(close, iterator) for iterator in iterators]
    try:
        yield from parts
    except GeneratorExit:
        pass  # the page was closed early, so that only errors of the steps are raised
    except BaseException:
        run_all(steps)
        raise
    error = run_all(steps)
    if error is not None:
        raise error
