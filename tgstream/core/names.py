"""The names of controllers, in messages, reports and metrics."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


def find_controller(request: Any) -> Any:
    """The controller that TG's dispatch chose."""
    action = request.dispatch_state.action
    return getattr(action, "__func__", action)


@lru_cache
def get_controller_name(function: Any) -> str:
    """The name of a controller: ``RootController.users``."""
    name: str = getattr(function, "__qualname__", repr(function))
    return name.rpartition("<locals>.")[2]
