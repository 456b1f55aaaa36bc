"""One row per endpoint: which request asks which call, and what its answer becomes."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from api_gateway.exchange import Exchange
from api_gateway.strict import lenient_struct, strict_struct
from volery.contracts.account import Scope
from volery.contracts.base import Call, Done, Entity
from volery.contracts.operation import ListQuery, Operation, Page

if TYPE_CHECKING:
    from api_gateway.desk import Desk

PREFIX = "/api/v1"
PLACEHOLDER = re.compile(r"\{(\w+)\}")
FROM_HEADER = "if_revision"
FROM_QUERY = "dry_run"
LIST_PARAMETERS = ("limit", "page", "order_by", "fields", "search")


@dataclass(frozen=True)
class Route:
    """`method path` asks `call`. The question's fields come from the path, `fixed`, `query` and the JSON body;
    `if_revision` comes from If-Match, `dry_run` from the query."""

    method: str
    path: str
    call: Call[Any, Any]
    tag: str
    summary: str
    note: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that the path decides, e.g. an action."""
    query: tuple[str, ...] = ()
    """Fields that come from the query."""
    hidden: tuple[str, ...] = ()
    """Fields that aren't for people."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Path parameter → field, where they differ."""
    items: type[Any] | None = None
    """What a list is of."""
    scope: Scope | None = None
    """Needed to ask; None: write for what mutates, else read."""
    open: bool = False
    """Nobody needs to say who they are."""
    at: str = ""
    """Collection in which a created object is found, for Location."""
    body_name: str = ""
    """What the documentation calls the body, where two routes ask the same question with different fields."""
    example: Mapping[str, Any] | None = None
    expands: Mapping[str, tuple[str, Call[Any, Any]]] = field(default_factory=dict)
    """`expand=` name → (field with the id, call that gets it)."""

    @cached_property
    def needed(self) -> Scope:
        return self.scope or (Scope.WRITE if self.call.mutates else Scope.READ)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(PLACEHOLDER.findall(self.path))

    @cached_property
    def lists(self) -> bool:
        return self.call.question is ListQuery

    @cached_property
    def operates(self) -> bool:
        """Whether it starts something that takes time."""
        return self.call.answer is Operation and self.call.mutates

    @cached_property
    def entity(self) -> bool:
        """Whether its answer has a revision."""
        return isinstance(self.call.answer, type) and issubclass(self.call.answer, Entity)

    @cached_property
    def plans(self) -> bool:
        """Whether it only ever answers a plan."""
        return bool(self.fixed.get(FROM_QUERY))

    @cached_property
    def success(self) -> int:
        if self.operates:
            return 200 if self.plans else 202
        if self.call.answer is Done:
            return 204
        return 201 if self.at else 200

    @cached_property
    def question_fields(self) -> frozenset[str]:
        return frozenset(self.call.question.__struct_fields__)

    @cached_property
    def compares(self) -> bool:
        return FROM_HEADER in self.question_fields

    @cached_property
    def rehearses(self) -> bool:
        return FROM_QUERY in self.question_fields and FROM_QUERY not in self.fixed

    @cached_property
    def _elsewhere(self) -> frozenset[str]:
        """Fields that don't come from the body."""
        from_path = {self.renamed.get(name, name) for name in self.names}
        return frozenset({*from_path, *self.fixed, *self.query, *self.hidden, FROM_HEADER, FROM_QUERY})

    @cached_property
    def has_body(self) -> bool:
        return self.method in ("POST", "PATCH", "PUT") and bool(self.question_fields - self._elsewhere)

    @cached_property
    def body_type(self) -> type[msgspec.Struct]:
        """What the body is decoded into."""
        return strict_struct(self.call.question, self._elsewhere)

    @cached_property
    def shown_body_type(self) -> type[msgspec.Struct]:
        """The same for the documentation."""
        return lenient_struct(self.call.question, self._elsewhere, self.body_name)

    @cached_property
    def body_required(self) -> bool:
        """Whether the body has a field without a default."""
        return any(f.required for f in msgspec.structs.fields(self.body_type))

    @cached_property
    def query_type(self) -> type[msgspec.Struct]:
        kept = frozenset(self.query) | ({FROM_QUERY} if self.rehearses else frozenset())
        return strict_struct(self.call.question, self.question_fields - kept)

    @cached_property
    def body_decoder(self) -> msgspec.json.Decoder[Any]:
        return msgspec.json.Decoder(self.body_type)

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Query parameters it knows, without filters."""
        found = set(self.query)
        if self.rehearses:
            found.add(FROM_QUERY)
        if self.lists:
            found |= set(LIST_PARAMETERS)
        if self.expands:
            found.add("expand")
        return frozenset(found)


Handler = Callable[["Desk", Exchange], Awaitable[None]]


@dataclass(frozen=True)
class Special:
    """An endpoint that is more than a call. `responses` are what its documentation adds."""

    method: str
    path: str
    handler: Handler
    tag: str
    summary: str
    note: str = ""
    scope: Scope | None = Scope.READ
    """None: nobody needs to say who they are."""
    prefix: str = PREFIX
    parameters: tuple[Mapping[str, Any], ...] = ()
    """OpenAPI parameter objects."""
    responses: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Status → OpenAPI response object; problems are added by number only."""
    refuses: tuple[int, ...] = ()
    request_body: Mapping[str, Any] | None = None
    mutates: bool = False


def shows_pages(route: Route) -> bool:
    return route.call.answer is Page


@dataclass(slots=True)
class Node:
    """Where a path leads: a tree of its parts, so that the number of endpoints doesn't matter."""

    children: dict[str, Node] = field(default_factory=dict)
    any: Node | None = None
    names: tuple[str, ...] = ()
    methods: dict[str, Any] = field(default_factory=dict)

    def add(self, method: str, path: str, target: Any) -> None:
        node: Node = self
        for part in path.strip("/").split("/"):
            if part.startswith("{"):
                node.any = node.any or Node()
                node = node.any
            else:
                node = node.children.setdefault(part, Node())
        names = tuple(PLACEHOLDER.findall(path))
        assert method not in node.methods, f"{method} {path} is declared twice"
        assert not node.methods or node.names == names, f"{path} has other names for its parts elsewhere"
        node.names = names
        node.methods[method] = target

    def find(self, path: str) -> tuple[Node | None, list[str]]:
        """The node of a path, and the values of its placeholders."""
        node: Node | None = self
        values: list[str] = []
        for part in path[1:].split("/"):
            assert node is not None
            below = node.children.get(part)
            if below is None and node.any is not None and part:
                values.append(part)
                below = node.any
            if below is None:
                return None, values
            node = below
        return node, values
