"""Hooks that stay registered with TG, however often its milestones are reset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tg
from tg.configuration import milestones


class _Registration:
    """Its method is bound: TG's own tests read ``__self__`` of milestone callbacks."""

    def __init__(self, pairs: tuple[tuple[str, Callable[..., Any]], ...]) -> None:
        self._pairs = pairs

    def register(self) -> None:
        for name, hook in self._pairs:
            tg.hooks.disconnect(name, hook)
            tg.hooks.register(name, hook)


def keep_hooks(*hooks: tuple[str, Callable[..., Any]]) -> None:
    """Register hooks, each once, when TG's configuration is ready or now if it is.

    :param hooks: the name and the function of each.
    """
    registration = _Registration(hooks)
    milestones.config_ready.register(registration.register, persist_on_reset=True)
