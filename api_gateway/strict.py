"""Bodies are decoded strictly: the contract's own structs, in which an unknown field is an error.

Contracts themselves are lenient, so that services of two releases understand each other; a person's typo must
not be ignored. Numbers must fit 64 bits and texts hold no NUL, since no owner can store anything else.
"""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Union

import msgspec
from msgspec.structs import FieldInfo, fields

from volery.contracts.base import Message

BOUNDED_INT = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
STORABLE_TEXT = Annotated[str, msgspec.Meta(pattern=r"\A[^\x00]*\Z")]
_MADE: dict[tuple[type[msgspec.Struct], frozenset[str]], type[msgspec.Struct]] = {}
_LEAVES: dict[Any, Any] = {int: BOUNDED_INT, str: STORABLE_TEXT}


def strict(type_: Any) -> Any:
    """The type, with every struct in it refusing unknown fields."""
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        return strict_struct(type_)
    origin = typing.get_origin(type_)
    if origin is None:
        return _LEAVES.get(type_, type_)
    arguments = [a if a is Ellipsis else strict(a) for a in typing.get_args(type_)]
    if origin in (Union, types.UnionType):
        return Union[tuple(arguments)]  # noqa: UP007
    return origin[tuple(arguments)]


def strict_struct(
    struct: type[msgspec.Struct], without: frozenset[str] = frozenset()
) -> type[msgspec.Struct]:
    """A struct like this one that refuses unknown fields; `without` names fields it doesn't have."""
    made = _MADE.get((struct, without))
    if made is None:
        made = _MADE[struct, without] = _like(struct, without, strict)
    return made


def lenient_struct(
    struct: type[msgspec.Struct], without: frozenset[str], name: str = ""
) -> type[msgspec.Struct]:
    """The struct without some of its fields, for the documentation."""
    return _like(struct, without, lambda t: t, name)


def _like(
    struct: type[msgspec.Struct],
    without: frozenset[str],
    convert: typing.Callable[[Any], Any],
    name: str = "",
) -> type[msgspec.Struct]:
    made = msgspec.defstruct(
        name or struct.__name__,
        [_field(f, convert) for f in fields(struct) if f.name not in without],
        kw_only=True,
        frozen=True,
        gc=False,
        forbid_unknown_fields=True,
        tag=struct.__struct_config__.tag,
        tag_field=struct.__struct_config__.tag_field,
        module=struct.__module__,
    )
    made.__doc__ = struct.__doc__
    return made


def _field(info: FieldInfo, convert: typing.Callable[[Any], Any]) -> tuple[str, Any] | tuple[str, Any, Any]:
    type_ = convert(info.type)
    if info.default is not msgspec.NODEFAULT:
        # A default that is a struct must be one of the strict kind; it is never looked at, only left out.
        default = msgspec.UNSET if isinstance(info.default, Message) else info.default
        return info.name, type_, default
    if info.default_factory is not msgspec.NODEFAULT:
        return info.name, type_, msgspec.field(default_factory=info.default_factory)
    return info.name, type_
