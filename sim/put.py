"""How a mistake is put into the product: by name, and loudly when the name is gone."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any


def put(module: ModuleType, name: str, mistake: Callable[..., Any]) -> None:
    """Where a module has imported a rule by name."""
    assert hasattr(module, name), f"{module.__name__} has no {name} any more: look for what took its place"
    setattr(module, name, mistake)


def put_value(module: ModuleType, name: str, value: Any) -> None:
    assert hasattr(module, name), f"{module.__name__} has no {name} any more: look for what took its place"
    setattr(module, name, value)


async def nothing(*_: Any, **__: Any) -> None:
    """Instead of what should be done."""


async def no(*_: Any, **__: Any) -> bool:
    return False
