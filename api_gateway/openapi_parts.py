"""Pieces of the OpenAPI document that the table is written with. `Ref` stands for a type until it is assembled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ETAG_HEADER = {"ETag": {"schema": {"type": "string"}, "description": "The revision: send it as If-Match"}}


PARTIAL = {"type": "object", "description": "Only what `fields` named"}


@dataclass(frozen=True, slots=True)
class Ref:
    """A schema of the components."""

    type: Any


def answer_of(type_: Any, description: str, *, etag: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {
        "description": description,
        "content": {"application/json": {"schema": Ref(type_)}},
    }
    if etag:
        found["headers"] = ETAG_HEADER
    return found


def page_schema(items: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["items", "next"],
        "properties": {
            "items": {"type": "array", "items": {"anyOf": [Ref(items), PARTIAL]}},
            "next": {"type": "string", "description": "Send it as `page` for what follows; empty at the end"},
        },
    }


def page_of(items: Any, description: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": page_schema(items)}},
        "headers": {
            "Link": {"schema": {"type": "string"}, "description": 'The next page: `<…>; rel="next"`'}
        },
    }


def text_of(media_type: str, description: str) -> dict[str, Any]:
    return {"description": description, "content": {media_type: {"schema": {"type": "string"}}}}


def body_of(type_: Any, example: Mapping[str, Any] | None = None, *, required: bool = True) -> dict[str, Any]:
    media: dict[str, Any] = {"schema": Ref(type_)}
    if example is not None:
        media["example"] = dict(example)
    return {"required": required, "content": {"application/json": media}}


def parameter(
    name: str, schema: Mapping[str, Any], description: str = "", where: str = "query"
) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "in": where, "schema": dict(schema)}
    if description:
        found["description"] = description
    if where == "path":
        found["required"] = True
    return found
