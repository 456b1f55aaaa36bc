"""The OpenAPI 3.1 document, made from the table and the contracts: nothing is described twice."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from api_gateway.openapi_parts import ETAG_HEADER, Ref, answer_of, body_of, page_of, parameter
from api_gateway.problems import BASE, CONTENT_TYPE, STATUSES, TITLES, ProblemDocument
from api_gateway.route import PREFIX, Route, Special
from volery.contracts.account import Scope
from volery.contracts.base import Message

TEMPLATE = "#/components/schemas/{name}"
DESCRIPTION = """\
Everything that Volery does, over HTTP. Objects are read and changed under plural nouns; what takes time answers
**202** with an operation and its `Location` (`Prefer: wait=10` waits for its end and answers 200).
Refusals are RFC 9457 problems: decide by `type`, show `detail`.

* **Lists** come in pages: `limit`, then `page` with the former answer's `next`. `filter.<column>=value` narrows,
  `order_by=-name` sorts, `search=` finds by part of the name, `fields=` leaves the rest out.
* **Changes** take `If-Match` with the ETag that was read, and `Idempotency-Key` to be repeated safely for 24 hours.
* **`dry_run=true`** answers the plan and changes nothing.
* **Events** are followed at `/api/v1/events`; every id is a cursor to go on from.
"""
READ_PROBLEMS = (400, 401, 403, 405, 500, 503, 504)
KIND_OF = {status: kind for kind, status in reversed(STATUSES.items())}


def document(table: Sequence[Route | Special]) -> bytes:
    """The document's JSON."""
    paths: dict[str, dict[str, Any]] = {}
    for row in table:
        path = row.prefix + row.path if isinstance(row, Special) else PREFIX + row.path
        described = _route(row) if isinstance(row, Route) else _special(row)
        described["operationId"] = operation_id(row.method, path)
        paths.setdefault(path, {})[row.method.lower()] = described
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Volery",
            "version": "1",
            "description": DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(row.tag for row in table)],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "From POST /api/v1/sessions"}
            },
            "responses": {str(status): _problem(status) for status in sorted(set(STATUSES.values()))},
        },
    }
    found["components"]["schemas"], names = _schemas(found)
    return msgspec.json.encode(_resolved(found, names))


def operation_id(method: str, path: str) -> str:
    """GET /api/v1/vms/{id}/disks/{disk_id} becomes get_vms_id_disks_disk_id: stable, for generated clients."""
    words = [
        part.strip("{}").replace("-", "_").replace(".", "_")
        for part in path.removeprefix(PREFIX).split("/")
        if part
    ]
    return "_".join([method.lower(), *words]) if words else "get_index"


def _route(route: Route) -> dict[str, Any]:
    found: dict[str, Any] = {"tags": [route.tag], "summary": route.summary}
    notes = [route.note] if route.note else []
    if not route.open:
        notes.append(f"Needs the scope `{route.needed.value}`.")
        found["security"] = [{"token": []}]
    if notes:
        found["description"] = " ".join(notes)
    if parameters := list(_parameters(route)):
        found["parameters"] = parameters
    if route.has_body:
        found["requestBody"] = body_of(route.shown_body_type, route.example, required=route.body_required)
    found["responses"] = {str(s): r for s, r in _responses(route).items()}
    return found


def _parameters(route: Route) -> Iterator[dict[str, Any]]:
    for name in route.names:
        yield parameter(name, {"type": "string"}, where="path")
    fields = {f.name: f for f in msgspec.structs.fields(route.call.question)}
    if route.lists:
        yield parameter("limit", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100})
        yield parameter("page", {"type": "string"}, "The former answer's `next`")
        yield parameter(
            "order_by", {"type": "string"}, "A column, `-` before it for descending; by creation without"
        )
        yield parameter("search", {"type": "string"}, "Part of the name")
        yield parameter("fields", {"type": "string"}, "Only these fields, separated by commas")
        if route.expands:
            names = ", ".join(route.expands)
            yield parameter("expand", {"type": "string"}, f"Objects to put beside their ids: {names}")
    for name in route.query:
        required = fields[name].required
        yield parameter(name, {"$type": Ref(fields[name].type)}) | ({"required": True} if required else {})
    if route.rehearses:
        yield parameter("dry_run", {"type": "boolean"}, "Answer the plan, change nothing")
    if route.compares:
        yield parameter(
            "If-Match", {"type": "string"}, "The ETag that was read: refused (412) when it changed", "header"
        )
    if route.call.mutates:
        yield parameter(
            "Idempotency-Key", {"type": "string"}, "A repeat gets the first answer, for 24 hours", "header"
        )
    if route.operates and not route.plans:
        yield parameter("Prefer", {"type": "string"}, "`wait=N` waits up to N seconds for the end", "header")
    if route.entity and route.method == "GET":
        yield parameter("If-None-Match", {"type": "string"}, "304 when it is still the same", "header")


def _responses(route: Route) -> dict[int, Any]:
    found: dict[int, Any] = {route.success: _success(route)}
    if route.operates and not route.plans:
        found[200] = answer_of(
            route.call.answer, "It has ended within `Prefer: wait`, or it is a plan (dry_run)"
        )
    if route.entity and route.method == "GET":
        found[304] = {"description": "Still as If-None-Match says"}
    problems = set(READ_PROBLEMS)
    if route.open:
        problems -= {401, 403}
    if route.names or route.call.mutates:
        problems |= {404}
    if route.call.mutates:
        problems |= {409, 422, 429}
    if route.lists:
        problems |= {413}
    if route.compares:
        problems |= {412}
    if route.has_body:
        problems |= {404, 409, 413, 415}
    for status in sorted(problems):
        found[status] = {"$ref": f"#/components/responses/{status}"}
    return found


def _success(route: Route) -> dict[str, Any]:
    if route.success == 204:
        return {"description": "Done"}
    if route.lists:
        return page_of(route.items, "A page")
    told = "Under way: follow `Location`" if route.operates else "Created" if route.at else "The answer"
    return answer_of(route.call.answer, told, etag=route.entity) | (
        {"headers": {**ETAG_HEADER, "Location": {"schema": {"type": "string"}}}}
        if route.operates or route.at
        else {}
    )


def _special(row: Special) -> dict[str, Any]:
    found: dict[str, Any] = {"tags": [row.tag], "summary": row.summary}
    notes = [row.note] if row.note else []
    problems = {405, 500, *row.refuses}
    if row.scope is not None:
        found["security"] = [{"token": []}]
        notes.append(f"Needs the scope `{Scope(row.scope).value}`.")
        problems |= {401, 403, 503, 504}
    if notes:
        found["description"] = " ".join(notes)
    names = re.findall(r"\{(\w+)\}", row.path)
    parameters = [parameter(name, {"type": "string"}, where="path") for name in names]
    if parameters or row.parameters:
        found["parameters"] = [*parameters, *row.parameters]
    if row.request_body is not None:
        found["requestBody"] = row.request_body
    found["responses"] = {str(s): r for s, r in row.responses.items()}
    for status in sorted(problems - set(row.responses)):
        found["responses"][str(status)] = {"$ref": f"#/components/responses/{status}"}
    return found


def _problem(status: int) -> dict[str, Any]:
    kinds = [kind for kind, found in STATUSES.items() if found == status]
    types = ", ".join(f"`{BASE}{kind}`" for kind in kinds)
    return {
        "description": f"{' / '.join(TITLES[kind] for kind in kinds)} ({types})",
        "content": {CONTENT_TYPE.decode(): {"schema": Ref(ProblemDocument)}},
    }


# --- schemas ---------------------------------------------------------------------------------------


def _refs(value: Any) -> Iterator[Any]:
    if isinstance(value, Ref):
        yield value.type
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _refs(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _refs(inner)


def _schemas(found: Any) -> tuple[dict[str, Any], dict[Any, Any]]:
    """The components, and each type's schema where it is referred to."""
    types = list(dict.fromkeys(_refs(found)))
    schemas, components = msgspec.json.schema_components(types, ref_template=TEMPLATE)
    _describe_fields(types, components)
    return components, dict(zip(types, schemas, strict=True))


def _resolved(value: Any, schemas: dict[Any, Any]) -> Any:
    if isinstance(value, Ref):
        return schemas[value.type]
    if isinstance(value, Mapping):
        if "$type" in value:
            return _resolved(value["$type"], schemas)
        return {key: _resolved(inner, schemas) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_resolved(inner, schemas) for inner in value]
    return value


def _describe_fields(types: list[Any], components: dict[str, Any]) -> None:
    """Put the contracts' own field docstrings into the schemas: Python drops them, so they are read again."""
    modules = {t.__module__ for t in _structs(types)}
    told: dict[str, dict[str, str]] = {}
    for module in sorted(modules | _contract_modules()):
        told |= _field_docs(inspect.getsource(importlib.import_module(module)))
    for name, schema in components.items():
        for field, text in told.get(name, {}).items():
            properties = schema.get("properties", {})
            if field in properties and "description" not in properties[field]:
                properties[field] = {**properties[field], "description": text}


def _structs(types: list[Any]) -> Iterator[type[msgspec.Struct]]:
    for found in types:
        if isinstance(found, type) and issubclass(found, msgspec.Struct):
            yield found


def _contract_modules() -> set[str]:
    return {
        struct.__module__ for struct in _all_subclasses(Message) if struct.__module__.startswith("volery.")
    }


def _all_subclasses(struct: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    below: type[msgspec.Struct]
    for below in struct.__subclasses__():
        yield below
        yield from _all_subclasses(below)


def _field_docs(source: str) -> dict[str, dict[str, str]]:
    """Class → field → the docstring under it."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and _is_text(after):
                text = textwrap.dedent(after.value.value).strip()  # type: ignore[attr-defined]
                found.setdefault(node.name, {})[field.target.id] = text
    return found


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
