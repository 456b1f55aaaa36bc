"""The shape of what a host can be ordered to do: one row per order, gathered by the agent into one table."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from volery.contracts.base import Message, Order

if TYPE_CHECKING:
    from host_agent.config import AgentConfig
    from host_agent.hypervisor import Hypervisor
    from host_agent.tickets import Tickets

Q = TypeVar("Q", bound=Message)
A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Running:
    """The order being run, as far as an action may know it."""

    order_id: str
    owner: str
    object_id: str
    epoch: int
    order_seq: int
    deadline_seconds: float
    resumed: bool
    """Whether a former run of the agent had begun it: only then look for leftovers first."""
    progress: Callable[[float, dict[str, Any]], None]
    """Say how far it is, 0 to 100; coalesced, never blocks."""


async def _assumed_reachable() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Host:
    """What actions may touch; nothing is global."""

    config: AgentConfig
    hypervisor: Hypervisor
    tickets: Tickets
    host_id: str
    control_plane_reachable: Callable[[], Awaitable[bool]] = _assumed_reachable
    """One round trip to the control plane, now: what a change of the host's network must not break."""


@dataclass(frozen=True, slots=True)
class Action(Generic[Q, A]):
    """One order and the function that carries it out.

    `run` returns the order's answer, or raises `Refused` with a sentence for a person. It is cancelled when the
    order is cancelled or its deadline passes, and then must leave nothing behind.
    """

    order: Order[Q, A]
    run: Callable[[Host, Q, Running], Awaitable[A]]


def whole(
    run: Callable[[Host, Q, Running], Coroutine[Any, Any, A]],
) -> Callable[[Host, Q, Running], Coroutine[Any, Any, A]]:
    """The same action, never stopped in the middle: for what is short, and whose order must not end as cancelled
    although it was carried out."""

    @functools.wraps(run)
    async def uncut(host: Host, order: Q, running: Running) -> A:
        return await to_its_end(run(host, order, running))

    return uncut


async def to_its_end(work: Coroutine[Any, Any, A]) -> A:
    """What the work answers or raises, also when whoever waits for it is cancelled meanwhile."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        return task.result()
