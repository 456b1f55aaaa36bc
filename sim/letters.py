"""Messages that are long on their way: kept back while others pass, and delivered late or never."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sim.world import World
from volery.contracts.agent import OrderEnvelope
from volery.contracts.base import Order
from volery.contracts.fencing import AskPower, PowerAction

Concerns = Callable[[str, bytes], bool]
"""Whether a message is one of those, by its subject and body."""


@dataclass(eq=False)
class Letters:
    """What is kept back, in the order in which it was sent."""

    world: World
    concerns: Concerns
    kept: list[tuple[str, bytes, Any]] = field(default_factory=list)
    came: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once there is one."""

    def keep(self, subject: str, data: bytes, headers: Any) -> bool:
        if not self.concerns(subject, data):
            return False
        self.kept.append((subject, data, headers))
        self.came.set()
        return True

    async def deliver(self) -> None:
        """Whoever waited for an answer has gone."""
        self.world.note(f"what was on its way arrives: {len(self.kept)} messages")
        for subject, data, headers in self.kept:
            await self.world.bus.client.publish(subject, data, headers=headers)


@contextmanager
def held_up(world: World, concerns: Concerns) -> Iterator[Letters]:
    """Within, such messages reach nobody."""
    letters = Letters(world, concerns)
    world.server.withholds.append(letters.keep)
    try:
        yield letters
    finally:
        world.server.withholds.remove(letters.keep)


def orders(order: Order[Any, Any], vm_id: str, host_id: str = "") -> Concerns:
    """To this host, or any."""

    def concerns(subject: str, data: bytes) -> bool:
        if not (subject.startswith("host.") and subject.endswith(".order")):
            return False
        envelope = msgspec.json.decode(data, type=OrderEnvelope)
        return (envelope.kind, envelope.object_id) == (order.kind, vm_id) and host_id in (
            "",
            envelope.host_id,
        )

    return concerns


def powers_off(host_id: str) -> Concerns:
    """Asks of ha to switch this host off."""

    def concerns(subject: str, data: bytes) -> bool:
        if not (subject.startswith("host.") and subject.endswith(".power")):
            return False
        ask = msgspec.json.decode(data, type=AskPower)
        return (ask.target_host_id, ask.action) == (host_id, PowerAction.OFF)

    return concerns


def facts_of(host_id: str) -> Concerns:
    return lambda subject, data: subject.startswith(f"fact.host.{host_id}.")


def questions_about_streams(name: str) -> Concerns:
    """As of a JetStream that has no leader for a moment."""
    return lambda subject, data: subject == f"$JS.API.STREAM.INFO.{name}"
