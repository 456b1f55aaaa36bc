"""A request as a value: what is asked, and what the answer decodes to. Sending it is the transport's business."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec

from volery.contracts.base import Message, encode

A = TypeVar("A")
E = TypeVar("E", bound=Message)


@dataclass(frozen=True, slots=True)
class Request(Generic[A]):
    """`answer` is the type of the JSON body; None when there is none."""

    method: str
    path: str
    answer: type[A] | None
    body: bytes | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    if_revision: int = 0
    dry_run: bool = False

    def headers(self) -> dict[str, str]:
        found = {"Accept": "application/json"}
        if self.body is not None:
            found["Content-Type"] = "application/json"
        if self.if_revision:
            found["If-Match"] = f'"{self.if_revision}"'
        return found


class ListPage(msgspec.Struct, Generic[E], frozen=True):
    items: list[E]
    next: str = ""


def body_of(question: Message | Mapping[str, Any] | None) -> bytes | None:
    """The JSON body of a question: what differs from its defaults, without what path and headers carry."""
    if question is None:
        return None
    fields = question if isinstance(question, Mapping) else _given(question)
    return encode({name: value for name, value in fields.items() if name not in CARRIED})


CARRIED = frozenset({"id", "if_revision", "dry_run"})


def _given(question: Message) -> dict[str, Any]:
    found = {}
    for field_ in msgspec.structs.fields(question):
        value = getattr(question, field_.name)
        default = field_.default
        if default is msgspec.NODEFAULT and field_.default_factory is not msgspec.NODEFAULT:
            default = field_.default_factory()
        if value != default and value is not msgspec.UNSET:
            found[field_.name] = value
    return found


@dataclass(frozen=True, slots=True)
class Resource(Generic[E]):
    """A collection of the API: `/api/v1/{path}`."""

    name: str
    """How a person calls one of them, e.g. `vm`."""
    path: str
    entity: type[E]
    columns: tuple[str, ...] = ("id", "name")
    """What a table shows."""

    def list(
        self,
        *,
        limit: int = 1000,
        page: str = "",
        order_by: str = "",
        search: str = "",
        filter: Mapping[str, str] | None = None,
    ) -> Request[ListPage[E]]:
        query = {"limit": str(limit), "page": page, "order_by": order_by, "search": search}
        query |= {f"filter.{k}": v for k, v in (filter or {}).items()}
        answer: type[ListPage[E]] = ListPage[self.entity]  # type: ignore[name-defined]
        return Request("GET", self.path, answer, query={k: v for k, v in query.items() if v})

    def get(self, object_id: str) -> Request[E]:
        return Request("GET", f"{self.path}/{object_id}", self.entity)

    def create(
        self, question: Message | Mapping[str, Any], answer: type[A] | None = None, *, dry_run: bool = False
    ) -> Request[A]:
        return Request("POST", self.path, answer or self.entity, body_of(question), dry_run=dry_run)  # type: ignore[arg-type]

    def update(
        self, object_id: str, question: Message | Mapping[str, Any], if_revision: int = 0
    ) -> Request[E]:
        return Request(
            "PATCH", f"{self.path}/{object_id}", self.entity, body_of(question), if_revision=if_revision
        )

    def delete(
        self, object_id: str, answer: type[A] | None = None, *, query: Mapping[str, str] | None = None
    ) -> Request[A]:
        return Request("DELETE", f"{self.path}/{object_id}", answer, query=query or {})

    def act(
        self,
        object_id: str,
        action: str,
        answer: type[A],
        question: Message | Mapping[str, Any] | None = None,
        *,
        dry_run: bool = False,
    ) -> Request[A]:
        """POST to a sub-resource: `/vms/{id}/start`."""
        body = body_of(question) if question is not None else b"{}"
        return Request("POST", f"{self.path}/{object_id}/{action}", answer, body, dry_run=dry_run)
