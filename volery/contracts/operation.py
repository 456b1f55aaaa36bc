"""Operations: what takes time. Every one ends, with a reason a person can act on."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec

from volery.contracts.base import Call, Entity, Fact, Message, Owner
from volery.contracts.errors import Problem


class OperationState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({OperationState.SUCCEEDED, OperationState.FAILED, OperationState.CANCELLED})


class Step(Message):
    name: str
    title: str
    state: OperationState = OperationState.RUNNING
    progress: float = 0.0
    """0 to 100."""


class Operation(Entity):
    """A long-running request. `id` is `{owner}-{uuid7}`."""

    kind: str
    """noun.verb, e.g. vm.start"""
    object_kind: str
    object_id: str
    deadline: datetime
    object_name: str = ""
    state: OperationState = OperationState.PENDING
    progress: float = 0.0
    steps: tuple[Step, ...] = ()
    problem: Problem | None = None
    """Why it failed or was cancelled, and what to do."""
    outcome_pending: bool = False
    """It ended by its deadline while a host was still at work; the object stays busy until the host reports."""
    result: dict[str, Any] = {}
    principal: str = ""
    ended_at: datetime | None = None
    trace_id: str = ""


class GetOperation(Message):
    id: str


class CancelOperation(Message):
    id: str


class Page(Message):
    """One page of a noun; `next` is the opaque token of the following page, "" at the end."""

    items: tuple[msgspec.Raw, ...]
    next: str = ""


class ListQuery(Message):
    """What every list accepts."""

    limit: int = 100
    page: str = ""
    """Token of a former answer."""
    filter: dict[str, str] = {}
    """Column = value, all of which must hold."""
    order_by: str = ""
    """A column, `-` before it for descending; "" is by id, which is by creation."""
    fields: tuple[str, ...] = ()
    search: str = ""
    """Part of the name."""


def operation_call(owner: Owner) -> Call[GetOperation, Operation]:
    return Call(f"{owner}.operation.get", GetOperation, Operation)


def operations_call(owner: Owner) -> Call[ListQuery, Page]:
    return Call(f"{owner}.operation.list", ListQuery, Page)


def cancel_call(owner: Owner) -> Call[CancelOperation, Operation]:
    return Call(f"{owner}.operation.cancel", CancelOperation, Operation)


def operation_changed(owner: Owner) -> Fact[Operation]:
    """Operation ids are `{owner}-{uuid}`, safe in a subject."""
    return Fact(f"fact.{owner}.operation.{{id}}.changed", Operation)


GET_OPERATION = {owner: operation_call(owner) for owner in Owner}
LIST_OPERATIONS = {owner: operations_call(owner) for owner in Owner}
CANCEL_OPERATION = {owner: cancel_call(owner) for owner in Owner}
OPERATION_CHANGED = {owner: operation_changed(owner) for owner in Owner}
