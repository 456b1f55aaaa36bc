"""A smallest value of any contract type, so that every row of the table can be tried."""

from __future__ import annotations

import typing
from datetime import UTC, datetime
from enum import Enum
from types import UnionType
from typing import Any

import msgspec
from msgspec.structs import fields

from api_gateway.route import Route
from volery.contracts.operation import Page

NOW = datetime(2026, 11, 20, tzinfo=UTC)


def sample(type_: Any, name: str = "x") -> Any:
    """A value of this type; structs have their required fields only."""
    if type_ is Page:
        return Page(items=())
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        return type_(**{f.name: sample(f.type, f.name) for f in fields(type_) if f.required})
    origin = typing.get_origin(type_)
    if origin in (typing.Union, UnionType):
        return sample(typing.get_args(type_)[0], name)
    if origin is tuple:
        return ()
    if origin is dict:
        return {}
    if origin is typing.Annotated:
        return sample(typing.get_args(type_)[0], name)
    if isinstance(type_, type) and issubclass(type_, Enum):
        return next(iter(type_))
    if type_ is datetime:
        return NOW
    return {str: "id-1" if name == "id" else "x", int: 1, float: 1.0, bool: False}.get(
        type_, msgspec.Raw(b"{}")
    )


def answer_of(route: Route) -> Any:
    return sample(route.call.answer)


def body_of(route: Route) -> dict[str, Any] | None:
    """A body with its required fields."""
    if not route.has_body:
        return None
    return typing.cast(
        "dict[str, Any]",
        msgspec.to_builtins({f.name: sample(f.type, f.name) for f in fields(route.body_type) if f.required}),
    )


def path_of(route: Route) -> str:
    """The path with `p-{name}` in each place."""
    path = route.path
    for name in route.names:
        path = path.replace("{" + name + "}", f"p-{name}")
    return path
